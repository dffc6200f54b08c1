"""The least time an operation can take on this machine: its products at the rate of a large one, its bytes at that of a copy.

Both rates are measured here, in the same process, not taken from a data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks.shapes import DEVICE, Shape

COPY_BYTES = 2**28 if DEVICE == "cpu" else 2**31
PRODUCT = (4096, 1024, 4096) if DEVICE == "cpu" else (8192, 8192, 8192)
CALLS = 7
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}  # a row's dtype -> its tensors'


@dataclass(frozen=True)
class Work:
    """What an operation cannot do without."""

    flops: float  # how many its dense products take
    product_dtype: str  # in which they may run without changing the result
    n_bytes: float  # read and written, each once
    gathered_bytes: float = 0.0  # what the rows of its entries take, where no cache holds a row that was read before

    def floor_s(self, with_gathers: bool = False) -> float:
        """Returns the seconds of the products and of the bytes, one after the other."""
        n_bytes = self.n_bytes + (self.gathered_bytes if with_gathers else 0.0)
        return self.flops / (product_tflop_per_s(self.product_dtype) * 1e12) + n_bytes / (copy_gb_per_s() * 1e9)


def gathered_bytes(shape: Shape, dtype: str, n_rows: int) -> float:
    """Returns the bytes of the rows, each `d_in` wide, of which every entry reads `n_rows`."""
    return n_rows * shape.n_tokens * shape.l0 * shape.d_in * DTYPES[dtype].itemsize


def encode_work(shape: Shape, dtype: str) -> Work:
    """One product, `x` and `W_enc` read, the entries written."""
    s, size = shape, DTYPES[dtype].itemsize
    n_bytes = (s.n_tokens + s.d_sae) * s.d_in * size + s.n_tokens * s.l0 * 8
    return Work(2.0 * s.n_tokens * s.d_in * s.d_sae, _fastest(dtype), n_bytes)


def step_work(shape: Shape, dtype: str, *, adam: bool = False) -> Work:
    """One product; `x` and both weights read, the residual and both gradients written; or, with Adam, 6 x 4 bytes a weight.

    An entry reads four rows: of `W_dec` to decode, of `W_dec` and the residual for its gradient and that of `W_dec`, of `x` for
    that of `W_enc`.
    """
    encode, weights, size = encode_work(shape, dtype), 2 * shape.d_in * shape.d_sae, DTYPES[dtype].itemsize
    n_bytes = encode.n_bytes + shape.n_tokens * shape.d_in * size + weights / 2 * size
    n_bytes += weights * (24 if adam else size)
    return Work(encode.flops, encode.product_dtype, n_bytes, gathered_bytes(shape, dtype, 4))


def _fastest(dtype: str) -> str:
    """A CPU with bf16 units finds the candidates of fp32 operands in bf16 and scores those alone again."""
    from fastsae_kernels.cpu.product import rounds

    return "bf16" if DEVICE == "cpu" and rounds(DTYPES[dtype]) else dtype


@contextmanager
def tf32_products() -> Iterator[None]:
    """Computes fp32 products of the block, or of the function that it decorates, in tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def copy_gb_per_s() -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _best_seconds(lambda: target.copy_(source)) / 1e9


@cache
def product_tflop_per_s(dtype: str) -> float:
    """Rate of PyTorch's own product of random matrices."""
    n, d, m = PRODUCT
    left, right = (torch.randn(rows, d, device=DEVICE).to(DTYPES[dtype]) for rows in (n, m))

    def product() -> Tensor:
        return left @ right.t()

    return 2 * n * d * m / _best_seconds(tf32_products()(product) if dtype == "tf32" else product) / 1e12


def _best_seconds(call: Callable[[], object]) -> float:
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    seconds = []
    for _ in range(CALLS + 1):
        wait()
        start = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
