"""Weight gradients of the rows that overflowed: the features' pass of `overflow`, with the same letters and promises."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import launch_config
from fastsae_kernels.gpu.overflow import Overflow
from fastsae_kernels.gpu.tiles import gate, gate_gradients, tile_product
from fastsae_kernels.spec import AutoencodeSpec


@triton.jit
def _overflow_features_kernel(
    # inputs
    x_ptr,  # [B, D]
    W_enc_ptr,  # [D, S]
    b_enc_ptr,  # [S]
    threshold_ptr,  # [S] fp32
    scale_ptr,  # [S] fp32 or None
    rows_ptr,  # [B] int64
    n_rows_ptr,  # [1] int32
    grad_out_ptr,  # [B, D_out]
    W_dec_ptr,  # [S, D_out]
    grad_penalty_ptr,  # [B] fp32
    row_scale_ptr,  # [B] fp32 or None: factor of grad_out
    # outputs, added to
    grad_W_enc_ptr,  # [S, D] contiguous
    grad_W_dec_ptr,  # [S, D_out] contiguous
    grad_b_enc_ptr,  # [S] fp32
    grad_threshold_ptr,  # [S] fp32
    grad_scale_ptr,  # [S] fp32 or None
    # scalars and sizes
    half_bandwidth,
    inv_bandwidth,
    tanh_scale,
    d_in,
    d_sae,
    d_dec,
    # strides
    stride_xb,
    stride_xd,
    stride_wd,
    stride_ws,
    stride_gb,
    stride_gd,
    stride_ds,
    stride_dd,
    stride_penalty,
    stride_scale,
    PENALTY: tl.constexpr,
    STE_TO_INPUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Program (j, i) owns columns i * BLOCK_O .. of both weight gradients of BLOCK_S features; i = 0 also their scalars."""
    n_rows = tl.load(n_rows_ptr)
    if n_rows == 0:
        return
    pid_o = tl.program_id(1)
    offs_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < d_sae
    columns = offs_s % d_sae
    offs_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O).to(tl.int64)
    bias = tl.load(b_enc_ptr + columns).to(tl.float32)[None, :]
    threshold = tl.load(threshold_ptr + columns)[None, :]
    scale = tl.full((1, BLOCK_S), 1.0, tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + columns).to(tl.float32)[None, :]
    grad_W_enc = tl.zeros((BLOCK_S, BLOCK_O), dtype=tl.float32)
    grad_W_dec = tl.zeros((BLOCK_S, BLOCK_O), dtype=tl.float32)
    grad_b_enc = tl.zeros((BLOCK_S,), dtype=tl.float32)
    grad_threshold = tl.zeros((BLOCK_S,), dtype=tl.float32)
    grad_scale = tl.zeros((BLOCK_S,), dtype=tl.float32)
    for first in range(0, n_rows, BLOCK_B):
        offs_r = first + tl.arange(0, BLOCK_B)
        mask_r = offs_r < n_rows
        rows = tl.load(rows_ptr + offs_r % n_rows)
        inside = mask_r[:, None] & mask_s[None, :]
        hidden_pre = bias + tile_product(
            x_ptr, rows, stride_xb, stride_xd, W_enc_ptr, columns, stride_wd, stride_ws, d_in,
            BLOCK_B, BLOCK_S, BLOCK_D, EVEN_D,
        )  # fmt: skip
        grad_acts = tile_product(
            grad_out_ptr, rows, stride_gb, stride_gd, W_dec_ptr, columns, stride_dd, stride_ds, d_dec,
            BLOCK_B, BLOCK_S, BLOCK_D, False,
        )  # fmt: skip
        if row_scale_ptr is not None:
            row_scale = tl.load(row_scale_ptr + rows * stride_scale)[:, None]
            grad_acts *= row_scale
        active, window = gate(hidden_pre, threshold, half_bandwidth)
        active = active & inside
        tile = tl.where(active | ((hidden_pre != hidden_pre) & inside), hidden_pre, 0.0)
        g = tl.load(grad_penalty_ptr + rows * stride_penalty)[:, None]
        grad_hidden_pre, threshold_terms, scale_terms = gate_gradients(
            tile, active, window & inside, grad_acts, g, threshold, scale, inv_bandwidth, tanh_scale,
            PENALTY, STE_TO_INPUT,
        )  # fmt: skip
        if row_scale_ptr is not None:
            tile *= row_scale
        x_ptrs = x_ptr + rows[:, None] * stride_xb + offs_o[None, :] * stride_xd
        x = tl.load(x_ptrs, mask=mask_r[:, None] & (offs_o < d_in)[None, :], other=0.0)
        grad_W_enc = tl.dot(tl.trans(grad_hidden_pre).to(x.dtype), x, grad_W_enc, input_precision="ieee")
        g_ptrs = grad_out_ptr + rows[:, None] * stride_gb + offs_o[None, :] * stride_gd
        grad_out = tl.load(g_ptrs, mask=mask_r[:, None] & (offs_o < d_dec)[None, :], other=0.0)
        grad_W_dec = tl.dot(tl.trans(tile).to(grad_out.dtype), grad_out, grad_W_dec, input_precision="ieee")
        grad_b_enc += tl.sum(grad_hidden_pre, 0)
        grad_threshold += tl.sum(threshold_terms, 0)
        grad_scale += tl.sum(scale_terms, 0)

    enc_ptrs = grad_W_enc_ptr + columns.to(tl.int64)[:, None] * d_in + offs_o[None, :]
    enc_mask = mask_s[:, None] & (offs_o < d_in)[None, :]
    grad_W_enc += tl.load(enc_ptrs, mask=enc_mask, other=0.0).to(tl.float32)
    tl.store(enc_ptrs, grad_W_enc.to(grad_W_enc_ptr.dtype.element_ty), mask=enc_mask)
    dec_ptrs = grad_W_dec_ptr + columns.to(tl.int64)[:, None] * d_dec + offs_o[None, :]
    dec_mask = mask_s[:, None] & (offs_o < d_dec)[None, :]
    grad_W_dec += tl.load(dec_ptrs, mask=dec_mask, other=0.0).to(tl.float32)
    tl.store(dec_ptrs, grad_W_dec.to(grad_W_dec_ptr.dtype.element_ty), mask=dec_mask)
    if pid_o == 0:
        # masked, for past the last feature lies what another program writes
        grad_b_enc += tl.load(grad_b_enc_ptr + offs_s, mask=mask_s, other=0.0)
        tl.store(grad_b_enc_ptr + offs_s, grad_b_enc, mask=mask_s)
        grad_threshold += tl.load(grad_threshold_ptr + offs_s, mask=mask_s, other=0.0)
        tl.store(grad_threshold_ptr + offs_s, grad_threshold, mask=mask_s)
        if grad_scale_ptr is not None:
            grad_scale += tl.load(grad_scale_ptr + offs_s, mask=mask_s, other=0.0)
            tl.store(grad_scale_ptr + offs_s, grad_scale, mask=mask_s)


def overflow_features(
    overflow: Overflow,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    feature_scale: Tensor | None,
    spec: AutoencodeSpec,
    grad_out: Tensor,
    grad_penalty: Tensor,
    row_scale: Tensor | None,
    grad_W_enc: Tensor,
    grad_b_enc: Tensor,
    grad_threshold: Tensor,
    grad_W_dec: Tensor,
    grad_scale: Tensor | None,
) -> None:
    """Add the overflowing rows' share to gradients that hold the other rows' already.

    Args:
        overflow: Which rows.
        x, W_enc, b_enc, threshold, W_dec, feature_scale, spec: As in `autoencode_forward`.
        grad_out, grad_penalty, row_scale: As in `autoencode_backward`.
        grad_W_enc: `[d_sae, d_in]`, contiguous.
        grad_b_enc, grad_threshold: `[d_sae]` fp32.
        grad_W_dec: `[d_sae, d_out]`, contiguous.
        grad_scale: `[d_sae]` fp32, or None.
    """
    n_tokens, d_in = x.shape
    d_sae, d_dec = W_dec.shape
    if n_tokens == 0:
        return
    config = launch_config("overflow_features", x)
    grid = (triton.cdiv(d_sae, config["BLOCK_S"]), triton.cdiv(max(d_in, d_dec), config["BLOCK_O"]))
    _overflow_features_kernel[grid](
        x_ptr=x,
        W_enc_ptr=W_enc,
        b_enc_ptr=b_enc,
        threshold_ptr=threshold,
        scale_ptr=feature_scale,
        rows_ptr=overflow.rows,
        n_rows_ptr=overflow.n_rows,
        grad_out_ptr=grad_out,
        W_dec_ptr=W_dec,
        grad_penalty_ptr=grad_penalty,
        row_scale_ptr=row_scale,
        grad_W_enc_ptr=grad_W_enc,
        grad_W_dec_ptr=grad_W_dec,
        grad_b_enc_ptr=grad_b_enc,
        grad_threshold_ptr=grad_threshold,
        grad_scale_ptr=grad_scale,
        half_bandwidth=spec.bandwidth / 2,
        inv_bandwidth=1 / spec.bandwidth if spec.bandwidth > 0 else 0.0,
        tanh_scale=spec.tanh_scale,
        d_in=d_in,
        d_sae=d_sae,
        d_dec=d_dec,
        stride_xb=x.stride(0),
        stride_xd=x.stride(1),
        stride_wd=W_enc.stride(0),
        stride_ws=W_enc.stride(1),
        stride_gb=grad_out.stride(0),
        stride_gd=grad_out.stride(1),
        stride_ds=W_dec.stride(0),
        stride_dd=W_dec.stride(1),
        stride_penalty=grad_penalty.stride(0),
        stride_scale=0 if row_scale is None else row_scale.stride(0),
        PENALTY=spec.penalty,
        STE_TO_INPUT=spec.ste_to_input,
        EVEN_D=d_in % config["BLOCK_D"] == 0,
        **config,
    )
