"""Order and top-k of listed entries: each row by feature index, cut to its `k` largest active ones.

Entries come from `encode` in any order, each an int64 that holds index and value bits together, so that sorting needs no
second gather. Activations are positive, so their bit patterns order as the values do (NaN above all); among equal ones
the lower feature index wins. The result is a function of the set of entries alone: deterministic.

A row with more than `k` active entries keeps the `k` largest and none that is listed for the window alone; a row with at
most `k` keeps everything. A row that overflowed its span can hide larger entries behind it: `_overflow_topk_kernel`
recomputes such a row feature block by feature block and merges each block into its best `k` by a bitonic step, in one pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import launch_config
from fastsae_kernels.gpu.tiles import entry_index, entry_value, gate, rank_entry, tile_product, unrank_entry
from fastsae_kernels.sparse_acts import SparseActs, topk_mask

# longest row sorted by one program; past it torch.sort is used
MAX_SORT = 2048
# largest k that an overflowing row is searched for; past 256 the search spills registers and is slow
MAX_K = 512


@triton.jit
def _sort_rows_kernel(
    # inputs
    entries_ptr,  # [B, capacity] int64
    counts_ptr,  # [B] int32: listed entries, more than capacity where the row overflowed
    # outputs
    indices_ptr,  # [B, capacity] int32
    values_ptr,  # [B, capacity] fp32
    row_counts_ptr,  # [B] int32: entries kept, 0 where the row overflowed
    # sizes
    capacity,
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
    mask = offs < capacity
    tl.store(indices_ptr + row * capacity + offs, entry_index(entry), mask=mask)
    tl.store(values_ptr + row * capacity + offs, entry_value(entry), mask=mask)
    tl.store(row_counts_ptr + row, count)


@triton.jit
def _overflow_topk_kernel(
    # inputs
    x_ptr,  # [B, D]
    W_enc_ptr,  # [D, S]
    b_enc_ptr,  # [S]
    threshold_ptr,  # [S] fp32
    rows_ptr,  # [B] int64: the rows that overflowed come first
    n_rows_ptr,  # [1] int32: how many they are
    # outputs
    entries_ptr,  # [B, capacity] int64
    counts_ptr,  # [B] int32: set to K where the row has more than K active entries, else left alone
    # sizes
    capacity,
    d_in,
    d_sae,
    # strides
    stride_xb,
    stride_xd,
    stride_wd,
    stride_ws,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,  # power of two, at least K
    BLOCK_D: tl.constexpr,
):
    """Program owns BLOCK_B overflowing rows and finds the K largest active entries of each, over all features."""
    n_rows = tl.load(n_rows_ptr)
    first = tl.program_id(0) * BLOCK_B
    if first >= n_rows:
        return
    offs_r = first + tl.arange(0, BLOCK_B)
    rows = tl.load(rows_ptr + offs_r % n_rows)
    best = tl.zeros((BLOCK_B, BLOCK_S), dtype=tl.int64)
    n_active = tl.zeros((BLOCK_B,), dtype=tl.int32)
    for start in range(0, d_sae, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        columns = offs_s % d_sae
        hidden_pre = tile_product(
            x_ptr, rows, stride_xb, stride_xd, W_enc_ptr, columns, stride_wd, stride_ws, d_in,
            PRECISION, BLOCK_B, BLOCK_S, BLOCK_D, EVEN_D,
        )  # fmt: skip
        hidden_pre += tl.load(b_enc_ptr + columns).to(tl.float32)[None, :]
        active, _ = gate(hidden_pre, tl.load(threshold_ptr + columns)[None, :], 0.0)
        active = (active | (hidden_pre != hidden_pre)) & (offs_s < d_sae)[None, :]
        n_active += tl.sum(active.to(tl.int32), 1)
        rank = tl.sort(tl.where(active, rank_entry(columns[None, :], hidden_pre), 0))
        # a falling and a rising sequence: their elementwise maximum is the larger half of both
        best = tl.sort(tl.maximum(best, rank), descending=True)
    slots = tl.arange(0, BLOCK_S)
    cut = (n_active > K) & (offs_r < n_rows)
    kept = cut[:, None] & (slots < K)[None, :]
    position = rows[:, None] * capacity + slots[None, :]
    tl.store(entries_ptr + position, unrank_entry(best), mask=kept)
    tl.store(counts_ptr + rows, tl.full((BLOCK_B,), K, tl.int32), mask=cut)


def flag_rows(flagged: Tensor) -> tuple[Tensor, Tensor]:
    """`(rows [N] int64, n_rows [1] int32)`: the flagged rows first, in ascending order; no synchronisation."""
    rows = torch.sort(flagged.to(torch.uint8), descending=True, stable=True).indices
    return rows, flagged.sum(dtype=torch.int32).reshape(1)


def resolve_overflow_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    counts: Tensor,
    entries: Tensor,
    capacity: int,
    k: int,
) -> None:
    """Replace the entries of overflowing rows with more than `k` active ones by their exact top `k`, in place.

    Raises:
        ValueError: `k` is above `MAX_K`, or `capacity` below `k`.
    """
    if not k <= min(MAX_K, capacity):
        raise ValueError(f"k: expected at most {MAX_K} and the capacity {capacity} on the Triton path, got {k}")
    rows, n_rows = flag_rows(counts > capacity)
    config = dict(launch_config("overflow_topk", x))
    config["BLOCK_S"] = max(config["BLOCK_S"], triton.next_power_of_2(k))
    config["num_warps"] = max(config["num_warps"], min(16, config["BLOCK_S"] // 16))  # two tiles of int64 in registers
    _overflow_topk_kernel[(triton.cdiv(x.shape[0], config["BLOCK_B"]),)](
        x_ptr=x,
        W_enc_ptr=W_enc,
        b_enc_ptr=b_enc,
        threshold_ptr=threshold,
        rows_ptr=rows,
        n_rows_ptr=n_rows,
        entries_ptr=entries,
        counts_ptr=counts,
        capacity=capacity,
        d_in=x.shape[1],
        d_sae=W_enc.shape[1],
        stride_xb=x.stride(0),
        stride_xd=x.stride(1),
        stride_wd=W_enc.stride(0),
        stride_ws=W_enc.stride(1),
        PRECISION="ieee",
        EVEN_D=x.shape[1] % config["BLOCK_D"] == 0,
        K=k,
        **config,
    )


def sort_rows(
    counts: Tensor, entries: Tensor, row_offsets: Tensor, shape: tuple[int, int], k: int | None
) -> SparseActs:
    """Rows of equal span, sorted by feature index and cut to the top `k`; a row that overflowed becomes empty.

    Args:
        counts: `[N]` int32, entries of each row, more than its span where it overflowed.
        entries: `[N * span]` int64, packed.
        row_offsets: `[N + 1]` int32; the span is at most `MAX_SORT`.
        shape: `(N, d_sae)`.
        k: How many active entries survive in a row, None for all.
    """
    n_tokens = shape[0]
    indices = torch.empty(entries.numel(), dtype=torch.int32, device=entries.device)
    values = torch.empty(entries.numel(), dtype=torch.float32, device=entries.device)
    row_counts = torch.empty_like(counts)
    if n_tokens > 0:
        capacity = entries.numel() // n_tokens
        block = max(16, triton.next_power_of_2(capacity))
        _sort_rows_kernel[(n_tokens,)](
            entries_ptr=entries,
            counts_ptr=counts,
            indices_ptr=indices,
            values_ptr=values,
            row_counts_ptr=row_counts,
            capacity=capacity,
            K=k or 0,
            BLOCK_K=block,
            num_warps=max(1, min(16, block // 128)),
        )
    return SparseActs(row_offsets, indices, values, shape, row_counts)


def sort_packed(entries: Tensor, row_offsets: Tensor, shape: tuple[int, int], k: int | None) -> SparseActs:
    """The same for packed rows of any length, by `torch.sort`; used where no fixed span is long enough."""
    indices, values = (entries >> 32).int(), entries.int().view(torch.float32)
    acts = SparseActs(row_offsets, indices, values, shape)
    rows = acts.row_ids()
    # row and index are below 2^31, so the pair fits an int64
    order = torch.sort((rows << 31) | indices).indices
    acts = SparseActs(row_offsets, indices[order], values[order], shape)
    return acts if k is None else acts.select(topk_mask(rows, acts.values, row_offsets, k))
