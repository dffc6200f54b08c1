"""What the tests of the Triton backend share: where it can run, small tiles, and one pass through the kernels."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import problems
import pytest
import torch
from torch import Tensor

from fastsae_kernels import AutoencodeSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHECKED = "ttsem" in sys.modules  # a CPU runs the compiled kernels, checks each access, and says that it is a GPU
ON_GPU = DEVICE == "cuda" and not CHECKED
NEEDS_GPU = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device: its streams, graphs and synchronisation")
NEEDS_ROUNDING = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter cuts fp32 off to bf16, a GPU rounds")
NARROW = [torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_ROUNDING)]
HAS_DESCRIPTORS = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)


def why_not() -> str:
    """Why the kernels cannot run here; empty where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if DEVICE == "cuda":
        return ""
    import numpy
    import triton

    def version(module: object) -> tuple[int, ...]:
        return tuple(int(part) for part in str(module.__version__).split(".")[:2])  # type: ignore[attr-defined]

    if version(triton) < (3, 7) and version(numpy) >= (2, 4):
        return "the interpreter of Triton < 3.7 cannot run loops with numpy >= 2.4 (triton-lang/triton#9171)"
    return ""


needs_kernels = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")

# the interpreter's time goes by the number of programs and operations, not by their size
FEW_PROGRAMS = {
    "list_pointers": {"BLOCK_B": 16, "BLOCK_S": 32, "BLOCK_D": 16, "GROUP_B": 2, "RUN": 2, "LANES": 4},
    "overflow_topk": {"BLOCK_B": 16, "BLOCK_S": 16, "BLOCK_D": 32, "num_warps": 4},
    "overflow_select": {"BLOCK_B": 16, "BLOCK_S": 16, "BLOCK_D": 32, "num_warps": 4},
    "batch_list": {"BLOCK_B": 16, "BLOCK_S": 16, "BLOCK_D": 32, "GROUP_B": 2},
    "batch_again": {"BLOCK_B": 16, "BLOCK_S": 32, "BLOCK_D": 32, "GROUP_B": 2},
    "decode": {"BLOCK_E": 64, "BLOCK_D": 32},
    "row_stats": {"BLOCK_E": 64},
    "sort_rows": {},
    "gate_tile": {"BLOCK_C": 4, "BLOCK_T": 16},
    "gate_tile_backward": {"BLOCK_C": 4, "BLOCK_T": 16},
    "feature_sums": {"BLOCK_E": 1, "D_PER_WARP": 512},
    "fused_backward": {"BLOCK_E": 16, "D_PER_WARP": 512, "CHUNK": 6},
    "join_chunks": {"BLOCK_C": 2, "BLOCK_D": 32},
    "adam_rows": {"BLOCK_E": 1, "D_PER_WARP": 512},
    "overflow_rows": {"BLOCK_B": 16, "BLOCK_S": 32, "BLOCK_D": 32, "BLOCK_O": 32},
    "finish_rows": {"BLOCK_N": 16, "BLOCK_O": 128},
    "overflow_features": {"BLOCK_B": 16, "BLOCK_S": 32, "BLOCK_D": 32, "BLOCK_O": 32},
}


SECOND_DEVICE = torch.device("cuda", 1)


class TwoDevices:
    """Two CUDA devices that are not there: they know which one is current, and the first is at first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        monkeypatch.setattr(torch.cuda, "device", self.guard)

    @contextmanager
    def guard(self, device: torch.device) -> Iterator[None]:
        """What `torch.cuda.device` does."""
        before, self.current = self.current, device.index
        try:
            yield
        finally:
            self.current = before


def launch_table(tiles: dict[str, Any]) -> dict[str, Any]:
    """A launch table that has the same tiles for operands of 16 and of 32 bits."""
    return {kernel: {"16": config, "32": config} for kernel, config in tiles.items()}


def few_programs_here(**others: dict[str, int]) -> AbstractContextManager[None]:
    """Those tiles on a CPU, but for kernels that have others; a GPU runs the shipped ones."""
    from fastsae_kernels.gpu import config

    return nullcontext() if ON_GPU else config.override(launch_table(FEW_PROGRAMS | others))


def on_device(tensor: Tensor) -> Tensor:
    """The tensor on the device, its strides and offset kept: `.to` packs what has gaps or repeats, and aligns its start."""
    if DEVICE == "cpu":
        return tensor
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.to(DEVICE).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def first(problem: problems.Problem, n_tokens: int) -> problems.Problem:
    """The first tokens of a problem."""
    return replace(
        problem,
        x=problem.x[:n_tokens],
        grad_out=problem.grad_out[:n_tokens],
        grad_penalty=problem.grad_penalty[:n_tokens],
    )


def transcoder(spec: AutoencodeSpec, d_out: int, n_tokens: int = 9) -> problems.Problem:
    """A problem whose reconstruction has another width than its input."""
    g = torch.Generator().manual_seed(3)
    return replace(
        problems.make(n_tokens, 20, 43, spec=spec, density=0.2, with_scale=spec.penalty != "l0"),
        W_dec=torch.randn(43, d_out, generator=g),
        b_dec=torch.randn(d_out, generator=g),
        grad_out=torch.randn(n_tokens, d_out, generator=g),
    )


def reserved(n_elements: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Memory in fp16 that takes address space alone, until it is touched."""
    try:
        memory = torch.empty(n_elements, dtype=torch.float16)
    except RuntimeError:
        pytest.skip(f"cannot reserve {n_elements / 2**29:.0f} GiB of address space")
    copy = torch.UntypedStorage.copy_
    # the interpreter copies each argument back onto itself, which would touch every page
    monkeypatch.setattr(
        torch.UntypedStorage, "copy_", lambda a, b, *args: a if a.data_ptr() == b.data_ptr() else copy(a, b, *args)
    )
    return memory


# rows or columns so far apart that an int32 product of the third one's number with its stride wraps and reads elsewhere
FAR_ROWS, FAR_COLUMNS = (2**30, 1), (1, 2**30)


def near_and_far(
    monkeypatch: pytest.MonkeyPatch, strides: tuple[int, int] = FAR_ROWS
) -> tuple[problems.Problem, problems.Problem]:
    """A problem, and the same in memory with these strides."""
    memory = reserved(2**31 + 9, monkeypatch)
    near = problems.make(3, 3, 3, spec=AutoencodeSpec(bandwidth=0.5), density=0.5).to(torch.float16)
    names = ("x", "W_dec", "grad_out")
    far = {name: memory[3 * i :].as_strided((3, 3), strides) for i, name in enumerate(names)}
    for name, tensor in far.items():
        tensor.copy_(getattr(near, name))
    return near, replace(near, **far)


def run(
    problem: problems.Problem,
    capacity: int,
    target: Tensor | None = None,
    row_scale: Tensor | None = None,
    mean_capacity: int | None = None,
) -> problems.Result:
    """Forward and every gradient of one pass, rows limited to `capacity` entries, all of them to `mean_capacity` on average.

    With a target, what comes back into the pass is `row_scale * residual` in place of the problem's gradient.
    """
    from fastsae_kernels import gpu
    from fastsae_kernels.types import AutoencodeNeeds, Capacity, OutputGrads, PassInputs

    tensors = [None if tensor is None else on_device(tensor) for tensor in problem.tensors()]
    target, row_scale = (None if tensor is None else on_device(tensor) for tensor in (target, row_scale))
    rank_scale = None if problem.rank_scale is None else on_device(problem.rank_scale)
    inputs = PassInputs(*tensors, target=target, rank_scale=rank_scale)  # type: ignore[arg-type]
    output, kept = gpu.forward(inputs, problem.spec, Capacity(capacity, mean_capacity or capacity))
    grad_out = on_device(problem.grad_out) if target is None else output.sae_out
    output_grads = OutputGrads(grad_out, row_scale, on_device(problem.grad_penalty))
    grads = gpu.backward(inputs, kept, problem.spec, output_grads, AutoencodeNeeds())
    names = ("sae_out", "penalty", "l0", "feature_counts", *(() if target is None else ("squared_error",)))
    named = {name: getattr(output, name) for name in names}
    assert (output.squared_error is None) == (target is None)
    assert output.sae_out.dtype == problem.x.dtype
    for name, grad, tensor in zip(problems.NAMES, grads, problem.tensors(), strict=True):
        assert (grad is None) == (tensor is None), name
        assert grad is None or (grad.dtype, grad.shape) == (tensor.dtype, tensor.shape), name  # type: ignore[union-attr]
    return problems.Result(
        {name: value.cpu().double() for name, value in named.items()},
        {name: grad.cpu().double() for name, grad in zip(problems.NAMES, grads, strict=True) if grad is not None},
    )
