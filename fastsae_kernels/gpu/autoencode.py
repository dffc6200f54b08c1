"""One training pass over the kernels: encode, order, decode, penalty, and every gradient; no host synchronisation.

    forward:   list entries -> sort (and top-k) -> row statistics, decode and its loss -> rows that overflowed
    backward:  entries' gradients row by row -> feature order -> feature sums -> rows that overflowed

Nothing of size `[N, d_sae]` is allocated: entries take `N * capacity * 8` bytes, their gradients as much again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae_kernels.gpu.adam import MAX_DEPTH
from fastsae_kernels.gpu.backward import feature_order, gradients_in_passes
from fastsae_kernels.gpu.batch_topk import encode_batch_topk
from fastsae_kernels.gpu.config import on_device
from fastsae_kernels.gpu.decode import column_sums, decode_into, decode_rows, row_stats
from fastsae_kernels.gpu.encode import list_all_entries, padded_offsets
from fastsae_kernels.gpu.feature_visit import feature_gradients
from fastsae_kernels.gpu.overflow import overflow_features, overflow_rows
from fastsae_kernels.gpu.overflow_tile import Overflow
from fastsae_kernels.gpu.row_topk import list_topk
from fastsae_kernels.gpu.topk import MAX_SORT, flag_rows, sort_rows
from fastsae_kernels.gpu.weight_gradients import GpuShare, gpu_share
from fastsae_kernels.gradients import AutoencodeGrads, AutoencodeNeeds, AutoencodeOutput
from fastsae_kernels.residual import scaled
from fastsae_kernels.sparse_acts import SparseActs
from fastsae_kernels.spec import AutoencodeSpec
from fastsae_kernels.weight_gradients import WeightGradients


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
        acts, flagged, listed = list_topk(x, W_enc, b_enc, threshold, spec.k, spec.bandwidth, capacity)
        return Listed(acts, None if flagged is None else Overflow(*flag_rows(flagged)), listed)
    capacity = min(max(capacity, 1), d_sae, MAX_SORT)
    row_offsets = padded_offsets(n_tokens, capacity, x.device)
    l0 = feature_counts = None
    if spec.penalty == "l0":  # the listing then counts all that there is to count
        l0 = torch.zeros(n_tokens, dtype=torch.int64, device=x.device)
        feature_counts = torch.zeros(d_sae, dtype=torch.int64, device=x.device)
    counts, entries = list_all_entries(
        x, W_enc, b_enc, threshold, row_offsets, n_tokens * capacity, spec.bandwidth,
        l0=l0, feature_counts=feature_counts,
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
    target: Tensor | None = None,
) -> tuple[AutoencodeOutput, Saved]:
    """`reference.autoencode` over active entries only.

    Args:
        x: `[N, d_in]`; fp32, bf16 or fp16. Strides are free, here and below.
        W_enc: `[d_in, d_sae]`, dtype of x.
        b_enc: `[d_sae]`, dtype of x or fp32; so `b_dec` too.
        threshold: `[d_sae]` fp32, >= 0.
        W_dec: `[d_sae, d_out]`.
        b_dec: `[d_out]`.
        feature_scale: `[d_sae]` fp32, or None for ones.
        spec: The options.
        capacity: Entries that a row can hold (clamped to d_sae and `MAX_SORT`; raised to what top-k needs). A row with more
            is exact too, and slower; `saved.listed` tells how many each wanted.
        target: `[N, d_out]` in a floating dtype of its own, or None. With one, the output's `sae_out` is the residual
            `sae_out - target`, formed in fp32, and `squared_error` its sum of squares before rounding.

    Returns:
        The output, whose `acts` has no entries in rows that overflowed, and what the backward needs.

    Raises:
        TypeError: x is fp64.
    """
    b_enc, threshold, b_dec = b_enc.contiguous(), threshold.contiguous(), b_dec.contiguous()
    feature_scale = None if feature_scale is None else feature_scale.contiguous()
    acts, overflow, listed, min_active, counted = _list(x, W_enc, b_enc, threshold, spec, capacity)
    penalty, l0, feature_counts = stats = counted or row_stats(acts, feature_scale, spec)
    sae_out, squared_error = decode_rows(acts, acts.values, W_dec, b_dec, x.dtype, target)
    if overflow is not None:
        if counted:  # overflowing rows are among them already, so what is added goes nowhere
            stats = (penalty, torch.zeros_like(l0), torch.zeros_like(feature_counts))
        overflow_rows(
            overflow, x, W_enc, b_enc, threshold, feature_scale, spec, sae_out, W_dec,
            b_out=b_dec, stats=stats, target=target, squared_error=squared_error,
        )  # fmt: skip
    output = AutoencodeOutput(sae_out, penalty, l0, feature_counts, acts, min_active, squared_error)
    return output, Saved(x, W_enc, b_enc, threshold, W_dec, b_dec, feature_scale, spec, acts, overflow, listed)


@on_device
def autoencode_backward(
    saved: Saved,
    grad_out: Tensor,
    grad_penalty: Tensor,
    needs: AutoencodeNeeds,
    row_scale: Tensor | None = None,
    weight_gradients: WeightGradients | None = None,
) -> AutoencodeGrads:
    """Gradients of `autoencode_forward`, each in its parameter's dtype.

    Args:
        saved: From the forward.
        grad_out: `[N, d_out]` in the dtype of x, any strides.
        grad_penalty: `[N]` fp32, any stride.
        needs: Which of the large gradients are asked for; that of x costs one more gather.
        row_scale: `[N]` fp32, any stride: the gradient of row n of sae_out is `row_scale[n] * grad_out[n]`. So the residual
            serves as it is: with twice the gradient of `squared_error`. None for ones.
        weight_gradients: Of an optimiser that sums those of both matrices itself: takes what they are sums of, unless it holds
            another pass's already.
    """
    x, W_enc, b_enc, threshold, W_dec, b_dec, feature_scale, spec, acts, overflow, _ = saved
    scale = None if spec.penalty == "l0" else feature_scale
    # rows of a BatchTopK have no common span
    by_feature = feature_order(acts, None if spec.batch_topk else acts.indices.numel() // max(x.shape[0], 1))
    fits = max(x.shape[1], W_dec.shape[1]) <= MAX_DEPTH
    leaves = fits and weight_gradients is not None and weight_gradients.gpu is None and (needs.W_enc or needs.W_dec)
    if fits:
        listed = feature_gradients(
            by_feature, acts.values, x, W_dec, grad_out, grad_penalty, threshold, scale, spec,
            row_scale=row_scale, with_weights=not leaves,
        )  # fmt: skip
    else:
        rows = scaled(grad_out, row_scale)
        listed = gradients_in_passes(by_feature, acts, x, W_dec, rows, grad_penalty, threshold, scale, spec)
    grad_hidden_pre, grad_W_enc, grad_W_dec, grad_b_enc, grad_threshold, grad_scale = listed
    if leaves and weight_gradients is not None:
        n_overflow = None if overflow is None else overflow.n_rows
        size = W_dec.shape[0] * (x.shape[1] + W_dec.shape[1])
        buffer = None if overflow is None else weight_gradients.buffer(size, like=x)
        encoder, decoder = gpu_share(
            by_feature, acts.values, grad_hidden_pre, x, grad_out, row_scale, n_overflow, buffer
        )
        weight_gradients.gpu = GpuShare(encoder if needs.W_enc else None, decoder if needs.W_dec else None)
        grad_W_enc, grad_W_dec = encoder.extra, decoder.extra
    grad_x = decode_into(acts, grad_hidden_pre, W_enc.t(), None, x.dtype) if needs.x else None
    if overflow is not None:
        assert grad_W_enc is not None  # their share is dense in any case
        assert grad_W_dec is not None
        overflow_features(
            overflow, x, W_enc, b_enc, threshold, W_dec, scale, spec, grad_out, grad_penalty, row_scale,
            grad_W_enc, grad_b_enc, grad_threshold, grad_W_dec, grad_scale,
        )  # fmt: skip
        if grad_x is not None:
            grads = (grad_out, W_dec, grad_penalty, row_scale)
            overflow_rows(overflow, x, W_enc, b_enc, threshold, scale, spec, grad_x, W_enc.t(), grads=grads)
    grad_b_dec = grad_out.sum(0, dtype=torch.float32) if row_scale is None else column_sums(grad_out, row_scale)
    if feature_scale is not None and grad_scale is None:
        grad_scale = torch.zeros_like(feature_scale)
    if leaves:
        grad_W_enc = grad_W_dec = None
    return AutoencodeGrads(
        grad_x, None if grad_W_enc is None else grad_W_enc.t(), grad_b_enc.to(b_enc.dtype), grad_threshold, grad_W_dec,
        grad_b_dec.to(b_dec.dtype), grad_scale,
    )  # fmt: skip
