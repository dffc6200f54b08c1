"""Encode of few tokens on a CPU: the whole product fits in cache, so it is formed once and looked at directly.

NumPy does the looking: on so few numbers the threads of PyTorch's operators cost more than they save.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastsae_kernels.cpu.entries import largest_of_rows, row_offsets_of
from fastsae_kernels.cpu.product import SHORT_MASK, nonzero_flat, padded_mask
from fastsae_kernels.sparse_acts import SparseActs

MAX_ELEMENTS = 2**20  # of the product: 4 MB in fp32
PARTIAL_SORT = 64  # `torch.topk` sorts partially for a smaller share of its input, and is several times slower beyond


def encode_small(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, *, bandwidth: float, k: int | None, batch_topk: bool
) -> SparseActs | None:
    """`encode` through one dense product of at most `MAX_ELEMENTS`; None where it is NaN or Inf."""
    if x.dtype == threshold.dtype:
        product = functional.linear(x, W_enc.t(), b_enc)
    else:  # the bias is not rounded to 16 bits, as on every other path
        product = functional.linear(x, W_enc.t()).to(threshold.dtype) + b_enc.to(threshold.dtype)
    array = product.numpy()
    with np.errstate(over="ignore"):  # a sum beyond the largest number is looked at again
        total = array.sum()
    if not np.isfinite(total) and not np.isfinite(array).all():
        return None
    if k is not None and bandwidth == 0 and not batch_topk:
        return _topk(product, threshold, k)
    listed = array > threshold.numpy()
    if bandwidth > 0:
        listed |= np.abs(array - threshold.numpy()) < bandwidth / 2
    if k is not None:
        acts = product * (product > threshold)
        if batch_topk:
            listed &= topk_keep(acts.view(1, -1), k * x.shape[0]).view_as(acts).numpy()
        else:
            listed &= topk_keep(acts, k).numpy()
    flat = np.flatnonzero(listed)
    d_sae = W_enc.shape[1]
    row_offsets = np.searchsorted(flat, np.arange(x.shape[0] + 1) * d_sae).astype(np.int32)
    indices = (flat % d_sae).astype(np.int32)
    values = array.reshape(-1)[flat]
    if bandwidth > 0:
        values = np.where(values > threshold.numpy()[indices], values, 0)
    return _as_acts(row_offsets, indices, values, (x.shape[0], d_sae))


def _as_acts(row_offsets: np.ndarray, indices: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> SparseActs:
    return SparseActs(torch.from_numpy(row_offsets), torch.from_numpy(indices), torch.from_numpy(values), shape)


def _topk(product: Tensor, threshold: Tensor, k: int) -> SparseActs:
    """The k largest active entries of each row: what reaches a lower bound of the k-th largest, cut to k."""
    n_tokens, d_sae = product.shape
    # where all thresholds are 0 an inactive entry is simply not positive, and no masked copy is needed
    acts = torch.where(product > threshold, product, 0) if bool(threshold.any()) else product
    found = _by_partial_sort(acts, k)
    if found is not None:
        return found
    mask, bound = padded_mask(acts.numel()), _lower_bound(acts, k)
    reaches = mask[: acts.numel()].view_as(acts)
    torch.ge(acts, bound, out=reaches)
    if not bool((bound > 0).all()):
        reaches &= acts > 0
    flat = nonzero_flat(mask)
    rows = flat // d_sae
    row_offsets = row_offsets_of(rows, n_tokens)
    indices, values = (flat - rows * d_sae).int(), acts.view(-1)[flat]
    keep = largest_of_rows(rows, values, row_offsets, k)
    if keep is not None:
        row_offsets, indices, values = row_offsets_of(rows[keep], n_tokens), indices[keep], values[keep]
    return SparseActs(row_offsets, indices, values, (n_tokens, d_sae))


def _by_partial_sort(acts: Tensor, k: int) -> SparseActs | None:
    """The same from `torch.topk`, on few elements; None where that would be slow, or has a choice among equal values."""
    n_tokens, d_sae = acts.shape
    if (k + 1) * PARTIAL_SORT > d_sae or acts.numel() > SHORT_MASK:
        return None
    values, indices = torch.topk(acts, k + 1, dim=1)
    kth = values[:, k - 1]
    if bool(((kth == values[:, k]) & (kth > 0)).any()):
        return None
    flat = np.sort(indices[:, :k].numpy(), axis=1) + np.arange(n_tokens)[:, None] * d_sae
    found = acts.numpy().reshape(-1)[flat]
    active = found > 0
    row_offsets = np.zeros(n_tokens + 1, dtype=np.int32)
    np.cumsum(active.sum(1), out=row_offsets[1:])
    if not bool((kth > 0).all()):
        flat, found = flat[active], found[active]
    return _as_acts(row_offsets, (flat % d_sae).astype(np.int32).reshape(-1), found.reshape(-1), (n_tokens, d_sae))


def _lower_bound(acts: Tensor, k: int) -> Tensor:
    """`[n, 1]` >= 0: at least k elements of a row reach it, if k are positive.

    The k-th largest of the maxima of 4 k groups: a pass over memory, and a `torch.topk` of few numbers. An eighth more
    elements than k reach it where values are independent.
    """
    n_groups = 4 * k
    per_group = acts.shape[1] // n_groups
    if per_group > 1:
        acts = acts[:, : per_group * n_groups].view(acts.shape[0], per_group, n_groups).amax(1)
    if acts.shape[1] < k:
        return acts.new_zeros(acts.shape[0], 1)
    largest = torch.topk(acts, k, dim=1, sorted=False).values
    return largest.amin(1, keepdim=True).clamp_min(0)


def topk_keep(acts: Tensor, k: int) -> Tensor:
    """`reference.topk_keep` for activations `[n, S]` >= 0, without a full sort."""
    if k >= acts.shape[1]:
        return torch.ones_like(acts, dtype=torch.bool)
    kth = torch.topk(acts, k, dim=1).values[:, -1:].clamp_min(0)
    above, tied = acts > kth, acts == kth
    room = k - above.sum(1, keepdim=True)
    return ((acts > 0).sum(1, keepdim=True) <= k) | above | (tied & (tied.cumsum(1) <= room))
