"""Encode of few tokens on a CPU: the whole product fits in cache, so it is formed once and looked at directly.

NumPy does the looking: on so few numbers the threads of PyTorch's operators cost more than they save, and its partition
finds a k-th largest several times faster.

On an AMD CPU the fp32 product of oneDNN takes half the time of MKL's, which is PyTorch's, but sums in one long chain and
so has up to three times its rounding error. It finds the candidates there, with a margin that admits too many, and the
candidates are scored again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastsae_kernels.activity import sampled_share
from fastsae_kernels.cpu.entries import largest_of_rows
from fastsae_kernels.cpu.product import has_fast_bf16, nonzero_flat, padded_mask, row_norms, sampled_dot
from fastsae_kernels.matmul import by_onednn, has_onednn, has_slow_mkl, sums_in_fp32
from fastsae_kernels.types import SparseActs

MAX_ELEMENTS = 2**20  # of the product: 4 MB in fp32
MIN_ROUGH_TOKENS = 8  # fewer multiplications per weight do not pay for the weights' norms
MIN_ROUGH_WORK = 2**24  # multiply-adds, likewise for the second score
MAX_RESCORED = 1 / 32  # of the elements; scoring more takes longer than the other product
MIN_GROUPS = 128  # whose maxima bound the k-th largest from below
MIN_ELEMENTS = 2**15  # for ways that save work on each; with fewer the calls are what takes time


class _Cut(NamedTuple):
    """The `k` largest of each row survive, the elements seen as `n_rows` rows: one of each token, or one of all."""

    n_rows: int
    k: int


def encode_small(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    *,
    bandwidth: float,
    k: int | None,
    batch_topk: bool,
    max_entries: int | None = None,
) -> SparseActs | None:
    """`encode` through one dense product of at most `MAX_ELEMENTS`; None where it is NaN or Inf, or has too many entries."""
    shape = n_tokens, _ = x.shape[0], W_enc.shape[1]
    cut = None
    if k is not None and bandwidth == 0 and n_tokens > 0:  # with a window a dense mask tells them
        cut = _Cut(1, k * n_tokens) if batch_topk else _Cut(n_tokens, k)
    is_rough = (k is None or cut is not None) and _is_rough_faster(x, W_enc)
    if is_rough and not _are_many(x, W_enc, b_enc, threshold - bandwidth / 2, cut):
        rough, margin = _rough_product(x, W_enc, b_enc)
        marks = _candidates(rough, threshold, margin, bandwidth, cut)
        count = math.inf if marks is None else np.count_nonzero(marks.numpy())
        if marks is not None and max_entries is not None and count > max_entries:
            return None
        if marks is not None and count <= MAX_RESCORED * rough.numel():
            rows, columns = _places(nonzero_flat(marks).numpy(), shape)
            return _entries(rows, columns, _scores(rows, columns, x, W_enc, b_enc), threshold, bandwidth, cut, shape)
    # the other way: a product that needs no second score, so that what it marks are the entries
    product = _product(x, W_enc, b_enc)
    if product.dtype != torch.bfloat16 or bandwidth > 0 or product.numel() < MIN_ELEMENTS:
        product = product.to(threshold.dtype)
    marks = _candidates(product, threshold, None, bandwidth, cut)
    if marks is None or (max_entries is not None and np.count_nonzero(marks.numpy()) > max_entries):
        return None
    listed = nonzero_flat(marks)
    if k is not None and cut is None:
        keep = topk_keep(product * (product > threshold), k)
        listed = listed[keep.view(-1)[listed]]
    values = product.view(-1).index_select(0, listed).to(threshold.dtype).numpy()
    return _entries(*_places(listed.numpy(), shape), values, threshold, bandwidth, cut, shape)


def _suits_onednn(x: Tensor, W_enc: Tensor) -> bool:
    # other strides are copied, or multiplied by a slow loop
    return has_onednn() and x.is_contiguous() and W_enc.t().is_contiguous()


def _is_rough_faster(x: Tensor, W_enc: Tensor) -> bool:
    if x.dtype != torch.float32 or x.shape[0] < MIN_ROUGH_TOKENS or x.numel() * W_enc.shape[1] < MIN_ROUGH_WORK:
        return False
    return has_slow_mkl() and sums_in_fp32() and _suits_onednn(x, W_enc)


def _are_many(x: Tensor, W_enc: Tensor, b_enc: Tensor, lower: Tensor, cut: _Cut | None) -> bool:
    """Whether so many candidates are to be expected, of a cut or of a sample, that the rough product would be in vain."""
    share = sampled_share(x, W_enc, b_enc, lower) if cut is None else cut.n_rows * cut.k / (len(x) * len(lower))
    return share > MAX_RESCORED


def _product(x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    """Pre-activations `[N, S]`, in 16 bits those of a linear layer bit for bit, in the bias's dtype where that is wider."""
    if b_enc is not None and b_enc.dtype != x.dtype:
        return _product(x, W_enc, None).to(b_enc.dtype).add_(b_enc)
    if _suits_onednn(x, W_enc):
        # `linear` calls it too, but first copies the bias to all rows
        if x.dtype == torch.bfloat16 and has_fast_bf16():
            return by_onednn(x, W_enc.t(), b_enc)
        if x.dtype == torch.float32 and x.shape[0] == 1 and has_slow_mkl():  # here it has the smaller error as well
            return by_onednn(x, W_enc.t(), b_enc)
    return functional.linear(x, W_enc.t(), b_enc)


def _rough_product(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activations `[N, S]` by oneDNN, and `[S]` how far more careful sums can lie from them.

    Two fp32 sums of the same products differ by at most 2 (d + 4) u |x| |w|, u = 2^-24; taken twice, and the bias rounded.
    """
    norms = row_norms(W_enc.t()) * row_norms(x).max()
    return by_onednn(x, W_enc.t(), b_enc), norms * (x.shape[1] + 8) * 2.0**-22 + b_enc.abs() * 2.0**-21


def _candidates(
    product: Tensor, threshold: Tensor, margin: Tensor | None, bandwidth: float, cut: _Cut | None
) -> Tensor | None:
    """A padded mask of all that may be an entry: above the window's lower end, and among the largest of a `cut`.

    None where the product is NaN or Inf.
    """
    # a sum beyond the largest number is looked at again
    if not math.isfinite(product.sum()) and not bool(product.isfinite().all()):
        return None
    gates = threshold.numpy()
    if product.dtype == torch.bfloat16:
        array, lower = product.view(torch.int16).numpy(), _bits_of_gates(gates)
        certain = lower
    elif margin is None and bandwidth == 0:
        array, lower = product.numpy(), np.maximum(gates, 0)
        certain = lower
    else:
        numbers = torch.finfo(product.dtype)
        slack = (gates + bandwidth + numbers.smallest_normal) * (2 * numbers.eps)  # for the rounding of what follows
        if margin is not None:
            slack = slack + margin.numpy()
        array, lower, certain = product.numpy(), gates - bandwidth / 2 - slack, gates + slack
    mask = padded_mask(array.size)
    listed = mask.numpy()[: array.size].reshape(array.shape)
    if cut is None:
        np.greater(array, lower, out=listed)
    else:
        # of a plain TopK an inactive element is simply not positive
        acts = np.where(array > certain, array, 0) if gates.any() else array
        reach = _kth_largest_bound(acts.reshape(cut.n_rows, -1), cut.k)
        if margin is not None:
            reach = reach - 2 * float(margin.max())
        np.greater_equal(array, reach, out=listed)
        if not (reach > lower.max()).all():
            listed &= array > lower
    return mask


def _bits_of_gates(threshold: np.ndarray) -> np.ndarray:
    """`[S]` int16: a bf16 exceeds its threshold, exactly, where its bits exceed these: the threshold's without the last 16."""
    clean = np.abs(np.maximum(threshold, 0))  # negative zero, or NaN with a sign, would lie below all
    return (clean.view(np.int32) >> 16).astype(np.int16)


def _kth_largest_bound(acts: np.ndarray, k: int) -> np.ndarray:
    """`[n, 1]` >= 0: at least k elements of a row reach it, if k are positive.

    The k-th largest of the maxima of 4 k groups: one pass over memory. An eighth more elements than k reach it where
    values are independent.
    """
    n_groups = max(MIN_GROUPS, 4 * k)
    per_group = acts.shape[1] // n_groups
    if per_group > 1 and acts.size >= MIN_ELEMENTS:
        grouped = torch.from_numpy(acts[:, : per_group * n_groups]).view(acts.shape[0], per_group, n_groups)
        acts = grouped.amax(1).numpy()  # unlike NumPy's maximum, over all threads
    at = acts.shape[1] - k
    bound: np.ndarray = np.maximum(np.partition(acts, at, axis=1)[:, at : at + 1], 0)
    return bound


def _places(flat: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """`(rows, columns)` of flat positions."""
    rows = flat // shape[1]
    return rows, (flat - rows * shape[1]).astype(np.int32)


def _scores(rows: np.ndarray, columns: np.ndarray, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> np.ndarray:
    """The pre-activations at these positions, each summed by itself."""
    offsets = torch.from_numpy(_row_offsets(rows, x.shape[0]))
    products: np.ndarray = sampled_dot(offsets, torch.from_numpy(columns), x, W_enc.t()).numpy()
    return products + b_enc.numpy().take(columns)


def _row_offsets(rows: np.ndarray, n_tokens: int) -> np.ndarray:
    return np.searchsorted(rows, np.arange(n_tokens + 1)).astype(np.int32)


def _entries(
    rows: np.ndarray,
    columns: np.ndarray,
    values: np.ndarray,
    threshold: Tensor,
    bandwidth: float,
    cut: _Cut | None,
    shape: tuple[int, int],
) -> SparseActs:
    """Those candidates that are entries, and the largest of a `cut`."""
    gates = threshold.numpy().take(columns)
    keep = active = values > gates
    if bandwidth > 0:
        keep = active | (np.abs(values - gates) < bandwidth / 2)
        values = np.where(active, values, 0)
    if not keep.all():
        rows, columns, values = rows[keep], columns[keep], values[keep]
    row_offsets = _row_offsets(rows, shape[0])
    if cut is not None:
        whole = cut.n_rows < shape[0]
        bounds = row_offsets[[0, -1]] if whole else row_offsets
        largest = largest_of_rows(np.zeros_like(rows) if whole else rows, values, bounds, cut.k)
        if largest is not None:
            rows, columns, values = rows[largest], columns[largest], values[largest]
            row_offsets = _row_offsets(rows, shape[0])
    return SparseActs(torch.from_numpy(row_offsets), torch.from_numpy(columns), torch.from_numpy(values), shape)


def topk_keep(acts: Tensor, k: int) -> Tensor:
    """`reference.topk_keep` for activations `[n, S]` >= 0, without a full sort."""
    if k >= acts.shape[1]:
        return torch.ones_like(acts, dtype=torch.bool)
    kth = torch.topk(acts, k, dim=1).values[:, -1:].clamp_min(0)
    above, tied = acts > kth, acts == kth
    room = k - above.sum(1, keepdim=True)
    return ((acts > 0).sum(1, keepdim=True) <= k) | above | (tied & (tied.cumsum(1) <= room))
