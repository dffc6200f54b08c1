"""The custom ops: `opcheck`, whole graphs with every gradient, autocast, deterministic mode, ranks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import problems
import pytest
import torch
from gpu_helpers import DEVICE, few_programs_here, needs_kernels
from torch import library
from torch.utils.checkpoint import checkpoint

import fastsae_kernels as kernels
from fastsae_kernels import ActivityHint, AutoencodeSpec
from fastsae_kernels.activity import DENSE
from fastsae_kernels.types import Capacity

SPECS = {
    name: problems.SPECS[name] for name in ("l0", "tanh, ste to input", "l1", "top-5 of everything", "batch top-3")
}
CAPACITY = ActivityHint.UNKNOWN


def arguments(problem: problems.Problem, capacity: Capacity, target: torch.Tensor | None = None) -> tuple[Any, ...]:
    return (*problems.leaves(problem), target, problem.rank_scale, *dataclasses.astuple(problem.spec), *capacity, 0)


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def run_compiled(problem: problems.Problem, device: str = "cpu") -> problems.Result:
    inputs = problems.leaves(problem)
    *tensors, scale, ranks = (None if leaf is None else leaf.to(device) for leaf in (*inputs, problem.rank_scale))

    @compiled
    def forward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = kernels.autoencode(*tensors, spec=problem.spec, feature_scale=scale, rank_scale=ranks)
        return output.sae_out, output.penalty, output.l0, output.feature_counts

    outputs = [output.cpu() for output in forward(*tensors)]  # type: ignore[arg-type]
    named = dict(zip(("sae_out", "penalty", "l0", "feature_counts"), outputs, strict=True))
    return problems.collect(inputs, named, problem)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """PyTorch's own mode, which also fills memory that is not initialised: what is unused then compare equal."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("capacity", [CAPACITY, DENSE], ids=["by activity", "dense"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_opcheck_autoencode(spec: AutoencodeSpec, capacity: Capacity) -> None:
    if capacity == DENSE and spec.k is not None:
        pytest.skip("a token's rank needs all features at once")
    problem = problems.make(9, 8, 60, spec=spec, with_scale=spec.penalty != "l0")
    target = problem.grad_out.clone().requires_grad_() if spec.penalty == "l0" else None
    library.opcheck(torch.ops.fastsae.autoencode.default, arguments(problem, capacity, target))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("k", [None, 3])
def test_opcheck_encode_and_decode(k: int | None) -> None:
    p = problems.make(9, 8, 60)
    inputs = [tensor.requires_grad_() for tensor in (p.x, p.W_enc, p.b_enc, p.threshold)]
    # data-dependent sizes have no dynamic-shape test
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    every = (*checks, "test_aot_dispatch_dynamic") if k else checks
    library.opcheck(torch.ops.fastsae.encode.default, (*inputs, 0.0, k, False), test_utils=every)
    with torch.no_grad():
        entries = torch.ops.fastsae.encode(*inputs, 0.0, k, False)
    values = entries[0].requires_grad_()
    decoder = (p.W_dec.requires_grad_(), p.b_dec.requires_grad_())
    library.opcheck(torch.ops.fastsae.decode.default, (values, *entries[1:], *decoder))


@pytest.mark.parametrize("density", [0.02, 0.5], ids=["sparse", "dense"])
@pytest.mark.parametrize("spec", problems.SPECS.values(), ids=problems.SPECS)
def test_whole_graph_matches_reference(spec: AutoencodeSpec, density: float) -> None:
    problem = problems.make(d_sae=300, spec=spec, density=density, with_scale=spec.penalty != "l0")
    problems.assert_matches(run_compiled(problem), problem)


@pytest.mark.parametrize("name", ["no tokens", "one token", "all dead", "all active", "wide window"])
def test_whole_graph_on_hostile_inputs(name: str) -> None:
    problems.assert_matches(run_compiled(problems.HOSTILE[name]), problems.HOSTILE[name])


@needs_kernels
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_whole_graph_on_the_triton_backend(spec: AutoencodeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ActivityHint, "UNKNOWN", Capacity(4, 4))  # most rows overflow
    problem = problems.make(9, 20, 43, spec=spec, density=0.2, with_scale=spec.penalty != "l0")
    with kernels.use_backend("triton"), few_programs_here():
        problems.assert_matches(run_compiled(problem, DEVICE), problem)


@pytest.mark.parametrize("k", [None, 3])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_encode_and_decode_in_a_whole_graph(k: int | None) -> None:
    p = problems.make(9, 20, 43)

    def forward(x, W_enc, b_enc, threshold, W_dec, b_dec):  # type: ignore[no-untyped-def]
        acts = kernels.encode(x, W_enc, b_enc, threshold, k=k)
        return kernels.decode(acts, W_dec, b_dec)

    results = []
    for function in (forward, compiled(forward)):
        inputs = problems.leaves(p)[:6]
        out = function(*inputs)
        out.backward(p.grad_out)
        # no window, no threshold's gradient
        results.append([out, *[leaf.grad for i, leaf in enumerate(inputs) if i != 3]])
    for eager, whole in zip(*results, strict=True):
        torch.testing.assert_close(eager, whole)


def test_autocast_inside_a_graph_is_that_outside() -> None:
    p = problems.make(64, 24, 83)

    def forward(*tensors: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return kernels.autoencode(*tensors, spec=p.spec).sae_out

    tensors = problems.leaves(p)[:6]
    eager, graph = forward(*tensors), compiled(forward)(*tensors)
    assert eager.dtype == graph.dtype == torch.bfloat16
    assert torch.equal(eager, graph)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("whole_graph", [False, True], ids=["eager", "whole graph"])
def test_inside_checkpoint(whole_graph: bool, use_reentrant: bool) -> None:
    p = problems.make()

    def forward(*tensors: torch.Tensor) -> torch.Tensor:
        if not whole_graph:
            return kernels.autoencode(*tensors, spec=p.spec).sae_out
        inputs = (*tensors, None, None, None, *dataclasses.astuple(p.spec), *CAPACITY, 0)
        return torch.ops.fastsae.autoencode(*inputs)[0]

    grads = []
    for function in (forward, lambda *tensors: checkpoint(forward, *tensors, use_reentrant=use_reentrant)):
        inputs = problems.leaves(p)[:6]
        function(*inputs).backward(p.grad_out)
        grads.append([leaf.grad for leaf in inputs])
    for plain, checkpointed in zip(*grads, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_mode_twice_bit_equal() -> None:
    p = problems.make(64, 24, 300)
    problems.assert_bit_equal(run_compiled(p), run_compiled(p))


def test_steps_of_one_shape_compile_once() -> None:
    """Activity changes from step to step; the graph must not."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    hint, spec = ActivityHint(), AutoencodeSpec(bandwidth=0.3)
    forward = torch.compile(
        lambda *tensors: kernels.autoencode(*tensors, spec=spec, hint=hint).sae_out, fullgraph=True, backend=backend
    )
    for density in (0.02, 0.5, 0.1):
        with torch.no_grad():
            forward(*problems.make(40, 24, 300, density=density).tensors()[:6])
    assert len(graphs) == 1


def test_copies_of_a_hint_have_their_own_key() -> None:
    hint = ActivityHint()
    twin = copy.deepcopy(hint)
    assert hint.key != twin.key
    assert ActivityHint.of(hint.key) is hint
    assert ActivityHint.of(twin.key) is twin
    assert ActivityHint.of(0) is None


@needs_kernels
@pytest.mark.skipif(DEVICE == "cuda", reason="counts the launches of the interpreter")
def test_rank_of_the_input_specialises_no_kernel_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    launched: list[set[tuple]] = []
    call = GridExecutor.__call__

    def record(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        kinds = tuple((type(a).__name__, getattr(a, "dtype", None)) for a in (*args, *kwargs.values()))
        constants = tuple(sorted((k, v) for k, v in kwargs.items() if k.isupper()))
        launched[-1].add((self.fn.__name__, kinds, constants))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", record)
    p = problems.make(12, 20, 43)
    for shape in ((12, 20), (3, 4, 20), (2, 2, 3, 20)):
        launched.append(set())
        with kernels.use_backend("triton"):
            *tensors, _ = p.tensors()
            kernels.autoencode(p.x.view(shape), *tensors[1:], spec=p.spec)  # type: ignore[arg-type]
    assert launched[0]
    assert launched[0] == launched[1] == launched[2]
