"""SparseActs: the one structure that ops hand to each other."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor


class FeatureMajor(NamedTuple):
    """The same entries ordered by feature, then token; what a weight gradient walks."""

    offsets: Tensor  # [d_sae + 1] int32; feature j owns entries offsets[j] .. offsets[j + 1]
    tokens: Tensor  # [nnz] int32
    values: Tensor  # [nnz]


@dataclass
class SparseActs:
    """Feature activations of `n_tokens` tokens, only the entries that are used, in CSR order.

    Row `n` owns the entries `row_offsets[n] .. row_offsets[n] + row_counts[n]`, sorted by feature index. A packed
    structure (`row_counts is None`) has no gaps. Kernels with a fixed capacity leave entries with index 0 and value 0
    behind a row's last one; these are safe to gather and add nothing. In training an entry inside the lower half of
    the straight-through window is listed too, with value 0: thresholds are non-negative, so active means value > 0.

    Args:
        row_offsets: `[n_tokens + 1]`, int32 or int64.
        indices: `[nnz]` feature of each entry, int32.
        values: `[nnz]` activation of each entry, in activation units.
        shape: `(n_tokens, d_sae)`.
        row_counts: `[n_tokens]` valid entries of each row, or None when packed.
        feature_major: The same entries by feature, where the producer has them at no cost.
    """

    row_offsets: Tensor
    indices: Tensor
    values: Tensor
    shape: tuple[int, int]
    row_counts: Tensor | None = None
    feature_major: FeatureMajor | None = None

    @property
    def device(self) -> torch.device:
        """Device of the entries."""
        return self.values.device

    def row_ids(self) -> Tensor:
        """Token of each stored entry, `[nnz]` int64 (padding included)."""
        spans = self.row_offsets.diff()
        rows = torch.arange(self.shape[0], device=self.device)
        return rows.repeat_interleave(spans, output_size=self.indices.numel())

    def valid(self) -> Tensor | None:
        """`[nnz]` bool, False on padding; None when the structure is packed."""
        if self.row_counts is None:
            return None
        rows = self.row_ids()
        slot = torch.arange(self.indices.numel(), device=self.device) - self.row_offsets[rows]
        return slot < self.row_counts[rows]

    def packed(self) -> SparseActs:
        """The same entries without padding; a host synchronisation on a GPU."""
        valid = self.valid()
        if valid is None:
            return self
        return self.select(valid)

    def active(self) -> SparseActs:
        """Only the entries with a positive value, packed: what an inference user wants of a training encode."""
        return self.select(self.values > 0)

    def select(self, keep: Tensor) -> SparseActs:
        """The entries where `keep` (`[nnz]` bool) is True, packed; order is kept."""
        counts = torch.zeros(self.shape[0], dtype=torch.int64, device=self.device)
        counts.index_add_(0, self.row_ids(), keep.to(torch.int64))
        row_offsets = torch.zeros_like(self.row_offsets)
        row_offsets[1:] = counts.cumsum(0)
        return SparseActs(row_offsets, self.indices[keep], self.values[keep], self.shape)

    def l0(self) -> Tensor:
        """Active features of each token, `[n_tokens]` int64."""
        counts = torch.zeros(self.shape[0], dtype=torch.int64, device=self.device)
        return counts.index_add_(0, self.row_ids(), (self.values > 0).to(torch.int64))

    def to_dense(self) -> Tensor:
        """`[n_tokens, d_sae]` in the dtype of `values`; allocates the dense tensor, for inspection and small inputs."""
        dense = torch.zeros(self.shape, dtype=self.values.dtype, device=self.device)
        # padding adds zeros at feature 0, so accumulation leaves a real entry there untouched
        return dense.index_put_((self.row_ids(), self.indices.long()), self.values, accumulate=True)

    def topk(self, k: int) -> SparseActs:
        """The `k` largest active entries of each row (all, where fewer are active), packed; ties to the lower feature.

        Raises:
            ValueError: `k` is below 1.
        """
        if not isinstance(k, Integral) or k < 1:
            raise ValueError(f"k: expected an integer >= 1, got {k!r}")
        acts = self.active()
        return acts.select(topk_mask(acts.row_ids(), acts.values.detach(), acts.row_offsets, k))


def topk_mask(rows: Tensor, values: Tensor, row_offsets: Tensor, k: int) -> Tensor:
    """Which entries survive top-k: `keep = rank < k or the row has at most k active entries`.

    Args:
        rows: `[nnz]` row of each entry, ascending; inside a row by feature index.
        values: `[nnz]`, 0 where an entry is in the window only.
        row_offsets: `[n_tokens + 1]` of the same entries.
        k: How many active entries survive; ties go to the lower feature index.

    Returns:
        `[nnz]` bool in the order of the entries.
    """
    order = torch.argsort(values, descending=True, stable=True)
    order = order[torch.argsort(rows[order], stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device) - row_offsets[rows[order]].long()
    n_active = torch.zeros(row_offsets.numel() - 1, dtype=torch.int64, device=values.device)
    n_active.index_add_(0, rows.long(), (values > 0).long())
    return (rank < k) | (n_active[rows] <= k)
