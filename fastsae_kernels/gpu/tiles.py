"""Pieces that several kernels share: the product of one tile, the gather of rows, the gate, the penalty, their gradients.

Letters: `B` tokens (rows of x), `D` d_in or d_out, `S` d_sae. Everything is fp32 but the operands of `tl.dot`, which keep
their dtype and accumulate in fp32. Two kernels that recompute the same `hidden_pre` call the same function, so the
formulas of `reference.autoencode` stand here once.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# the longest row that one program can hold in its registers: 16 elements of each of 512 threads
MAX_DEPTH = 8192


@triton.jit
def start_of_tile(tile, n_rows, n_columns, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, GROUP_B: tl.constexpr):
    """`(first row, first column)` of a tile; GROUP_B row tiles share a column tile before the next one: both stay in L2."""
    tiles_b = tl.cdiv(n_rows, BLOCK_B)
    in_group = GROUP_B * tl.cdiv(n_columns, BLOCK_S)
    first_b = tile // in_group * GROUP_B
    group = min(tiles_b - first_b, GROUP_B)
    return (first_b + tile % in_group % group) * BLOCK_B, tile % in_group // group * BLOCK_S


@triton.jit
def tile_product(
    a_ptr,  # [B, D]
    rows,  # [BLOCK_B] row of a
    stride_ab,
    stride_ad,
    b_ptr,  # [D, S]
    columns,  # [BLOCK_S] column of b
    stride_bd,
    stride_bs,
    depth,  # D
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,  # BLOCK_D divides D: no masks in the loop
):
    """`a[rows] @ b[:, columns]`, `[BLOCK_B, BLOCK_S]` fp32; rows and columns must be in range, so nothing is masked there."""
    # int64: row * stride passes 2^31 at d_sae = 1M, d_in = 2304
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    a_ptrs = a_ptr + rows.to(tl.int64)[:, None] * stride_ab + offs_d[None, :] * stride_ad
    b_ptrs = b_ptr + offs_d[:, None] * stride_bd + columns.to(tl.int64)[None, :] * stride_bs
    acc = tl.zeros((BLOCK_B, BLOCK_S), dtype=tl.float32)
    for start in range(0, depth, BLOCK_D):
        if EVEN_D:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            mask_d = start + offs_d < depth
            a = tl.load(a_ptrs, mask=mask_d[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_d[:, None], other=0.0)
        acc = tl.dot(a.to(b.dtype), b, acc, input_precision="ieee")
        a_ptrs += BLOCK_D * stride_ad
        b_ptrs += BLOCK_D * stride_bd
    return acc


@triton.jit
def gather_rows(ptr, rows, stride_b, stride_d, offs_d, depth, used):
    """`[BLOCK_E, BLOCK_D]` fp32: rows of a matrix at some columns; zero where a row is not used, and past the last column."""
    ptrs = ptr + rows[:, None] * stride_b + offs_d[None, :].to(tl.int64) * stride_d
    return tl.load(ptrs, mask=used[:, None] & (offs_d < depth)[None, :], other=0.0).to(tl.float32)


@triton.jit
def gather_sum(weight, ptr, rows, stride_b, stride_d, offs_d, depth):
    """`[BLOCK_D]` fp32: the sum of weight * row over some rows of a matrix; those of weight 0 are not read."""
    return tl.sum(weight[:, None] * gather_rows(ptr, rows, stride_b, stride_d, offs_d, depth, weight != 0.0), 0)


@triton.jit
def store_row(ptr, row, offs_d, depth, values):
    """Columns of one row of a contiguous matrix, in its dtype."""
    tl.store(ptr + row * depth + offs_d, values.to(ptr.dtype.element_ty), mask=offs_d < depth)


def pieces_of(depth: int) -> tuple[int, int]:
    """A row as two powers of two that leave few lanes idle: 2304 is 2048 and 256, 1024 is twice 512."""
    first = max(triton.next_power_of_2(depth) // 2, 1)
    return first, triton.next_power_of_2(max(depth - first, 1))


@triton.jit
def columns_of_pieces(BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr):
    """The columns of a row's two pieces."""
    # int32: a mask is then one comparison in place of two, so that it is rather made again than kept in a register
    return tl.arange(0, BLOCK_1), BLOCK_1 + tl.arange(0, BLOCK_2)


class Matrix(NamedTuple):
    """A matrix of any strides; a kernel sees a pointer in place of the tensor."""

    rows: Tensor
    stride_row: int
    stride_column: int


def matrix_of(rows: Tensor) -> Matrix:
    """The matrix with its strides."""
    return Matrix(rows, *rows.stride())


@triton.jit
def read_row(matrix, row, columns_1, columns_2, depth):
    """Both pieces of a row, fp32; zero from `depth` on."""
    ptrs = matrix.rows + row * matrix.stride_row
    piece_1 = tl.load(ptrs + columns_1.to(tl.int64) * matrix.stride_column, mask=columns_1 < depth, other=0.0)
    piece_2 = tl.load(ptrs + columns_2.to(tl.int64) * matrix.stride_column, mask=columns_2 < depth, other=0.0)
    return piece_1.to(tl.float32), piece_2.to(tl.float32)


@triton.jit
def write_row(matrix, row, columns_1, columns_2, depth, piece_1, piece_2):
    """Both pieces of a row, in the matrix's dtype."""
    ptrs = matrix.rows + row * matrix.stride_row
    dtype = matrix.rows.dtype.element_ty
    tl.store(ptrs + columns_1.to(tl.int64) * matrix.stride_column, piece_1.to(dtype), mask=columns_1 < depth)
    tl.store(ptrs + columns_2.to(tl.int64) * matrix.stride_column, piece_2.to(dtype), mask=columns_2 < depth)


@triton.jit
def gather_pieces(matrix, rows, columns_1, columns_2, depth, used):
    """Both pieces of some rows, `[BLOCK_E, BLOCK_1]` and `[BLOCK_E, BLOCK_2]` fp32."""
    piece_1 = gather_rows(matrix.rows, rows, matrix.stride_row, matrix.stride_column, columns_1, depth, used)
    piece_2 = gather_rows(matrix.rows, rows, matrix.stride_row, matrix.stride_column, columns_2, depth, used)
    return piece_1, piece_2


@triton.jit
def store_pieces(ptr, row, columns_1, columns_2, depth, piece_1, piece_2):
    """Both pieces of one row of a contiguous matrix, in its dtype."""
    store_row(ptr, row, columns_1, depth, piece_1)
    store_row(ptr, row, columns_2, depth, piece_2)


@triton.jit
def add_three(a, b, c, more_a, more_b, more_c):
    """For one `tl.reduce` of three sums: on three reductions side by side LLVM's SLP vectoriser, as of Triton 3.8, crashes."""
    return a + more_a, b + more_b, c + more_c


@triton.jit
def gate(hidden_pre, threshold, half_bandwidth):
    """`(active, window)` of the strict gate and the open window; NaN is neither."""
    return hidden_pre > threshold, tl.abs(hidden_pre - threshold) < half_bandwidth


@triton.jit
def penalty_terms(feature_acts, active, scale, tanh_scale, PENALTY: tl.constexpr):
    """Each feature's share of the penalty."""
    if PENALTY == "l0":
        return active.to(tl.float32)
    elif PENALTY == "l1":
        return feature_acts * scale
    else:
        y = tanh_scale * feature_acts * scale
        # of |y|, for e^-2y is more than fp32 holds below -44; a scale may be negative
        decay = tl.exp(-2.0 * tl.abs(y))
        size = (1.0 - decay) / (1.0 + decay)
        # (1 - e^-2y) cancels for small y: four terms of the series are exact to fp32 below 0.1
        y2 = y * y
        series = y * (1.0 + y2 * (-1.0 / 3.0 + y2 * (2.0 / 15.0 - y2 * (17.0 / 315.0))))
        return tl.where(tl.abs(y) < 0.1, series, tl.where(y < 0.0, -size, size))


@triton.jit
def gate_gradients(
    feature_acts,  # 0 where inactive
    active,
    window,
    grad_acts,  # grad_out @ W_dec.T, without the penalty
    grad_penalty,
    threshold,
    scale,
    inv_bandwidth,
    tanh_scale,
    PENALTY: tl.constexpr,
    STE_TO_INPUT: tl.constexpr,
):
    """Shares of `(grad_hidden_pre, grad_threshold, grad_scale)` of each entry, as in `reference.autoencode`."""
    grad_scale = tl.zeros_like(feature_acts)
    step = tl.zeros_like(grad_acts)
    if PENALTY == "l0":
        step += grad_penalty
    elif PENALTY == "l1":
        grad_acts += grad_penalty * scale
        grad_scale += grad_penalty * feature_acts
    else:
        decay = tl.exp(-2.0 * tl.abs(tanh_scale * feature_acts * scale))
        slope = grad_penalty * tanh_scale * 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
        grad_acts += slope * scale
        grad_scale += slope * feature_acts
    estimate = tl.where(window, (threshold * grad_acts + step) * inv_bandwidth, 0.0)
    grad_hidden_pre = tl.where(active, grad_acts, 0.0)
    if STE_TO_INPUT:
        grad_hidden_pre += estimate
    return grad_hidden_pre, -estimate, tl.where(active, grad_scale, 0.0)


@triton.jit
def pack_entry(index, value):
    """Index (high half) and value bits (low half) as one int64: one store, and a key that sorts by index."""
    bits = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return (index.to(tl.int64) << 32) | bits


@triton.jit
def entry_index(entry):
    """Index of a packed entry, int32."""
    return (entry >> 32).to(tl.int32)


@triton.jit
def entry_value(entry):
    """Value of a packed entry, fp32."""
    return entry.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def value_bits(value):
    """An int32 that orders non-negative values as they are, any NaN on top."""
    return tl.where(value != value, 0x7FC00000, value.to(tl.int32, bitcast=True))


@triton.jit
def rank_entry(index, value):
    """An int64 that orders non-negative values (any NaN on top), the lower index first among equals."""
    return (value_bits(value).to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def unrank_entry(rank):
    """The packed entry that `rank_entry` ranked."""
    return ((0x7FFFFFFF - (rank & 0x7FFFFFFF)) << 32) | (rank >> 32)


class EncoderInputs(NamedTuple):
    """What pre-activations are computed from; a kernel sees pointers in place of tensors."""

    x: Tensor  # [B, D]
    W_enc: Tensor  # [D, S]
    b_enc: Tensor  # [S]
    threshold: Tensor  # [S] fp32
    d_in: int
    d_sae: int
    stride_xb: int
    stride_xd: int
    stride_wd: int
    stride_ws: int


def encoder_inputs(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> EncoderInputs:
    """The tensors with their sizes and strides."""
    return EncoderInputs(x, W_enc, b_enc, threshold, *W_enc.shape, *x.stride(), *W_enc.stride())


@triton.jit
def active_bits(
    encoder,  # EncoderInputs
    rows,  # [BLOCK_B] row of x, in range
    offs_s,  # [BLOCK_S] feature, past the last one too
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    """`(bits, hidden_pre)` of one tile: `value_bits` of the active and NaN entries, 0 elsewhere."""
    columns = offs_s % encoder.d_sae
    hidden_pre = tile_product(
        encoder.x, rows, encoder.stride_xb, encoder.stride_xd,
        encoder.W_enc, columns, encoder.stride_wd, encoder.stride_ws, encoder.d_in,
        BLOCK_B, BLOCK_S, BLOCK_D, EVEN_D,
    )  # fmt: skip
    hidden_pre += tl.load(encoder.b_enc + columns).to(tl.float32)[None, :]
    active, _ = gate(hidden_pre, tl.load(encoder.threshold + columns)[None, :], 0.0)
    active = (active | (hidden_pre != hidden_pre)) & (offs_s < encoder.d_sae)[None, :]
    return tl.where(active, value_bits(hidden_pre), 0), hidden_pre
