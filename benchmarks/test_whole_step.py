"""A whole training step: forward, loss, backward and Adam, against the dense step with `torch.optim.Adam(fused=True)`.

Each provider is timed only once the parameters that it has after three steps are as close to those of fp64 as the dense eager
step's are, within a factor of two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from benchmarks.memory import MIB, peak_mib
from benchmarks.shapes import BANDWIDTH, SHAPES, parameters, tokens
from fastsae import FusedJumpReLUSAE, FusedSAEAdam
from fastsae_kernels import AutoencodeSpec, reference

L0_COEFFICIENT, LR, CHECKED_STEPS = 0.01, 1e-4, 3
SPEC = AutoencodeSpec(bandwidth=BANDWIDTH)
SPARSE_SHAPES = ("gpt2-small-16k", "demo")
FLOOR = (
    1e-3  # relative, of a change of parameters: the first steps of Adam are signs of gradients, however small those are
)

Step = Callable[[Tensor], None]


def make(shape: str) -> FusedJumpReLUSAE:
    s = SHAPES[shape]
    sae = FusedJumpReLUSAE(s.d_in, s.d_sae, BANDWIDTH)
    sae.load_state_dict({name: tensor.detach() for name, tensor in parameters(s).items()})
    return sae


def dense_step(sae: FusedJumpReLUSAE, compiled: bool = False, bf16: bool = False) -> Step:
    """The step as one writes it."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, fused=True)

    def loss_of(x: Tensor) -> Tensor:
        weights = (sae.W_enc, sae.b_enc, sae.threshold, sae.W_dec, sae.b_dec)
        sae_out, l0, _ = reference.autoencode(x, *weights, None, SPEC)
        return (sae_out - x).square().sum(-1).mean() + L0_COEFFICIENT * l0.mean()

    forward = torch.compile(loss_of) if compiled else loss_of

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = forward(x)
        loss.backward()
        optimizer.step()

    return step


def fused_step(sae: FusedJumpReLUSAE, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        sae.training_forward(x, L0_COEFFICIENT).loss.backward()
        optimizer.step()

    return step


PROVIDERS: dict[str, Callable[[FusedJumpReLUSAE], Step]] = {
    "dense eager fp32": dense_step,
    "dense compiled fp32": lambda sae: dense_step(sae, compiled=True),
    "dense compiled bf16 autocast": lambda sae: dense_step(sae, compiled=True, bf16=True),
    "fused, torch.optim.Adam": lambda sae: fused_step(sae, torch.optim.Adam(sae.parameters(), lr=LR, fused=True)),
    "fused, FusedSAEAdam": lambda sae: fused_step(sae, FusedSAEAdam(sae, lr=LR)),
    "fused, FusedSAEAdam, clipped": lambda sae: fused_step(sae, FusedSAEAdam(sae, lr=LR, max_grad_norm=1e6)),
}


@cache
def changes(provider: str, shape: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What three steps add to each parameter."""
    sae = make(shape).to(dtype)
    before = copy.deepcopy(sae.state_dict())
    step = PROVIDERS[provider](sae)
    for _ in range(CHECKED_STEPS):
        step(tokens(SHAPES[shape]).to(dtype))
    return {name: tensor.double() - before[name].double() for name, tensor in sae.state_dict().items()}


@cache
def errors_of(provider: str, shape: str) -> dict[str, float]:
    exact = changes("dense eager fp32", shape, torch.float64)
    return {
        name: ((changes(provider, shape)[name] - change).norm() / change.norm()).item()
        for name, change in exact.items()
    }


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SPARSE_SHAPES)
def test_whole_step(benchmark, provider: str, shape: str) -> None:  # type: ignore[no-untyped-def]
    try:
        errors = errors_of(provider, shape)
    except Exception as error:
        if "compiled" in provider and "compiler" in str(error).lower():
            pytest.skip(f"torch.compile needs a C++ compiler: {str(error).splitlines()[0]}")
        raise
    if "bf16" not in provider:
        eager = errors_of("dense eager fp32", shape)
        worse = {name: (error, eager[name]) for name, error in errors.items() if error > 2 * eager[name] + FLOOR}
        assert not worse, f"{provider}: error over twice that of eager: {worse}"
    s, x, step = SHAPES[shape], tokens(SHAPES[shape]), PROVIDERS[provider](make(shape))
    benchmark.group = f"whole step with Adam, {shape}"
    benchmark.extra_info.update(provider=provider, baseline="dense eager fp32", shape=shape, error=max(errors.values()))
    benchmark.extra_info.update(peak_mib=peak_mib(lambda: step(x)), dense_tensor_mib=s.n_tokens * s.d_sae * 4 / MIB)
    benchmark.pedantic(step, args=(x,), rounds=5, warmup_rounds=1)
