"""One training pass over the kernels: encode, order, decode, penalty, and every gradient; no host synchronisation.

    forward:   list entries -> sort (and top-k) -> row statistics, decode and its loss -> rows that overflowed
    backward:  entries' gradients row by row -> feature order -> feature sums -> rows that overflowed

Nothing of size `[N, d_sae]` is allocated: while they are listed, entries take `N * capacity * 8` bytes; afterwards they lie
one behind the other, 8 bytes each, and 44 while they are sorted by feature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae_kernels.gpu.batch_topk import encode_batch_topk
from fastsae_kernels.gpu.config import on_device
from fastsae_kernels.gpu.decode import column_sums, decode_into, decode_rows, row_stats
from fastsae_kernels.gpu.encode import encode as encode_active
from fastsae_kernels.gpu.encode import list_all_entries, padded_offsets
from fastsae_kernels.gpu.feature_sums import feature_order
from fastsae_kernels.gpu.gradients import feature_gradients
from fastsae_kernels.gpu.overflow import overflow_features, overflow_rows
from fastsae_kernels.gpu.row_topk import capacity_of, encode_topk, list_topk
from fastsae_kernels.gpu.topk import MAX_SORT, flag_rows, packed_offsets, sort_rows
from fastsae_kernels.gpu.weight_gradients import GpuShare, gpu_share
from fastsae_kernels.loss_terms import scoring_encoder
from fastsae_kernels.types import (
    AutoencodeGrads,
    AutoencodeNeeds,
    AutoencodeOutput,
    AutoencodeSpec,
    Capacity,
    Kept,
    KeptSize,
    OutputGrads,
    Overflow,
    PassInputs,
    SparseActs,
)
from fastsae_kernels.weight_gradients import WeightGradients


class Listed(NamedTuple):
    """The entries of a batch, by any of the selections."""

    acts: SparseActs
    overflow: Overflow | None
    listed: Tensor
    min_active: Tensor | None = None


def _list(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, spec: AutoencodeSpec, capacity: Capacity
) -> Listed:
    """The entries that survive `spec`, in rows sorted by feature; rows that overflowed are empty and flagged."""
    n_tokens, d_sae = x.shape[0], W_enc.shape[1]
    if spec.batch_topk and spec.k is not None:
        acts, min_active = encode_batch_topk(x, W_enc, b_enc, threshold, spec.k)
        assert acts.row_counts is not None  # its slots are as many in every step, its entries are not
        return Listed(acts, None, acts.row_counts, min_active)
    if spec.k is not None:
        acts, flagged, listed = list_topk(x, W_enc, b_enc, threshold, spec.k, spec.bandwidth)
        return Listed(acts, None if flagged is None else Overflow(*flag_rows(flagged)), listed)
    row_capacity = _row_capacity(d_sae, capacity)
    row_offsets = padded_offsets(n_tokens, row_capacity, x.device)
    counts, entries = list_all_entries(
        x, W_enc, b_enc, threshold, row_offsets, n_tokens * row_capacity, spec.bandwidth
    )  # fmt: skip
    size = kept_size(n_tokens, d_sae, spec, capacity)
    offsets = packed_offsets(counts, row_capacity, size.entries)
    acts = sort_rows(counts, entries, offsets, (n_tokens, d_sae), None, size.entries)
    assert acts.row_counts is not None
    # a row overflows where it has more entries than its capacity, or where the rows before it took all room
    overflow = Overflow(*flag_rows(acts.row_counts < counts)) if size.overflows else None
    return Listed(acts, overflow, counts)


def kept_size(n_tokens: int, d_sae: int, spec: AutoencodeSpec, capacity: Capacity) -> KeptSize:
    """Room for all rows together; none overflows where there is room for every feature, or for all that top-k leaves."""
    if spec.k is None:
        per_row = min(capacity.mean, _row_capacity(d_sae, capacity))
    elif spec.bandwidth == 0:
        return KeptSize(n_tokens * min(spec.k, d_sae), overflows=False)
    else:
        per_row = capacity_of(min(spec.k, d_sae), d_sae)
    return KeptSize(n_tokens * per_row, overflows=per_row < d_sae)


def _row_capacity(d_sae: int, capacity: Capacity) -> int:
    return min(max(capacity.row, 1), d_sae, MAX_SORT)


@on_device
def forward(
    inputs: PassInputs, spec: AutoencodeSpec, capacity: Capacity, keeps_dense: bool = False
) -> tuple[AutoencodeOutput, Kept]:
    """`reference.autoencode` over active entries only.

    Args:
        inputs: The tensors, x in fp32, bf16 or fp16. Strides are free. With a target the residual is formed in fp32, and
            `squared_error` is its sum of squares before rounding.
        spec: The options.
        capacity: For how many entries there is room where no top-k decides it; that of a row is clamped to d_sae and
            `MAX_SORT`. Where all rows together have too little, the last ones overflow. `Kept.listed` tells how many entries
            each row wanted to hold.
        keeps_dense: Not used here.

    Returns:
        The output, and what the backward needs, whose `acts` has no entries in rows that overflowed.

    Raises:
        TypeError: x is fp64.
    """
    inputs = inputs.with_contiguous_vectors()
    x, _, _, threshold, W_dec, b_dec, feature_scale, target, rank_scale = inputs
    acts, overflow, listed, min_active = _list(x, *scoring_encoder(inputs), threshold, spec, capacity)
    if rank_scale is not None:
        acts = acts.divided(rank_scale)
    penalty, l0, feature_counts = stats = row_stats(acts, feature_scale, spec)
    sae_out, squared_error = decode_rows(acts, acts.values, W_dec, b_dec, x.dtype, target)
    if overflow is not None:
        overflow_rows(overflow, inputs, spec, sae_out, stats=stats, squared_error=squared_error)
    # rows that outgrew the capacity are not among the entries, so the caller gets none
    output = AutoencodeOutput(sae_out, penalty, l0, feature_counts, None, min_active, squared_error)
    return output, Kept(acts, overflow=overflow, listed=listed)


@on_device
def backward(
    inputs: PassInputs,
    kept: Kept,
    spec: AutoencodeSpec,
    grads: OutputGrads,
    needs: AutoencodeNeeds,
    collected: WeightGradients | None = None,
) -> AutoencodeGrads:
    """Gradients of `forward`, each in its parameter's dtype.

    Args:
        inputs: The tensors of the forward.
        kept: What it kept.
        spec: The options.
        grads: What comes back, `rows` of any strides. So the residual serves as it is: with twice the gradient of
            `squared_error` as `row_scale`.
        needs: Which of the large gradients are asked for; that of x costs one more gather.
        collected: Takes what the gradients of both weight matrices are sums of, unless it holds another pass's already.
    """
    inputs = inputs.with_contiguous_vectors()
    x, W_enc, b_enc, _, W_dec, b_dec, feature_scale, *_ = inputs
    (acts, _, overflow, _), (grad_out, row_scale, _) = kept, grads
    assert acts is not None
    if spec.penalty == "l0":
        inputs = inputs._replace(feature_scale=None)
    # only a top-k of each row leaves rows of one length
    one_length = spec.k is not None and not spec.batch_topk
    by_feature = feature_order(acts, acts.indices.numel() // max(x.shape[0], 1) if one_length else None)
    leaves = collected is not None and collected.gpu is None and (needs.W_enc or needs.W_dec)
    found = feature_gradients(by_feature, acts.values, inputs, spec, grads, with_weights=not leaves)
    if leaves and collected is not None:
        n_overflow = None if overflow is None else overflow.n_rows
        size = W_dec.shape[0] * (x.shape[1] + W_dec.shape[1])
        buffer = None if overflow is None else collected.buffer(size, like=x)
        encoder, decoder = gpu_share(
            by_feature, acts.values, found.grad_hidden_pre, x, grad_out, row_scale, n_overflow, buffer
        )
        collected.gpu = GpuShare(encoder if needs.W_enc else None, decoder if needs.W_dec else None)
        found = found._replace(W_enc=encoder.extra, W_dec=decoder.extra)
    grad_x = decode_into(acts, found.grad_hidden_pre, W_enc.t(), None, x.dtype) if needs.x else None
    if overflow is not None:
        overflow_features(overflow, inputs, spec, grads, found)
        if grad_x is not None:
            overflow_rows(overflow, inputs, spec, grad_x, grads=grads)
    grad_b_dec = grad_out.sum(0, dtype=torch.float32) if row_scale is None else column_sums(grad_out, row_scale)
    if feature_scale is not None and found.scale is None:
        found = found._replace(scale=torch.zeros_like(feature_scale))
    if leaves:
        found = found._replace(W_enc=None, W_dec=None)
    return AutoencodeGrads(
        grad_x, None if found.W_enc is None else found.W_enc.t(), found.b_enc.to(b_enc.dtype), found.threshold,
        found.W_dec, grad_b_dec.to(b_dec.dtype), found.scale,
    )  # fmt: skip


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, spec: AutoencodeSpec) -> SparseActs:
    """`reference.encode` as entries, NaN with its value; one host synchronisation, none for BatchTopK.

    Raises:
        TypeError: x is fp64.
    """
    if spec.k is None:
        return encode_active(x, W_enc, b_enc, threshold, bandwidth=spec.bandwidth)
    if spec.batch_topk:
        return encode_batch_topk(x, W_enc, b_enc, threshold, spec.k).acts
    return encode_topk(x, W_enc, b_enc, threshold, bandwidth=spec.bandwidth, k=spec.k)
