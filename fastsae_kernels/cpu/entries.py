"""Entries in feature-major order as they leave the chunks, pruned to the largest ones, and their CSR order at the end."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastsae_kernels.types import FeatureMajor, SparseActs, topk_mask

PRUNE_SLACK = 2**16  # entries beyond 8 k per token before the top k of each are taken


def row_offsets_of(sorted_rows: Tensor, n_rows: int) -> Tensor:
    """`[n_rows + 1]` int32 offsets of ascending row numbers."""
    return torch.searchsorted(sorted_rows, torch.arange(n_rows + 1, dtype=sorted_rows.dtype), out_int32=True)


def largest_of_rows(rows: np.ndarray, values: np.ndarray, row_offsets: np.ndarray, k: int) -> np.ndarray | None:
    """`[nnz]` bool, whether an entry is among the k largest of its row (ties: the earlier one); None where all are.

    Args:
        rows: `[nnz]` int64, ascending.
        values: `[nnz]`.
        row_offsets: `[n + 1]` of the rows.
        k: How many survive.
    """
    counts = np.diff(row_offsets)
    longest = int(counts.max(initial=0))
    keep: np.ndarray
    if longest <= k:
        return None
    if counts.size == 1:
        kth = np.partition(values, longest - k)[longest - k]
        keep = values >= kth
        surplus = np.count_nonzero(keep) - k
        if surplus:
            keep[np.flatnonzero(values == kth)[-surplus:]] = False
        return keep
    padded = np.full((counts.size, longest), -np.inf, dtype=values.dtype)
    at = np.arange(rows.size) + (np.arange(counts.size) * longest - row_offsets[:-1]).take(rows)
    padded.reshape(-1)[at] = values
    kth = np.partition(padded, longest - k, axis=1)[:, longest - k]
    keep = values >= kth.take(rows)
    if np.count_nonzero(keep) > np.minimum(counts, k).sum():
        above, tied = padded > kth[:, None], padded == kth[:, None]
        kept = above | (tied & (tied.cumsum(1) <= k - above.sum(1, keepdims=True)))
        keep = kept.reshape(-1)[at]
    return keep


def stack_rows(parts: list[SparseActs | None]) -> SparseActs | None:
    """The rows of all blocks as one structure; None where a block has none."""
    if len(parts) == 1:
        return parts[0]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    counts = torch.cat([part.row_offsets.diff() for part in found])
    row_offsets = torch.zeros(counts.numel() + 1, dtype=torch.int32)
    row_offsets[1:] = counts.cumsum(0)
    return SparseActs(
        row_offsets,
        torch.cat([part.indices for part in found]),
        torch.cat([part.values for part in found]),
        (counts.numel(), found[0].shape[1]),
    )


class Entries:
    """A growing list of entries in feature-major order."""

    def __init__(self, n_tokens: int, d_sae: int) -> None:
        self.n_tokens, self.d_sae, self.count = n_tokens, d_sae, 0
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def append(self, features: Tensor, tokens: Tensor, values: Tensor) -> None:
        """Takes the entries of the next features."""
        self.parts.append((features, tokens, values))
        self.count += tokens.numel()

    def append_listed(self, listed: Tensor, features: Tensor, tokens: Tensor, values: Tensor) -> None:
        """Takes those candidates of the next features that are listed (bool)."""
        at = torch.from_numpy(np.flatnonzero(listed.numpy()))
        self.append(features.index_select(0, at).int(), tokens.index_select(0, at), values.index_select(0, at))

    def merge(self) -> tuple[Tensor, Tensor, Tensor]:
        """All entries in one piece, `(features, tokens, values)`."""
        if len(self.parts) > 1:
            features, tokens, values = zip(*self.parts, strict=True)
            self.parts = [(torch.cat(features), torch.cat(tokens), torch.cat(values))]
        return self.parts[0]

    def select(self, keep: Tensor) -> None:
        """Keeps only some entries (`keep`: bool, in the order of `merge`)."""
        at = torch.from_numpy(np.flatnonzero(keep.numpy()))
        features, tokens, values = (column.index_select(0, at) for column in self.merge())
        self.parts = [(features, tokens, values)]
        self.count = at.numel()

    def finish(self) -> SparseActs:
        """The entries in both orders."""
        features, tokens, values = self.merge()
        rows, order = torch.sort(tokens, stable=True)
        return SparseActs(
            row_offsets=row_offsets_of(rows, self.n_tokens),
            indices=features[order],
            values=values[order],
            shape=(self.n_tokens, self.d_sae),
            feature_major=FeatureMajor(row_offsets_of(features, self.d_sae), tokens, values),
        )


class RowTopK(Entries):
    """Keeps the k largest active entries of each token, and the window's where a token has no more than k."""

    def __init__(self, n_tokens: int, d_sae: int, k: int) -> None:
        super().__init__(n_tokens, d_sae)
        self.k, self.prune_at = k, 8 * n_tokens * k + PRUNE_SLACK
        self.truncated = torch.zeros(n_tokens, dtype=torch.bool)  # rows that have lost active entries

    def append(self, features: Tensor, tokens: Tensor, values: Tensor) -> None:
        super().append(features, tokens, values)
        if self.count > self.prune_at:
            self._prune()
            self.prune_at = max(self.prune_at, 2 * self.count)

    def _prune(self) -> None:
        _, tokens, values = self.merge()
        rows, order = torch.sort(tokens, stable=True)
        keep = torch.empty(tokens.numel(), dtype=torch.bool)
        keep[order] = topk_mask(rows.long(), values[order], row_offsets_of(rows, self.n_tokens), self.k)
        self.truncated[tokens[(values > 0) & ~keep].long()] = True
        # a row cut by an earlier call holds k active entries by now and looks whole to topk_mask
        keep &= (values > 0) | ~self.truncated[tokens.long()]
        self.select(keep)

    def finish(self) -> SparseActs:
        self._prune()
        return super().finish()


class BatchTopK(Entries):
    """Keeps the `n_kept` largest entries of the batch, ties to the lower token, then the lower feature.

    `bound` is the smallest of them once there are that many: what lies below it cannot survive.
    """

    def __init__(self, n_tokens: int, d_sae: int, n_kept: int) -> None:
        super().__init__(n_tokens, d_sae)
        self.n_kept, self.bound = n_kept, 0.0

    def append(self, features: Tensor, tokens: Tensor, values: Tensor) -> None:
        super().append(features, tokens, values)
        if self.count > 2 * self.n_kept:
            self._prune()

    def _prune(self) -> None:
        features, tokens, values = self.merge()
        if self.count <= self.n_kept:
            return
        at = self.count - self.n_kept
        smallest = np.partition(values.numpy(), at)[at]
        keep = values >= smallest
        surplus = int(keep.sum()) - self.n_kept
        if surplus:
            tied = (values == smallest).nonzero().squeeze(1)
            positions = tokens[tied].long() * self.d_sae + features[tied]
            keep[tied[positions.topk(surplus).indices]] = False
        self.select(keep)
        self.bound = float(smallest)

    def finish(self) -> SparseActs:
        self._prune()
        return super().finish()
