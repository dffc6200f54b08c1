"""Problems for the kernel tests: parameters, hostile inputs, and the fp64 truth with its error budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae_kernels import AutoencodeSpec, reference

NAMES = ("x", "W_enc", "b_enc", "threshold", "W_dec", "b_dec", "feature_scale")


@dataclass(frozen=True)
class Problem:
    """Arguments of one pass and the gradients that come back into it."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor
    b_dec: Tensor
    feature_scale: Tensor | None
    grad_out: Tensor
    grad_penalty: Tensor
    spec: AutoencodeSpec
    rank_scale: Tensor | None = None

    def tensors(self) -> list[Tensor | None]:
        return [getattr(self, name) for name in NAMES]

    def to(self, dtype: torch.dtype) -> Problem:
        """In another dtype, the threshold in at least fp32; values are rounded once, here."""
        wide = torch.promote_types(dtype, torch.float32)
        dtypes = dict.fromkeys((*NAMES, "grad_out"), dtype) | dict.fromkeys(
            ("threshold", "feature_scale", "grad_penalty", "rank_scale"), wide
        )
        moved = {name: getattr(self, name) for name in dtypes if getattr(self, name) is not None}
        return replace(self, **{name: tensor.to(dtypes[name]) for name, tensor in moved.items()})


class Result(NamedTuple):
    """Outputs and gradients by name, as fp64."""

    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]


def make(
    n_tokens: int = 37,
    d_in: int = 24,
    d_sae: int = 83,
    *,
    spec: AutoencodeSpec | None = None,
    seed: int = 0,
    density: float = 0.1,
    with_scale: bool = False,
) -> Problem:
    """A random problem in fp32 whose features fire with about the given density."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    W_enc = (randn(d_sae, d_in) / d_in**0.5).t()  # feature-major, as the module stores it
    quantile = torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - density)).item()
    threshold = (quantile + 0.1 * randn(d_sae)).clamp_min(0.05)
    return Problem(
        x=randn(n_tokens, d_in),
        W_enc=W_enc,
        b_enc=0.1 * randn(d_sae),
        threshold=threshold,
        W_dec=randn(d_sae, d_in),
        b_dec=randn(d_in),
        feature_scale=randn(d_sae).abs() + 0.5 if with_scale else None,
        grad_out=randn(n_tokens, d_in),
        grad_penalty=randn(n_tokens),
        spec=spec or AutoencodeSpec(bandwidth=0.3),
    )


def on_the_edges(spec: AutoencodeSpec) -> Problem:
    """Exact small integers: every pre-activation is exact, and many sit on the threshold and on both window edges."""
    g = torch.Generator().manual_seed(1)
    problem = make(64, 8, 40, spec=spec if spec.batch_topk else replace(spec, bandwidth=2.0))

    def integers(shape: torch.Size, low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g).float()

    W_enc = integers(torch.Size((40, 8)), -1, 2).t()
    return replace(
        problem,
        x=integers(problem.x.shape, -2, 3),
        W_enc=W_enc,
        b_enc=integers(problem.b_enc.shape, -1, 2),
        threshold=integers(problem.threshold.shape, 0, 4),
        W_dec=integers(problem.W_dec.shape, -3, 4),
        grad_out=integers(problem.grad_out.shape, -3, 4),
    )


HOSTILE = {
    "one token": make(1, 5, 9),
    "one token, all active": replace(make(1, 5, 9), threshold=torch.zeros(9), b_enc=torch.full((9,), 50.0)),
    "one feature": make(6, 5, 1),
    "one dimension": make(7, 1, 33),
    "odd": make(13, 7, 131),
    "no tokens": make(0, 5, 9),
    "all dead": replace(make(), threshold=torch.full((83,), 1e6)),
    "all active": replace(make(), threshold=torch.zeros(83), b_enc=torch.full((83,), 50.0)),
    "one feature on every token": replace(make(), b_enc=torch.where(torch.arange(83) == 3, 40.0, 0.0)),
    "one row of zeros": replace(make(), x=make().x * (torch.arange(37) != 4)[:, None]),
    "zero thresholds": replace(make(), threshold=torch.zeros(83)),
    "tiny values": replace(make(), x=make().x * 1e-20, threshold=torch.full((83,), 1e-21), b_enc=torch.zeros(83)),
    "nearly subnormal products": replace(
        make(), x=make().x * 1e-17, W_enc=make().W_enc * 1e-17, threshold=torch.zeros(83), b_enc=torch.zeros(83)
    ),
    "squares below the smallest number": replace(
        make(), x=make().x * 1e-24, threshold=torch.zeros(83), b_enc=torch.zeros(83)
    ),
    "weights whose squares vanish": replace(
        make(), W_enc=make().W_enc * 1e-25, threshold=torch.zeros(83), b_enc=torch.zeros(83)
    ),
    "huge values": replace(
        make(), x=make().x * 1e21, W_enc=make().W_enc.bfloat16().float(), grad_out=make().grad_out * 1e-9
    ),
    # the gate then hangs on the product alone; few enough lie within rounding of 0 for counts to be exact
    "bias at the threshold": replace(make(), x=make().x * 0.1, b_enc=make().threshold),
    "large values": replace(make(), x=make().x * 1e15, grad_out=make().grad_out * 1e-3),
    "one large row": replace(make(), x=make().x * (1 + 1e6 * (torch.arange(37) == 5))[:, None]),
    "wide window": make(spec=AutoencodeSpec(bandwidth=50.0)),
}

SPECS = {
    "l0": AutoencodeSpec(bandwidth=0.3),
    "no window": AutoencodeSpec(),
    "ste to input": AutoencodeSpec(bandwidth=0.3, ste_to_input=True),
    "l1": AutoencodeSpec(penalty="l1"),
    "tanh": AutoencodeSpec(bandwidth=0.3, penalty="tanh"),
    "tanh, ste to input": AutoencodeSpec(bandwidth=0.3, penalty="tanh", ste_to_input=True),
    "top-3": AutoencodeSpec(bandwidth=0.3, k=3),
    "top-1, l1": AutoencodeSpec(penalty="l1", k=1),
    "top-5 of everything": AutoencodeSpec(k=5),
    "batch top-3": AutoencodeSpec(k=3, batch_topk=True),
    "batch top-2, tanh": AutoencodeSpec(k=2, batch_topk=True, penalty="tanh"),
    "batch top-k never reached": AutoencodeSpec(k=70, batch_topk=True),
    "top-k never reached": AutoencodeSpec(bandwidth=0.3, k=60),
}


def leaves(problem: Problem) -> list[Tensor | None]:
    """Detached copies that collect gradients, strides kept."""
    return [None if t is None else t.detach().clone().requires_grad_() for t in problem.tensors()]


def collect(inputs: list[Tensor | None], outputs: dict[str, Tensor], problem: Problem) -> Result:
    """Sends the problem's gradients back and gathers everything as fp64."""
    torch.autograd.backward(
        [outputs["sae_out"], outputs["penalty"]],
        [problem.grad_out.to(outputs["sae_out"].dtype), problem.grad_penalty.to(outputs["penalty"].dtype)],
    )
    grads = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in zip(NAMES, inputs, strict=True)
        if leaf is not None
    }
    return Result(
        {name: value.detach().double() for name, value in outputs.items()},
        {name: grad.double() for name, grad in grads.items()},
    )


def run_reference(problem: Problem) -> Result:
    """The dense reference in the problem's dtype."""
    inputs = leaves(problem)
    output = reference.autoencode(*inputs, problem.spec, problem.rank_scale)  # type: ignore[arg-type]
    acts = output.feature_acts.detach()
    named = {"sae_out": output.sae_out, "penalty": output.penalty, "l0": (acts > 0).sum(-1)}
    return collect(inputs, {**named, "feature_counts": (acts > 0).sum(0)}, problem)


def assert_within_budget(name: str, got: Tensor, truth: Tensor, eager: Tensor, floor: float = 1e-6) -> None:
    """`|got - truth| <= 2 max |eager - truth| + floor * max |truth|`: at most twice the error of dense eager PyTorch."""
    if truth.numel() == 0:
        assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
        return
    budget = 2 * (eager - truth).abs().max() + floor * truth.abs().max()
    error = (got - truth).abs()
    worst = int(error.argmax())
    assert error.max() <= budget, (
        f"{name}: error {error.max():.3g} over the budget of {budget:.3g} at {worst}: "
        f"got {got.flatten()[worst]:.9g}, expected {truth.flatten()[worst]:.9g}"
    )


def assert_bit_equal(one: Result, other: Result) -> None:
    """Every output and every gradient."""
    for name, value in {**one.outputs, **one.grads}.items():
        assert torch.equal(value, {**other.outputs, **other.grads}[name]), name


def assert_matches(got: Result, problem: Problem) -> None:
    """Counts exactly, outputs and every gradient by name within the error budget."""
    truth, eager = run_reference(problem.to(torch.float64)), run_reference(problem)
    for name in ("l0", "feature_counts"):
        assert torch.equal(got.outputs[name], truth.outputs[name]), f"{name} differs"
    for name in ("sae_out", "penalty"):
        assert_within_budget(name, got.outputs[name], truth.outputs[name], eager.outputs[name])
    assert got.grads.keys() == truth.grads.keys()
    for name, grad in truth.grads.items():
        assert_within_budget(f"grad of {name}", got.grads[name], grad, eager.grads[name])
