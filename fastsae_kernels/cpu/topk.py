"""The k largest active entries of each token on a CPU, feature chunk by feature chunk, above a bound that rises.

Among any number of features the k-th largest active entry of a token is a lower bound of its final k-th largest, but a
loose one: after a share p of the features it admits k / p entries in all. So the bound is guessed from the m-th largest,
where m is what p * k would be at most but for odds of 1 in 10,000 (features in no particular order), and proved later:
a token of which k entries have reached its bound has lost none of them. A token without, as where early features fire more
than late ones, is searched again by the certain bound. Each token lists about 3 k entries; nothing is sorted but those.

Where the product is rounded (`product.py`), each element is known as an interval. `upper` is what the product says with
its margin, the lower end is that less `gap`. Bounds and proofs take lower ends, admission takes upper ends, and only what
is left at the end is scored exactly. A token with more entries than room (hundreds of equal values) is encoded again
densely, by itself.

Tokens are processed in blocks, so that the state of a block stays in cache.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastsae_kernels.cpu import product
from fastsae_kernels.cpu.entries import largest_of_rows, row_offsets_of, stack_rows
from fastsae_kernels.cpu.small import MAX_ELEMENTS, encode_small
from fastsae_kernels.types import SparseActs

BLOCK_ELEMENTS = 2**20  # of a block's state, 8 bytes each
MIN_TOKENS = 256  # of a block; fewer make the products slow
COLUMNS = product.MARGIN_COLUMNS + 2  # one for the bound, one to make the depth even
DENSE_ELEMENTS = 2**21  # of a dense product of a block of tokens
MIN_DENSE_TOKENS = 64  # of such a block; fewer read the weights too often
MAX_SEARCHED_SHARE = 0.01  # of the features; a longer list costs more than `torch.topk` of everything
GROWTH = 4  # features seen between two guesses
NOTHING = float("-inf")


def listed_width(d_sae: int, k: int) -> int:
    """Slots of each token."""
    return min(d_sae, 6 * k + 64)


def encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k: int) -> SparseActs | None:
    """`encode` with `k` and no window; None where NaN or Inf makes a bound meaningless."""
    d_sae = W_enc.shape[1]
    rounds = x.dtype == torch.bfloat16 or product.is_rounded(x)
    parts: list[SparseActs | None] = []
    if _is_dense_faster(x.dtype, d_sae, k):
        for rows in x.split(DENSE_ELEMENTS // d_sae):
            parts.append(encode_small(rows, W_enc, b_enc, threshold, bandwidth=0.0, k=k, batch_topk=False))
        return stack_rows(parts)
    weights, b_enc = W_enc.t(), b_enc.to(threshold.dtype)
    norms = product.row_norms(weights)
    largest = norms.max() * product.row_norms(x).max() + b_enc.abs().max() + threshold.abs().max()
    rounds = rounds and bool(largest < product.OVERFLOW)  # False for NaN too, which the plain product finds
    n_blocks = -(-len(x) // max(MIN_TOKENS, BLOCK_ELEMENTS // listed_width(d_sae, k)))
    for rows in x.split(-(-len(x) // max(1, n_blocks))):  # as many tokens in each
        parts.append(_Block(rows, weights, norms, b_enc, threshold, k, rounds=rounds, guesses=True).run())
    return stack_rows(parts)


def _is_dense_faster(dtype: torch.dtype, d_sae: int, k: int) -> bool:
    """Whether `torch.topk` over dense products of blocks of tokens beats the search (measured, see the benchmarks)."""
    if DENSE_ELEMENTS // d_sae < MIN_DENSE_TOKENS:
        return False
    # a rounded product and a short list pay for the search
    return not product.rounds(dtype) or k > MAX_SEARCHED_SHARE * d_sae


class _Block:
    """The search for one block of tokens; `[N, width]` arrays hold what each token has listed."""

    def __init__(
        self,
        x: Tensor,
        weights: Tensor,
        norms: Tensor,
        b_enc: Tensor,
        threshold: Tensor,
        k: int,
        *,
        rounds: bool,
        guesses: bool,
    ) -> None:
        self.x, self.weights, self.norms, self.b_enc, self.threshold, self.k = x, weights, norms, b_enc, threshold, k
        self.guesses, self.has_thresholds = guesses, bool(threshold.any())
        n_tokens, d_sae = x.shape[0], weights.shape[0]
        self.width = listed_width(d_sae, k)
        self.chunk = product.chunk_size(n_tokens * (4 if rounds else 2), d_sae, x.shape[1] if rounds else 0)
        self.upper = torch.full((n_tokens, self.width), NOTHING, dtype=b_enc.dtype)
        self.features = torch.zeros(n_tokens, self.width, dtype=torch.int32)
        self.fill = torch.zeros(n_tokens, dtype=torch.int64)
        self.bound = torch.zeros(n_tokens, dtype=b_enc.dtype)
        self.certain = torch.zeros(n_tokens, dtype=b_enc.dtype)  # the largest bound that k listed entries reached
        self.gap = torch.zeros(n_tokens, dtype=b_enc.dtype)
        self.crowded = torch.zeros(n_tokens, dtype=torch.bool)
        self.tokens = product.augmented_tokens(x, product.row_norms(x), COLUMNS) if rounds else None
        self.augmented = product.AugmentedWeights(weights, self.chunk, COLUMNS) if rounds else None
        self.buffer = torch.empty(n_tokens * self.chunk, dtype=x.dtype if self.tokens is None else torch.bfloat16)
        self.mask = product.padded_mask(n_tokens * self.chunk)

    def run(self) -> SparseActs | None:
        """The block's entries; None where a product is Inf."""
        d_sae, raise_at = self.weights.shape[0], 0
        for start in range(0, d_sae, self.chunk):
            stop = min(start + self.chunk, d_sae)
            elements, base, by_bound = self._product(start, stop)
            if self.tokens is None and not torch.isfinite(elements.sum()) and not torch.isfinite(elements).all():
                return None
            if start == 0:
                self._raise_bounds(self._upper_end(elements, base), torch.arange(stop)[None, :], stop)
            self._list(elements, base, by_bound, start, stop)
            if stop >= raise_at and start > 0 and stop < d_sae:
                self._raise_bounds(*self._listed(), stop)
                raise_at = GROWTH * stop
        self._raise_bounds(*self._listed(), d_sae)
        return self._exact()

    def _product(self, start: int, stop: int) -> tuple[Tensor, Tensor, bool]:
        """One chunk: elements `[N, C]`, what to add for the upper end of their intervals, and whether that is the bound.

        Inside a rounded product one of two is subtracted, so that candidates are positive: each token's bound once all
        bounds are above the chunk's thresholds, the thresholds until then.
        """
        n_features = stop - start
        elements = self.buffer[: self.x.shape[0] * n_features].view(-1, n_features)
        weights, b_enc, threshold = self.weights[start:stop], self.b_enc[start:stop], self.threshold[start:stop]
        if self.tokens is None or self.augmented is None:
            return torch.mm(self.x, weights.t(), out=elements), b_enc[None, :], False
        bound_column = self.tokens[:, self.x.shape[1] + product.MARGIN_COLUMNS]
        by_bound = bool(self.bound.min() > 0) and bool(self.bound.min() >= threshold.max())
        if by_bound:
            bound_column.copy_(product.round_up(-self.bound.clamp_max(torch.finfo(torch.float32).max)))
            base, offset = -bound_column.to(b_enc.dtype)[:, None], b_enc
        else:
            bound_column.zero_()
            base, offset = threshold[None, :], b_enc - threshold
        slack = (offset.abs() + threshold.abs()) * 4 * torch.finfo(torch.float32).eps
        augmented = self.augmented.of(weights, self.norms[start:stop], offset, slack)
        torch.maximum(self.gap, self._gap(augmented, offset), out=self.gap)
        return torch.mm(self.tokens, augmented.t(), out=elements), base, by_bound

    def _gap(self, augmented: Tensor, offset: Tensor) -> Tensor:
        """`[N]`: by how much the margins inside a chunk's product can exceed the truth, twice, its own rounding aside."""
        assert self.tokens is not None
        d_in = self.x.shape[1]
        norm, residual, rest = (augmented[:, d_in + i].float() for i in (0, 1, 3))
        added = augmented[:, d_in + 2].float() + rest - offset
        margin = self.tokens[:, d_in].float() * norm.max() + self.tokens[:, d_in + 1].float() * residual.max()
        return 2.02 * (margin + added.max())

    def _upper_end(self, elements: Tensor, base: Tensor) -> Tensor:
        elements = elements.to(self.bound.dtype)
        # a bf16 is off by half a unit, 2^-9 of it
        return elements + base if self.tokens is None else elements + elements.abs() * 2.0**-8 + base

    def _lower_end(self, upper: Tensor, features: Tensor) -> Tensor:
        """The lower ends of intervals, -inf where the entry may be inactive."""
        # a candidate's element is positive and at most its upper end
        lower = upper if self.tokens is None else upper - upper.abs() * 2.0**-7 - self.gap[:, None]
        return torch.where(lower > self.threshold[features], lower, NOTHING) if self.has_thresholds else lower

    def _raise_bounds(self, upper: Tensor, features: Tensor, seen: int) -> None:
        """Raises bounds from intervals among the `seen` first features; those that were left out may be missing."""
        share = self.k * seen / self.weights.shape[0]
        rank = self.k
        if self.guesses and seen < self.weights.shape[0]:
            rank = min(self.k, math.ceil(share + 4 * share**0.5 + 4))
        if upper.shape[1] >= rank:
            at = upper.shape[1] - rank  # NumPy's partition takes a half to a quarter of the time of `torch.topk`
            kth = torch.from_numpy(np.partition(self._lower_end(upper, features).numpy(), at, axis=1)[:, at])
            torch.maximum(self.bound, kth, out=self.bound)
            if rank == self.k:
                torch.maximum(self.certain, kth, out=self.certain)

    def _listed(self) -> tuple[Tensor, Tensor]:
        """`(upper, features)`, the columns in use."""
        used = int(self.fill.max()) if self.fill.numel() else 0
        return self.upper[:, :used], self.features[:, :used]

    def _list(self, elements: Tensor, base: Tensor, by_bound: bool, start: int, stop: int) -> None:
        """Lists a chunk's candidates behind what each token has."""
        mask = self.mask[: -(-elements.numel() // product.WORD) * product.WORD]
        mask[elements.numel() :] = False
        view = mask[: elements.numel()].view_as(elements)
        if by_bound:
            product.mark_greater(elements.view(torch.int16), torch.zeros((), dtype=torch.int16), view)
        else:
            upper = self._upper_end(elements, base)
            torch.ge(upper, self.bound[:, None], out=view)
            view &= upper > self.threshold[start:stop]
        flat = product.nonzero_flat(mask)
        rows = torch.from_numpy(flat.numpy() // (stop - start))
        columns = flat - rows * (stop - start)
        base = base.reshape(-1).index_select(0, rows if by_bound else columns)
        upper = self._upper_end(elements.view(-1).index_select(0, flat), base)
        self._append(rows, (columns + start).int(), upper)

    def _append(self, rows: Tensor, features: Tensor, upper: Tensor) -> None:
        """Puts entries, ascending by row, behind what each row has; makes room where a row is full."""
        first = row_offsets_of(rows, self.x.shape[0])
        if bool((self.fill + first.diff()).max() > self.width):
            self._make_room(first.diff())
            left = ~self.crowded[rows]
            rows, features, upper = rows[left], features[left], upper[left]
            first = row_offsets_of(rows, self.x.shape[0])
        slots = torch.arange(self.x.shape[0]) * self.width + self.fill - first[:-1]
        at = np.repeat(slots.numpy(), first.diff().numpy()) + np.arange(rows.numel())
        self.upper.numpy().reshape(-1)[at] = upper.numpy()
        self.features.numpy().reshape(-1)[at] = features.numpy()
        self.fill += first.diff()

    def _make_room(self, wanted: Tensor) -> None:
        """Drops what is below the bounds; a row without enough room even so is crowded, and left to a dense product."""
        self._raise_bounds(*self._listed(), self.weights.shape[0])
        keep = (self.upper >= self.bound[:, None]) & (self.upper > NOTHING)
        self.fill = keep.sum(1)
        self.crowded |= self.fill + wanted > self.width
        self.fill[self.crowded] = 0
        keep &= ~self.crowded[:, None]
        rows = keep.nonzero()[:, 0]
        at = (rows, (keep.cumsum(1) - 1)[keep])
        upper, features = self.upper[keep], self.features[keep]
        self.upper.fill_(NOTHING)
        self.upper[at], self.features[at] = upper, features
        self.bound[self.crowded] = torch.finfo(torch.float32).max

    def _exact(self) -> SparseActs:
        """Scores what is left exactly and takes the k largest of each row."""
        n_tokens, d_sae = self.x.shape[0], self.weights.shape[0]
        # not counted afresh: gaps grow, and k entries that reached a bound once may seem below it by now
        again = self.crowded | (self.certain < self.bound)
        left = (self.upper >= self.bound[:, None]) & (self.upper > NOTHING) & ~again[:, None]
        flat = np.flatnonzero(left.numpy())
        rows, at = torch.from_numpy((flat // self.width).astype(np.int32)), torch.from_numpy(flat)
        entries = [rows, *(listed.view(-1).index_select(0, at) for listed in (self.features, self.upper))]
        rows, features, values = _taken(entries, torch.sort(entries[1], stable=True).indices)
        if self.tokens is not None:
            values = self._scores(features, rows) + self.b_enc.index_select(0, features)
        rows, features, values = _taken([rows.long(), features, values], torch.sort(rows, stable=True).indices)
        entries = _kept([rows, features, values], (values > self.threshold.index_select(0, features)).numpy())
        offsets = row_offsets_of(entries[0], n_tokens)
        keep = largest_of_rows(entries[0].numpy(), entries[2].numpy(), offsets.numpy(), self.k)
        if keep is not None:
            entries = _kept(entries, keep)
        if bool(again.any()):
            entries = self._with_others(entries, again)
        return SparseActs(row_offsets_of(entries[0], n_tokens), entries[1], entries[2], (n_tokens, d_sae))

    def _scores(self, features: Tensor, rows: Tensor) -> Tensor:
        offsets = row_offsets_of(features, self.weights.shape[0])
        if self.x.dtype == torch.float32:
            return product.sampled_dot(offsets, rows, self.weights, self.x)
        x, ends = self.x.float(), offsets.tolist()  # weights of 16 bits are widened piece by piece
        starts = range(0, self.weights.shape[0], 1024)
        return torch.cat(
            [
                product.sampled_dot(
                    offsets[s : s + 1025] - ends[s],
                    rows[ends[s] : ends[min(s + 1024, len(ends) - 1)]],
                    self.weights[s : s + 1024],
                    x,
                )
                for s in starts
            ]
        )

    def _with_others(self, entries: list[Tensor], again: Tensor) -> list[Tensor]:
        """The entries joined with those of rows that the search left open, each found another way."""
        parts = [entries]
        unproved = (again & ~self.crowded).nonzero().squeeze(1)
        if unproved.numel():
            arguments = (self.weights, self.norms, self.b_enc, self.threshold, self.k)
            block = _Block(self.x[unproved], *arguments, rounds=self.tokens is not None, guesses=False)
            parts.append(_entries_of(block.run(), unproved))
        crowded = self.crowded.nonzero().squeeze(1)
        if crowded.numel():
            wide = self.b_enc.dtype
            x, W_enc = self.x[crowded].to(wide), self.weights.to(wide).t()
            step = max(1, MAX_ELEMENTS // self.weights.shape[0])
            for part, rows in zip(x.split(step), crowded.split(step), strict=True):
                acts = encode_small(part, W_enc, self.b_enc, self.threshold, bandwidth=0.0, k=self.k, batch_topk=False)
                parts.append(_entries_of(acts, rows))
        rows, features, values = (torch.cat(column) for column in zip(*parts, strict=True))
        order = torch.sort(rows, stable=True).indices
        return [rows[order], features[order], values[order]]


def _taken(columns: list[Tensor], at: Tensor) -> list[Tensor]:
    return [column.index_select(0, at) for column in columns]


def _kept(columns: list[Tensor], keep: np.ndarray) -> list[Tensor]:
    return columns if keep.all() else _taken(columns, torch.from_numpy(np.flatnonzero(keep)))


def _entries_of(acts: SparseActs | None, rows: Tensor) -> list[Tensor]:
    assert acts is not None  # as finite as the products were
    return [rows[acts.row_ids()], acts.indices, acts.values]
