"""Decode: `acts @ W_dec + b_dec` from listed entries, and the statistics of each row.

    sae_out[n] = sum_e value_e * W_dec[index_e] + b_dec
    penalty[n] = sum_e of (value_e > 0), value_e * scale or tanh(tanh_scale * value_e * scale)

Letters: `B` tokens, `D` d_out, `S` d_sae. Decoder rows are wide, so gathers are coalesced: 1 flop per byte, against a
GEMM over all S in the dense step. The same kernel computes `grad_x` from `(grad_hidden_pre, W_enc.T)`.

Numerics: cast to fp32 after loading, accumulated in fp32 in the order of the entries: deterministic (feature counts are
integer atomics).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import launch_config, on_device
from fastsae_kernels.gpu.tiles import penalty_terms
from fastsae_kernels.sparse_acts import SparseActs
from fastsae_kernels.spec import AutoencodeSpec


@triton.jit
def _decode_kernel(
    # inputs
    row_offsets_ptr,  # [B + 1]
    row_counts_ptr,  # [B]
    indices_ptr,  # [nnz]
    values_ptr,  # [nnz]
    W_dec_ptr,  # [S, D]
    b_dec_ptr,  # [D] or None
    # output
    sae_out_ptr,  # [B, D]
    # sizes and strides
    d_out,
    stride_ws,
    stride_wd,
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
    out_ptrs = sae_out_ptr + row * stride_ob + offs_d * stride_od
    tl.store(out_ptrs, acc.to(sae_out_ptr.dtype.element_ty), mask=mask_d)


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


def decode_into(acts: SparseActs, values: Tensor, W_dec: Tensor, b_dec: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`sum_e values_e * W_dec[index_e] + b_dec` per row, `[N, d_out]` in `dtype`; `values` replace those of `acts`."""
    n_tokens, d_out = acts.shape[0], W_dec.shape[1]
    sae_out = torch.empty(n_tokens, d_out, dtype=dtype, device=W_dec.device)
    if n_tokens == 0:
        return sae_out
    config = launch_config("decode", W_dec)
    _decode_kernel[(n_tokens, triton.cdiv(d_out, config["BLOCK_D"]))](
        row_offsets_ptr=acts.row_offsets,
        row_counts_ptr=row_counts_of(acts),
        indices_ptr=acts.indices.contiguous(),
        values_ptr=values.contiguous(),
        W_dec_ptr=W_dec,
        b_dec_ptr=None if b_dec is None else b_dec.contiguous(),
        sae_out_ptr=sae_out,
        d_out=d_out,
        stride_ws=W_dec.stride(0),
        stride_wd=W_dec.stride(1),
        stride_ob=sae_out.stride(0),
        stride_od=sae_out.stride(1),
        **config,
    )
    return sae_out


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
