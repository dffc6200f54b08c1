"""The pass with a target: residual, squared errors and what their gradients give every argument, against fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import problems
import pytest
import torch
from gpu_helpers import DEVICE, few_programs_here, needs_kernels
from problems import NAMES, SPECS, assert_within_budget, leaves
from torch import Tensor

import fastsae_kernels as kernels
from fastsae_kernels import ActivityHint, reference

# a token's rank needs all features at once, which the dense path never has
BACKENDS = [
    (backend, name) for name in SPECS for backend in ("cpu", "dense") if backend == "cpu" or SPECS[name].k is None
]
USES = ("squared error", "residual", "both")
Values = dict[str, Tensor]


def target_of(problem: problems.Problem) -> Tensor:
    g = torch.Generator().manual_seed(7)
    return torch.randn(problem.grad_out.shape, generator=g).to(problem.x.dtype)


def send_back(residual: Tensor, squared_error: Tensor, penalty: Tensor, problem: problems.Problem, use: str) -> None:
    """Gradients into those outputs that the loss uses; squared errors get one per token."""
    weights = torch.linspace(-1, 2, len(penalty), dtype=torch.float64)
    outputs: list[Tensor] = [penalty]
    grads = [problem.grad_penalty.to(penalty.dtype)]
    if use != "residual":
        outputs.append(squared_error)
        grads.append(weights.to(squared_error.dtype))
    if use != "squared error":
        outputs.append(residual)
        grads.append(problem.grad_out.to(residual.dtype))
    torch.autograd.backward(outputs, grads)


def results(inputs: list[Tensor | None], residual: Tensor, squared_error: Tensor) -> Values:
    grads = {name: leaf.grad for name, leaf in zip((*NAMES, "target"), inputs, strict=True) if leaf is not None}
    named = {"residual": residual, "squared_error": squared_error, **{f"grad of {n}": g for n, g in grads.items()}}
    return {name: torch.zeros(()) if value is None else value.detach().double() for name, value in named.items()}


def run_reference(problem: problems.Problem, target: Tensor, use: str) -> Values:
    inputs = [*leaves(problem), target.detach().clone().requires_grad_()]
    *tensors, target = inputs  # type: ignore[assignment]
    output = reference.autoencode(*tensors, problem.spec)  # type: ignore[arg-type]
    residual = output.sae_out - target
    squared_error = residual.to(torch.promote_types(residual.dtype, torch.float32)).square().sum(-1)
    send_back(residual, squared_error, output.penalty, problem, use)
    return results(inputs, residual, squared_error)


def run(
    problem: problems.Problem,
    target: Tensor,
    use: str,
    wrap: Callable = lambda function: function,
    device: str = "cpu",
) -> Values:
    inputs = [*leaves(problem), target.detach().clone().requires_grad_()]

    def forward(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, *others: Tensor) -> tuple[Any, ...]:
        W_dec, b_dec, feature_scale, target = others
        output = kernels.autoencode(
            x, W_enc, b_enc, threshold, W_dec, b_dec, spec=problem.spec, feature_scale=feature_scale, target=target
        )
        return output.sae_out, output.squared_error, output.penalty

    moved = (None if leaf is None else leaf.to(device) for leaf in inputs)
    residual, squared_error, penalty = (output.cpu() for output in wrap(forward)(*moved))
    assert residual.dtype == problem.x.dtype
    assert squared_error.dtype == problem.threshold.dtype
    send_back(residual, squared_error, penalty, problem, use)
    return results(inputs, residual, squared_error)


def assert_matches(got: Values, problem: problems.Problem, target: Tensor, use: str) -> None:
    truth = run_reference(problem.to(torch.float64), target.double(), use)
    eager = run_reference(problem, target, use)
    assert got.keys() == truth.keys()
    for name, exact in truth.items():
        assert_within_budget(name, got[name], exact, eager[name])


def whole_graph(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("backend", "name"), BACKENDS)
def test_matches_reference(name: str, backend: Any, use: str) -> None:
    spec = SPECS[name]
    problem = problems.make(d_sae=300, spec=spec, with_scale=spec.penalty != "l0")
    with kernels.use_backend(backend):
        assert_matches(run(problem, target_of(problem), use), problem, target_of(problem), use)


@pytest.mark.parametrize("backend", ["cpu", "dense"])
@pytest.mark.parametrize("problem", problems.HOSTILE.values(), ids=problems.HOSTILE)
def test_hostile_inputs(problem: problems.Problem, backend: Any) -> None:
    with kernels.use_backend(backend):
        got = run(problem, target_of(problem), "squared error")
        assert_matches(got, problem, target_of(problem), "squared error")


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("density", [0.02, 0.5], ids=["sparse", "dense"])
def test_in_a_whole_graph(density: float, use: str) -> None:
    problem = problems.make(d_sae=300, density=density)
    target = target_of(problem)
    assert_matches(run(problem, target, use, whole_graph), problem, target, use)


@needs_kernels
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("capacity", [64, 2], ids=["fits", "overflows"])
def test_on_the_triton_backend(capacity: int, use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ActivityHint, "capacity", lambda *_: capacity)
    problem = problems.make(9, 20, 43, spec=SPECS["tanh, ste to input"], density=0.2, with_scale=True)
    target = target_of(problem)
    with kernels.use_backend("triton"), few_programs_here():
        assert_matches(run(problem, target, use, device=DEVICE), problem, target, use)


@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_the_error_of_narrow_weights_is_that_of_a_wide_difference(backend: Any) -> None:
    """A reconstruction of 1 part in 1000: a difference of rounded numbers would have no correct digit."""
    problem = problems.make(64, 24, 300).to(torch.bfloat16)
    with kernels.use_backend(backend):
        output = kernels.autoencode(*problem.tensors()[:6], spec=problem.spec)  # type: ignore[arg-type]
        target = output.sae_out.float() * (1 + 1e-3 * torch.randn(output.sae_out.shape))
        with_target = kernels.autoencode(*problem.tensors()[:6], spec=problem.spec, target=target)  # type: ignore[arg-type]
    if backend == "cpu":  # whose reconstruction is rounded before
        difference = output.sae_out.double() - target.double()
        torch.testing.assert_close(with_target.squared_error.double(), difference.square().sum(1), rtol=1e-5, atol=0)
    assert with_target.sae_out.dtype == torch.bfloat16
    squares = with_target.sae_out.double().square().sum(1)
    torch.testing.assert_close(with_target.squared_error.double(), squares, rtol=1e-2, atol=0)


def test_leading_dimensions_and_no_copy_of_the_residual() -> None:
    problem = problems.make(12, 24, 83)
    x, target = problem.x.view(3, 4, 24), target_of(problem).view(3, 4, 24)
    output = kernels.autoencode(x, *leaves(problem)[1:6], spec=problem.spec, target=target)  # type: ignore[arg-type]
    assert output.sae_out.shape == (3, 4, 24)
    assert output.squared_error is not None
    assert output.squared_error.shape == (3, 4)
    found = [t for t in saved_by(output.squared_error.grad_fn) if t.shape == (12, 24) and t.grad_fn is not None]
    assert [t.data_ptr() for t in found] == [output.sae_out.data_ptr()]


def saved_by(node: Any) -> list[Tensor]:
    """Tensors that the op's own node saved, some reshapes up the graph."""
    while not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    return [tensor for tensor in node.saved_tensors if tensor is not None]


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (torch.zeros(37, 23), ValueError, r"target: expected shape \[..., d_out\] = \(37, 24\), got shape \(37, 23\)"),
        (
            torch.zeros(37, 24, dtype=torch.int32),
            TypeError,
            "target: expected a floating-point tensor, got torch.int32",
        ),
        (torch.zeros(37, 24, device="meta"), ValueError, "target: expected device cpu as the input x, got meta"),
    ],
)
def test_bad_targets(target: Tensor, error: type[Exception], message: str) -> None:
    problem = problems.make()
    with pytest.raises(error, match=message):
        kernels.autoencode(*problem.tensors()[:6], spec=problem.spec, target=target)  # type: ignore[arg-type]
