"""The entries by feature, and sums over the entries of each feature: what a weight's gradient is made of.

    sums[j] = sum over the entries e of feature j of  weight_e * vector[token_e]

Letters: `B` tokens, `D` the length of a vector, `S` d_sae. A stable sort of the entries by feature makes the tokens of a
feature a contiguous, ascending list. Traffic: one vector per entry, one write of each sum.

Numerics: cast to fp32 after loading, accumulated in fp32 in a fixed order: deterministic, no atomics. Sums are stored in the
dtype of their tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import launch_config, on_device
from fastsae_kernels.gpu.tiles import gather_sum
from fastsae_kernels.types import SparseActs


class FeatureOrder(NamedTuple):
    """Entries by feature, then token."""

    offsets: Tensor  # [S + 1] int64; feature j owns order[offsets[j]:offsets[j + 1]]
    order: Tensor  # [nnz] int64, padding last
    tokens: Tensor | None  # [nnz] int64, token of each entry before ordering; None: entry // row_length
    row_length: int

    @property
    def device(self) -> torch.device:
        """Where the entries lie."""
        return self.order.device


def feature_order(acts: SparseActs, row_length: int | None = None) -> FeatureOrder:
    """Sort the entries by feature on the device; padding goes behind the last feature.

    Args:
        acts: The entries.
        row_length: The length of every row, where all have the same; it saves a table of tokens.
    """
    d_sae = acts.shape[1]
    features = acts.indices
    if acts.row_counts is not None:
        positions = torch.arange(features.numel(), device=acts.device, dtype=torch.int32)
        ends = (acts.row_offsets[:-1] + acts.row_counts).int()
        features = features.masked_fill(positions >= ends[_tokens(acts, positions)], d_sae)
        del positions
    features, order = torch.sort(features, stable=True)
    bounds = torch.arange(d_sae + 1, device=acts.device, dtype=features.dtype)
    offsets = torch.searchsorted(features, bounds)
    del features
    return FeatureOrder(offsets, order, acts.row_ids() if row_length is None else None, row_length or 1)


def _tokens(acts: SparseActs, positions: Tensor) -> Tensor:
    """The token of each entry, int32."""
    return torch.searchsorted(acts.row_offsets[1:].int(), positions, right=True, out_int32=True)


@triton.jit
def token_of(entry, tokens_ptr, row_length, mask):
    """The token of each entry, int64."""
    if tokens_ptr is not None:
        return tl.load(tokens_ptr + entry, mask=mask, other=0)
    else:
        return (entry.to(tl.int32) // row_length).to(tl.int64)


@triton.jit
def feature_sum(
    start,  # of the feature's entries
    count,
    order_ptr,  # [nnz] int64: entries by feature, then token
    tokens_ptr,  # [nnz] int64: token of each entry; None: entry // row_length
    weights_ptr,  # [nnz]
    vectors_ptr,  # [B, D]
    row_length,
    stride_vb,
    stride_vd,
    offs_d,
    depth,  # D
    BLOCK_E: tl.constexpr,  # entries gathered at a time
    BLOCK_D: tl.constexpr,
):
    """`[BLOCK_D]` fp32: the sum of weight * vector over a feature's entries, at some columns."""
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(0, count, BLOCK_E):
        offs_e = first + tl.arange(0, BLOCK_E)
        mask_e = offs_e < count
        entry = tl.load(order_ptr + start + offs_e, mask=mask_e, other=0)
        token = token_of(entry, tokens_ptr, row_length, mask_e)
        weight = tl.load(weights_ptr + entry, mask=mask_e, other=0.0).to(tl.float32)
        acc += gather_sum(weight, vectors_ptr, token, stride_vb, stride_vd, offs_d, depth)
    return acc


@triton.jit
def _feature_sums_kernel(
    # inputs
    feature_offsets_ptr,  # [S + 1] int64
    order_ptr,  # [nnz] int64
    tokens_ptr,  # [nnz] int64 or None
    weights_ptr,  # [nnz]
    vectors_ptr,  # [B, D]
    # output
    sums_ptr,  # [S, D]
    # sizes and strides
    row_length,
    depth,  # D
    stride_vb,
    stride_vd,
    stride_os,
    stride_od,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (j, i) owns columns i * BLOCK_D .. of feature j's sum."""
    feature = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    start = tl.load(feature_offsets_ptr + feature)
    count = (tl.load(feature_offsets_ptr + feature + 1) - start).to(tl.int32)
    acc = feature_sum(
        start, count, order_ptr, tokens_ptr, weights_ptr, vectors_ptr, row_length, stride_vb, stride_vd, offs_d, depth,
        BLOCK_E, BLOCK_D,
    )  # fmt: skip
    out_ptrs = sums_ptr + feature * stride_os + offs_d * stride_od
    tl.store(out_ptrs, acc.to(sums_ptr.dtype.element_ty), mask=offs_d < depth)


@on_device
def feature_sums(by_feature: FeatureOrder, weights: Tensor, vectors: Tensor, sums: Tensor) -> None:
    """The module's sums, written over `sums`.

    Args:
        by_feature: The entries by feature.
        weights: `[nnz]`, before ordering.
        vectors: `[N, D]`, any strides.
        sums: `[d_sae, D]`, any strides.
    """
    d_sae, depth = sums.shape
    config = launch_config("feature_sums", vectors)
    _feature_sums_kernel[(d_sae, triton.cdiv(depth, config["BLOCK_D"]))](
        feature_offsets_ptr=by_feature.offsets,
        order_ptr=by_feature.order,
        tokens_ptr=by_feature.tokens,
        weights_ptr=weights.contiguous(),
        vectors_ptr=vectors,
        sums_ptr=sums,
        row_length=by_feature.row_length,
        depth=depth,
        stride_vb=vectors.stride(0),
        stride_vd=vectors.stride(1),
        stride_os=sums.stride(0),
        stride_od=sums.stride(1),
        **config,
    )
