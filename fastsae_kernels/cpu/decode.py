"""Sparse decode on a CPU: a weighted gather-sum of the decoder's rows."""

from __future__ import annotations

from torch import Tensor

from fastsae_kernels.gather import gather_sum
from fastsae_kernels.types import SparseActs


def decode(acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """`sae_out[n] = b_dec + sum over the entries of row n of value * W_dec[index]`, `[N, d_out]` in the dtype of `W_dec`."""
    sae_out = gather_sum(acts.row_offsets, acts.indices, acts.values, W_dec)
    return sae_out if b_dec is None else sae_out.add_(b_dec)
