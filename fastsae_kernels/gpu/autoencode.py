"""One training pass over the kernels: encode, order, decode, penalty, and every gradient; no host synchronisation.

    forward:   list entries -> sort (and top-k) -> row statistics, decode -> rows that overflowed
    backward:  entries' gradients row by row -> feature order -> feature sums -> rows that overflowed

Nothing of size `[N, d_sae]` is allocated: entries take `N * capacity * 8` bytes, their gradients as much again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae_kernels.gpu.backward import entry_grads, feature_order, feature_sums
from fastsae_kernels.gpu.batch_topk import encode_batch_topk
from fastsae_kernels.gpu.config import on_device
from fastsae_kernels.gpu.decode import decode_into, row_stats
from fastsae_kernels.gpu.encode import CANDIDATES, list_all_entries, padded_offsets
from fastsae_kernels.gpu.overflow import Overflow, overflow_rows
from fastsae_kernels.gpu.overflow_features import overflow_features
from fastsae_kernels.gpu.row_topk import list_topk
from fastsae_kernels.gpu.topk import MAX_SORT, flag_rows, sort_rows
from fastsae_kernels.gradients import AutoencodeGrads, AutoencodeOutput
from fastsae_kernels.sparse_acts import SparseActs
from fastsae_kernels.spec import AutoencodeSpec


class Saved(NamedTuple):
    """What `autoencode_backward` needs of the forward: its arguments and the entries that it kept."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor
    b_dec: Tensor
    feature_scale: Tensor | None
    spec: AutoencodeSpec
    acts: SparseActs
    overflow: Overflow | None  # None: no row can have overflowed
    listed: Tensor  # [N] int32: entries that each row wanted to hold, window and overflow included; sizes the capacity

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.x.device


class Listed(NamedTuple):
    """The entries of a batch, by any of the selections."""

    acts: SparseActs
    overflow: Overflow | None
    listed: Tensor
    min_active: Tensor | None = None
    stats: tuple[Tensor, Tensor, Tensor] | None = None  # penalty, l0, feature_counts, where the listing counted them


def _list(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, spec: AutoencodeSpec, capacity: int) -> Listed:
    """The entries that survive `spec`, in rows sorted by feature; rows that overflowed are empty and flagged."""
    n_tokens, d_sae = x.shape[0], W_enc.shape[1]
    if spec.batch_topk and spec.k is not None:
        acts, min_active = encode_batch_topk(x, W_enc, b_enc, threshold, spec.k)
        assert acts.row_counts is not None  # its places are as many in every step, its entries are not
        return Listed(acts, None, acts.row_counts, min_active)
    if spec.k is not None:
        acts, flagged, listed = list_topk(
            x, W_enc, b_enc, threshold, spec.k, spec.bandwidth, capacity, spec.precision
        )  # fmt: skip
        return Listed(acts, None if flagged is None else Overflow(*flag_rows(flagged)), listed)
    capacity = min(max(capacity, 1) * (CANDIDATES if spec.fp8 else 1), d_sae, MAX_SORT)
    row_offsets = padded_offsets(n_tokens, capacity, x.device)
    l0 = feature_counts = None
    if spec.penalty == "l0" and not spec.fp8:  # the listing then counts all that there is to count
        l0 = torch.zeros(n_tokens, dtype=torch.int64, device=x.device)
        feature_counts = torch.zeros(d_sae, dtype=torch.int64, device=x.device)
    counts, entries = list_all_entries(
        x, W_enc, b_enc, threshold, row_offsets, n_tokens * capacity, spec.bandwidth,
        precision=spec.precision, fp8=spec.fp8, l0=l0, feature_counts=feature_counts,
    )  # fmt: skip
    acts = sort_rows(counts, entries, row_offsets, (n_tokens, d_sae), None)
    overflow = None if capacity == d_sae else Overflow(*flag_rows(counts > capacity))
    stats = None if l0 is None or feature_counts is None else (l0.float(), l0, feature_counts)
    return Listed(acts, overflow, counts, stats=stats)


@on_device
def autoencode_forward(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    feature_scale: Tensor | None,
    spec: AutoencodeSpec,
    capacity: int,
) -> tuple[AutoencodeOutput, Saved]:
    """`reference.autoencode` over active entries only.

    Args:
        x: `[N, d_in]`; fp32, bf16 or fp16. Strides are free, here and below.
        W_enc: `[d_in, d_sae]`, dtype of x.
        b_enc: `[d_sae]`.
        threshold: `[d_sae]` fp32, >= 0.
        W_dec: `[d_sae, d_out]`.
        b_dec: `[d_out]`.
        feature_scale: `[d_sae]` fp32, or None for ones.
        spec: The options.
        capacity: Entries that a row can hold (clamped to d_sae and `MAX_SORT`; raised to what top-k needs). A row with more
            is exact too, and slower; `saved.listed` tells how many each wanted.

    Returns:
        The output, whose `acts` has no entries in rows that overflowed, and what the backward needs.

    Raises:
        TypeError: x is fp64.
    """
    b_enc, threshold, b_dec = b_enc.contiguous(), threshold.contiguous(), b_dec.contiguous()
    feature_scale = None if feature_scale is None else feature_scale.contiguous()
    acts, overflow, listed, min_active, counted = _list(x, W_enc, b_enc, threshold, spec, capacity)
    penalty, l0, feature_counts = stats = counted or row_stats(acts, feature_scale, spec)
    sae_out = decode_into(acts, acts.values, W_dec, b_dec, x.dtype)
    if overflow is not None:
        if counted:  # overflowing rows are among them already, so what is added goes nowhere
            stats = (penalty, torch.zeros_like(l0), torch.zeros_like(feature_counts))
        overflow_rows(
            overflow, x, W_enc, b_enc, threshold, feature_scale, spec, sae_out, W_dec, b_out=b_dec, stats=stats
        )  # fmt: skip
    output = AutoencodeOutput(sae_out, penalty, l0, feature_counts, acts, min_active)
    return output, Saved(x, W_enc, b_enc, threshold, W_dec, b_dec, feature_scale, spec, acts, overflow, listed)


@on_device
def autoencode_backward(saved: Saved, grad_out: Tensor, grad_penalty: Tensor, needs_x: bool) -> AutoencodeGrads:
    """Gradients of `autoencode_forward`, each in its parameter's dtype.

    Args:
        saved: From the forward.
        grad_out: `[N, d_out]` in the dtype of x, any strides.
        grad_penalty: `[N]` fp32, any stride.
        needs_x: Whether to compute `grad_x`, which costs one more gather.
    """
    x, W_enc, b_enc, threshold, W_dec, b_dec, feature_scale, spec, acts, overflow, _ = saved
    d_in, d_sae = W_enc.shape
    grad_W_enc = torch.empty(d_sae, d_in, dtype=W_enc.dtype, device=W_enc.device)
    grad_W_dec = torch.empty(W_dec.shape, dtype=W_dec.dtype, device=W_dec.device)
    grad_b_enc = torch.empty_like(b_enc)
    grad_threshold = torch.empty_like(threshold)
    has_scale = feature_scale is not None and spec.penalty != "l0"
    grad_scale = torch.empty_like(feature_scale) if feature_scale is not None and has_scale else None

    scale = feature_scale if has_scale else None
    grad_hidden_pre, threshold_entries, scale_entries = entry_grads(
        acts, W_dec, grad_out, threshold, scale, grad_penalty, spec
    )  # fmt: skip
    # rows of a BatchTopK have no common span
    by_feature = feature_order(acts, None if spec.batch_topk else acts.indices.numel() // max(x.shape[0], 1))
    feature_sums(by_feature, acts.values, grad_out, grad_W_dec)
    feature_sums(
        by_feature,
        grad_hidden_pre,
        x,
        grad_W_enc,
        weight_sums=grad_b_enc,
        threshold_entries=threshold_entries,
        threshold_sums=grad_threshold,
        scale_entries=scale_entries,
        scale_sums=grad_scale,
    )
    grad_x = decode_into(acts, grad_hidden_pre, W_enc.t(), None, x.dtype) if needs_x else None
    if overflow is not None:
        overflow_features(
            overflow, x, W_enc, b_enc, threshold, W_dec, scale, spec, grad_out, grad_penalty,
            grad_W_enc, grad_b_enc, grad_threshold, grad_W_dec, grad_scale,
        )  # fmt: skip
        if grad_x is not None:
            grads = (grad_out, W_dec, grad_penalty)
            overflow_rows(overflow, x, W_enc, b_enc, threshold, scale, spec, grad_x, W_enc.t(), grads=grads)
    grad_b_dec = grad_out.sum(0, dtype=torch.float32).to(b_dec.dtype)
    if feature_scale is not None and grad_scale is None:
        grad_scale = torch.zeros_like(feature_scale)
    return AutoencodeGrads(
        grad_x, grad_W_enc.t(), grad_b_enc, grad_threshold, grad_W_dec, grad_b_dec, grad_scale
    )  # fmt: skip
