"""Rows in fp8 (e4m3) with a power of two as scale each, and the norms that `fp8` makes its margins of.

A program reads its rows twice, the second time from the cache, and writes a byte per element. Powers of two as scales make
scaling exact, so what rounding changed is exact too before it is squared. Letters: `R` rows of x or features, `D` d_in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import capability, launch_config

# rows are padded with zeros to a multiple of it: the product's loop needs no masks, whatever d_in is
PARTIAL = 128
# rows that stand for all when the spread is measured
MAX_SAMPLE = 1024
MIN_CAPABILITY = (8, 9)


class Quantised(NamedTuple):
    """Vectors of a matrix in fp8, and how far that is from the matrix."""

    values: Tensor  # [R, D padded with zeros to a multiple of PARTIAL] float8_e4m3fn, contiguous
    scales: Tensor  # [R] fp32: a power of two, NaN where the vector is not finite
    norms: Tensor  # [R] fp32: norm before or after rounding, whichever is larger
    errors: Tensor  # [R] fp32: norm of what rounding changed


class Fp8Weights(NamedTuple):
    """`W_enc` in fp8 with what makes its margins."""

    quantised: Quantised  # features as rows, norms weighted by the spread
    spread: Tensor | None  # [D] fp32: c in the module's docstring, None for the bound that never misses
    sigmas: float  # 1 for the bound

    def features(self, start: int, stop: int) -> Fp8Weights:
        """A range of the features."""
        return self._replace(quantised=Quantised(*(tensor[start:stop] for tensor in self.quantised)))


@triton.jit
def _fp8_quantise_kernel(
    # inputs
    matrix_ptr,  # [R, D]
    spread_ptr,  # [D] fp32 or None
    # outputs
    values_ptr,  # [R, width] fp8
    scales_ptr,  # [R] fp32
    norms_ptr,  # [R] fp32
    errors_ptr,  # [R] fp32
    # sizes
    n_rows,
    d_in,
    width,
    # strides
    stride_mr,
    stride_md,
    TOKENS: tl.constexpr,  # True: rows that differ from the spread have wider margins; False: it weights the norms
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program owns BLOCK_R rows: their largest exponents first, then their values in fp8 and the norms."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < n_rows
    rows = offs_r.to(tl.int64)[:, None]
    # bits of a magnitude order as its value does, infinity and NaN on top, so that the largest shows them
    largest = tl.zeros((BLOCK_R,), dtype=tl.int32)
    for start in range(0, d_in, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
        mask = mask_r[:, None] & (offs_d < d_in)
        value = tl.load(matrix_ptr + rows * stride_mr + offs_d * stride_md, mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
    # the largest value lands in [128, 256), below e4m3's 448; a scale and its inverse are both normal numbers
    exponent = tl.maximum(largest >> 23, 8)
    finite = exponent < 255
    scale = ((exponent - 7) << 23).to(tl.float32, bitcast=True)
    inverse = tl.where(finite, (261 - exponent) << 23, 0x7FC00000).to(tl.float32, bitcast=True)

    squares = tl.zeros((BLOCK_R,), dtype=tl.float32)
    rounded_squares = tl.zeros((BLOCK_R,), dtype=tl.float32)
    error_squares = tl.zeros((BLOCK_R,), dtype=tl.float32)
    fourth_powers = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
        mask = mask_r[:, None] & (offs_d < d_in)
        value = tl.load(matrix_ptr + rows * stride_mr + offs_d * stride_md, mask=mask, other=0.0).to(tl.float32)
        value *= inverse[:, None]
        rounded = value.to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + rows * width + offs_d, rounded, mask=mask_r[:, None] & (offs_d < width))
        rounded = rounded.to(tl.float32)
        error = value - rounded
        if spread_ptr is not None:
            spread = tl.load(spread_ptr + offs_d, mask=offs_d < d_in, other=1.0)
            if TOKENS:
                fourth_powers += tl.sum(value * value * value * value / spread, 1)
            else:
                root = tl.sqrt(spread)
                value *= root
                rounded *= root
                error *= root
        squares += tl.sum(value * value, 1)
        rounded_squares += tl.sum(rounded * rounded, 1)
        error_squares += tl.sum(error * error, 1)
    # squared in units of the scale, so that no square vanishes or overflows
    usual = tl.maximum(3.0 * squares * squares, 1e-30)
    unit = scale * tl.sqrt(tl.maximum(fourth_powers / usual, 1.0))
    tl.store(scales_ptr + offs_r, tl.where(finite, scale, float("nan")), mask=mask_r)
    tl.store(norms_ptr + offs_r, tl.sqrt(tl.maximum(squares, rounded_squares)) * unit, mask=mask_r)
    tl.store(errors_ptr + offs_r, tl.sqrt(error_squares) * unit, mask=mask_r)


def check_device(device: torch.device) -> None:
    """Raises RuntimeError where the GPU has no matrix instructions for e4m3."""
    if device.type == "cuda" and capability(device.index) < MIN_CAPABILITY:
        raise RuntimeError(
            "fp8: expected an NVIDIA GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell), "
            f"got {torch.cuda.get_device_name(device)}; encode without fp8"
        )


def quantise(matrix: Tensor, spread: Tensor | None, tokens: bool) -> Quantised:
    """Rows of `[R, D]` in fp8; fp32, bf16 or fp16, strides are free. What `spread` does depends on whether they are tokens."""
    n_rows, d_in = matrix.shape
    width = triton.cdiv(d_in, PARTIAL) * PARTIAL
    values = torch.empty(n_rows, width, dtype=torch.float8_e4m3fn, device=matrix.device)
    scales, norms, errors = torch.empty(3, n_rows, dtype=torch.float32, device=matrix.device)
    if n_rows > 0:
        config = launch_config("fp8_quantise", matrix)
        _fp8_quantise_kernel[(triton.cdiv(n_rows, config["BLOCK_R"]),)](
            matrix_ptr=matrix,
            spread_ptr=spread,
            values_ptr=values,
            scales_ptr=scales,
            norms_ptr=norms,
            errors_ptr=errors,
            n_rows=n_rows,
            d_in=d_in,
            width=width,
            stride_mr=matrix.stride(0),
            stride_md=matrix.stride(1),
            TOKENS=tokens,
            **config,
        )
    return Quantised(values, scales, norms, errors)


def dimension_spread(x: Tensor) -> Tensor:
    """`[D]` fp32 that adds up to 1: the share of each dimension in the tokens' squares, averaged with an equal share."""
    sample = x[:: max(1, x.shape[0] // MAX_SAMPLE)].float()
    squares = (sample / sample.abs().amax(1, keepdim=True)).square()  # of the largest: no square vanishes or overflows
    shares = squares / squares.sum(1, keepdim=True)
    equal = 1 / x.shape[1]
    shares = torch.where(shares.isfinite(), shares, equal)  # rows of zeros, infinite rows
    return (shares.sum(0) + equal) / (len(shares) + 1) * 0.5 + 0.5 * equal


def fp8_weights(W_enc: Tensor, x: Tensor, sigmas: float | None = 6.0) -> Fp8Weights:
    """What `list_entries_fp8` needs of the weights; to be made again whenever they change.

    Args:
        W_enc: `[d_in, S]`; fp32, bf16 or fp16, best stored feature-major.
        x: `[N, d_in]`: tokens like those to come, or the same.
        sigmas: Margin in standard deviations of the rounding errors; None for the bound that never misses.

    Raises:
        ValueError: `sigmas` is not positive.
        RuntimeError: The GPU has no fp8.
    """
    if sigmas is not None and not sigmas > 0:
        raise ValueError(f"sigmas: expected a positive number or None, got {sigmas}")
    check_device(W_enc.device)
    spread = None if sigmas is None else dimension_spread(x)
    return Fp8Weights(quantise(W_enc.t(), spread, tokens=False), spread, 1.0 if sigmas is None else sigmas)
