"""What `FusedSAEAdam` buys: whole steps with our passes that differ in the optimiser alone, in time and in peak memory.

Adam by itself, and Adam as `fastsae train` wants it: the decoder's gradient projected, all clipped by their global norm, the
decoder's rows of unit norm after the update. A provider is timed once the parameters after a step are as close to fp64 as
those of `torch.optim.Adam` are, within a factor of two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from benchmarks.baselines import L0_COEFFICIENT, relative_errors, worst
from benchmarks.floor import step_work
from benchmarks.harness import Case, Provider, cases_and_providers
from benchmarks.shapes import DEVICE, HEADLINE, SHAPES, Shape, tokens
from benchmarks.test_whole_step import FLOOR, LR, Step, adam, changes, fused_step, make_sae, torch_step
from fastsae import FusedJumpReLUSAE, FusedSAEAdam

MAX_GRAD_NORM = 1.0
CPU_NAMES = (HEADLINE, "demo", "pythia-70m", "gemma-2-2b 16k", "gemma-2-2b 65k")
NAMES = tuple(SHAPES) if DEVICE == "cuda" else CPU_NAMES


def as_trained_by_torch(sae: FusedJumpReLUSAE) -> Step:
    """Projection, clipping and unit norm as one writes them around `torch.optim.Adam`."""
    optimizer = adam(sae)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        sae.training_forward(x, L0_COEFFICIENT).loss.backward()
        W_dec = sae.W_dec
        assert W_dec.grad is not None
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            torch.nn.utils.clip_grad_norm_(sae.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            sae.normalize_decoder_()

    return step


def as_trained(sae: FusedJumpReLUSAE) -> FusedSAEAdam:
    return FusedSAEAdam(sae, lr=LR, max_grad_norm=MAX_GRAD_NORM, normalize_decoder=True)


STEPS: dict[str, dict[str, Callable[[FusedJumpReLUSAE], Step]]] = {
    "optimiser": {
        "torch.optim.Adam": lambda sae: torch_step(sae, adam(sae)),
        "FusedSAEAdam, loss.backward()": lambda sae: torch_step(sae, FusedSAEAdam(sae, lr=LR)),
        "FusedSAEAdam, optimizer.backward(loss)": lambda sae: fused_step(sae, FusedSAEAdam(sae, lr=LR)),
    },
    "optimiser, clipped and unit norm": {
        "torch.optim.Adam": as_trained_by_torch,
        "FusedSAEAdam, loss.backward()": lambda sae: torch_step(sae, as_trained(sae)),
        "FusedSAEAdam, optimizer.backward(loss)": lambda sae: fused_step(sae, as_trained(sae)),
    },
}


@lru_cache(2)
def exact(operation: str, shape: Shape) -> dict[str, Tensor]:
    return changes(STEPS[operation]["torch.optim.Adam"], shape, torch.float64)


def check(operation: str, name: str, shape: Shape) -> tuple[float, float]:
    steps = STEPS[operation]
    found, theirs = (
        relative_errors(changes(steps[of], shape, torch.float32), exact(operation, shape))
        for of in (name, "torch.optim.Adam")
    )
    return worst(found, {key: 2 * error + FLOOR for key, error in theirs.items()})


def case(operation: str, shape_name: str) -> Case:
    shape = SHAPES[shape_name]
    providers = {
        name: Provider(
            lambda make=make: partial(make(make_sae(shape)), tokens(shape)),
            partial(check, operation, name, shape),
            "fp32",
        )
        for name, make in STEPS[operation].items()
    }
    return Case(operation, shape_name, shape, providers, work=partial(step_work, shape, adam=True))


@cases_and_providers([case(operation, name) for operation in STEPS for name in NAMES])
def test_optimizer(timed, case: Case, provider: str) -> None:  # type: ignore[no-untyped-def]
    timed(case, provider)
