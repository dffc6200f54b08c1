"""Decode of listed entries against the dense product, and against the gather that one writes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import fastsae_kernels as kernels
from benchmarks.floor import DTYPES, Work, gathered_bytes
from benchmarks.harness import Case, Provider, benchmark_of
from benchmarks.shapes import DEVICE, HEADLINE, SHAPES, Shape
from fastsae_kernels import SparseActs

DECODE_SHAPES = {"cpu": (HEADLINE, "demo"), "cuda": ("gemma-2-2b 65k", "llama-3.1-8b x32")}[DEVICE]
CHECKED_TOKENS = 64
Decode = Callable[[], Tensor]


class Problem(NamedTuple):
    """`k` entries in each row, features ascending."""

    acts: SparseActs
    W_dec: Tensor
    b_dec: Tensor
    k: int


@lru_cache(1)
def problem(s: Shape, dtype: torch.dtype) -> Problem:
    g = torch.Generator(DEVICE).manual_seed(0)
    k = int(s.l0)
    chosen = torch.rand(s.n_tokens, s.d_sae, generator=g, device=DEVICE).topk(k).indices.sort().values
    offsets = torch.arange(0, (s.n_tokens + 1) * k, k, dtype=torch.int32, device=DEVICE)
    values = torch.rand(s.n_tokens * k, generator=g, device=DEVICE) + 0.5
    W_dec = functional.normalize(torch.randn(s.d_sae, s.d_in, generator=g, device=DEVICE), dim=1).to(dtype)
    acts = SparseActs(offsets, chosen.flatten().int(), values, (s.n_tokens, s.d_sae))
    return Problem(acts, W_dec, torch.randn(s.d_in, generator=g, device=DEVICE).to(dtype), k)


def dense_product(p: Problem) -> Decode:
    return partial(torch.addmm, p.b_dec, p.acts.to_dense().to(p.W_dec.dtype), p.W_dec)


def embedding_bag(p: Problem) -> Decode:
    indices, weights = p.acts.indices.view(-1, p.k), p.acts.values.view(-1, p.k).to(p.W_dec.dtype)
    return lambda: functional.embedding_bag(indices, p.W_dec, per_sample_weights=weights, mode="sum") + p.b_dec


def fused(p: Problem) -> Decode:
    return partial(kernels.decode, p.acts, p.W_dec, p.b_dec)


DECODERS = {"dense eager": dense_product, "embedding_bag": embedding_bag, "fused": fused}


def error_of(name: str, p: Problem) -> float:
    exact = p.acts.to_dense()[:CHECKED_TOKENS].double() @ p.W_dec.double() + p.b_dec.double()
    got = DECODERS[name](p)()[:CHECKED_TOKENS].double()
    return ((got - exact).norm() / exact.norm()).item()


def check(name: str, s: Shape, dtype: torch.dtype) -> tuple[float, float]:
    p = problem(s, dtype)
    return error_of(name, p), 2 * error_of("dense eager", p) + 1e-6


def work(s: Shape, dtype: str) -> Work:
    """Every decoder row is read once at least, every row of the result written."""
    n_bytes = (s.d_sae + s.n_tokens) * s.d_in * DTYPES[dtype].itemsize + s.n_tokens * s.l0 * 8
    return Work(0, dtype, n_bytes, gathered_bytes(s, dtype, 1))


def case(shape_name: str, dtype: str) -> Case:
    shape, torch_dtype = SHAPES[shape_name], DTYPES[dtype]
    providers = {
        name: Provider(
            lambda make=make: torch.no_grad()(make(problem(shape, torch_dtype))),
            partial(check, name, shape, torch_dtype),
        )
        for name, make in DECODERS.items()
    }
    return Case("decode", shape_name, shape, providers, dtype, partial(work, shape))


test_decode = benchmark_of([case(shape_name, dtype) for shape_name in DECODE_SHAPES for dtype in ("fp32", "bf16")])
