"""How the kernels for rows that overflow share their work: what their programs read and write."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import problems
import pytest
from gpu_helpers import DEVICE, few_programs_here, needs_kernels, run

from fastsae_kernels import AutoencodeSpec

pytestmark = needs_kernels
SPEC = AutoencodeSpec(bandwidth=0.3, penalty="tanh", ste_to_input=True)


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    with few_programs_here():
        yield


def overflowing() -> problems.Problem:
    """Most of its rows have more than two entries; no tile divides the number of features."""
    return problems.make(40, 24, 75, spec=SPEC, density=0.3, with_scale=True)


class Watched:
    """The interpreter's memory: by launch, which program loaded and stored at each address."""

    def __init__(self, memory: Any, programs: Any) -> None:
        self._memory, self._programs = memory, programs
        self.loads: dict[int, set[int]] = defaultdict(set)
        self.stores: dict[int, set[int]] = defaultdict(set)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def _note(self, by: dict[int, set[int]], pointers: Any, mask: Any) -> None:
        x, y, z = self._programs.grid_idx
        _, height, depth = self._programs.grid_dim
        pointers, mask = np.broadcast_arrays(pointers, mask)
        for address in pointers[mask.astype(bool)].ravel().tolist():
            by[address].add((x * height + y) * depth + z)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._note(self.loads, pointers, mask)
        return self._memory.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        self._note(self.stores, pointers, mask)
        return self._memory.store(pointers, value, mask)

    def shared(self) -> set[int]:
        """Addresses that one program stored to and another loaded or stored."""
        return {address for address, writers in self.stores.items() if len(writers | self.loads[address]) > 1}


@pytest.mark.skipif(DEVICE == "cuda", reason="watches the interpreter's memory")
def test_programs_touch_nothing_that_another_one_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    raced: dict[str, int] = {}
    call, memory = interpreter.GridExecutor.__call__, interpreter._interpreter

    def watch(self: Any, *arguments: Any, **options: Any) -> None:
        watched = Watched(memory, interpreter.interpreter_builder)
        with monkeypatch.context() as patch:
            patch.setattr(interpreter, "_interpreter", watched)
            call(self, *arguments, **options)
        raced[self.fn.__name__] = len(watched.shared()) + raced.get(self.fn.__name__, 0)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", watch)
    run(overflowing(), 2)
    assert {"_overflow_rows_kernel", "_reduce_rows_kernel", "_overflow_features_kernel"} <= set(raced)
    assert {name: n for name, n in raced.items() if n} == {}
