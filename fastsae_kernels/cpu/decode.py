"""Sparse decode on a CPU: a weighted gather-sum, PyTorch's own `embedding_bag`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fastsae_kernels.sparse_acts import SparseActs


def gather_sum(offsets: Tensor, indices: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """`out[i] = sum of weights[e] * rows[indices[e]]` over the entries e of segment i, `[n_segments, d]`.

    `rows` must be contiguous for speed; accumulates in fp32 for every dtype, in the order of the entries.
    """
    if indices.numel() == 0:
        return rows.new_zeros(offsets.numel() - 1, rows.shape[1])
    return functional.embedding_bag(
        indices,
        rows,
        offsets.to(indices.dtype),
        mode="sum",
        per_sample_weights=weights.to(rows.dtype),
        include_last_offset=True,
    )


def decode(acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """`sae_out[n] = b_dec + sum over the entries of row n of value * W_dec[index]`, `[N, d_out]` in the dtype of `W_dec`."""
    sae_out = gather_sum(acts.row_offsets, acts.indices, acts.values, W_dec)
    return sae_out if b_dec is None else sae_out.add_(b_dec)
