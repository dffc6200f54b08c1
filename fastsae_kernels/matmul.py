"""Dense products; on a CPU by the faster of the two libraries inside PyTorch.

On a CPU of AMD MKL, whose fp32 product is PyTorch's, keeps to instructions of 256 bits. That costs half of the speed where the
CPU has units of 512 bits (Zen 5): there oneDNN's product takes half as long. But oneDNN sums in one long chain, with up to three
times the rounding error; up to `LONGEST_SUM` terms the errors are alike.
"""

from __future__ import annotations

import platform
import re
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LONGEST_SUM = 256  # of the products that oneDNN adds up; longer sums are taken in pieces
ZEN_5_FAMILY = 26
MIN_ROWS = 64  # of either operand for oneDNN; with fewer the copies that it needs cost more than it saves
FEW_COLUMNS = (
    16  # of a product of two transposed operands for MKL; with fewer it takes five times as long as with so many
)
MIN_BLOCK = 512  # columns of a product for MKL, where there are more of them than rows


@cache
def has_onednn() -> bool:
    """Whether this build of PyTorch has oneDNN's linear layer as an op."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def has_slow_mkl() -> bool:
    """Whether this is a CPU of AMD, on which MKL keeps to older instructions."""
    return torch.backends.mkl.is_available() and "AuthenticAMD" in _cpu()


@cache
def has_half_speed_mkl() -> bool:
    """Whether this is a CPU of AMD with units of 512 bits, half of which MKL leaves idle.

    Zen 4 (family 25) has the instructions, but units of 256 bits: there MKL multiplies 512 x 768 x 16384 in 74 ms, oneDNN
    with the copies that it needs in 112 ms (two threads).
    """
    family = re.search(r"cpu family\s*:\s*(\d+)", _cpu())
    return has_slow_mkl() and family is not None and int(family[1]) >= ZEN_5_FAMILY


def _cpu() -> str:
    """What the system says of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    return platform.processor() + (cpuinfo.read_text() if cpuinfo.exists() else "")


def sums_in_fp32() -> bool:
    """False where the user lets oneDNN multiply fp32 matrices in a narrower dtype."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # since PyTorch 2.9
    if matmul is None:
        return torch.get_float32_matmul_precision() == "highest"
    return matmul.fp32_precision in ("none", "ieee")


def by_onednn(a: Tensor, b_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b_t.T + bias`; both operands contiguous, as other strides are copied or multiplied by a slow loop."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b_t, bias, "none", [], "")
    return product


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """`out = a @ b`, or `out += a @ b`, for matrices of any strides on any device.

    Args:
        a: `[M, K]`.
        b: `[K, N]`.
        out: `[M, N]` in the dtype of the operands or a wider one.
        add: Add to what `out` holds.
    """
    if _is_transposed(out):  # then in the order of its memory
        a, b, out = b.t(), a.t(), out.t()
    if _is_onednn_faster(a, out):
        for start in range(0, a.shape[1], LONGEST_SUM):
            block = slice(start, start + LONGEST_SUM)
            part = by_onednn(a[:, block].contiguous(), b[block].t().contiguous())
            if add or start > 0:
                out += part
            else:
                out.copy_(part)
    elif out.dtype != a.dtype:
        if add:
            out += a @ b
        else:
            out.copy_(a @ b)
    elif not add and a.device.type == "cpu" and b.shape[1] < FEW_COLUMNS and _is_transposed(a) and _is_transposed(b):
        out.copy_((b.t() @ a.t()).t())
    else:
        by_blas(a, b, out, add=add)


def by_blas(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """`multiply` in one dtype by the library that PyTorch takes for it; on a CPU in blocks with no more columns than rows.

    MKL shares others badly among its threads: two of a Zen 4 limited to AVX2 multiply 512 x 768 by 768 x 4096 at 169 GFLOP/s,
    and at 184 in square blocks; one thread at 89 and 94.
    """
    by_mkl = out.device.type == "cpu" and out.element_size() > 2  # products of 16 bits are oneDNN's
    size = max(out.shape[0], MIN_BLOCK) if by_mkl else max(1, out.shape[1])
    for columns, block in zip(b.split(size, 1), out.split(size, 1), strict=True):
        if add:
            block.addmm_(a, columns)
        else:
            torch.mm(a, columns, out=block)


def _is_transposed(matrix: Tensor) -> bool:
    return matrix.stride(0) == 1 < matrix.stride(1)


def _is_onednn_faster(a: Tensor, out: Tensor) -> bool:
    if a.device.type != "cpu" or a.dtype != torch.float32 or out.dtype != torch.float32:
        return False
    enough = min(out.shape) >= MIN_ROWS and a.shape[1] > 0
    return enough and has_half_speed_mkl() and has_onednn() and sums_in_fp32()
