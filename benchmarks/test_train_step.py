"""Forward and backward of a JumpReLU training step: the fused ops against dense PyTorch, eager and compiled.

Each provider is timed only once every gradient's error against fp64 is at most twice that of the dense eager step in the
same dtype. (Errors in norm, over the features none of whose pre-activations lies within rounding of the threshold or a window's
edge: there eager itself flips, and one flip outweighs all rounding.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

import fastsae_kernels as kernels
from benchmarks.shapes import BANDWIDTH, SHAPES, parameters, tokens
from fastsae_kernels import AutoencodeSpec, reference

SPEC = AutoencodeSpec(bandwidth=BANDWIDTH)
L0_COEFFICIENT = 0.01


def dense(x: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    sae_out, penalty, _ = reference.autoencode(x, *p.values(), None, SPEC)
    return sae_out, penalty


def fused(x: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    output = kernels.autoencode(x, *p.values(), spec=SPEC)
    return output.sae_out, output.penalty


def chunked(x: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    with kernels.use_backend("dense"):
        return fused(x, p)


def dense_bf16(x: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return dense(x, p)


EAGER = {"eager fp32": dense, "eager bf16": dense_bf16}
PROVIDERS: dict[str, Callable[[], Callable]] = {
    "dense eager fp32": lambda: dense,
    "dense compiled fp32": lambda: torch.compile(dense),
    "dense compiled bf16 autocast": lambda: torch.compile(dense_bf16),
    "dense in chunks fp32": lambda: chunked,
    "fused fp32": lambda: fused,
}
FLOOR = 2e-6  # of a relative error: sums over 4,096 tokens in another order
ROUNDING = 2e-6  # of an fp32 pre-activation, whose size is about 1


@cache
def errors_of(provider: str, shape: str) -> dict[str, float]:
    """Relative error in norm of each gradient against fp64."""
    x, p = tokens(SHAPES[shape]), parameters(SHAPES[shape])
    got = step(EAGER[provider] if provider in EAGER else PROVIDERS[provider](), x, p)
    compared, exact = clear_of_edges(got, shape), clear_of_edges(truth(shape), shape)
    return {name: ((compared[name] - grad).norm() / grad.norm()).item() for name, grad in exact.items()}


@cache
def truth(shape: str) -> dict[str, Tensor]:
    """The gradients in fp64."""
    p = {name: tensor.detach().double().requires_grad_() for name, tensor in parameters(SHAPES[shape]).items()}
    return step(dense, tokens(SHAPES[shape]).double(), p)


def clear_of_edges(grads: dict[str, Tensor], shape: str) -> dict[str, Tensor]:
    """The gradients of those features whose gates and windows do not hang on rounding; `b_dec` belongs to none."""
    clear = clear_features(shape)
    return {
        name: grad if name == "b_dec" else grad[:, clear] if name == "W_enc" else grad[clear]
        for name, grad in grads.items()
    }


@cache
def clear_features(shape: str) -> Tensor:
    """`[d_sae]` bool: no pre-activation of the feature lies within rounding of its threshold or of an edge of its window."""
    x, p = tokens(SHAPES[shape]).double(), {name: t.detach().double() for name, t in parameters(SHAPES[shape]).items()}
    clear = []
    for rows in torch.arange(SHAPES[shape].d_sae).split(1024):
        above = (x @ p["W_enc"][:, rows] + (p["b_enc"] - p["threshold"])[rows]).abs_()
        nearest = torch.minimum(above, (above - BANDWIDTH / 2).abs())
        clear.append(nearest.amin(0) > ROUNDING)
    return torch.cat(clear)


def step(forward: Callable, x: Tensor, p: dict[str, Tensor]) -> dict[str, Tensor]:
    for tensor in p.values():
        tensor.grad = None
    sae_out, penalty = forward(x, p)
    loss = (sae_out - x).square().sum(-1).mean() + L0_COEFFICIENT * penalty.mean()
    loss.backward()
    return {name: tensor.grad for name, tensor in p.items() if tensor.grad is not None}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_backward(benchmark, provider: str, shape: str) -> None:  # type: ignore[no-untyped-def]
    try:
        errors = errors_of(provider, shape)
    except Exception as error:
        if "compiled" in provider and "compiler" in str(error).lower():
            pytest.skip(f"torch.compile needs a C++ compiler: {str(error).splitlines()[0]}")
        raise
    eager = errors_of("eager bf16" if "bf16" in provider else "eager fp32", shape)
    worse = {name: (error, eager[name]) for name, error in errors.items() if error > 2 * eager[name] + FLOOR}
    assert not worse, f"{provider}: error over twice that of eager: {worse}"
    x, p, forward = tokens(SHAPES[shape]), parameters(SHAPES[shape]), PROVIDERS[provider]()
    benchmark.group = f"forward+backward, {shape}"
    benchmark.extra_info.update(provider=provider, baseline="dense eager fp32", shape=shape, error=max(errors.values()))
    benchmark.pedantic(step, args=(forward, x, p), rounds=5, warmup_rounds=1)
