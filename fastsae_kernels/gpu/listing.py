"""What every way of listing entries shares: its arguments, and the device function that lists the entries of one tile.

    hidden_pre = x @ W_enc + b_enc
    listed     = hidden_pre > threshold  or  |hidden_pre - threshold| < bandwidth / 2
    value      = hidden_pre where active, 0 where listed for the window alone

The three kernels (`list_pointers`, `list_descriptors`, `list_products`) differ in how a tile of the product comes to be;
they gate and append it by the same function, so all list the same set.

A row of the tile is cut into strips, each of the columns that one thread holds of it: `RUN` neighbours out of every
`RUN * LANES`. So nothing travels between threads. Each strip becomes a bit mask, takes its slots from the cursor of the row by
one atomic, and writes its entries from the lowest bit to the highest; the loop runs as often as the fullest strip of the
tile has entries, once or twice where features are sparse. `RUN` and `LANES` tell how the matrix unit of an architecture
deals out its result; with wrong ones the result is the same, and slower. The cursor moves on past the row's last slot
while the stores stop, so it counts the true number of entries and an overflow is never silent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.tiles import gate, pack_entry

NOT_LISTED = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)  # every value that is listed reaches it
WORD = tl.constexpr(16)  # bits of a mask whose sum as fp32 is exact


class GateAndRows(NamedTuple):
    """What a tile of the product is gated with, and the rows whose slots its entries go to; a kernel sees pointers."""

    b_enc: Tensor  # [S]
    threshold: Tensor  # [S] fp32
    row_ends: Tensor  # [B] int32: where the slots of each row end
    bounds: Tensor | None  # [B] fp32: smaller entries of a row are left out; where positive, its window too
    cursors: Tensor  # [B] int32: the next slot of each row; moves on by every entry, also those that find no slot
    entries: Tensor  # [nnz] int64: index and bits of the value
    half_bandwidth: float
    d_sae: int  # S


class Listing(NamedTuple):
    """Checked arguments of `encode.list_entries`, which describes them."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    cursors: Tensor
    row_ends: Tensor
    entries: Tensor
    bandwidth: float
    bounds: Tensor | None
    first_feature: int

    def part(self, rows: slice, columns: slice) -> Listing:
        """The listing of some rows and some features."""
        return self._replace(
            x=self.x[rows],
            W_enc=self.W_enc[:, columns],
            b_enc=self.b_enc[columns],
            threshold=self.threshold[columns],
            cursors=self.cursors[rows],
            row_ends=self.row_ends[rows],
            bounds=None if self.bounds is None else self.bounds[rows],
            first_feature=self.first_feature + columns.start,
        )

    def arguments(self) -> dict[str, Any]:
        """What every listing kernel takes beside the operands of its product."""
        gate_and_rows = GateAndRows(
            self.b_enc, self.threshold, self.row_ends, self.bounds, self.cursors, self.entries, self.bandwidth / 2,
            self.W_enc.shape[1],
        )  # fmt: skip
        return {"gate_and_rows": gate_and_rows, "first_feature": self.first_feature, "n_tokens": self.x.shape[0]}


@triton.jit
def _popcount(word):
    """How many bits of an int32 are set, in the form that compilers know."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _pick(values, at):
    """`values[row, at[row]]`, by one selection for each bit of `at`: half as many candidates remain after each."""
    for bit in tl.static_range(8):
        if values.shape[1] > 1:
            even, odd = tl.split(tl.reshape(values, (values.shape[0], values.shape[1] // 2, 2)))
            values = tl.where(((at >> bit) & 1)[:, None] != 0, odd, even)
    return tl.reshape(values, (values.shape[0],))


@triton.jit
def _in_strips(tile, RUN: tl.constexpr, LANES: tl.constexpr):
    """`[BLOCK_B, BLOCK_S]` as `[BLOCK_B * LANES, BLOCK_S / LANES]`; what one thread holds of a row stays with it."""
    WIDTH: tl.constexpr = tile.shape[1] // LANES
    strips = tl.permute(tl.reshape(tile, (tile.shape[0], WIDTH // RUN, LANES, RUN)), (0, 2, 1, 3))
    return tl.reshape(strips, (tile.shape[0] * LANES, WIDTH))


@triton.jit
def list_tile(
    product,  # [BLOCK_B, BLOCK_S] fp32, x @ W_enc
    start_b,  # its first token
    start_s,  # its first feature, counted from the first column of W_enc
    gate_and_rows,  # GateAndRows
    first_feature,  # index of the first column of W_enc
    n_tokens,
    RUN: tl.constexpr,
    LANES: tl.constexpr,
):
    """Append the entries of one tile, which may reach past the last token and the last feature, to their rows."""
    BLOCK_B: tl.constexpr = product.shape[0]
    BLOCK_S: tl.constexpr = product.shape[1]
    STRIPS: tl.constexpr = BLOCK_B * LANES
    WIDTH: tl.constexpr = BLOCK_S // LANES
    BITS: tl.constexpr = min(WORD, WIDTH)
    WORDS: tl.constexpr = WIDTH // BITS

    d_sae = gate_and_rows.d_sae
    offs_s = tl.arange(0, BLOCK_S)
    columns = tl.minimum(start_s + offs_s, d_sae - 1)
    hidden_pre = product + tl.load(gate_and_rows.b_enc + columns).to(tl.float32)[None, :]
    threshold = tl.load(gate_and_rows.threshold + columns)
    # a NaN of hidden_pre is listed, one of the threshold is not
    threshold = tl.where(threshold != threshold, float("inf"), threshold)[None, :]
    _, window = gate(hidden_pre, threshold, gate_and_rows.half_bandwidth)
    value = tl.where(hidden_pre <= threshold, tl.where(window, 0.0, NOT_LISTED), hidden_pre)
    bound = LOWEST
    if gate_and_rows.bounds is not None:
        bound = tl.load(gate_and_rows.bounds + tl.minimum(start_b + tl.arange(0, BLOCK_B), n_tokens - 1))[:, None]
    bit = 1 << (offs_s // (RUN * LANES) * RUN + offs_s % RUN) % BITS
    bits = tl.where(value < bound, 0.0, bit.to(tl.float32)[None, :])  # NaN stays
    # a sum of fp32, for LLVM would gather one of integers by way of the stack
    words = tl.sum(tl.reshape(_in_strips(bits, RUN, LANES), (STRIPS, WORDS, BITS)), 2).to(tl.int32)
    value = _in_strips(value, RUN, LANES)

    strip = tl.arange(0, STRIPS)
    offs_b = start_b + strip // LANES
    rows = tl.minimum(offs_b, n_tokens - 1)
    column = strip % LANES * RUN  # first column of the strip
    inside = tl.maximum(d_sae - start_s - column, 0)
    inside = inside // (RUN * LANES) * RUN + tl.minimum(inside % (RUN * LANES), RUN)
    inside = tl.where(offs_b < n_tokens, inside, 0)
    first_bit = (tl.arange(0, WORDS) * BITS)[None, :]
    # what lies past the last token or feature is cleared
    words &= (1 << tl.minimum(tl.maximum(inside[:, None] - first_bit, 0), BITS)) - 1

    count = tl.sum(_popcount(words), 1)
    slot = tl.atomic_add(gate_and_rows.cursors + rows, count, mask=count > 0, sem="relaxed")
    end = tl.minimum(tl.load(gate_and_rows.row_ends + rows), slot + count)
    # over two dimensions, for Triton 3.6 cannot compile the maximum of a vector that comes from tensor memory (sm_100)
    for _ in range(0, tl.max(count[:, None])):
        lowest = first_bit + _popcount(~words & (words - 1))
        at = tl.min(tl.where(words != 0, lowest, WIDTH), 1)
        words = tl.where(lowest == at[:, None], words & (words - 1), words)
        index = first_feature + start_s + column + at // RUN * (RUN * LANES) + at % RUN
        tl.store(gate_and_rows.entries + slot, pack_entry(index, _pick(value, at)), mask=slot < end)
        slot += 1
