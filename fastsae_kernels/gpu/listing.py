"""The arguments of one listing, as every way of doing it takes them."""

from __future__ import annotations

from typing import NamedTuple

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
    precision: str  # "ieee" for 16-bit operands, which have no other
    l0: Tensor | None
    feature_counts: Tensor | None
