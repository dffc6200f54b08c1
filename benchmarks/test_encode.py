"""Encode with its selection against the matrix product alone, and against what one writes without this library.

    pytest benchmarks/test_encode.py --results benchmarks/results       on a CPU, or on a GPU where there is one

Each provider's entries are compared with fp64 before it is timed. A call is timed in runs of several, so that a GPU is
waited for once a run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastsae_kernels as kernels
from benchmarks.memory import MIB, peak_mib
from benchmarks.shapes import Shape, threshold_for
from fastsae_kernels import SparseActs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU_SHAPES = {
    "gpt2-small-16k": Shape(4096, 768, 16384, 78),
    "demo": Shape(1024, 256, 2048, 32),
    "small": Shape(64, 512, 4096, 32),
    "one token": Shape(1, 768, 16384, 64),
}
GPU_SHAPES = {
    "B": Shape(8192, 2304, 65536, 64),
    "C": Shape(8192, 4096, 131072, 64),
    "D, GPT-2": Shape(4096, 768, 24576, 32),
    "B, 32 tokens": Shape(32, 2304, 65536, 64),
    "B, one token": Shape(1, 2304, 65536, 64),
}
SHAPES = GPU_SHAPES if DEVICE == "cuda" else CPU_SHAPES
CHECKED_TOKENS = 64  # compared with fp64, whose product of all tokens would not fit


@dataclass(frozen=True)
class Problem:
    """Arguments of encode; the threshold gives the shape's L0, or is 0 for top-k."""

    x: Tensor
    W_enc: Tensor  # [d_in, d_sae], stored feature-major
    b_enc: Tensor
    threshold: Tensor
    k: int

    @property
    def weight(self) -> Tensor:
        return self.W_enc.t()


@cache
def problem(shape: str, dtype: torch.dtype, top_k: bool) -> Problem:
    s = SHAPES[shape]
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


def fused(p: Problem) -> SparseActs:
    return kernels.encode(p.x, p.W_enc, p.b_enc, p.threshold)


def fused_rescored(p: Problem) -> SparseActs:
    return kernels.encode(p.x, p.W_enc, p.b_enc, p.threshold, rescore=True)


def fused_topk(p: Problem) -> SparseActs:
    return kernels.encode(p.x, p.W_enc, p.b_enc, p.threshold, k=p.k)


def fused_batch_topk(p: Problem) -> SparseActs:
    return kernels.encode(p.x, p.W_enc, p.b_enc, p.threshold, k=p.k, batch_topk=True)


def by_rival(name: str) -> Callable[[], AbstractContextManager]:
    def rival() -> AbstractContextManager:
        from fastsae_kernels.gpu.rivals import use_rival

        return use_rival(name)

    return rival


# group -> what it is compared with, and the providers
THRESHOLD: dict[str, Callable] = {"product alone": product, "dense, threshold": dense_threshold, "fused": fused}
TOP_K: dict[str, Callable] = {"F.linear + torch.topk": dense_topk, "fused": fused_topk}
BATCH_TOP_K: dict[str, Callable] = {"F.linear + flat torch.topk": dense_batch_topk, "fused": fused_batch_topk}
RIVALS = {f"fused, {name}": by_rival(name) for name in ("pointer", "persistent", "chunks")} if DEVICE == "cuda" else {}


def error_of(acts: SparseActs, p: Problem, shape: str) -> float:
    """Largest relative error of a value against fp64 among the first tokens; fails where an entry is wrong.

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
    assert torch.equal(listed & clear, (exact > bound) & clear), f"{shape}: entries differ from fp64"
    return ((rows.values[:end] - exact[at]).abs() / exact[at].abs()).max().item() if end else 0.0


def timed(benchmark, shape: str, call: Callable[[], object], rounds: int = 9) -> None:  # type: ignore[no-untyped-def]
    """Times runs of several calls; the summary divides by `calls`."""
    s = SHAPES[shape]
    work = {"cpu": 2e9, "cuda": 1e13}[DEVICE]  # multiply-adds of a run: some ten milliseconds
    calls = max(1, min(50, int(work / (s.n_tokens * s.d_in * s.d_sae))))

    def run() -> None:
        for _ in range(calls):
            call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    dense = s.n_tokens * s.d_sae * 4 / MIB
    benchmark.extra_info.update(calls=calls, shape=shape, peak_mib=peak_mib(call), dense_tensor_mib=dense)
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=2)


def measure(benchmark, shape: str, dtype: str, kind: str, providers: dict[str, Callable], name: str) -> None:  # type: ignore[no-untyped-def]
    p = problem(shape, getattr(torch, dtype), kind != "threshold")
    with torch.no_grad(), RIVALS.get(name, nullcontext)():
        call = providers[name] if name in providers else providers["fused"]  # a rival is the fused op, forced
        result = call(p)
        error = error_of(result, p, shape) if isinstance(result, SparseActs) and kind != "batch top-k" else None
        benchmark.group = f"encode, {kind}, {shape}, {dtype}"
        benchmark.extra_info.update(provider=name, baseline=next(iter(providers)), error=error)
        del result
        timed(benchmark, shape, lambda: call(p), rounds=3 if kind == "batch top-k" else 9)  # a flat top-k is slow


DTYPES = ["float32", "bfloat16"] if DEVICE == "cpu" else ["bfloat16"]


@pytest.mark.parametrize("provider", [*THRESHOLD, *RIVALS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_threshold(benchmark, shape: str, dtype: str, provider: str) -> None:  # type: ignore[no-untyped-def]
    measure(benchmark, shape, dtype, "threshold", THRESHOLD, provider)


@pytest.mark.skipif(DEVICE != "cpu", reason="products of a GPU are not rounded")
@pytest.mark.parametrize("shape", SHAPES)
def test_threshold_rescored(benchmark, shape: str) -> None:  # type: ignore[no-untyped-def]
    providers = {"product alone": product, "fused, rescored": fused_rescored}
    measure(benchmark, shape, "bfloat16", "threshold", providers, "fused, rescored")


@pytest.mark.parametrize("provider", [*TOP_K, *RIVALS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_topk(benchmark, shape: str, dtype: str, provider: str) -> None:  # type: ignore[no-untyped-def]
    measure(benchmark, shape, dtype, "top-k", TOP_K, provider)


@pytest.mark.parametrize("provider", BATCH_TOP_K)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [name for name in SHAPES if "token" not in name])
def test_batch_topk(benchmark, shape: str, dtype: str, provider: str) -> None:  # type: ignore[no-untyped-def]
    measure(benchmark, shape, dtype, "batch top-k", BATCH_TOP_K, provider)


@pytest.mark.skipif(DEVICE != "cuda", reason="a GPU's latency is bound by reading the weights")
@pytest.mark.parametrize("provider", ["copy of W_enc", "fused"])
def test_latency_of_32_tokens(benchmark, provider: str) -> None:  # type: ignore[no-untyped-def]
    """A copy reads and writes, so reading once is half of it."""
    p = problem("B, 32 tokens", torch.bfloat16, False)
    target = torch.empty_like(p.weight)
    providers = {"copy of W_enc": lambda p: target.copy_(p.weight), "fused": fused}
    with torch.no_grad():
        benchmark.group = "encode, latency, B, 32 tokens"
        benchmark.extra_info.update(provider=provider, baseline="copy of W_enc", error=None)
        timed(benchmark, "B, 32 tokens", lambda: providers[provider](p))
