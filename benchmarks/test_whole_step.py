"""A whole training step: forward, loss, backward and Adam, against the dense step with `torch.optim.Adam(fused=True)`.

A provider is timed once the parameters that it has after a step are as close to those of fp64 as the dense eager step's in the
same dtype are, within a factor of two. (A second step would meet gates that hang on rounding; tests compare 200 steps.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from benchmarks.baselines import (
    L0_COEFFICIENT,
    SPEC,
    checked,
    clear_tokens,
    compiled,
    in_bf16,
    in_fp64,
    in_tf32,
    relative_errors,
    worst,
)
from benchmarks.floor import step_work
from benchmarks.harness import Call, Case, Provider, cases_and_providers
from benchmarks.peers import PEER_SHAPES, peer_providers
from benchmarks.shapes import BANDWIDTH, DEVICE, HEADLINE, SHAPES, Shape, parameters, tokens, too_large
from fastsae import FusedJumpReLUSAE, FusedSAEAdam
from fastsae_kernels import reference

LR = 1e-4
# relative, of a change of parameters: the first step of Adam is the sign of the gradient, however small that is
FLOOR = 1e-3
STEP_SHAPES = SHAPES if DEVICE == "cuda" else {name: SHAPES[name] for name in (HEADLINE, "demo")}

Step = Callable[[Tensor], None]


def make_sae(shape: Shape) -> FusedJumpReLUSAE:
    sae = FusedJumpReLUSAE(shape.d_in, shape.d_sae, BANDWIDTH, device=DEVICE)
    sae.load_state_dict({name: tensor.detach() for name, tensor in parameters(shape).items()})
    return sae


def dense_step(
    sae: FusedJumpReLUSAE, wrap: Callable[[Callable], Callable] = lambda loss: loss, *, like_trainer: bool = False
) -> Step:
    """The step as one writes it; `like_trainer`: with the clipping and the unit norm of `fastsae train`."""
    optimizer = adam(sae)

    def loss_of(x: Tensor) -> Tensor:
        weights = (sae.W_enc, sae.b_enc, sae.threshold, sae.W_dec, sae.b_dec)
        sae_out, l0, _ = reference.autoencode(x, *weights, None, SPEC)
        return (sae_out - x).square().sum(-1).mean() + L0_COEFFICIENT * l0.mean()

    forward = wrap(loss_of)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        forward(x).backward()
        optimizer.step()

    return step


def fused_step(
    sae: FusedJumpReLUSAE, optimizer: FusedSAEAdam, wrap: Callable[[Callable], Callable] = lambda loss: loss
) -> Step:
    forward = wrap(lambda x: sae.training_forward(x, L0_COEFFICIENT).loss)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        optimizer.backward(forward(x))
        optimizer.step()

    return step


def torch_step(sae: FusedJumpReLUSAE, optimizer: torch.optim.Optimizer) -> Step:
    """Our passes, and an optimiser that finds their gradients in `.grad`."""

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        sae.training_forward(x, L0_COEFFICIENT).loss.backward()
        optimizer.step()

    return step


def adam(sae: FusedJumpReLUSAE) -> torch.optim.Adam:
    return torch.optim.Adam(sae.parameters(), lr=LR, fused=True)


STEPS: dict[str, Callable[[FusedJumpReLUSAE], Step]] = {
    "dense eager fp32": dense_step,
    "dense compiled fp32": lambda sae: dense_step(sae, compiled),
    "dense eager bf16": lambda sae: dense_step(sae, in_bf16),
    "dense compiled bf16": lambda sae: dense_step(sae, lambda loss: compiled(in_bf16(loss))),
    "fused, torch.optim.Adam fp32": lambda sae: torch_step(sae, adam(sae)),
    "fused fp32": lambda sae: fused_step(sae, FusedSAEAdam(sae, lr=LR)),
    "fused bf16": lambda sae: fused_step(sae, FusedSAEAdam(sae, lr=LR, compute_dtype=torch.bfloat16), in_bf16),
}
if DEVICE == "cuda":
    STEPS["dense compiled tf32"] = lambda sae: dense_step(sae, lambda loss: in_tf32(compiled(loss)))


def changes(make: Callable[[FusedJumpReLUSAE], Step], shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a step adds to each parameter."""
    sae = make_sae(shape).to(dtype)
    before = copy.deepcopy(sae.state_dict())
    step, x = make(sae), clear_rows(shape).to(dtype)
    if DEVICE == "cuda":  # or its first step would be dense, which is not what is timed
        sae.training_forward(x, L0_COEFFICIENT)
        torch.cuda.synchronize()
    step(x)
    return {name: tensor.double() - before[name].double() for name, tensor in sae.state_dict().items()}


@lru_cache(1)
def clear_rows(shape: Shape) -> Tensor:
    """Tokens none of whose gates hangs on rounding, in the first step."""
    return tokens(shape)[clear_tokens(*in_fp64(shape), "jumprelu", 0)]


@lru_cache(1)
def exact_changes(shape: Shape) -> dict[str, Tensor]:
    return changes(dense_step, shape, torch.float64)


@lru_cache(2)
def eager_errors(shape: Shape, dtype: str) -> dict[str, float]:
    eager = STEPS["dense eager bf16" if dtype == "bf16" else "dense eager fp32"]
    return relative_errors(changes(eager, shape, torch.float32), exact_changes(shape))


def check(name: str, shape: Shape, dtype: str) -> tuple[float, float]:
    part = checked(shape)
    errors = relative_errors(changes(STEPS[name], part, torch.float32), exact_changes(part))
    return worst(errors, {key: 2 * error + FLOOR for key, error in eager_errors(part, dtype).items()})


def make(name: str, shape: Shape) -> Call:
    return partial(STEPS[name](make_sae(shape)), tokens(shape))


def provider(name: str, shape_name: str) -> Provider:
    shape, dtype = STEP_SHAPES[shape_name], name.rsplit(" ", 1)[1]
    gate, too_large_here = partial(check, name, shape, dtype), partial(too_large, name, shape)
    return Provider(partial(make, name, shape), gate, dtype, too_large_here)


def case(shape_name: str, shape: Shape) -> Case:
    # eager bf16 is slower than compiled bf16 and takes long where the shape is large
    names = [name for name in STEPS if name != "dense eager bf16" or DEVICE == "cuda" or shape_name != HEADLINE]
    providers = {name: provider(name, shape_name) for name in names}
    if shape_name in PEER_SHAPES:
        providers |= peer_providers(shape, "jumprelu", "train_step")
    return Case("whole step", shape_name, shape, providers, work=partial(step_work, shape, adam=True))


@cases_and_providers([case(*item) for item in STEP_SHAPES.items()])
def test_whole_step(timed, case: Case, provider: str) -> None:  # type: ignore[no-untyped-def]
    timed(case, provider)
