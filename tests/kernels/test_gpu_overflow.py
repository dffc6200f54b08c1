"""How the kernels for rows that overflow share their work: what their programs read and write."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import problems
import pytest
import torch
from gpu_helpers import DEVICE, few_programs_here, needs_kernels, run

from fastsae_kernels import AutoencodeSpec

pytestmark = needs_kernels
KERNELS = ("_overflow_rows_kernel", "_finish_rows_kernel", "_overflow_features_kernel")
SPEC = AutoencodeSpec(bandwidth=0.3, penalty="tanh", ste_to_input=True)


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    with few_programs_here():
        yield


def overflowing() -> problems.Problem:
    """Most of its rows have more than two entries; no tile divides the number of features."""
    return problems.make(40, 24, 75, spec=SPEC, density=0.3, with_scale=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="watches the interpreter's memory")
def test_each_tile_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one block holds all rows, a pass loads each weight once per product, however many blocks of columns it has."""
    from triton.runtime import interpreter

    problem = problems.make(9, 96, 64, spec=SPEC, density=0.3, with_scale=True)
    loads: dict[str, int] = {}
    call, load = interpreter.GridExecutor.__call__, interpreter._interpreter.load

    def count(self: Any, *arguments: Any, **options: Any) -> None:
        seen = 0

        class Counted:
            def __getattr__(self, name: str) -> Any:
                return getattr(memory, name)

            def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
                nonlocal seen
                seen += int(np.broadcast_to(mask, pointers.shape).sum()) if pointers.ndim == 2 else 0
                return load(pointers, mask, other, dtype)

        memory = interpreter._interpreter
        with monkeypatch.context() as patch:
            patch.setattr(interpreter, "_interpreter", Counted())
            call(self, *arguments, **options)
        loads[self.fn.__name__] = max(seen, loads.get(self.fn.__name__, 0))

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", count)
    run(problem, 2)
    # the rows' pass backward: weights of two products and of the sum, and of x and grad_out 16 rows per tile of 32 features;
    # its sums are read once per tile but the first
    weights, rows, sums = 64 * 96, 2 * 16 * 96, 16 * 96
    assert loads["_overflow_rows_kernel"] <= 3 * weights + 2 * rows + sums
    # the features' pass: two products, the rows that the sums are made of, both gradients
    assert loads["_overflow_features_kernel"] <= 2 * weights + 4 * rows + 2 * weights


@pytest.mark.parametrize("programs", [1, 2, 64])
def test_any_number_of_programs_gives_the_same_sums(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no row overflowed each program costs time for nothing; where many did, each walks over several tiles."""
    from fastsae_kernels.gpu import overflow

    monkeypatch.setattr(overflow, "SCRATCH_PROGRAMS", programs)
    monkeypatch.setattr(overflow, "FEATURE_PROGRAMS", programs)
    monkeypatch.setattr(overflow, "FEATURE_SCRATCHES", (programs + 1) // 2)
    grids: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    kernel = type(overflow._overflow_rows_kernel)
    launch = kernel.__getitem__

    def noted(self: Any, grid: tuple[int, ...]) -> Any:
        grids[self.fn.__name__].add(grid)
        return launch(self, grid)

    monkeypatch.setattr(kernel, "__getitem__", noted)
    problem = overflowing()
    problems.assert_matches(run(problem, 2), problem)
    assert all(grid <= (programs,) for name in KERNELS for grid in grids[name])
    assert all(grids[name] for name in KERNELS)


def test_16_bit_gradients_of_many_rows_are_rounded_once() -> None:
    """Sums over several blocks of rows lie in fp32 until the last block is added."""
    base = problems.make(1, 24, 75, spec=SPEC, density=0.3, with_scale=True).to(torch.float16)
    n_rows = 320  # equal ones, so that each rounding would err to the same side
    problem = replace(
        base,
        x=base.x.expand(n_rows, -1),
        grad_out=base.grad_out.expand(n_rows, -1),
        grad_penalty=base.grad_penalty.expand(n_rows),
    )
    problems.assert_matches(run(problem, 2), problem)
