"""Forward and backward of a JumpReLU training step: the fused ops against dense PyTorch, eager and compiled.

Each provider first has to agree with the dense reference in every gradient; only then is it timed.
"""

from __future__ import annotations

from collections.abc import Callable

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


PROVIDERS: dict[str, Callable[[], Callable]] = {
    "dense eager fp32": lambda: dense,
    "dense compiled fp32": lambda: torch.compile(dense),
    "dense compiled bf16 autocast": lambda: torch.compile(dense_bf16),
    "dense in chunks fp32": lambda: chunked,
    "fused fp32": lambda: fused,
}
TOLERANCE = {"dense compiled bf16 autocast": 0.1}  # relative, in norm; all others 1e-6


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
    torch.manual_seed(0)
    x, p = tokens(SHAPES[shape]), parameters(SHAPES[shape])
    truth = {name: grad.clone() for name, grad in step(dense, x, p).items()}
    forward = PROVIDERS[provider]()
    try:
        grads = step(forward, x, p)
    except Exception as error:
        if "compiled" in provider and "compiler" in str(error).lower():
            pytest.skip(f"torch.compile needs a C++ compiler: {str(error).splitlines()[0]}")
        raise
    errors = {name: ((grads[name] - truth[name]).norm() / truth[name].norm()).item() for name in truth}
    assert max(errors.values()) <= TOLERANCE.get(provider, 1e-6), f"{provider} disagrees with the reference: {errors}"
    benchmark.group = f"forward+backward, {shape}"
    benchmark.extra_info.update(provider=provider, shape=shape, max_relative_gradient_error=max(errors.values()))
    benchmark.pedantic(step, args=(forward, x, p), rounds=5, warmup_rounds=1)
