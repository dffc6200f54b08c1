"""Decode: `acts @ W_dec + b_dec` from listed entries, and the statistics of each row.

    sae_out[n] = sum_e value_e * W_dec[index_e] + b_dec, less target[n] where one is given
    squared_error[n] = sum of squares of that residual
    penalty[n] = sum_e of (value_e > 0), value_e * scale or tanh(tanh_scale * value_e * scale)

Letters: `B` tokens, `D` d_out, `S` d_sae. Decoder rows are wide, so gathers are coalesced: 1 flop per byte, against a
GEMM over all S in the dense step. The same kernel computes `grad_x` from `(grad_hidden_pre, W_enc.T)`. With a target, the
reconstruction is never written: its residual is both the loss and, but for a factor per row, its gradient.

Numerics: cast to fp32 after loading, accumulated in fp32 in the order of the entries: deterministic (feature counts are
integer atomics). The residual is squared before it is rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import launch_config, on_device
from fastsae_kernels.gpu.tiles import penalty_terms
from fastsae_kernels.types import AutoencodeSpec, SparseActs

# programs that share the rows of a column sum; bounds its scratch to MAX_ROW_SPLITS x d_out
MAX_ROW_SPLITS = 128


@triton.jit
def _decode_kernel(
    # inputs
    row_offsets_ptr,  # [B + 1]
    row_counts_ptr,  # [B]
    indices_ptr,  # [nnz]
    values_ptr,  # [nnz]
    W_dec_ptr,  # [S, D]
    b_dec_ptr,  # [D] or None
    target_ptr,  # [B, D] or None
    # outputs
    sae_out_ptr,  # [B, D], the residual with a target
    squares_ptr,  # [B, D / BLOCK_D] fp32, with a target
    # sizes and strides
    d_out,
    stride_ws,
    stride_wd,
    stride_tb,
    stride_td,
    stride_ob,
    stride_od,
    BLOCK_E: tl.constexpr,  # entries gathered at a time
    BLOCK_D: tl.constexpr,
):
    """Program (n, i) owns columns i * BLOCK_D .. of row n."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < d_out
    start = tl.load(row_offsets_ptr + row).to(tl.int64)
    count = tl.load(row_counts_ptr + row).to(tl.int32)
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    if b_dec_ptr is not None:
        acc += tl.load(b_dec_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    for first in range(0, count, BLOCK_E):
        offs_e = first + tl.arange(0, BLOCK_E)
        mask_e = offs_e < count
        index = tl.load(indices_ptr + start + offs_e, mask=mask_e, other=0).to(tl.int64)
        value = tl.load(values_ptr + start + offs_e, mask=mask_e, other=0.0).to(tl.float32)
        w_ptrs = W_dec_ptr + index[:, None] * stride_ws + offs_d[None, :] * stride_wd
        # entries of the window alone are worth nothing here, so their rows are not read
        used = mask_e & (value != 0.0)
        w = tl.load(w_ptrs, mask=used[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(value[:, None] * w, 0)
    if target_ptr is not None:
        acc -= tl.load(target_ptr + row * stride_tb + offs_d * stride_td, mask=mask_d, other=0.0).to(tl.float32)
        # an infinite value makes NaN of the zeros beyond the last column
        square = tl.sum(tl.where(mask_d, acc * acc, 0.0), 0)
        tl.store(squares_ptr + row * tl.num_programs(1) + tl.program_id(1), square)
    out_ptrs = sae_out_ptr + row * stride_ob + offs_d * stride_od
    tl.store(out_ptrs, acc.to(sae_out_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def _column_sums_kernel(
    # inputs
    vectors_ptr,  # [B, D]
    weights_ptr,  # [B]
    # output
    partial_ptr,  # [splits, D] fp32
    # sizes and strides
    n_tokens,
    depth,  # D
    stride_vb,
    stride_vd,
    stride_weight,
    BLOCK_E: tl.constexpr,  # rows at a time
    BLOCK_D: tl.constexpr,
):
    """Program (w, i) adds columns i * BLOCK_D .. of every num_programs(0)-th block of BLOCK_E rows."""
    split = tl.program_id(0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < depth
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(split * BLOCK_E, n_tokens, tl.num_programs(0) * BLOCK_E):
        rows = first + tl.arange(0, BLOCK_E).to(tl.int64)
        mask_b = rows < n_tokens
        weight = tl.load(weights_ptr + rows * stride_weight, mask=mask_b, other=0.0).to(tl.float32)
        v_ptrs = vectors_ptr + rows[:, None] * stride_vb + offs_d[None, :] * stride_vd
        vectors = tl.load(v_ptrs, mask=mask_b[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(weight[:, None] * vectors, 0)
    tl.store(partial_ptr + split.to(tl.int64) * depth + offs_d, acc, mask=mask_d)


@triton.jit
def _row_stats_kernel(
    # inputs
    row_offsets_ptr,  # [B + 1]
    row_counts_ptr,  # [B]
    indices_ptr,  # [nnz]
    values_ptr,  # [nnz] fp32
    scale_ptr,  # [S] fp32 or None
    # outputs
    penalty_ptr,  # [B] fp32
    l0_ptr,  # [B] int64
    feature_counts_ptr,  # [S] int64, added to
    # scalar
    tanh_scale,
    PENALTY: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program owns one row: its penalty, its L0, its votes in the features' firing counts."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(row_offsets_ptr + row).to(tl.int64)
    count = tl.load(row_counts_ptr + row).to(tl.int32)
    penalty = tl.zeros((BLOCK_E,), dtype=tl.float32)
    l0 = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for first in range(0, count, BLOCK_E):
        offs_e = first + tl.arange(0, BLOCK_E)
        mask_e = offs_e < count
        index = tl.load(indices_ptr + start + offs_e, mask=mask_e, other=0)
        value = tl.load(values_ptr + start + offs_e, mask=mask_e, other=0.0)
        active = value > 0.0
        scale = tl.full((BLOCK_E,), 1.0, tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + index, mask=mask_e, other=0.0).to(tl.float32)
        penalty += penalty_terms(value, active, scale, tanh_scale, PENALTY)
        l0 += active.to(tl.int32)
        tl.atomic_add(feature_counts_ptr + index, 1, mask=active, sem="relaxed")
    tl.store(penalty_ptr + row, tl.sum(penalty, 0))
    tl.store(l0_ptr + row, tl.sum(l0, 0))


def row_counts_of(acts: SparseActs) -> Tensor:
    """Entries of each row, `[N]`, for padded and packed structures alike."""
    return acts.row_offsets.diff() if acts.row_counts is None else acts.row_counts


def decode_rows(
    acts: SparseActs,
    values: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    dtype: torch.dtype,
    target: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`(sae_out [N, d_out] in dtype, None)`; with a target `(residual, its sum of squares [N] fp32)`.

    Args:
        acts: `N` rows, padded or packed.
        values: `[nnz]`, in place of those of `acts`.
        W_dec: `[d_sae, d_out]`, any strides.
        b_dec: `[d_out]`, or None.
        dtype: Of the first result.
        target: `[N, d_out]` in a dtype of its own, any strides, or None.
    """
    n_tokens, d_out = acts.shape[0], W_dec.shape[1]
    config = launch_config("decode", W_dec)
    columns = triton.cdiv(d_out, config["BLOCK_D"])
    sae_out = torch.empty(n_tokens, d_out, dtype=dtype, device=W_dec.device)
    squares = None
    if target is not None:
        squares = torch.empty(n_tokens, columns, dtype=torch.float32, device=W_dec.device)
    if n_tokens == 0:
        return sae_out, None if squares is None else squares.sum(1)
    _decode_kernel[(n_tokens, columns)](
        row_offsets_ptr=acts.row_offsets,
        row_counts_ptr=row_counts_of(acts),
        indices_ptr=acts.indices.contiguous(),
        values_ptr=values.contiguous(),
        W_dec_ptr=W_dec,
        b_dec_ptr=None if b_dec is None else b_dec.contiguous(),
        target_ptr=target,
        sae_out_ptr=sae_out,
        squares_ptr=squares,
        d_out=d_out,
        stride_ws=W_dec.stride(0),
        stride_wd=W_dec.stride(1),
        stride_tb=0 if target is None else target.stride(0),
        stride_td=0 if target is None else target.stride(1),
        stride_ob=sae_out.stride(0),
        stride_od=sae_out.stride(1),
        **config,
    )
    return sae_out, None if squares is None else squares.sum(1)


def decode_into(acts: SparseActs, values: Tensor, W_dec: Tensor, b_dec: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`sum_e values_e * W_dec[index_e] + b_dec` per row, `[N, d_out]` in `dtype`; `values` replace those of `acts`."""
    return decode_rows(acts, values, W_dec, b_dec, dtype)[0]


def column_sums(vectors: Tensor, weights: Tensor) -> Tensor:
    """`weights @ vectors`, `[D]` fp32, of `[N]` and `[N, D]` in any dtypes and strides; nothing of their size is made."""
    n_tokens, depth = vectors.shape
    config = launch_config("decode", vectors)
    splits = max(min(triton.cdiv(n_tokens, config["BLOCK_E"]), MAX_ROW_SPLITS), 1)
    partial = torch.empty(splits, depth, dtype=torch.float32, device=vectors.device)
    _column_sums_kernel[(splits, triton.cdiv(depth, config["BLOCK_D"]))](
        vectors_ptr=vectors,
        weights_ptr=weights,
        partial_ptr=partial,
        n_tokens=n_tokens,
        depth=depth,
        stride_vb=vectors.stride(0),
        stride_vd=vectors.stride(1),
        stride_weight=weights.stride(0),
        **config,
    )
    return partial.sum(0)


@on_device
def decode(acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """`acts @ W_dec + b_dec`, `[N, d_out]` in the dtype of `W_dec`.

    Equivalent to `fastsae_kernels.reference.decode`.

    Args:
        acts: `N` rows, padded or packed.
        W_dec: `[d_sae, d_out]`, any strides.
        b_dec: `[d_out]`, or None.
    """
    return decode_into(acts, acts.values, W_dec, b_dec, W_dec.dtype)


def row_stats(acts: SparseActs, feature_scale: Tensor | None, spec: AutoencodeSpec) -> tuple[Tensor, Tensor, Tensor]:
    """`(penalty [N] fp32, l0 [N] int64, feature_counts [S] int64)` of listed entries."""
    n_tokens, d_sae = acts.shape
    penalty = torch.empty(n_tokens, dtype=torch.float32, device=acts.device)
    l0 = torch.empty(n_tokens, dtype=torch.int64, device=acts.device)
    feature_counts = torch.zeros(d_sae, dtype=torch.int64, device=acts.device)
    if n_tokens > 0:
        _row_stats_kernel[(n_tokens,)](
            row_offsets_ptr=acts.row_offsets,
            row_counts_ptr=row_counts_of(acts),
            indices_ptr=acts.indices,
            values_ptr=acts.values,
            scale_ptr=feature_scale,
            penalty_ptr=penalty,
            l0_ptr=l0,
            feature_counts_ptr=feature_counts,
            tanh_scale=spec.tanh_scale,
            PENALTY=spec.penalty,
            **launch_config("row_stats", acts.values),
        )
    return penalty, l0, feature_counts
