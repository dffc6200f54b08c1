"""Sparse backward on a CPU, feature-major: every gradient from the entries alone, no `[N, d_sae]` tensor, no atomics."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastsae_kernels.cpu.product import SCRATCH_ELEMENTS, sampled_dot
from fastsae_kernels.gather import gather_sum
from fastsae_kernels.memory import Spare
from fastsae_kernels.types import FeatureMajor, SparseActs


def by_feature(acts: SparseActs) -> FeatureMajor:
    """The entries of `acts` by feature, then as they lie, which is by token; padding is among those of feature 0."""
    if acts.feature_major is None:
        features, order = torch.sort(acts.indices, stable=True)
        offsets = torch.searchsorted(features, torch.arange(acts.shape[1] + 1, dtype=torch.int32), out_int32=True)
        acts.feature_major = FeatureMajor(offsets, acts.row_ids().int()[order], acts.values[order])
    return acts.feature_major


def of_entries(of_features: Tensor, offsets: Tensor) -> Tensor:
    """What is known of each feature for each of its entries, `[nnz]`, feature-major."""
    return torch.from_numpy(np.repeat(of_features.detach().numpy(), offsets.diff().numpy()))


def _feature_order(acts: SparseActs) -> Tensor:
    """Permutation that takes entries from the row-major order of `acts`, whatever that is inside a row, to feature-major."""
    return torch.sort(acts.indices, stable=True).indices


def to_rows(acts: SparseActs, by_feature_values: Tensor) -> Tensor:
    """Reorders one number per entry from feature-major to the row-major order of `acts`."""
    out = torch.empty_like(by_feature_values)
    out[_feature_order(acts)] = by_feature_values
    return out


def to_features(acts: SparseActs, by_row_values: Tensor) -> Tensor:
    """Reorders one number per entry from the row-major order of `acts` to feature-major."""
    return by_row_values[_feature_order(acts)]


def grad_of_acts(entries: FeatureMajor, W_dec: Tensor, grad_out: Tensor) -> Tensor:
    """`grad_out[n] . W_dec[j]` at each entry in feature-major order, `[nnz]` fp32.

    The feature's decoder row stays in cache while its tokens are walked; a narrower dtype is widened chunk by chunk.
    """
    if W_dec.dtype in (torch.float32, torch.float64):
        return sampled_dot(entries.offsets, entries.tokens, W_dec, grad_out)
    d_sae, wide = W_dec.shape[0], grad_out.float()
    size = max(64, SCRATCH_ELEMENTS // max(1, W_dec.shape[1]))
    bounds = [*entries.offsets[:-1:size].tolist(), entries.tokens.numel()]
    parts = [
        sampled_dot(
            entries.offsets[start : start + size + 1] - bounds[i],
            entries.tokens[bounds[i] : bounds[i + 1]],
            W_dec[start : start + size],
            wide,
        )
        for i, start in enumerate(range(0, d_sae, size))
    ]
    return torch.cat(parts)


def weight_gradient(entries: FeatureMajor, values: Tensor, rows: Tensor, spare: Spare | None = None) -> Tensor:
    """`out[j] = sum over the entries of feature j of value * rows[token]`, `[d_sae, d]` in the dtype of `rows`."""
    return gather_sum(entries.offsets, entries.tokens, values, rows.contiguous(), spare)


def sum_segments(values: Tensor, offsets: Tensor) -> Tensor:
    """`[n_segments]` sums of `values` over each segment's entries in the dtype of `values`, added up in fp64.

    One by one in fp32 thousands of terms would lose two digits.
    """
    return torch.segment_reduce(values.double(), "sum", offsets=offsets, unsafe=True).to(values.dtype)


def count_segments(marks: Tensor, offsets: Tensor) -> Tensor:
    """`[n_segments]` int64, how many of each segment's `marks` (bool) are True."""
    before = np.zeros(marks.numel() + 1, dtype=np.int32)
    np.cumsum(marks.numpy(), out=before[1:])
    return torch.from_numpy(np.diff(before.take(offsets.numpy())).astype(np.int64))


def grad_input(acts: SparseActs, grad_hidden_pre: Tensor, W_enc: Tensor) -> Tensor:
    """`grad_x[n] = sum over the entries of row n of grad_hidden_pre * W_enc[:, index]`; values in row-major order."""
    return gather_sum(acts.row_offsets, acts.indices, grad_hidden_pre, W_enc.t().contiguous())


def decode_backward(acts: SparseActs, W_dec: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `decode` with respect to the values (row-major, `[nnz]`) and `W_dec`."""
    entries = by_feature(acts)
    grad_values = to_rows(acts, grad_of_acts(entries, W_dec, grad_out))
    # not entries.values: a user may have edited acts.values since, to steer or to ablate
    return grad_values, weight_gradient(entries, to_features(acts, acts.values), grad_out)


def encode_backward(
    acts: SparseActs, x: Tensor, W_enc: Tensor, grad_hidden_pre: Tensor, needs_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of `encode` with respect to x (on demand), `W_enc` and `b_enc` from those of its entries, row-major."""
    entries = by_feature(acts)
    by_features = to_features(acts, grad_hidden_pre)
    grad_b_enc = sum_segments(by_features, entries.offsets)
    grad_x = grad_input(acts, grad_hidden_pre, W_enc) if needs_x else None
    return grad_x, weight_gradient(entries, by_features, x).t(), grad_b_enc
