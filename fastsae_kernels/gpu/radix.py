"""The n-th largest of many values, by histograms of their bits, on the device: what BatchTopK cuts its batch with.

Activations are non-negative, so their bits order as they do (`tiles.value_bits`). Level by level, 11 + 10 + 10 bits, a
histogram of the values that share the leading bits found so far tells the next ones; every program of a level reads the
histograms of the levels before it and descends for itself. Two levels give a bound that is at most 2^-13 below the n-th
value; three give the value and how many equal ones are kept. Those go to the lower tokens: a fourth pass counts
the equal values of each token, which makes a bound per token.

The values lie in a `Buffer` of candidates, or, where a buffer overflowed, are computed tile by tile once more. Counts are
integers, so the result does not depend on the order of the atomics: deterministic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import tile_config
from fastsae_kernels.gpu.tiles import EncoderInputs, active_bits, entry_value, value_bits

BINS = 2048
EXACT = 3  # levels that find a value to the last bit; as a level, the pass that counts equal values
BLOCK = 2048  # candidates that a program reads at a time
PROGRAMS = 512  # of a pass over the buffer, whose fill only the device knows


class Buffer(NamedTuple):
    """Candidates of the whole batch in any order; a kernel sees pointers in place of tensors."""

    entries: Tensor  # [size] int64, packed
    tokens: Tensor  # [size] int32
    cursor: Tensor  # [1] int64: how many were appended, also past the size: then some were lost

    @classmethod
    def empty(cls, size: int, device: torch.device) -> Buffer:
        """Room for `size` candidates."""
        entries = torch.empty(size, dtype=torch.int64, device=device)
        tokens = torch.empty(size, dtype=torch.int32, device=device)
        return cls(entries, tokens, torch.zeros(1, dtype=torch.int64, device=device))


class Cut(NamedTuple):
    """What lies among the n largest: values above the bound of their token, and of the equal ones the first."""

    bounds: Tensor  # [N] int32, bits of the smallest value that can be among them
    kth: Tensor  # [2] int64: bits of the n-th value, and how many values equal to it are kept


@triton.jit
def _descend(hists_ptr, n_kept, LEVELS: tl.constexpr):
    """`(bits, left)`: the leading bits of the `n_kept`-th largest value, and its rank among those that share them."""
    bins = tl.arange(0, 2048)
    bits = tl.full((), 0, tl.int32)
    left = tl.full((), 0, tl.int64) + n_kept
    for level in tl.static_range(LEVELS):
        counts = tl.load(hists_ptr + level * 2048 + bins)
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        # fewer values than are wanted: the bound is 0
        digit = tl.maximum(tl.sum((at_least >= left).to(tl.int32), 0) - 1, 0)
        left -= tl.sum(tl.where(bins > digit, counts, 0), 0)
        bits = bits | (digit << (20 - 10 * level))
    return bits, left


@triton.jit
def _histogram(bits, mask, prefix, LEVEL: tl.constexpr):
    """`[2048]`: how many of `[n]` values that share the leading bits found so far have each digit of this level."""
    if LEVEL == 0:
        return tl.histogram(bits >> 20, 2048, mask=mask)
    else:
        shares = (bits >> (30 - 10 * LEVEL)) == (prefix >> (30 - 10 * LEVEL))
        return tl.histogram((bits >> (20 - 10 * LEVEL)) & 1023, 2048, mask=mask & shares)


@triton.jit
def _add_histogram(hists_ptr, hist, LEVEL: tl.constexpr):
    """Adds a program's histogram to that of the level; the pass over equal values has none."""
    if LEVEL < 3:
        bins = tl.arange(0, 2048)
        tl.atomic_add(hists_ptr + LEVEL * 2048 + bins, hist.to(tl.int64), mask=hist > 0, sem="relaxed")


@triton.jit(do_not_specialize=["n_kept", "size"])
def _buffer_histogram_kernel(
    buffer,  # Buffer
    # outputs
    hists_ptr,  # [3, 2048] int64: those of the levels before are read, that of this level is added to
    ties_ptr,  # [B] int64, added to by the last pass
    # sizes
    n_kept,
    size,  # of the buffer
    LEVEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program adds every num_programs(0)-th block of candidates to the histogram of the level, or to the ties of tokens."""
    count = tl.load(buffer.cursor)
    start = tl.program_id(0) * BLOCK
    if (count > size) | (start >= count):
        return
    prefix, _left = _descend(hists_ptr, n_kept, LEVEL)
    hist = tl.zeros((2048,), dtype=tl.int32)
    for first in range(start, count.to(tl.int32), tl.num_programs(0) * BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < count
        bits = value_bits(entry_value(tl.load(buffer.entries + offs, mask=mask, other=0)))
        if LEVEL < 3:
            hist += _histogram(bits, mask, prefix, LEVEL)
        else:
            tie = mask & (bits == prefix)
            tl.atomic_add(ties_ptr + tl.load(buffer.tokens + offs, mask=tie, other=0), 1, mask=tie, sem="relaxed")
    _add_histogram(hists_ptr, hist, LEVEL)


@triton.jit(do_not_specialize=["n_kept", "size", "n_tokens"])
def _tile_histogram_kernel(
    encoder,  # EncoderInputs
    cursor_ptr,  # [1] int64: leaves at once unless it is past the size
    # outputs
    hists_ptr,  # [3, 2048] int64
    ties_ptr,  # [B] int64
    # sizes
    n_kept,
    size,
    n_tokens,
    LEVEL: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The same over recomputed activations: program takes every num_programs(0)-th tile."""
    if tl.load(cursor_ptr) <= size:
        return
    prefix, _left = _descend(hists_ptr, n_kept, LEVEL)
    hist = tl.zeros((2048,), dtype=tl.int32)
    tiles_b = tl.cdiv(n_tokens, BLOCK_B)
    for tile in range(tl.program_id(0), tiles_b * tl.cdiv(encoder.d_sae, BLOCK_S), tl.num_programs(0)):
        offs_b = tile % tiles_b * BLOCK_B + tl.arange(0, BLOCK_B)
        offs_s = tile // tiles_b * BLOCK_S + tl.arange(0, BLOCK_S)
        rows = offs_b % n_tokens
        bits, _hidden_pre = active_bits(encoder, rows, offs_s, BLOCK_B, BLOCK_S, BLOCK_D, EVEN_D)
        mask = (bits > 0) & (offs_b < n_tokens)[:, None]
        if LEVEL < 3:
            flat = tl.reshape(bits, (BLOCK_B * BLOCK_S,))
            hist += _histogram(flat, tl.reshape(mask, (BLOCK_B * BLOCK_S,)), prefix, LEVEL)
        else:
            ties = tl.sum((mask & (bits == prefix)).to(tl.int32), 1)
            tl.atomic_add(ties_ptr + rows, ties.to(tl.int64), mask=ties > 0, sem="relaxed")
    _add_histogram(hists_ptr, hist, LEVEL)


@triton.jit(do_not_specialize=["n_kept", "size", "n_tokens"])
def _bounds_kernel(
    # inputs
    hists_ptr,  # [3, 2048] int64
    ties_before_ptr,  # [B] int64: values equal to the n-th of lower tokens; None without the last pass
    cursor_ptr,  # [1] int64
    # outputs
    bounds_ptr,  # [B] int32
    kth_ptr,  # [2] int64
    # sizes
    n_kept,
    size,
    n_tokens,
    CLOSES: tl.constexpr,  # past an overflowing buffer nothing is listed any more
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program owns the bounds of BLOCK tokens."""
    bits, left = _descend(hists_ptr, n_kept, LEVELS)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < n_tokens
    bounds = tl.zeros((BLOCK,), tl.int32) + bits
    if ties_before_ptr is not None:
        bounds += (tl.load(ties_before_ptr + rows, mask=mask, other=0) >= left).to(tl.int32)
    if CLOSES:
        bounds = tl.where(tl.load(cursor_ptr) > size, 0x7FFFFFFF, bounds)
    tl.store(bounds_ptr + rows, bounds, mask=mask)
    if tl.program_id(0) == 0:
        tl.store(kth_ptr, bits.to(tl.int64))
        tl.store(kth_ptr + 1, left)


@triton.jit(do_not_specialize=["size"])
def _compact_kernel(
    buffer,  # Buffer
    bounds_ptr,  # [B] int32
    into,  # Buffer, its cursor 0 before
    size,  # of the buffer
    BLOCK: tl.constexpr,
):
    """Program moves those of every num_programs(0)-th block of candidates that reach the bound of their token."""
    count = tl.load(buffer.cursor)
    if count > size:
        tl.store(into.cursor, count)  # an overflow is remembered
        return
    for first in range(tl.program_id(0) * BLOCK, count.to(tl.int32), tl.num_programs(0) * BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < count
        entry = tl.load(buffer.entries + offs, mask=mask, other=0)
        token = tl.load(buffer.tokens + offs, mask=mask, other=0)
        kept = mask & (value_bits(entry_value(entry)) >= tl.load(bounds_ptr + token, mask=mask, other=0))
        slots = tl.cumsum(kept.to(tl.int32), 0) - 1
        total = tl.sum(kept.to(tl.int32), 0)
        slots += tl.atomic_add(into.cursor, total.to(tl.int64), sem="relaxed").to(tl.int32)
        tl.store(into.entries + slots, entry, mask=kept)
        tl.store(into.tokens + slots, token, mask=kept)


def _cut(buffer: Buffer, n_tokens: int, n_kept: int, histogram, levels: int, closes: bool) -> Cut:
    """Runs the passes of `histogram(level, hists, ties)` and turns their counts into bounds."""
    device = buffer.entries.device
    hists = torch.zeros(3, BINS, dtype=torch.int64, device=device)
    ties = torch.zeros(n_tokens, dtype=torch.int64, device=device)
    for level in range(levels + (levels == EXACT)):
        histogram(level, hists, ties)
    bounds = torch.empty(n_tokens, dtype=torch.int32, device=device)
    kth = torch.empty(2, dtype=torch.int64, device=device)
    _bounds_kernel[(triton.cdiv(n_tokens, 1024),)](
        hists_ptr=hists,
        ties_before_ptr=ties.cumsum(0) - ties if levels == EXACT else None,
        cursor_ptr=buffer.cursor,
        bounds_ptr=bounds,
        kth_ptr=kth,
        n_kept=n_kept,
        size=buffer.entries.numel(),
        n_tokens=n_tokens,
        CLOSES=closes,
        LEVELS=levels,
        BLOCK=1024,
    )
    return Cut(bounds, kth)


def cut_buffer(buffer: Buffer, n_tokens: int, n_kept: int, levels: int) -> Cut:
    """The `n_kept` largest candidates; with less than `EXACT` levels a lower bound that lets in few more."""

    def histogram(level: int, hists: Tensor, ties: Tensor) -> None:
        _buffer_histogram_kernel[(_programs(buffer),)](
            buffer=buffer,
            hists_ptr=hists,
            ties_ptr=ties,
            n_kept=n_kept,
            size=buffer.entries.numel(),
            LEVEL=level,
            BLOCK=BLOCK,
        )

    return _cut(buffer, n_tokens, n_kept, histogram, levels, closes=True)


def cut_activations(encoder: EncoderInputs, buffer: Buffer, n_kept: int) -> Cut:
    """The `n_kept` largest activations of all, recomputed; does nothing on the device unless the buffer overflowed."""
    n_tokens = encoder.x.shape[0]
    # as the pass that lists what is found here: equal tiles have equal sums
    config = tile_config("batch_again", encoder.x, encoder.d_in)
    del config["GROUP_B"]
    tiles = triton.cdiv(n_tokens, config["BLOCK_B"]) * triton.cdiv(encoder.d_sae, config["BLOCK_S"])

    def histogram(level: int, hists: Tensor, ties: Tensor) -> None:
        _tile_histogram_kernel[(min(tiles, 2 * PROGRAMS),)](
            encoder=encoder,
            cursor_ptr=buffer.cursor,
            hists_ptr=hists,
            ties_ptr=ties,
            n_kept=n_kept,
            size=buffer.entries.numel(),
            n_tokens=n_tokens,
            LEVEL=level,
            **config,
        )

    return _cut(buffer, n_tokens, n_kept, histogram, EXACT, closes=False)


def compact(buffer: Buffer, into: Buffer, bounds: Tensor) -> Buffer:
    """The candidates that reach the bound of their token, in the memory of `into`."""
    into = into._replace(cursor=torch.zeros_like(buffer.cursor))
    _compact_kernel[(_programs(buffer),)](
        buffer=buffer,
        bounds_ptr=bounds,
        into=into,
        size=buffer.entries.numel(),
        BLOCK=BLOCK,
    )
    return into


def _programs(buffer: Buffer) -> int:
    return min(PROGRAMS, triton.cdiv(buffer.entries.numel(), BLOCK))
