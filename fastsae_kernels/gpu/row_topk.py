"""Exact top-k of every row without its full list: features are listed range by range, and rows pruned in between.

    bounds = 0
    for each range of features, growing by a constant factor (2 or more):
        append the entries of the range with value >= bounds[row] to the row                       (encode.list_entries)
        keep the k largest active ones of a row that has more; bounds[row] = just above the k-th   (topk.prune_rows)
    sort by feature, cut to k

A bound from a part of the features only admits too much, so the result is exact. The first range has as many features as
a row's capacity, so it cannot overflow; for features in no particular order, ranges that end `growth` times as far as the
one before admit about `(growth - 1) * k` entries, and rows have room for far more (see `growth_of`). A row that overflows
all the same is flagged for good, costs nothing more, and is recomputed exactly at the end (`overflow_topk`). There is no
host synchronisation; up to as many features as a row's capacity there is one range and no pruning.

Bytes: `N * capacity * 8` for the rows, against `N * d_sae * 2` of a dense tensor; every weight is read once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastsae_kernels.gpu import topk
from fastsae_kernels.gpu.config import on_device
from fastsae_kernels.gpu.encode import encode, list_entries, padded_offsets
from fastsae_kernels.gpu.overflow_topk import resolve_overflow_topk
from fastsae_kernels.types import SparseActs

# capacity of a row: at least so many per surviving entry, and in all
HEADROOM = 4
MIN_CAPACITY = 256
# few tokens: more costs nothing, and saves ranges, which are launches and cannot fill the device
SMALL_BATCH = 64
SMALL_HEADROOM = 16


class RowTopK(NamedTuple):
    """Listed and cut rows."""

    acts: SparseActs  # rows of equal length; empty where flagged
    flagged: Tensor | None  # [N] bool: at most k active entries, and more in the window than fit; None: no such row
    counts: Tensor  # [N] int32: entries of each row before the last cut


def capacity_of(k: int, d_sae: int, headroom: int | None = None) -> int:
    """Entries that a row can hold, and features of the first range: a power of two that one program sorts, if it can be."""
    capacity = triton.next_power_of_2(max((headroom or HEADROOM) * k, MIN_CAPACITY))
    if capacity > topk.MAX_SORT:  # k kept, k new ones, and k to spare
        capacity = max(topk.MAX_SORT, triton.cdiv(3 * k, 256) * 256)
    return min(capacity, d_sae)


def growth_of(k: int, capacity: int) -> int:
    """By which factor ranges can grow: with features in no order, less than one row in 10^7 then overflows in a range.

    Of the largest `capacity` values up to the end of a range, about `capacity / growth` lie before it, Poisson distributed;
    the row overflows where these are less than `k`. So `capacity / growth` shall exceed `k` by 5.5 standard deviations.
    """
    before = ((5.5 + math.sqrt(5.5**2 + 4 * k)) / 2) ** 2
    return max(2, int(capacity / before))


def list_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k: int, bandwidth: float) -> RowTopK:
    """The `k` largest active entries of every row, or all of it (window entries too) where at most `k` are active.

    Args:
        x, W_enc, b_enc, threshold, bandwidth: As in `encode.list_entries`, all features.
        k: The number of entries that survive, at least 1.
    """
    (n_tokens, d_sae), device = (x.shape[0], W_enc.shape[1]), x.device
    k = min(k, d_sae)
    only_active = bandwidth == 0
    capacity = capacity_of(k, d_sae, SMALL_HEADROOM if only_active and n_tokens <= SMALL_BATCH else HEADROOM)
    row_offsets = padded_offsets(n_tokens, capacity, device)
    starts, ends = row_offsets[:-1], row_offsets[1:]
    cursors = starts.clone()
    entries = torch.empty(n_tokens * capacity, dtype=torch.int64, device=device)
    bounds = torch.zeros(n_tokens, dtype=torch.float32, device=device)
    for start, end in topk.feature_ranges(capacity, d_sae, growth_of(k, capacity)):
        if start > 0 and n_tokens > 0:
            topk.prune_rows(entries.view(n_tokens, capacity), cursors, starts, bounds, k)
        list_entries(
            x, W_enc[:, start:end], b_enc[start:end], threshold[start:end], cursors, ends, entries,
            bandwidth=bandwidth, bounds=bounds if start > 0 else None, first_feature=start,
        )  # fmt: skip
    counts = cursors - starts
    if capacity < d_sae and n_tokens > 0:
        resolve_overflow_topk(x, W_enc, b_enc, threshold, counts, entries, capacity, k, only_active)
    if only_active:  # there are only active entries, so k slots hold whatever a row keeps
        acts = topk.sort_rows(counts, entries, padded_offsets(n_tokens, k, device), (n_tokens, d_sae), k, n_tokens * k)
        return RowTopK(acts, None, counts)
    acts = topk.sort_rows(counts, entries, row_offsets, (n_tokens, d_sae), k)
    return RowTopK(acts, None if capacity == d_sae else counts > capacity, counts)


@on_device
def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, *, k: int, bandwidth: float = 0.0
) -> SparseActs:
    """`encode.encode` of which at most the `k` largest active entries of a row survive, ties to the lower index.

    It synchronises with the host only to see whether a row's window overflowed, if there is one. Such rows keep everything
    that they have, so they are encoded once more on their own, without top-k.
    """
    b_enc, threshold = b_enc.contiguous(), threshold.contiguous()
    rows = list_topk(x, W_enc, b_enc, threshold, k, bandwidth)
    acts = rows.acts
    if rows.flagged is None or not rows.flagged.any():
        return acts
    left = rows.flagged.nonzero().flatten()
    more = encode(x[left], W_enc, b_enc, threshold, bandwidth=bandwidth).packed()
    acts = acts.packed()
    tokens = torch.cat((acts.row_ids(), left[more.row_ids()]))
    indices, values = torch.cat((acts.indices, more.indices)), torch.cat((acts.values, more.values))
    order = torch.sort(tokens, stable=True).indices  # a row's entries lie together in either, in order
    row_offsets = torch.searchsorted(tokens[order], torch.arange(x.shape[0] + 1, device=x.device)).int()
    return SparseActs(row_offsets, indices[order], values[order], acts.shape)
