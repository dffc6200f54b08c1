"""Order and top-k of listed entries: each row by feature index, cut to its `k` largest active ones.

Entries come from `encode` in any order, each an int64 that holds index and value bits together, so that sorting needs no
second gather. Activations are positive, so their bit patterns order as the values do (NaN above all); among equal ones
the lower feature index wins. The result is a function of the set of entries alone: deterministic.

A row with more than `k` active entries keeps the `k` largest and none that is listed for the window alone; a row with at
most `k` keeps everything. `row_topk` lists the features range by range and calls `prune_rows` in between.

A program sorts a row in its registers (a bitonic network); rows longer than `MAX_SORT` go through `torch.sort`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import LaunchConfig, launch_config
from fastsae_kernels.gpu.tiles import entry_index, entry_value, rank_entry, unrank_entry, value_bits
from fastsae_kernels.types import SparseActs

# longest row sorted by one program; past it torch.sort is used
MAX_SORT = 2048
LAST = 0x7FFFFFFFFFFFFFFF  # sorts behind every entry


def feature_ranges(first: int, d_sae: int, growth: int = 2) -> Iterator[tuple[int, int]]:
    """`(start, end)` of ranges, each ending `growth` times as far as the one before."""
    start, end = 0, min(first, d_sae)
    while start < d_sae:
        yield start, end
        start, end = end, min(growth * end, d_sae)


@triton.jit
def _cut(entry, used, K: tl.constexpr):
    """`(entry, n_active)`: the active entries of a row, the largest first, where more than K are active."""
    value = entry_value(entry)
    active = used & ~(value <= 0.0)
    n_active = tl.sum(active.to(tl.int32), 0)
    if n_active > K:
        entry = tl.where(active, rank_entry(entry_index(entry), value), 0)
        entry = unrank_entry(tl.sort(entry, descending=True))
    return entry, n_active


@triton.jit
def _sort_rows_kernel(
    # inputs
    entries_ptr,  # [B, capacity] int64
    counts_ptr,  # [B] int32: listed entries, more than capacity where the row overflowed
    row_offsets_ptr,  # [B + 1] int32: where the rows of the output lie
    # outputs, zero before
    indices_ptr,  # [nnz] int32
    values_ptr,  # [nnz] fp32
    row_counts_ptr,  # [B] int32: entries kept, 0 where the row overflowed
    # size
    capacity,
    K: tl.constexpr,  # 0 keeps every entry
    BLOCK_K: tl.constexpr,  # power of two, at least capacity
):
    """Program owns one row: sorts it by feature index and cuts it to the top K."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(row_offsets_ptr + row)
    room = tl.load(row_offsets_ptr + row + 1) - start
    count = tl.load(counts_ptr + row)
    count = tl.where(count > capacity, 0, count)
    offs = tl.arange(0, BLOCK_K)
    entry = tl.load(entries_ptr + row * capacity + offs, mask=offs < count, other=0)
    if K > 0:
        entry, n_active = _cut(entry, offs < count, K)
        count = tl.where(n_active > K, K, count)
    entry = tl.sort(tl.where(offs < count, entry, 0x7FFFFFFFFFFFFFFF))
    count = tl.where(count > room, 0, count)
    tl.store(indices_ptr + start + offs, entry_index(entry), mask=offs < count)
    tl.store(values_ptr + start + offs, entry_value(entry), mask=offs < count)
    tl.store(row_counts_ptr + row, count)


@triton.jit
def _prune_rows_kernel(
    # changed in place
    entries_ptr,  # [B, capacity] int64
    cursors_ptr,  # [B] int32: next slot of each row
    bounds_ptr,  # [B] fp32: smaller entries need not be listed any more
    # sizes
    capacity,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,  # power of two, at least capacity
):
    """Program owns one row: keeps its K largest active entries where more are active, else everything."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(cursors_ptr + row) - (row * capacity).to(tl.int32)
    if count > capacity:
        # the cursor stays where it is, past the end: the row is lost, and listing more of it would be wasted
        tl.store(bounds_ptr + row, float("inf"))
    elif count > K:
        offs = tl.arange(0, BLOCK_K)
        entry = tl.load(entries_ptr + row * capacity + offs, mask=offs < count, other=0)
        tl.debug_barrier()  # everything is read before anything is overwritten
        entry, n_active = _cut(entry, offs < count, K)
        if n_active > K:
            tl.store(entries_ptr + row * capacity + offs, entry, mask=offs < K)
            tl.store(cursors_ptr + row, (row * capacity).to(tl.int32) + K)
            # a later entry has a higher feature, so it must be larger than the K-th, not equal: the next float, at most inf
            bits = tl.max(tl.where(offs == K - 1, value_bits(entry_value(entry)), 0), 0)
            tl.store(bounds_ptr + row, tl.minimum(bits + 1, 0x7F800000).to(tl.float32, bitcast=True))


def _block(capacity: int, counts: Tensor) -> LaunchConfig:
    """The launch parameters of a program that sorts a row; `counts`, int32, tells the device."""
    block = max(16, triton.next_power_of_2(capacity))
    # the table has a bound on registers: without one the compiler takes so few that the sort of 512 spills
    return {"BLOCK_K": block, "num_warps": max(1, min(16, block // 128)), **launch_config("sort_rows", counts)}


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


def _prune_long_rows(entries: Tensor, cursors: Tensor, row_starts: Tensor, bounds: Tensor, k: int) -> None:
    """`prune_rows` for rows that no program can sort."""
    counts = cursors - row_starts
    rank, _ = _ranks(entries, counts)
    cut = (rank > 0).sum(1) > k
    best = _by_rank(rank)[:, :k]
    entries[:, :k] = torch.where(cut[:, None], best, entries[:, :k])
    cursors.copy_(torch.where(cut, row_starts + k, cursors))
    kth = ((best[:, -1] & 0x7FFFFFFF) + 1).clamp(max=0x7F800000).int().view(torch.float32)
    bounds.copy_(torch.where(cut, kth, bounds).masked_fill(counts > entries.shape[1], float("inf")))


def prune_rows(entries: Tensor, cursors: Tensor, row_starts: Tensor, bounds: Tensor, k: int) -> None:
    """Cut every row with more than `k` active entries to the `k` largest, in place, and raise its bound above the k-th.

    Features must come in ascending order: a later entry that equals the k-th has a higher index and loses.

    Args:
        entries: `[N, capacity]` int64, packed.
        cursors: `[N]` int32, next slot of each row; of a row that overflowed it stays past the end.
        row_starts: `[N]` int32.
        bounds: `[N]` fp32, see `encode.list_entries`; infinite for a row that overflowed.
        k: How many active entries survive.
    """
    capacity = entries.shape[1]
    if capacity > MAX_SORT:
        _prune_long_rows(entries, cursors, row_starts, bounds, k)
        return
    _prune_rows_kernel[(entries.shape[0],)](
        entries_ptr=entries,
        cursors_ptr=cursors,
        bounds_ptr=bounds,
        capacity=capacity,
        K=k,
        **_block(capacity, cursors),
    )


def flag_rows(flagged: Tensor) -> tuple[Tensor, Tensor]:
    """`(rows [N] int64, n_rows [1] int32)`: the flagged rows first, in ascending order; no synchronisation."""
    rows = torch.sort(flagged.to(torch.uint8), descending=True, stable=True).indices
    return rows, flagged.sum(dtype=torch.int32).reshape(1)


def _sort_long_rows(counts: Tensor, entries: Tensor, room: int, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """`(indices, values, row_counts)` of `sort_rows` for rows that no program can sort."""
    rank, valid = _ranks(entries, counts)
    kept = counts.masked_fill(counts > entries.shape[1], 0)
    entries = torch.where(valid, entries, LAST)
    if k is not None and k < entries.shape[1]:
        cut = (rank > 0).sum(1) > k
        best = torch.where(torch.arange(entries.shape[1], device=entries.device) < k, _by_rank(rank), LAST)
        entries = torch.where(cut[:, None], best, entries)
        kept = kept.masked_fill(cut, k)
    entries = torch.sort(entries, dim=1).values[:, :room]
    entries = torch.where(entries == LAST, 0, entries).flatten()
    return (entries >> 32).int(), entries.int().view(torch.float32), kept.int()


def packed_offsets(counts: Tensor, capacity: int, size: int) -> Tensor:
    """`[N + 1]` int32: where rows lie one behind the other, as many as find room; no synchronisation.

    Args:
        counts: `[N]`, entries of each row; a row with more than `capacity` takes no room.
        capacity: The number of entries that a row can hold.
        size: The number of entries that all rows together can hold. What is left over belongs to the last row.
    """
    ends = counts.masked_fill(counts > capacity, 0).cumsum(0).clamp(max=size)
    row_offsets = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=counts.device)
    row_offsets[1:] = ends
    row_offsets[-1:] = size
    return row_offsets


def sort_rows(
    counts: Tensor,
    entries: Tensor,
    row_offsets: Tensor,
    shape: tuple[int, int],
    k: int | None,
    size: int | None = None,
) -> SparseActs:
    """Rows sorted by feature index and cut to the top `k`; a row that overflowed, or finds no room, becomes empty.

    Args:
        counts: `[N]` int32, entries of each row, more than its capacity where it overflowed.
        entries: `[N * capacity]` int64, packed.
        row_offsets: `[N + 1]` int32, where the rows of the result lie.
        shape: `(N, d_sae)`.
        k: How many active entries survive in a row, None for all.
        size: The number of entries that the result can hold, where `row_offsets` ends; None for that of `entries`.
    """
    n_tokens = shape[0]
    capacity = entries.numel() // max(n_tokens, 1)
    size = entries.numel() if size is None else size
    if capacity > MAX_SORT:
        indices, values, row_counts = _sort_long_rows(counts, entries.view(n_tokens, capacity), size // n_tokens, k)
        return SparseActs(row_offsets, indices, values, shape, row_counts)
    indices = torch.zeros(size, dtype=torch.int32, device=entries.device)
    values = torch.zeros(size, dtype=torch.float32, device=entries.device)
    row_counts = torch.empty_like(counts)
    if n_tokens > 0:
        _sort_rows_kernel[(n_tokens,)](
            entries_ptr=entries,
            counts_ptr=counts,
            row_offsets_ptr=row_offsets,
            indices_ptr=indices,
            values_ptr=values,
            row_counts_ptr=row_counts,
            capacity=capacity,
            K=k or 0,
            **_block(capacity, counts),
        )
    return SparseActs(row_offsets, indices, values, shape, row_counts)


def sort_packed(entries: Tensor, row_offsets: Tensor, shape: tuple[int, int]) -> SparseActs:
    """Packed rows of any length by feature index, by `torch.sort`; used where no capacity that all rows share is large enough."""
    indices, values = (entries >> 32).int(), entries.int().view(torch.float32)
    rows = SparseActs(row_offsets, indices, values, shape).row_ids()
    # row and index are below 2^31, so the pair fits an int64
    order = torch.sort((rows << 31) | indices).indices
    return SparseActs(row_offsets, indices[order], values[order], shape)
