"""BatchTopK: the `k * N` largest active entries of a batch of `N` tokens, exact, without an `[N, d_sae]` tensor.

    bound = 0
    for each range of features, each as large as all before it together:
        append the entries of the range that reach the bound to one buffer for the whole batch
        bound = the (k * N)-th largest in the buffer (`radix.cut_buffer`); drop what does not reach it
    cut exactly, sort by token and feature

Order: value descending, then token, then feature. A bound from a part of the features only admits too much, so the result
is exact. The first range cannot overflow the buffer; for features in no particular order each later one admits about
`k * N` entries, and the buffer holds `HEADROOM` times as many. Where it overflows all the same, nothing more is listed,
the bound is found over recomputed activations (`radix.cut_activations`), and one more pass lists what reaches it: at most
`k * N` entries and one token's ties. In every other step these kernels leave at once. No host synchronisation.

Listing is a kernel of this module, and not one of those behind `encode.list_entries`, which fill the slots of each row. Here a
tile claims its slots by one atomic on the buffer's cursor; inside, they follow from running sums along its rows. One
atomic per entry on a single address would serialise. The order in the buffer is arbitrary and the result a function of
the set alone: deterministic. Letters: `B` tokens, `D` d_in, `S` d_sae.

Bytes: two buffers of `12 * (HEADROOM * k * N + d_sae)`, against `2 * N * d_sae` of a dense tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import on_device, tile_config
from fastsae_kernels.gpu.radix import EXACT, Buffer, Cut, compact, cut_activations, cut_buffer
from fastsae_kernels.gpu.tiles import EncoderInputs, active_bits, encoder_inputs, pack_entry, start_of_tile
from fastsae_kernels.gpu.topk import feature_ranges
from fastsae_kernels.types import SparseActs

# candidates per surviving entry: those that survived so far, about as many new ones, and some to spare
HEADROOM = 2.25
# features of the first range at least, and what ranges are multiples of
MIN_RANGE = 64
# programs that list once more after an overflow: enough to fill a device
AGAIN_PROGRAMS = 1024


class BatchTopK(NamedTuple):
    """What survives of a batch."""

    acts: SparseActs  # min(k, d_sae) * N slots; unused ones stand behind the last row's entries
    min_active: Tensor  # [] fp32: the smallest surviving activation, infinite where none is active


@triton.jit
def _list_tile(
    tile, encoder, bounds_ptr, buffer, size, first_feature, n_tokens,
    EVEN_D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_B: tl.constexpr,
):  # fmt: skip
    """Lists the entries of one tile; arguments as in the kernel."""
    first_b, first_s = start_of_tile(tile, n_tokens, encoder.d_sae, BLOCK_B, BLOCK_S, GROUP_B)
    offs_b = first_b + tl.arange(0, BLOCK_B)
    offs_s = first_s + tl.arange(0, BLOCK_S)
    rows = offs_b % n_tokens  # wrap around rather than mask: the loop stays free of masks
    bits, hidden_pre = active_bits(encoder, rows, offs_s, BLOCK_B, BLOCK_S, BLOCK_D, EVEN_D)
    listed = (bits > 0) & (offs_b < n_tokens)[:, None]
    if bounds_ptr is not None:
        listed = listed & (bits >= tl.load(bounds_ptr + rows)[:, None])
    counts = tl.sum(listed.to(tl.int32), 1)
    # over two dimensions, for Triton 3.6 cannot compile the sum of a vector that comes from tensor memory (sm_100)
    base = tl.atomic_add(buffer.cursor, tl.sum(counts[:, None]).to(tl.int64), sem="relaxed")
    first = tl.minimum(base, size).to(tl.int32) + tl.cumsum(counts, 0) - counts
    slots = first[:, None] + tl.cumsum(listed.to(tl.int32), 1) - 1
    fits = listed & (slots < size)
    tl.store(buffer.entries + slots, pack_entry(first_feature + offs_s[None, :], hidden_pre), mask=fits)
    tl.store(buffer.tokens + slots, rows[:, None] + tl.zeros((BLOCK_B, BLOCK_S), tl.int32), mask=fits)


@triton.jit(do_not_specialize=["n_tokens", "first_feature", "size"])
def _batch_list_kernel(
    encoder,  # EncoderInputs
    bounds_ptr,  # [B] int32 or None: bits of the smallest value of a token that is listed
    overflow_ptr,  # [1] int64 or None: a cursor; does nothing unless that is past the size
    buffer,  # Buffer: its cursor moves on by every entry, also those that find no slot
    size,  # of the buffer
    first_feature,  # index of the first column of W_enc
    n_tokens,
    EVEN_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_B: tl.constexpr,  # row tiles that share a column tile before the next one: both stay in L2
):
    """Program owns one tile: BLOCK_B tokens, BLOCK_S features; after an overflow it takes every num_programs(0)-th of them."""
    if overflow_ptr is None:
        _list_tile(
            tl.program_id(0), encoder, bounds_ptr, buffer, size, first_feature, n_tokens,
            EVEN_D, BLOCK_B, BLOCK_S, BLOCK_D, GROUP_B,
        )  # fmt: skip
    elif tl.load(overflow_ptr) > size:
        n_tiles = tl.cdiv(n_tokens, BLOCK_B) * tl.cdiv(encoder.d_sae, BLOCK_S)
        for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
            _list_tile(
                tile, encoder, bounds_ptr, buffer, size, first_feature, n_tokens,
                EVEN_D, BLOCK_B, BLOCK_S, BLOCK_D, GROUP_B,
            )  # fmt: skip


def _append(
    encoder: EncoderInputs, start: int, end: int, buffer: Buffer, bounds: Tensor | None, overflow: Tensor | None = None
) -> None:
    """Append the entries of features `start .. end` that reach the bounds; if `overflow` is given, only where it did."""
    x, W_enc, b_enc, threshold = encoder[:4]
    config = tile_config("batch_list" if overflow is None else "batch_again", x, encoder.d_in)
    tiles = triton.cdiv(x.shape[0], config["BLOCK_B"]) * triton.cdiv(end - start, config["BLOCK_S"])
    # where nothing overflowed, which is nearly always, few programs leave at once
    _batch_list_kernel[(tiles if overflow is None else min(tiles, AGAIN_PROGRAMS),)](
        encoder=encoder_inputs(x, W_enc[:, start:end], b_enc[start:end], threshold[start:end]),
        bounds_ptr=bounds,
        overflow_ptr=overflow,
        buffer=buffer,
        size=buffer.entries.numel(),
        first_feature=start,
        n_tokens=x.shape[0],
        **config,
    )


def _candidates(encoder: EncoderInputs, n_kept: int, size: int) -> tuple[Buffer, Cut]:
    """At most `size` entries, the `n_kept` largest among them, and what tells these apart."""
    n_tokens, d_sae = encoder.x.shape[0], encoder.d_sae
    buffer, spare = Buffer.empty(size, encoder.x.device), Buffer.empty(size, encoder.x.device)
    whole = size == n_tokens * d_sae
    first = d_sae if whole else size // n_tokens // MIN_RANGE * MIN_RANGE
    bounds = None
    for start, end in feature_ranges(first, d_sae):
        if start > 0:
            bounds = cut_buffer(buffer, n_tokens, n_kept, levels=2).bounds
            buffer, spare = compact(buffer, spare, bounds), buffer
        _append(encoder, start, end, buffer, bounds)
    if not whole:
        bounds = cut_activations(encoder, buffer, n_kept).bounds
        again = buffer._replace(cursor=torch.zeros_like(buffer.cursor))
        _append(encoder, 0, d_sae, again, bounds, overflow=buffer.cursor)
        buffer = again._replace(cursor=torch.where(buffer.cursor > size, again.cursor, buffer.cursor))
    return buffer, cut_buffer(buffer, n_tokens, n_kept, EXACT)


def _survivors(encoder: EncoderInputs, n_kept: int, size: int) -> tuple[Buffer, Cut]:
    """The `n_kept` largest entries, and those that equal the last of them in its token; and what tells these apart."""
    buffer, cut = _candidates(encoder, n_kept, size)
    # one token may have more entries that equal the last one than are kept
    into = Buffer.empty(min(size, n_kept + encoder.d_sae), buffer.entries.device)
    return compact(buffer, into, cut.bounds), cut


def _in_rows(buffer: Buffer, cut: Cut, shape: tuple[int, int], n_kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(row_offsets, indices, values)` of the candidates that survive the cut, `n_kept` long, by token and feature."""
    (n_tokens, d_sae), device = shape, buffer.entries.device
    valid = torch.arange(buffer.entries.numel(), device=device) < buffer.cursor
    dtype = torch.int32 if n_tokens * d_sae < 2**31 else torch.int64  # sorting takes several times the keys
    key = buffer.tokens.to(dtype) * d_sae + (buffer.entries >> 32).to(dtype)
    key, order = torch.sort(torch.where(valid, key, torch.iinfo(dtype).max))
    bits = buffer.entries[order].int()
    kth, left = cut.kth
    # NaNs have more than one pattern, and one rank
    tie = valid & (torch.where(bits.view(torch.float32).isnan(), 0x7FC00000, bits) == kth)
    kept = valid & (~tie | (tie.cumsum(0) <= left))
    slots = torch.where(kept, kept.cumsum(0) - 1, n_kept)  # what is dropped shares the slot behind the last

    def in_slots(values: Tensor, unused: int) -> Tensor:
        return torch.full((n_kept + 1,), unused, dtype=values.dtype, device=device).scatter_(0, slots, values)

    rows = in_slots((key // d_sae).int(), n_tokens)[:n_kept]
    row_offsets = torch.searchsorted(rows, torch.arange(n_tokens + 1, device=device, dtype=torch.int32), out_int32=True)
    indices, values = in_slots((key % d_sae).int(), 0)[:n_kept], in_slots(bits, 0)[:n_kept].view(torch.float32)
    return row_offsets, indices, values


@on_device
def encode_batch_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k: int) -> BatchTopK:
    """The `k * N` largest active entries of the batch, or all where fewer are active; equal ones to the lower token, feature.

    Equivalent to `fastsae_kernels.reference.encode(..., batch_topk=True)`.

    Args:
        x: `[N, d_in]`; fp32, bf16 or fp16. Strides are free, here and below.
        W_enc: `[d_in, d_sae]`, dtype of x.
        b_enc: `[d_sae]`.
        threshold: `[d_sae]` fp32, >= 0.
        k: At least 1.

    Returns:
        Rows of any length, sorted by feature index; values fp32. The last row's offsets take in the unused slots, and
        `row_counts` tells where it ends.

    Raises:
        TypeError: x is fp64.
        ValueError: 2^30 candidates or more.
    """
    if x.dtype == torch.float64:
        raise TypeError("x: expected float32, bfloat16 or float16 on the Triton path, got float64")
    encoder = encoder_inputs(x, W_enc, b_enc.contiguous(), threshold.contiguous())
    n_tokens, d_sae = x.shape[0], W_enc.shape[1]
    n_kept = min(k, d_sae) * n_tokens
    if n_tokens == 0:
        offsets = torch.zeros(1, dtype=torch.int32, device=x.device)
        empty = torch.empty(0, dtype=torch.int32, device=x.device)
        infinity = torch.full((), float("inf"), device=x.device)
        return BatchTopK(SparseActs(offsets, empty, empty.float(), (0, d_sae), empty), infinity)
    size = min(max(int(HEADROOM * n_kept), MIN_RANGE * n_tokens) + d_sae, n_tokens * d_sae)
    if size >= 2**30:
        raise ValueError(f"x: expected fewer than 2**30 candidates in one call, got {size}; split the tokens")
    kept, cut = _survivors(encoder, n_kept, size)
    row_offsets, indices, values = _in_rows(kept, cut, (n_tokens, d_sae), n_kept)
    row_counts = row_offsets.diff()
    row_offsets[-1] = n_kept
    min_active = torch.where(values > 0, values, float("inf")).amin()
    return BatchTopK(SparseActs(row_offsets, indices, values, (n_tokens, d_sae), row_counts), min_active)
