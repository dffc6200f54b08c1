"""The arguments of one listing, as every way of doing it takes them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


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
    l0: Tensor | None
    feature_counts: Tensor | None

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
            l0=None if self.l0 is None else self.l0[rows],
            feature_counts=None if self.feature_counts is None else self.feature_counts[columns],
        )

    def arguments(self) -> dict[str, Any]:
        """What every listing kernel takes beside the operands of its product."""
        return {
            "b_enc_ptr": self.b_enc,
            "threshold_ptr": self.threshold,
            "row_ends_ptr": self.row_ends,
            "bounds_ptr": self.bounds,
            "cursors_ptr": self.cursors,
            "entries_ptr": self.entries,
            "l0_ptr": self.l0,
            "feature_counts_ptr": self.feature_counts,
            "half_bandwidth": self.bandwidth / 2,
            "first_feature": self.first_feature,
            "n_tokens": self.x.shape[0],
            "d_sae": self.W_enc.shape[1],
        }
