"""The shapes of the benchmarks by name, and random problems in them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BANDWIDTH = 0.05


@dataclass(frozen=True)
class Shape:
    """Tokens of a step, widths, active features per token, and whether the model's own step would be larger."""

    n_tokens: int
    d_in: int
    d_sae: int
    l0: float
    is_cut: bool = False


HEADLINE = "gpt2-small-16k"
CPU_SHAPES = {
    HEADLINE: Shape(4096, 768, 16384, 78),
    "demo": Shape(1024, 256, 2048, 32),
    "gpt2-small x32": Shape(256, 768, 24576, 64, is_cut=True),
    "gemma-2-2b 16k": Shape(128, 2304, 16384, 64, is_cut=True),
    "gemma-2-2b 65k": Shape(64, 2304, 65536, 64, is_cut=True),
    "qwen2.5-7b x8": Shape(64, 3584, 28672, 64, is_cut=True),
    "1M features": Shape(32, 64, 1048576, 64, is_cut=True),
}
GPU_SHAPES = {
    "pythia-70m": Shape(8192, 512, 16384, 64),
    "gpt2-small x32": Shape(8192, 768, 24576, 64),
    "gemma-2-2b 16k": Shape(8192, 2304, 16384, 64),
    "gemma-2-2b 65k": Shape(8192, 2304, 65536, 64),
    "qwen2.5-7b x8": Shape(8192, 3584, 28672, 64),
    "llama-3.1-8b x8": Shape(8192, 4096, 32768, 64),
    "llama-3.1-8b x32": Shape(8192, 4096, 131072, 64),
    "1M features": Shape(16384, 3584, 1048576, 64),
}
# early training, where half of all features are active and the dense path runs
EARLY_SHAPES = {
    f"{HEADLINE}, half active": Shape(512, 768, 16384, 8192, is_cut=True),
    "demo, half active": Shape(1024, 256, 2048, 1024),
    "64 tokens, half active": Shape(64, 512, 4096, 2048),
}
SHAPES = CPU_SHAPES if DEVICE == "cpu" else GPU_SHAPES
# what a run on a CPU measures without --full
SMALL = ("demo", "demo x4", "demo, half active", "64 tokens", "64 tokens, half active", "one token", "512 tokens")


def too_large(provider: str, shape: Shape) -> str | None:
    """Why a dense provider cannot run on any GPU, before it has tried for a minute; None where it may."""
    gib = shape.n_tokens * shape.d_sae * 4 / 2**30
    if DEVICE == "cpu" or not provider.startswith("dense") or gib < 32:
        return None
    return f"a dense tensor of {shape.n_tokens:,} tokens and {shape.d_sae:,} features takes {gib:.0f} GiB, and a step several"


def threshold_for(shape: Shape) -> float:
    """The threshold above which a standard normal pre-activation lies as often as the shape's L0 asks."""
    return torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - shape.l0 / shape.d_sae)).item()


@lru_cache({"cpu": 2, "cuda": 0}[DEVICE])  # all providers of a group start from them; a GPU makes them soon and is full
def parameters(shape: Shape) -> dict[str, Tensor]:
    """Weights to be copied: random unit-norm decoder, thresholds at the quantile that gives the shape's L0."""
    g = torch.Generator(DEVICE).manual_seed(0)
    W_dec = torch.randn(shape.d_sae, shape.d_in, generator=g, device=DEVICE)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return {
        "W_enc": W_dec.t(),
        "b_enc": torch.zeros(shape.d_sae, device=DEVICE),
        "threshold": torch.full((shape.d_sae,), threshold_for(shape), device=DEVICE),
        "W_dec": W_dec,
        "b_dec": torch.zeros(shape.d_in, device=DEVICE),
    }


def tokens(shape: Shape) -> Tensor:
    """`[n_tokens, d_in]`, standard normal, so that pre-activations are too (rows of W_enc have unit norm)."""
    g = torch.Generator(DEVICE).manual_seed(1)
    return torch.randn(shape.n_tokens, shape.d_in, generator=g, device=DEVICE)
