"""What a tile of pre-activations does with its entries: which are listed, and two ways to append them to their rows.

Every way of listing entries (`pointer`, `persistent`, `compact`) gates through `listed_values` and ends in one of the
appends, so all list the same set. A tile of listed values holds `NOT_LISTED` (-inf, which no gate passes) elsewhere: one
tile in registers instead of a value and a mask, and that decides whether the large tiles spill.

Appending takes slots from the row's cursor by an atomic; the cursor moves on past the row's span while the stores stop, so
it counts the true number of entries and an overflow is never silent.

    append_each      one atomic per entry. Fewest registers per element, most instructions: tiles of up to 128 x 64.
    append_in_turn   one atomic per row, then the first entry of every row, the second, ... The loop runs as often as the
                     fullest row of the tile has entries (2 or 3 times where features are sparse).

Their `columns` are unequal, also past the last feature, where nothing is listed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastsae_kernels.gpu.tiles import gate, pack_entry

NOT_LISTED = tl.constexpr(float("-inf"))


@triton.jit
def listed_values(
    product,  # [BLOCK_B, BLOCK_S] fp32, x @ W_enc
    offs_b,  # [BLOCK_B], may run past the last row
    offs_s,  # [BLOCK_S], may run past the last feature
    n_tokens,
    d_sae,
    b_enc_ptr,
    threshold_ptr,
    bounds_ptr,  # [B] fp32 or None
    half_bandwidth,
):
    """The value of each listed entry (0 for the window's), `NOT_LISTED` elsewhere. NaN is listed."""
    columns = offs_s % d_sae
    hidden_pre = product + tl.load(b_enc_ptr + columns).to(tl.float32)[None, :]
    active, window = gate(hidden_pre, tl.load(threshold_ptr + columns)[None, :], half_bandwidth)
    value = tl.where(active | (hidden_pre != hidden_pre), hidden_pre, tl.where(window, 0.0, NOT_LISTED))
    value = tl.where((offs_b < n_tokens)[:, None] & (offs_s < d_sae)[None, :], value, NOT_LISTED)
    if bounds_ptr is not None:
        value = tl.where(value < tl.load(bounds_ptr + offs_b % n_tokens)[:, None], NOT_LISTED, value)  # NaN stays
    return value


@triton.jit
def _count(mask, AXIS: tl.constexpr):
    """How many are set along an axis, int32. In fp32: LLVM would gather a sum of bits by way of the stack."""
    return tl.sum(tl.where(mask, 1.0, 0.0), AXIS).to(tl.int32)


@triton.jit
def count_active(
    value,  # [BLOCK_B, BLOCK_S]
    rows,
    columns,
    l0_ptr,  # [B] int32 or int64, or None
    feature_counts_ptr,  # [S] int32 or int64, or None
):
    """Add the tile's active entries to the counts per row and per feature."""
    if l0_ptr is not None:
        count = _count(value > 0.0, 1)
        tl.atomic_add(l0_ptr + rows, count.to(l0_ptr.dtype.element_ty), mask=count > 0, sem="relaxed")
    if feature_counts_ptr is not None:
        fired = _count(value > 0.0, 0)
        counts = feature_counts_ptr + columns
        tl.atomic_add(counts, fired.to(feature_counts_ptr.dtype.element_ty), mask=fired > 0, sem="relaxed")


@triton.jit
def append_each(value, rows, columns, first_feature, cursors_ptr, row_ends_ptr, entries_ptr):
    """Append the tile's entries, each by an atomic of its own."""
    listed = value != NOT_LISTED
    slot = tl.atomic_add((cursors_ptr + rows)[:, None] + (columns * 0)[None, :], 1, mask=listed, sem="relaxed")
    fits = listed & (slot < tl.load(row_ends_ptr + rows)[:, None])
    tl.store(entries_ptr + slot, pack_entry(first_feature + columns[None, :], value), mask=fits)


@triton.jit
def append_in_turn(value, rows, columns, first_feature, cursors_ptr, row_ends_ptr, entries_ptr):
    """Append the tile's entries, one of every row at a time."""
    count = _count(value != NOT_LISTED, 1)
    slot = tl.atomic_add(cursors_ptr + rows, count, mask=count > 0, sem="relaxed")
    end = tl.load(row_ends_ptr + rows)
    for turn in range(0, tl.max(count, 0)):
        column = tl.min(tl.where(value != NOT_LISTED, columns[None, :], 0x7FFFFFFF), 1)
        taken = columns[None, :] == column[:, None]
        entry = pack_entry(first_feature + column, tl.sum(tl.where(taken, value, 0.0), 1))
        tl.store(entries_ptr + slot, entry, mask=(turn < count) & (slot < end))
        value = tl.where(taken, NOT_LISTED, value)
        slot += 1
