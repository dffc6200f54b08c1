"""What only a GPU can show: CUDA graphs, a whole compiled step, no synchronisation, repeated runs that agree bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import problems
import pytest
import torch
from gpu_helpers import DEVICE, NARROW, NEEDS_GPU, few_programs_here, needs_kernels
from torch import Tensor

import fastsae_kernels as kernels
from fastsae_kernels import AutoencodeSpec

SPECS = {
    "l0": AutoencodeSpec(bandwidth=0.3),
    "top-k": AutoencodeSpec(k=16),
    "batch top-k": AutoencodeSpec(k=16, batch_topk=True),
}


def step_of(problem: problems.Problem) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A forward and backward pass on the sparse path, and what it writes: the output and every gradient."""
    leaves = [None if leaf is None else leaf.detach().to(DEVICE).requires_grad_() for leaf in problem.tensors()]
    grad_out = problem.grad_out.to(DEVICE)
    *tensors, _ = leaves
    written = [leaf for leaf in tensors if leaf is not None]

    def step() -> Tensor:
        for leaf in written:
            leaf.grad = None
        with kernels.use_backend("triton" if DEVICE == "cuda" else "cpu"):
            output = kernels.autoencode(*tensors, spec=problem.spec)  # type: ignore[arg-type]
            torch.autograd.backward([output.sae_out, output.penalty.sum()], [grad_out, None])
        return output.sae_out

    return step, written


def results_of(step: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Copies of what a step writes; they hold nothing of its autograd graph, which a capture would trip over.

    The output would keep the leaves' AccumulateGrad nodes alive, and with them the stream on which these were made.
    """
    out = step().detach().clone()
    return [out, *[leaf.grad.clone() for leaf in leaves if leaf.grad is not None]]


def test_results_of_a_step_keep_no_accumulator_alive() -> None:
    step, leaves = step_of(problems.make(256, 64, 2048, spec=SPECS["l0"], density=0.01))

    def accumulator() -> Any:
        return leaves[1].view_as(leaves[1]).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

    results = results_of(step, leaves)
    accumulator().metadata["mark"] = "of a step"
    assert "mark" not in accumulator().metadata
    output = step()  # keeps it alive, so the mark is seen
    accumulator().metadata["mark"] = "of a step"
    assert "mark" in accumulator().metadata
    del results, output


@NEEDS_GPU
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_replay_of_a_cuda_graph_equals_the_eager_step(spec: AutoencodeSpec) -> None:
    step, leaves = step_of(problems.make(256, 64, 2048, spec=spec, density=0.01))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles and settles before the capture
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    eager = results_of(step, leaves)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        replayed = [out, *[leaf.grad for leaf in leaves if leaf.grad is not None]]
        for value, expected in zip(replayed, eager, strict=True):
            assert torch.equal(value, expected)


@NEEDS_GPU
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_step_never_waits_for_the_device(spec: AutoencodeSpec) -> None:
    step, _ = step_of(problems.make(256, 64, 2048, spec=spec, density=0.01))
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NEEDS_GPU
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_two_runs_are_bit_equal_in_deterministic_mode(spec: AutoencodeSpec) -> None:
    step, leaves = step_of(problems.make(256, 64, 2048, spec=spec, density=0.01))
    torch.use_deterministic_algorithms(True)
    try:
        runs = [results_of(step, leaves) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@NEEDS_GPU
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_module_equals_the_eager_one(mode: str) -> None:
    from fastsae import FusedTopKSAE

    sae = FusedTopKSAE(64, 1024, k=8, device="cuda")
    x = torch.randn(128, 64, device="cuda")
    compiled = torch.compile(sae, fullgraph=True, mode=mode)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), sae(x))


@needs_kernels
@pytest.mark.parametrize("dtype", [*NARROW, torch.float32], ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_shipped_tiles_match_reference(spec: AutoencodeSpec, dtype: torch.dtype) -> None:
    """Integers are exact in every dtype, so the entries must be the same ones; a CPU runs small tiles."""
    problem = problems.on_the_edges(spec).to(dtype)
    leaves = [None if leaf is None else leaf.detach().to(DEVICE).requires_grad_() for leaf in problem.tensors()]
    *tensors, _ = leaves
    grad_out, grad_penalty = problem.grad_out.to(DEVICE), problem.grad_penalty.to(DEVICE)
    with kernels.use_backend("triton"), few_programs_here():
        output = kernels.autoencode(*tensors, spec=problem.spec)  # type: ignore[arg-type]
        named = {name: getattr(output, name).cpu() for name in ("sae_out", "penalty", "l0", "feature_counts")}
        torch.autograd.backward([output.sae_out, output.penalty], [grad_out, grad_penalty])
    grads = {
        name: leaf.grad.cpu().double() if leaf.grad is not None else torch.zeros(leaf.shape, dtype=torch.float64)
        for name, leaf in zip(problems.NAMES, leaves, strict=True)
        if leaf is not None
    }
    outputs = {name: value.detach().double() for name, value in named.items()}
    problems.assert_matches(problems.Result(outputs, grads), problem)
