"""Backward of decode and encode over listed entries: no dense gradient, no `[nnz, d]` temporary, no atomics.

    grad_acts[e]  = grad_out[token_e] . W_dec[index_e]                                    row by row
    grad_W_dec[j] = sum over the entries e of feature j of  value_e * grad_out[token_e]   feature by feature
    grad_W_enc[j] = sum over the same entries of            grad_hidden_pre_e * x[token_e]

Letters: `B` tokens, `D` d_in or d_out, `S` d_sae. The second pass visits each feature once: a stable sort of the entries by
feature makes its tokens a contiguous, ascending list; the sums of `b_enc`, `threshold` and `feature_scale` come from the
same visit. Traffic: one decoder row and one row of grad_out and x per entry, one write of each gradient.

Numerics: cast to fp32 after loading, accumulated in fp32 in a fixed order: deterministic. Gradients are stored in the
dtype of their parameter, `grad_W_enc` feature-major (`[d_sae, d_in]` storage, viewed `[d_in, d_sae]`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import launch_config, on_device
from fastsae_kernels.gpu.decode import decode_into, row_counts_of
from fastsae_kernels.gpu.tiles import gate_gradients
from fastsae_kernels.types import AutoencodeSpec, SparseActs


@triton.jit
def _entry_grads_kernel(
    # inputs
    row_offsets_ptr,  # [B + 1]
    row_counts_ptr,  # [B]
    indices_ptr,  # [nnz]
    W_dec_ptr,  # [S, D]
    grad_out_ptr,  # [B, D]
    # inputs of the gate, None without it
    values_ptr,  # [nnz] fp32
    threshold_ptr,  # [S] fp32
    scale_ptr,  # [S] fp32 or None
    grad_penalty_ptr,  # [B] fp32
    # outputs
    grad_entries_ptr,  # [nnz]: grad_acts without the gate, grad_hidden_pre with it
    grad_threshold_entries_ptr,  # [nnz] fp32 or None
    grad_scale_entries_ptr,  # [nnz] fp32 or None
    # scalars, sizes, strides
    half_bandwidth,
    inv_bandwidth,
    tanh_scale,
    d_out,
    stride_ws,
    stride_wd,
    stride_gb,
    stride_gd,
    stride_penalty,
    HAS_GATE: tl.constexpr,
    PENALTY: tl.constexpr,
    STE_TO_INPUT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (n, i) owns every num_programs(1)-th block of BLOCK_E entries of row n."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(row_offsets_ptr + row).to(tl.int64)
    count = tl.load(row_counts_ptr + row).to(tl.int32)
    for first in range(tl.program_id(1) * BLOCK_E, count, tl.num_programs(1) * BLOCK_E):
        offs_e = first + tl.arange(0, BLOCK_E)
        mask_e = offs_e < count
        index = tl.load(indices_ptr + start + offs_e, mask=mask_e, other=0).to(tl.int64)
        products = tl.zeros((BLOCK_E, BLOCK_D), dtype=tl.float32)
        for start_d in range(0, d_out, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D).to(tl.int64)
            mask_d = offs_d < d_out
            g_ptrs = grad_out_ptr + row * stride_gb + offs_d * stride_gd
            g = tl.load(g_ptrs, mask=mask_d, other=0.0).to(tl.float32)
            w_ptrs = W_dec_ptr + index[:, None] * stride_ws + offs_d[None, :] * stride_wd
            w = tl.load(w_ptrs, mask=mask_e[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
            products += w * g[None, :]
        grad_acts = tl.sum(products, 1)
        if HAS_GATE:
            value = tl.load(values_ptr + start + offs_e, mask=mask_e, other=0.0)
            threshold = tl.load(threshold_ptr + index, mask=mask_e, other=0.0)
            scale = tl.full((BLOCK_E,), 1.0, tl.float32)
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + index, mask=mask_e, other=0.0).to(tl.float32)
            # an inactive entry is listed only where it lies in the window
            active = value > 0.0
            window = (value == 0.0) | (tl.abs(value - threshold) < half_bandwidth)
            grad_acts, grad_threshold, grad_scale = gate_gradients(
                value, active, window, grad_acts, tl.load(grad_penalty_ptr + row * stride_penalty), threshold, scale,
                inv_bandwidth, tanh_scale, PENALTY, STE_TO_INPUT,
            )  # fmt: skip
            tl.store(grad_threshold_entries_ptr + start + offs_e, grad_threshold, mask=mask_e)
            if grad_scale_entries_ptr is not None:
                tl.store(grad_scale_entries_ptr + start + offs_e, grad_scale, mask=mask_e)
        grads = grad_acts.to(grad_entries_ptr.dtype.element_ty)
        tl.store(grad_entries_ptr + start + offs_e, grads, mask=mask_e)


@triton.jit
def _feature_sums_kernel(
    # inputs
    feature_offsets_ptr,  # [S + 1] int64
    order_ptr,  # [nnz] int64: entries by feature, then token
    tokens_ptr,  # [nnz] int64: token of each entry; None: entry // span
    weights_ptr,  # [nnz]
    vectors_ptr,  # [B, D]
    threshold_entries_ptr,  # [nnz] fp32 or None
    scale_entries_ptr,  # [nnz] fp32 or None
    # outputs
    sums_ptr,  # [S, D]: sum of weight * vector
    weight_sums_ptr,  # [S] fp32 or None
    threshold_sums_ptr,  # [S] fp32 or None
    scale_sums_ptr,  # [S] fp32 or None
    # sizes and strides
    span,
    depth,  # D
    stride_vb,
    stride_vd,
    stride_os,
    stride_od,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (j, i) owns columns i * BLOCK_D .. of feature j's sum; i = 0 sums its scalars too."""
    feature = tl.program_id(0).to(tl.int64)
    pid_d = tl.program_id(1)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < depth
    start = tl.load(feature_offsets_ptr + feature)
    count = (tl.load(feature_offsets_ptr + feature + 1) - start).to(tl.int32)
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    weight_sum = tl.zeros((BLOCK_E,), dtype=tl.float32)
    threshold_sum = tl.zeros((BLOCK_E,), dtype=tl.float32)
    scale_sum = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for first in range(0, count, BLOCK_E):
        offs_e = first + tl.arange(0, BLOCK_E)
        mask_e = offs_e < count
        entry = tl.load(order_ptr + start + offs_e, mask=mask_e, other=0)
        if tokens_ptr is not None:
            token = tl.load(tokens_ptr + entry, mask=mask_e, other=0)
        else:
            token = (entry.to(tl.int32) // span).to(tl.int64)
        weight = tl.load(weights_ptr + entry, mask=mask_e, other=0.0).to(tl.float32)
        v_ptrs = vectors_ptr + token[:, None] * stride_vb + offs_d[None, :] * stride_vd
        used = mask_e & (weight != 0.0)
        vectors = tl.load(v_ptrs, mask=used[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(weight[:, None] * vectors, 0)
        weight_sum += weight
        if threshold_entries_ptr is not None:
            threshold_sum += tl.load(threshold_entries_ptr + entry, mask=mask_e, other=0.0)
        if scale_entries_ptr is not None:
            scale_sum += tl.load(scale_entries_ptr + entry, mask=mask_e, other=0.0)
    out_ptrs = sums_ptr + feature * stride_os + offs_d * stride_od
    tl.store(out_ptrs, acc.to(sums_ptr.dtype.element_ty), mask=mask_d)
    if pid_d == 0:
        if weight_sums_ptr is not None:
            tl.store(weight_sums_ptr + feature, tl.sum(weight_sum, 0))
        if threshold_sums_ptr is not None:
            tl.store(threshold_sums_ptr + feature, tl.sum(threshold_sum, 0))
        if scale_sums_ptr is not None:
            tl.store(scale_sums_ptr + feature, tl.sum(scale_sum, 0))


class FeatureOrder(NamedTuple):
    """Entries by feature, then token."""

    offsets: Tensor  # [S + 1] int64; feature j owns order[offsets[j]:offsets[j + 1]]
    order: Tensor  # [nnz] int64, padding last
    tokens: Tensor | None  # [nnz] int64, token of each entry before ordering; None: entry // span
    span: int

    @property
    def device(self) -> torch.device:
        """Where the entries lie."""
        return self.order.device


def feature_order(acts: SparseActs, span: int | None = None) -> FeatureOrder:
    """Sort the entries by feature on the device; padding goes behind the last feature.

    Args:
        acts: The entries.
        span: Length of every row's span, where it is the same: saves a table of tokens.
    """
    d_sae = acts.shape[1]
    features, tokens = acts.indices, None
    if span is not None and acts.row_counts is not None:
        padding = torch.arange(span, device=acts.device) >= acts.row_counts[:, None]
        features = features.masked_fill(padding.flatten(), d_sae)
    else:
        tokens, valid = acts.row_ids(), acts.valid()
        features = features if valid is None else features.masked_fill(~valid, d_sae)
    features, order = torch.sort(features, stable=True)
    bounds = torch.arange(d_sae + 1, device=acts.device, dtype=features.dtype)
    return FeatureOrder(torch.searchsorted(features, bounds), order, tokens, span or 1)


def entry_grads(
    acts: SparseActs,
    W_dec: Tensor,
    grad_out: Tensor,
    threshold: Tensor | None = None,
    feature_scale: Tensor | None = None,
    grad_penalty: Tensor | None = None,
    spec: AutoencodeSpec | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Per entry: grad_acts without a `spec`; else the shares of (grad_hidden_pre, grad_threshold, grad_scale).

    Padding is zero in the first, unwritten in the others.
    """
    n_tokens = acts.shape[0]
    grads = torch.zeros(acts.values.shape, dtype=acts.values.dtype, device=acts.device)
    gated = spec is not None
    spec = spec or AutoencodeSpec()
    grad_threshold = torch.empty_like(acts.values) if gated else None
    grad_scale = torch.empty_like(acts.values) if gated and feature_scale is not None else None
    if n_tokens == 0:
        return grads, grad_threshold, grad_scale
    config = launch_config("entry_grads", W_dec)
    # few rows: several programs share one, or most of the device would idle
    mean_span = triton.cdiv(acts.indices.numel(), n_tokens)
    splits = max(1, min(16, 1024 // n_tokens, triton.cdiv(mean_span, config["BLOCK_E"])))
    _entry_grads_kernel[(n_tokens, splits)](
        row_offsets_ptr=acts.row_offsets,
        row_counts_ptr=row_counts_of(acts),
        indices_ptr=acts.indices.contiguous(),
        W_dec_ptr=W_dec,
        grad_out_ptr=grad_out,
        values_ptr=acts.values if gated else None,
        threshold_ptr=threshold,
        scale_ptr=feature_scale,
        grad_penalty_ptr=grad_penalty,
        grad_entries_ptr=grads,
        grad_threshold_entries_ptr=grad_threshold,
        grad_scale_entries_ptr=grad_scale,
        half_bandwidth=spec.bandwidth / 2,
        inv_bandwidth=1 / spec.bandwidth if spec.bandwidth > 0 else 0.0,
        tanh_scale=spec.tanh_scale,
        d_out=W_dec.shape[1],
        stride_ws=W_dec.stride(0),
        stride_wd=W_dec.stride(1),
        stride_gb=grad_out.stride(0),
        stride_gd=grad_out.stride(1),
        stride_penalty=grad_penalty.stride(0) if grad_penalty is not None else 0,
        HAS_GATE=gated,
        PENALTY=spec.penalty,
        STE_TO_INPUT=spec.ste_to_input,
        **config,
    )
    return grads, grad_threshold, grad_scale


@on_device
def feature_sums(
    by_feature: FeatureOrder,
    weights: Tensor,
    vectors: Tensor,
    sums: Tensor,
    weight_sums: Tensor | None = None,
    threshold_entries: Tensor | None = None,
    threshold_sums: Tensor | None = None,
    scale_entries: Tensor | None = None,
    scale_sums: Tensor | None = None,
) -> None:
    """`sums[j] = sum over feature j's entries of weights_e * vectors[token_e]`, and the sums of scalars, into place."""
    d_sae, depth = sums.shape
    config = launch_config("feature_sums", vectors)
    _feature_sums_kernel[(d_sae, triton.cdiv(depth, config["BLOCK_D"]))](
        feature_offsets_ptr=by_feature.offsets,
        order_ptr=by_feature.order,
        tokens_ptr=by_feature.tokens,
        weights_ptr=weights.contiguous(),
        vectors_ptr=vectors,
        threshold_entries_ptr=threshold_entries,
        scale_entries_ptr=scale_entries,
        sums_ptr=sums,
        weight_sums_ptr=weight_sums,
        threshold_sums_ptr=threshold_sums,
        scale_sums_ptr=scale_sums,
        span=by_feature.span,
        depth=depth,
        stride_vb=vectors.stride(0),
        stride_vd=vectors.stride(1),
        stride_os=sums.stride(0),
        stride_od=sums.stride(1),
        **config,
    )


class FeatureGradients(NamedTuple):
    """Gradients of one pass over listed entries; those of the weights are None where an optimiser sums them itself."""

    grad_hidden_pre: Tensor  # [nnz] fp32, zero on padding
    W_enc: Tensor | None  # [S, d_in]
    W_dec: Tensor | None  # [S, d_out]
    b_enc: Tensor  # [S] fp32
    threshold: Tensor  # [S] fp32
    scale: Tensor | None  # [S] fp32


def gradients_in_passes(
    by_feature: FeatureOrder,
    acts: SparseActs,
    x: Tensor,
    W_dec: Tensor,
    grad_out: Tensor,
    grad_penalty: Tensor,
    threshold: Tensor,
    feature_scale: Tensor | None,
    spec: AutoencodeSpec,
) -> FeatureGradients:
    """As `feature_visit.feature_gradients`, row by row and then feature by feature, whatever the length of a row."""
    d_sae = W_dec.shape[0]
    grad_hidden_pre, threshold_entries, scale_entries = entry_grads(
        acts, W_dec, grad_out, threshold, feature_scale, grad_penalty, spec
    )  # fmt: skip
    grads = FeatureGradients(
        grad_hidden_pre,
        W_dec.new_empty(d_sae, x.shape[1]),
        torch.empty_like(W_dec, memory_format=torch.contiguous_format),
        torch.empty_like(threshold),
        torch.empty_like(threshold),
        None if feature_scale is None else torch.empty_like(feature_scale),
    )
    assert grads.W_enc is not None
    assert grads.W_dec is not None
    feature_sums(by_feature, acts.values, grad_out, grads.W_dec)
    feature_sums(
        by_feature,
        grad_hidden_pre,
        x,
        grads.W_enc,
        weight_sums=grads.b_enc,
        threshold_entries=threshold_entries,
        threshold_sums=grads.threshold,
        scale_entries=scale_entries,
        scale_sums=grads.scale,
    )
    return grads


@on_device
def decode_backward(acts: SparseActs, W_dec: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `decode` for `acts.values` (`[nnz]`, zero on padding) and `W_dec` (`[d_sae, d_out]`).

    Args:
        acts: The entries that were decoded.
        W_dec: `[d_sae, d_out]`.
        grad_out: `[N, d_out]`, any strides.
    """
    grad_values, _, _ = entry_grads(acts, W_dec, grad_out)
    grad_W_dec = torch.empty(W_dec.shape, dtype=W_dec.dtype, device=W_dec.device)
    feature_sums(feature_order(acts), acts.values, grad_out, grad_W_dec)
    return grad_values, grad_W_dec


@on_device
def encode_backward(
    acts: SparseActs, x: Tensor, W_enc: Tensor, grad_hidden_pre: Tensor, needs_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of `hidden_pre = x @ W_enc + b_enc` at the entries of `acts`.

    Args:
        acts: Which entries; its values are not used.
        x: `[N, d_in]`.
        W_enc: `[d_in, d_sae]`.
        grad_hidden_pre: `[nnz]`.
        needs_x: Whether to compute `grad_x`.

    Returns:
        `grad_x [N, d_in]` or None, `grad_W_enc [d_in, d_sae]` (feature-major storage), `grad_b_enc [d_sae]` fp32.
    """
    d_in, d_sae = W_enc.shape
    grad_W_enc = torch.empty(d_sae, d_in, dtype=W_enc.dtype, device=W_enc.device)
    grad_b_enc = torch.empty(d_sae, dtype=torch.float32, device=W_enc.device)
    feature_sums(feature_order(acts), grad_hidden_pre, x, grad_W_enc, weight_sums=grad_b_enc)
    grad_x = decode_into(acts, grad_hidden_pre, W_enc.t(), None, x.dtype) if needs_x else None
    return grad_x, grad_W_enc.t(), grad_b_enc
