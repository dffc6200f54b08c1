"""Order and top-k of listed entries: each row by feature index, cut to its `k` largest active ones.

Entries come from `encode` in any order, each an int64 that holds index and value bits together, so that sorting needs no
second gather. Activations are positive, so their bit patterns order as the values do (NaN above all); among equal ones
the lower feature index wins. The result is a function of the set of entries alone: deterministic.

A row with more than `k` active entries keeps the `k` largest and none that is listed for the window alone; a row with at
most `k` keeps everything. `row_topk` lists the features range by range and calls `prune_rows` in between.

A program sorts a row in its registers (a bitonic network); rows longer than `MAX_SORT` go through `torch.sort`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.tiles import entry_index, entry_value, rank_entry, unrank_entry
from fastsae_kernels.types import SparseActs

# longest row sorted by one program; past it torch.sort is used
MAX_SORT = 2048
LAST = 0x7FFFFFFFFFFFFFFF  # sorts behind every entry


@triton.jit
def _sort_rows_kernel(
    # inputs
    entries_ptr,  # [B, capacity] int64
    counts_ptr,  # [B] int32: listed entries, more than capacity where the row overflowed
    # outputs
    indices_ptr,  # [B, span] int32
    values_ptr,  # [B, span] fp32
    row_counts_ptr,  # [B] int32: entries kept, 0 where the row overflowed
    # sizes
    capacity,
    span,  # places of a row in the output: at least what it keeps
    K: tl.constexpr,  # 0 keeps every entry
    BLOCK_K: tl.constexpr,  # power of two, at least capacity
):
    """Program owns one row: sorts it by feature index, cuts it to the top K, writes zeros behind it."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + row)
    count = tl.where(count > capacity, 0, count)
    offs = tl.arange(0, BLOCK_K)
    entry = tl.load(entries_ptr + row * capacity + offs, mask=offs < count, other=0)
    if K > 0:
        value = entry_value(entry)
        active = (offs < count) & ~(value <= 0.0)
        if tl.sum(active.to(tl.int32), 0) > K:
            rank = tl.where(active, rank_entry(entry_index(entry), value), 0)
            entry = unrank_entry(tl.sort(rank, descending=True))
            count = K
    entry = tl.sort(tl.where(offs < count, entry, 0x7FFFFFFFFFFFFFFF))
    entry = tl.where(offs < count, entry, 0)
    mask = offs < span
    tl.store(indices_ptr + row * span + offs, entry_index(entry), mask=mask)
    tl.store(values_ptr + row * span + offs, entry_value(entry), mask=mask)
    tl.store(row_counts_ptr + row, count)


@triton.jit
def _prune_rows_kernel(
    # changed in place
    entries_ptr,  # [B, capacity] int64
    cursors_ptr,  # [B] int32: next slot of each row
    bounds_ptr,  # [B] fp32: smaller entries need not be listed any more
    peaks_ptr,  # [B] int32: most entries that the row has wanted to hold so far
    # sizes
    capacity,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,  # power of two, at least capacity
):
    """Program owns one row: keeps its K largest active entries where more are active, else everything."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(cursors_ptr + row) - (row * capacity).to(tl.int32)
    tl.store(peaks_ptr + row, tl.maximum(tl.load(peaks_ptr + row), count))
    if count > capacity:
        # the cursor stays where it is, past the end: the row is lost, and listing more of it would be wasted
        tl.store(bounds_ptr + row, float("inf"))
    elif count > K:
        offs = tl.arange(0, BLOCK_K)
        entry = tl.load(entries_ptr + row * capacity + offs, mask=offs < count, other=0)
        tl.debug_barrier()  # everything is read before anything is overwritten
        value = entry_value(entry)
        active = (offs < count) & ~(value <= 0.0)
        if tl.sum(active.to(tl.int32), 0) > K:
            rank = tl.sort(tl.where(active, rank_entry(entry_index(entry), value), 0), descending=True)
            tl.store(entries_ptr + row * capacity + offs, unrank_entry(rank), mask=offs < K)
            tl.store(cursors_ptr + row, (row * capacity).to(tl.int32) + K)
            # a later entry has a higher feature, so it must be larger than the K-th, not equal: the next float, at most inf
            bits = tl.max(tl.where(offs == K - 1, rank >> 32, 0), 0).to(tl.int32)
            tl.store(bounds_ptr + row, tl.minimum(bits + 1, 0x7F800000).to(tl.float32, bitcast=True))


def _block(capacity: int) -> dict[str, int]:
    """Tile and warps of a program that sorts a row."""
    block = max(16, triton.next_power_of_2(capacity))
    return {"BLOCK_K": block, "num_warps": max(1, min(16, block // 128))}


def _ranks(entries: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """`(rank, valid)` of `[N, capacity]` entries: `tiles.rank_entry` where active, else 0; valid where in use."""
    capacity = entries.shape[1]
    slots = torch.arange(capacity, device=entries.device)
    valid = (slots < counts[:, None]) & (counts <= capacity)[:, None]
    bits = entries & 0xFFFFFFFF
    # above the bits of infinity lie the NaNs, and from the sign bit on the negative ones
    bits = torch.where(bits > 0x7F800000, 0x7FC00000, bits)
    rank = (bits << 32) | (0x7FFFFFFF - (entries >> 32))
    return torch.where(valid & (bits > 0), rank, 0), valid


def _by_rank(rank: Tensor) -> Tensor:
    """The entries of each row, the highest rank first."""
    rank = torch.sort(rank, dim=1, descending=True).values
    return ((0x7FFFFFFF - (rank & 0x7FFFFFFF)) << 32) | (rank >> 32)


def _prune_long_rows(
    entries: Tensor, cursors: Tensor, row_starts: Tensor, bounds: Tensor, peaks: Tensor, k: int
) -> None:
    """`prune_rows` for rows that no program can sort."""
    counts = cursors - row_starts
    torch.maximum(peaks, counts, out=peaks)
    rank, _ = _ranks(entries, counts)
    cut = (rank > 0).sum(1) > k
    best = _by_rank(rank)[:, :k]
    entries[:, :k] = torch.where(cut[:, None], best, entries[:, :k])
    cursors.copy_(torch.where(cut, row_starts + k, cursors))
    kth = ((best[:, -1] & 0x7FFFFFFF) + 1).clamp(max=0x7F800000).int().view(torch.float32)
    bounds.copy_(torch.where(cut, kth, bounds).masked_fill(counts > entries.shape[1], float("inf")))


def prune_rows(entries: Tensor, cursors: Tensor, row_starts: Tensor, bounds: Tensor, peaks: Tensor, k: int) -> None:
    """Cut every row with more than `k` active entries to the `k` largest, in place, and raise its bound above the k-th.

    Features must come in ascending order: a later entry that equals the k-th has a higher index and loses.

    Args:
        entries: `[N, capacity]` int64, packed.
        cursors: `[N]` int32, next slot of each row; of a row that overflowed it stays past the end.
        row_starts: `[N]` int32.
        bounds: `[N]` fp32, see `encode.list_entries`; infinite for a row that overflowed.
        peaks: `[N]` int32, the most entries that a row has wanted to hold.
        k: How many active entries survive.
    """
    capacity = entries.shape[1]
    if capacity > MAX_SORT:
        _prune_long_rows(entries, cursors, row_starts, bounds, peaks, k)
        return
    _prune_rows_kernel[(entries.shape[0],)](
        entries_ptr=entries,
        cursors_ptr=cursors,
        bounds_ptr=bounds,
        peaks_ptr=peaks,
        capacity=capacity,
        K=k,
        **_block(capacity),
    )


def flag_rows(flagged: Tensor) -> tuple[Tensor, Tensor]:
    """`(rows [N] int64, n_rows [1] int32)`: the flagged rows first, in ascending order; no synchronisation."""
    rows = torch.sort(flagged.to(torch.uint8), descending=True, stable=True).indices
    return rows, flagged.sum(dtype=torch.int32).reshape(1)


def _sort_long_rows(counts: Tensor, entries: Tensor, span: int, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """`(indices, values, row_counts)` of `sort_rows` for rows that no program can sort."""
    rank, valid = _ranks(entries, counts)
    kept = counts.masked_fill(counts > entries.shape[1], 0)
    entries = torch.where(valid, entries, LAST)
    if k is not None and k < entries.shape[1]:
        cut = (rank > 0).sum(1) > k
        best = torch.where(torch.arange(entries.shape[1], device=entries.device) < k, _by_rank(rank), LAST)
        entries = torch.where(cut[:, None], best, entries)
        kept = kept.masked_fill(cut, k)
    entries = torch.sort(entries, dim=1).values[:, :span]
    entries = torch.where(entries == LAST, 0, entries).flatten()
    return (entries >> 32).int(), entries.int().view(torch.float32), kept.int()


def sort_rows(
    counts: Tensor,
    entries: Tensor,
    row_offsets: Tensor,
    shape: tuple[int, int],
    k: int | None,
    span: int | None = None,
) -> SparseActs:
    """Rows of equal span, sorted by feature index and cut to the top `k`; a row that overflowed becomes empty.

    Args:
        counts: `[N]` int32, entries of each row, more than its span where it overflowed.
        entries: `[N * capacity]` int64, packed.
        row_offsets: `[N + 1]` int32, where the rows of the result lie.
        shape: `(N, d_sae)`.
        k: How many active entries survive in a row, None for all.
        span: Places of a row in the result, at least what it keeps; None for the capacity.
    """
    n_tokens = shape[0]
    capacity = entries.numel() // max(n_tokens, 1)
    span = capacity if span is None else span
    if capacity > MAX_SORT:
        indices, values, row_counts = _sort_long_rows(counts, entries.view(n_tokens, capacity), span, k)
        return SparseActs(row_offsets, indices, values, shape, row_counts)
    indices = torch.empty(n_tokens * span, dtype=torch.int32, device=entries.device)
    values = torch.empty(n_tokens * span, dtype=torch.float32, device=entries.device)
    row_counts = torch.empty_like(counts)
    if n_tokens > 0:
        _sort_rows_kernel[(n_tokens,)](
            entries_ptr=entries,
            counts_ptr=counts,
            indices_ptr=indices,
            values_ptr=values,
            row_counts_ptr=row_counts,
            capacity=capacity,
            span=span,
            K=k or 0,
            **_block(capacity),
        )
    return SparseActs(row_offsets, indices, values, shape, row_counts)


def sort_packed(entries: Tensor, row_offsets: Tensor, shape: tuple[int, int]) -> SparseActs:
    """Packed rows of any length by feature index, by `torch.sort`; used where no fixed span is long enough."""
    indices, values = (entries >> 32).int(), entries.int().view(torch.float32)
    rows = SparseActs(row_offsets, indices, values, shape).row_ids()
    # row and index are below 2^31, so the pair fits an int64
    order = torch.sort((rows << 31) | indices).indices
    return SparseActs(row_offsets, indices[order], values[order], shape)
