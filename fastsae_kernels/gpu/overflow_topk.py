"""Top-k of rows that overflowed their capacity, recomputed exactly on the device; leaves at once where there are none.

Such a row can hide larger entries behind its capacity, so its activations are recomputed feature block by feature block:

    k <= MAX_MERGE   each block is merged into the best k so far by a bitonic step: one pass over the features
    else             the bits of the k-th largest value are found two by two, counting candidates: 17 passes

A row that turns out to have at most `k` active entries is left alone (it overflowed by its window); `overflow` keeps all
of it. Slow and rare: `row_topk` chooses capacities so that features in no particular order never come here.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import tile_config
from fastsae_kernels.gpu.overflow_tile import operands_of
from fastsae_kernels.gpu.tiles import active_bits, pack_entry, rank_entry, unrank_entry
from fastsae_kernels.gpu.topk import flag_rows
from fastsae_kernels.types import Overflow

# largest k that is merged; past it the two tiles of int64 spill
MAX_MERGE = 256


@triton.jit
def _overflow_topk_kernel(
    operands,  # Operands
    # outputs
    entries_ptr,  # [B, capacity] int64
    counts_ptr,  # [B] int32: set to K where the row has more than K active entries, else left alone
    # sizes
    least,  # a row with so many active entries or fewer is left alone
    capacity,
    K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,  # power of two, at least K
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    """Program owns BLOCK_B overflowing rows and finds the K largest active entries of each, over all features."""
    n_rows = tl.load(operands.n_rows)
    first = tl.program_id(0) * BLOCK_B
    if first >= n_rows:
        return
    offs_r = first + tl.arange(0, BLOCK_B)
    rows = tl.load(operands.rows + offs_r % n_rows)
    best = tl.zeros((BLOCK_B, BLOCK_S), dtype=tl.int64)
    n_active = tl.zeros((BLOCK_B,), dtype=tl.int32)
    for start in range(0, operands.d_sae, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        bits, hidden_pre = active_bits(operands, rows, offs_s, BLOCK_B, BLOCK_S, BLOCK_D, EVEN_D)
        n_active += tl.sum((bits > 0).to(tl.int32), 1)
        rank = tl.sort(tl.where(bits > 0, rank_entry(offs_s[None, :], hidden_pre), 0))
        # a falling and a rising sequence: their elementwise maximum is the larger half of both
        best = tl.sort(tl.maximum(best, rank), descending=True)
    slots = tl.arange(0, BLOCK_S)
    listed = tl.minimum(n_active, K)
    resolved = (n_active > least) & (offs_r < n_rows)
    kept = resolved[:, None] & (slots[None, :] < listed[:, None])
    position = rows[:, None] * capacity + slots[None, :]
    tl.store(entries_ptr + position, unrank_entry(best), mask=kept)
    tl.store(counts_ptr + rows, listed, mask=resolved)


@triton.jit
def _overflow_select_kernel(
    operands,  # Operands
    # outputs
    entries_ptr,  # [B, capacity] int64
    counts_ptr,  # [B] int32: set to k where the row has more than k active entries, else left alone
    # sizes
    k,
    least,  # a row with so many active entries or fewer is left alone
    capacity,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    """Program owns BLOCK_B overflowing rows: finds the k-th largest value of each, then lists what lies above it."""
    n_rows = tl.load(operands.n_rows)
    first = tl.program_id(0) * BLOCK_B
    if first >= n_rows:
        return
    offs_r = first + tl.arange(0, BLOCK_B)
    rows = tl.load(operands.rows + offs_r % n_rows)
    kth = tl.zeros((BLOCK_B,), dtype=tl.uint32)  # its leading bits, as far as they are known
    above = tl.zeros((BLOCK_B,), dtype=tl.int32)  # entries whose leading bits are larger
    step = tl.full((BLOCK_B,), 1 << 30, tl.uint32)
    for _digit in range(0, 16):
        one, two, three = kth | step, kth | (step * 2), kth | (step * 3)
        ones = tl.zeros((BLOCK_B, BLOCK_S), dtype=tl.int32)
        twos = tl.zeros((BLOCK_B, BLOCK_S), dtype=tl.int32)
        threes = tl.zeros((BLOCK_B, BLOCK_S), dtype=tl.int32)
        for start in range(0, operands.d_sae, BLOCK_S):
            offs_s = start + tl.arange(0, BLOCK_S)
            bits, _hidden_pre = active_bits(operands, rows, offs_s, BLOCK_B, BLOCK_S, BLOCK_D, EVEN_D)
            bits = bits.to(tl.uint32)
            ones += (bits >= one[:, None]).to(tl.int32)
            twos += (bits >= two[:, None]).to(tl.int32)
            threes += (bits >= three[:, None]).to(tl.int32)
        n_one, n_two, n_three = tl.sum(ones, 1), tl.sum(twos, 1), tl.sum(threes, 1)
        above = tl.where(n_three >= k, above, tl.where(n_two >= k, n_three, tl.where(n_one >= k, n_two, n_one)))
        kth = tl.where(n_three >= k, three, tl.where(n_two >= k, two, tl.where(n_one >= k, one, kth)))
        step = step >> 2

    kth = kth.to(tl.int32)
    n_active = tl.zeros((BLOCK_B,), dtype=tl.int32)
    slot = tl.zeros((BLOCK_B,), dtype=tl.int32)
    ties = tl.where(kth > 0, k - above, 0)  # that are still kept: the first ones; nothing inactive is
    for start in range(0, operands.d_sae, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        bits, hidden_pre = active_bits(operands, rows, offs_s, BLOCK_B, BLOCK_S, BLOCK_D, EVEN_D)
        n_active += tl.sum((bits > 0).to(tl.int32), 1)
        tie = (bits == kth[:, None]).to(tl.int32)
        kept = (bits > kth[:, None]) | ((tie > 0) & (tl.cumsum(tie, 1) <= ties[:, None]))
        ties -= tl.sum(tie, 1)
        slots = slot[:, None] + tl.cumsum(kept.to(tl.int32), 1) - 1
        fits = kept & (slots < k) & (offs_r < n_rows)[:, None]
        tl.store(entries_ptr + rows[:, None] * capacity + slots, pack_entry(offs_s[None, :], hidden_pre), mask=fits)
        slot += tl.sum(kept.to(tl.int32), 1)
    tl.store(counts_ptr + rows, tl.minimum(n_active, k), mask=(n_active > least) & (offs_r < n_rows))


def resolve_overflow_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    counts: Tensor,
    entries: Tensor,
    capacity: int,
    k: int,
    only_active: bool,
) -> None:
    """Replace the entries of overflowing rows with more than `k` active ones by their exact top `k`, in place.

    Args:
        x, W_enc, b_enc, threshold: As in `encode.list_entries`, all features.
        counts: `[N]` int32, more than `capacity` where a row overflowed; set to `k` where it was resolved.
        entries: `[N * capacity]` int64.
        capacity: At least `k`.
        k: How many active entries survive.
        only_active: There is no window, so a row with at most `k` active entries is resolved too: the
            listing adds up in another order and may have counted more.
    """
    merges = k <= MAX_MERGE
    kernel, name = (_overflow_topk_kernel, "overflow_topk") if merges else (_overflow_select_kernel, "overflow_select")
    config = tile_config(name, x, x.shape[1])
    if merges:
        config["BLOCK_S"] = max(config["BLOCK_S"], triton.next_power_of_2(k))
        # two tiles of int64 lie in registers
        config["num_warps"] = max(config["num_warps"], min(16, config["BLOCK_S"] // 16))
    kernel[(triton.cdiv(x.shape[0], config["BLOCK_B"]),)](
        operands=operands_of(Overflow(*flag_rows(counts > capacity)), x, W_enc, b_enc, threshold),
        entries_ptr=entries,
        counts_ptr=counts,
        capacity=capacity,
        least=-1 if only_active else k,
        **{"K" if merges else "k": k},
        **config,
    )
