"""Questions to a trained SAE: its largest activations, and the activations of some features."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae_kernels import SparseActs


class TopActivations(NamedTuple):
    """The largest activations of each token, as `torch.topk` returns them."""

    values: Tensor  # [..., k] descending; 0 behind a token's last active feature
    indices: Tensor  # [..., k] int64 feature of each value; 0 where the value is 0


class FeatureWeights(NamedTuple):
    """The weights of some features as `encode` and `decode` use them: rescaled, where decoder norms count."""

    W_enc: Tensor  # [d_in, n_ids]
    b_enc: Tensor  # [n_ids]
    threshold: Tensor  # [n_ids]
    W_dec: Tensor  # [n_ids, d_in], what one unit of each activation adds to the reconstruction


def check_integer(name: str, value: Any, d_sae: int | None = None) -> int:
    """The argument `name` where it is an integer from 1, to `d_sae` where that is given.

    Raises:
        TypeError: It is no integer.
        ValueError: It is out of range.
    """
    bounds = ">= 1" if d_sae is None else f"from 1 to d_sae = {d_sae}"
    expected = f"{name}: expected an integer {bounds}, got {value!r}"
    try:
        number = operator.index(value)  # NumPy's integers too, no floats
    except TypeError:
        raise TypeError(expected) from None
    if isinstance(value, bool):
        raise TypeError(expected)
    if number < 1 or (d_sae is not None and number > d_sae):
        raise ValueError(expected)
    return number


def check_feature_ids(feature_ids: Sequence[int] | Tensor, d_sae: int, device: torch.device) -> Tensor:
    """`[n_ids]` int64 on `device`; looking at ids that lie on a GPU waits for it.

    Raises:
        TypeError: They are no integers.
        ValueError: They are not in one dimension, or one is out of range.
    """
    expected = f"feature_ids: expected integers from 0 to d_sae - 1 = {d_sae - 1} in one dimension"
    try:
        ids = torch.as_tensor(feature_ids)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{expected}, got {feature_ids!r}") from None
    if ids.numel() == 0:
        ids = ids.long()  # an empty list has no dtype of its own
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{expected}, got {ids.dtype}")
    if ids.dim() != 1:
        raise ValueError(f"{expected}, got shape {tuple(ids.shape)}")
    if ids.numel() and torch.compiler.is_compiling():  # while a graph is traced there is nothing to look at
        torch._assert_async(((ids >= 0) & (ids < d_sae)).all(), expected)
    elif ids.numel():
        lowest, highest = (int(bound) for bound in torch.aminmax(ids))
        if lowest < 0 or highest >= d_sae:
            raise ValueError(f"{expected}, got {lowest if lowest < 0 else highest}")
    return ids.to(device, torch.int64)


def top_activations(acts: SparseActs, k: int) -> TopActivations:
    """The `k` largest activations of each row of `acts`, whose rows have at most `k`; ties to the lower feature."""
    n_tokens, rows = acts.shape[0], acts.row_ids()
    slots = torch.arange(rows.numel(), device=rows.device) - acts.row_offsets.long()[rows]
    place = (rows, slots.clamp(max=k))  # behind a row's entries there may be padding, zeros all; it falls off the end
    values = acts.values.new_zeros(n_tokens, k + 1).index_put(place, acts.values)[:, :k]
    indices = rows.new_zeros(n_tokens, k + 1).index_put(place, acts.indices.long())[:, :k]
    # stable, and a row lists its features in ascending order: the lower one of equals stays in front
    values, order = values.sort(dim=1, descending=True, stable=True)
    return TopActivations(values, indices.gather(1, order))


def from_sparse_tensor(acts: Tensor, dtype: torch.dtype) -> SparseActs:
    """The entries of a sparse tensor `[..., d_sae]`, in `dtype`, its leading dimensions flattened; differentiable.

    Raises:
        TypeError: It is no sparse tensor of numbers, but one of blocks or with dense dimensions.
    """
    if acts.layout is not torch.sparse_coo:
        acts = acts.to_sparse_coo()
    if acts.dense_dim():
        raise TypeError(f"acts: expected a sparse tensor without dense dimensions, got {acts.dense_dim()} of them")
    *leading, d_sae = acts.shape
    acts, n_tokens = acts.coalesce(), math.prod(leading)
    places, rows = acts.indices(), acts.indices().new_zeros(acts.values().numel())
    for size, place in zip(leading, places, strict=False):  # row-major, as the entries are sorted
        rows = rows * size + place
    row_offsets = rows.new_zeros(n_tokens + 1)
    row_offsets[1:] = torch.bincount(rows, minlength=n_tokens).cumsum(0)
    return SparseActs(row_offsets, places[-1].int(), acts.values().to(dtype), (n_tokens, d_sae))


def columns(acts: SparseActs, feature_ids: Tensor) -> Tensor:
    """`acts.to_dense()[:, feature_ids]` without the dense tensor; ids may repeat."""
    n_ids = feature_ids.numel()
    # one column per feature asked for, any of its places where an id repeats, and the last one for all other features
    column_of = torch.full((acts.shape[1],), n_ids, device=acts.device)
    column_of[feature_ids] = torch.arange(n_ids, device=acts.device)
    picked = acts.values.new_zeros(acts.shape[0], n_ids + 1)
    place = (acts.row_ids(), column_of[acts.indices.long()])
    # accumulated, because padding adds zeros at feature 0
    return picked.index_put(place, acts.values, accumulate=True)[:, column_of[feature_ids]]
