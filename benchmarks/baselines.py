"""The dense step as one writes it in PyTorch, eager, compiled and in bf16, and its truth in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.shapes import BANDWIDTH, DEVICE, Shape
from fastsae_kernels import AutoencodeSpec, reference

SPEC = AutoencodeSpec(bandwidth=BANDWIDTH)
L0_COEFFICIENT = 0.01
CHECKED_TOKENS = {"cpu": 128, "cuda": 256}[DEVICE]
# the fp64 truth of more features, or of more weights, would take longer than all else, or not fit
CHECKED_FEATURES = {"cpu": 2**16, "cuda": 2**17}[DEVICE]
CHECKED_WEIGHTS = {"cpu": 2**24, "cuda": 2**27}[DEVICE]
ROUNDING = 2e-6  # of an fp32 pre-activation, whose size is about 1
Parameters = dict[str, Tensor]
Loss = Callable[[Tensor, Parameters], Tensor]
Function = TypeVar("Function", bound=Callable[..., Any])


def dense_loss(x: Tensor, p: Parameters) -> Tensor:
    sae_out, penalty, _ = reference.autoencode(x, *p.values(), None, SPEC)
    return (sae_out - x).square().sum(-1).mean() + L0_COEFFICIENT * penalty.mean()


def in_bf16(function: Function) -> Function:
    """The function under bf16 autocast."""
    return torch.autocast(DEVICE, torch.bfloat16)(function)


def in_tf32(function: Function) -> Function:
    """The function with fp32 products in tf32."""
    return _tf32_products()(function)


@contextmanager
def _tf32_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compiled(function: Function) -> Function:
    """Compiled for the shapes it meets, as for a training run."""
    return torch.compile(function, dynamic=False)  # type: ignore[return-value]


def checked(shape: Shape) -> Shape:
    """The part of a shape that is compared with fp64."""
    d_sae = min(shape.d_sae, CHECKED_FEATURES, CHECKED_WEIGHTS // shape.d_in)
    return replace(shape, n_tokens=min(shape.n_tokens, CHECKED_TOKENS), d_sae=d_sae)


@torch.no_grad()
def clear_tokens(x: Tensor, p: Parameters, architecture: str, k: int) -> Tensor:
    """`[N]` bool: which features of the token are active, or in the window, does not hang on rounding.

    Elsewhere two right answers differ by a feature, which outweighs all rounding.
    """
    clear = []
    for rows in x.split(512):
        if architecture == "jumprelu":
            above = (reference.hidden_pre(rows, p["W_enc"], p["b_enc"]) - p["threshold"]).abs()
            nearest = torch.minimum(above, (above - BANDWIDTH / 2).abs()).amin(1)
        else:
            pre = reference.hidden_pre(rows - p["b_dec"], p["W_enc"], p["b_enc"])
            largest = pre.topk(min(k + 1, pre.shape[1])).values.relu()
            nearest = largest[:, k - 1] - largest[:, k] if k < pre.shape[1] else largest[:, k - 1]
        clear.append(nearest > ROUNDING)
    return torch.cat(clear)


def relative_errors(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Error in norm of each tensor, relative to its norm."""
    return {name: ((got[name].double() - tensor).norm() / tensor.norm()).item() for name, tensor in exact.items()}


def worst(errors: dict[str, float], limits: dict[str, float]) -> tuple[float, float]:
    """The error that is largest against its limit, and that limit."""
    name = max(errors, key=lambda name: errors[name] / limits[name])
    return errors[name], limits[name]
