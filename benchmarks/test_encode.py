"""Encode with its selection against the matrix product alone, and against what one writes without this library.

Each provider's entries are compared with fp64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import fastsae_kernels as kernels
from benchmarks.floor import DTYPES, encode_work
from benchmarks.harness import Call, Case, Provider, benchmark_of
from benchmarks.shapes import CPU_SHAPES, DEVICE, GPU_SHAPES, HEADLINE, Shape, threshold_for
from fastsae_kernels import SparseActs

ENCODE_SHAPES = {
    "cpu": {
        HEADLINE: CPU_SHAPES[HEADLINE],
        "demo": CPU_SHAPES["demo"],
        "64 tokens": Shape(64, 512, 4096, 32),
        "one token": Shape(1, 768, 16384, 64),
    },
    "cuda": {
        **{name: shape for name, shape in GPU_SHAPES.items() if name != "1M features"},
        "gemma-2-2b 65k, 32 tokens": Shape(32, 2304, 65536, 64),
        "gemma-2-2b 65k, one token": Shape(1, 2304, 65536, 64),
    },
}[DEVICE]
CHECKED_TOKENS = 64  # compared with fp64, whose product of all tokens would not fit


class Problem(NamedTuple):
    """Arguments of encode; the threshold gives the shape's L0, or is 0 for top-k."""

    x: Tensor
    W_enc: Tensor  # [d_in, d_sae], stored feature-major
    b_enc: Tensor
    threshold: Tensor
    k: int

    @property
    def weight(self) -> Tensor:
        return self.W_enc.t()


@lru_cache(1)
def problem(s: Shape, dtype: torch.dtype, top_k: bool) -> Problem:
    g = torch.Generator(DEVICE).manual_seed(0)
    weight = functional.normalize(torch.randn(s.d_sae, s.d_in, generator=g, device=DEVICE), dim=1).to(dtype)
    x = torch.randn(s.n_tokens, s.d_in, generator=g, device=DEVICE).to(dtype)
    threshold = torch.full((s.d_sae,), 0.0 if top_k else threshold_for(s), device=DEVICE)
    b_enc = 0.01 * torch.randn(s.d_sae, generator=g, device=DEVICE).to(dtype)
    return Problem(x, weight.t(), b_enc, threshold, int(s.l0))


def product(p: Problem) -> Tensor:
    return functional.linear(p.x, p.weight, p.b_enc)


def dense_threshold(p: Problem) -> Tensor:
    hidden_pre = product(p)
    return hidden_pre * (hidden_pre > p.threshold)


def dense_topk(p: Problem) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(product(p), p.k, dim=1, sorted=False)
    return values.relu(), indices


def dense_batch_topk(p: Problem) -> Tensor:
    flat = product(p).relu().flatten()
    values, indices = torch.topk(flat, p.k * p.x.shape[0], sorted=False)
    return torch.zeros_like(flat).scatter(0, indices, values)


def fused(p: Problem, **options: Any) -> SparseActs:
    return kernels.encode(p.x, p.W_enc, p.b_enc, p.threshold, **options)


# operation -> its providers, the first of which the ratios refer to
Encoders = dict[str, Callable[[Problem], Any]]
OPERATIONS: dict[str, Encoders] = {
    "encode": {"product alone": product, "dense eager": dense_threshold, "fused": fused},
    "top-k": {"dense eager, torch.topk": dense_topk, "fused": lambda p: fused(p, k=p.k)},
    "batch top-k": {
        "dense eager, flat torch.topk": dense_batch_topk,
        "fused": lambda p: fused(p, k=p.k, batch_topk=True),
    },
}


def error_of(acts: SparseActs, p: Problem) -> float:
    """Largest relative error of a value against fp64 among the first tokens; infinite where an entry is wrong.

    An entry may be missing or too many only where the fp64 value is within rounding of the bound.
    """
    n = min(CHECKED_TOKENS, p.x.shape[0])
    rows = acts.packed()
    end = int(rows.row_offsets[n])
    exact = p.x[:n].double() @ p.W_enc.double() + p.b_enc.double()
    listed = torch.zeros_like(exact, dtype=torch.bool)
    at = (rows.row_ids()[:end], rows.indices[:end].long())
    listed[at] = True
    rounding = 16 * torch.finfo(p.x.dtype).eps
    bound = p.threshold.double()
    if bool((p.threshold == 0).all()):  # top-k: the smallest that was kept, of the token
        bound = torch.where(listed, exact, torch.inf).amin(1, keepdim=True).clamp_min(0)
    clear = (exact - bound).abs() > rounding * exact.abs().max()
    if not torch.equal(listed & clear, (exact > bound) & clear):
        return float("inf")
    return ((rows.values[:end] - exact[at]).abs() / exact[at].abs()).max().item() if end else 0.0


def check(
    encode: Callable[[Problem], SparseActs], shape: Shape, dtype: torch.dtype, top_k: bool
) -> tuple[float, float]:
    p = problem(shape, dtype, top_k)
    with torch.no_grad():
        return error_of(encode(p), p), 16 * torch.finfo(dtype).eps


def make(encode: Callable[[Problem], Any], shape: Shape, dtype: torch.dtype, top_k: bool) -> Call:
    return partial(torch.no_grad()(encode), problem(shape, dtype, top_k))


def case(operation: str, shape_name: str, dtype: str) -> Case:
    shape, encoders, top_k = ENCODE_SHAPES[shape_name], OPERATIONS[operation], operation != "encode"
    providers = {}
    for name, encode in encoders.items():
        arguments = (encode, shape, DTYPES[dtype], top_k)
        # what a batch keeps hangs on all tokens: its tests compare it with fp64, here the whole product would not fit
        has_gate = name.startswith("fused") and operation != "batch top-k"
        providers[name] = Provider(partial(make, *arguments), partial(check, *arguments) if has_gate else None, dtype)
    return Case(operation, shape_name, shape, providers, dtype, partial(encode_work, shape))


CASES = [
    case(operation, shape_name, dtype)
    for operation in OPERATIONS
    for shape_name in ENCODE_SHAPES
    for dtype in (("fp32", "bf16") if DEVICE == "cpu" else ("bf16",))
    # a large batch's flat torch.topk takes seconds
    if operation != "batch top-k" or not ("token" in shape_name or shape_name == HEADLINE)
]


test_encode = benchmark_of(CASES)
