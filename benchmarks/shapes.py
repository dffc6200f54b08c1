"""The shapes of the benchmarks by name, and random problems in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Tokens of a step, widths, and active features per token."""

    n_tokens: int
    d_in: int
    d_sae: int
    l0: float


SHAPES = {
    "gpt2-small-16k": Shape(4096, 768, 16384, 78),
    "demo": Shape(1024, 256, 2048, 32),
    # early training, where the dense path runs
    "gpt2-small-16k, half active": Shape(4096, 768, 16384, 8192),
    "demo, half active": Shape(1024, 256, 2048, 1024),
    "64 tokens, half active": Shape(64, 512, 4096, 2048),
}
BANDWIDTH = 0.05


def threshold_for(shape: Shape) -> float:
    """The threshold above which a standard normal pre-activation lies as often as the shape's L0 asks."""
    return torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - shape.l0 / shape.d_sae)).item()


def parameters(shape: Shape) -> dict[str, Tensor]:
    """Leaves of one step: random unit-norm decoder, thresholds at the quantile that gives the shape's L0."""
    g = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(shape.d_sae, shape.d_in, generator=g), dim=1)
    tensors = {
        "W_enc": W_dec.clone().t(),
        "b_enc": torch.zeros(shape.d_sae),
        "threshold": torch.full((shape.d_sae,), threshold_for(shape)),
        "W_dec": W_dec,
        "b_dec": torch.zeros(shape.d_in),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def tokens(shape: Shape) -> Tensor:
    """`[n_tokens, d_in]`, standard normal, so that pre-activations are too (rows of W_enc have unit norm)."""
    return torch.randn(shape.n_tokens, shape.d_in, generator=torch.Generator().manual_seed(1))
