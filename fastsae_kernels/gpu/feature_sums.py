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

from fastsae_kernels.gpu.config import LaunchConfig, launch_config, on_device
from fastsae_kernels.gpu.tiles import (
    MAX_DEPTH,
    Matrix,
    columns_of_pieces,
    matrix_of,
    pieces_of,
    read_row,
    write_row,
)
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
        # neither is negative, and a division of unsigned numbers takes fewer instructions
        return (entry.to(tl.uint32) // tl.full((), row_length, tl.uint32)).to(tl.int64)


class Entries(NamedTuple):
    """What each feature sums; a kernel sees pointers in place of tensors."""

    offsets: Tensor  # [S + 1] int64
    order: Tensor  # [nnz] int64: entries by feature, then token
    tokens: Tensor | None  # [nnz] int64: token of each entry; None: entry // row_length
    weights: Tensor  # [nnz]
    vectors: Tensor  # [B, D]
    row_length: int
    depth: int  # D
    stride_vb: int
    stride_vd: int


def entries_of(by_feature: FeatureOrder, weights: Tensor, vectors: Tensor) -> Entries:
    """The entries by feature with their weights (`[nnz]`, before ordering) and what they weigh (`[N, D]`)."""
    return Entries(
        *by_feature[:3], weights.contiguous(), vectors, by_feature.row_length, vectors.shape[1], *vectors.stride()
    )


def row_config(kernel: str, vectors: Tensor) -> LaunchConfig:
    """The launch parameters of a kernel whose programs hold a whole row, or `MAX_DEPTH` of its columns, in two pieces."""
    depth = vectors.shape[1]
    config = dict(launch_config(kernel, vectors, odd=depth % 16 != 0))
    block_1, block_2 = pieces_of(min(depth, MAX_DEPTH))
    num_warps = triton.next_power_of_2(triton.cdiv(block_1 + block_2, config.pop("D_PER_WARP")))
    return config | {"BLOCK_1": block_1, "BLOCK_2": block_2, "num_warps": num_warps}


@triton.jit
def feature_sum(entries, start, count, columns_1, columns_2, BLOCK_E: tl.constexpr):
    """The sum of weight * vector over a feature's entries, fp32, at both pieces of a row."""
    sum_1 = tl.zeros_like(columns_1).to(tl.float32)
    sum_2 = tl.zeros_like(columns_2).to(tl.float32)
    for first in range(0, count, BLOCK_E):
        # one by one, an entry's weight and address are numbers of the whole program; its gathers are under way together
        for i in tl.static_range(BLOCK_E):
            exists = first + i < count
            entry = tl.load(entries.order + start + first + i, mask=exists, other=0)
            token = token_of(entry, entries.tokens, entries.row_length, exists)
            weight = tl.load(entries.weights + entry, mask=exists, other=0.0).to(tl.float32)
            vectors = Matrix(entries.vectors, entries.stride_vb, entries.stride_vd)
            vector_1, vector_2 = read_row(
                vectors, token, columns_1, columns_2, tl.where(weight != 0.0, entries.depth, 0)
            )
            sum_1 += weight * vector_1
            sum_2 += weight * vector_2
    return sum_1, sum_2


@triton.jit
def _feature_sums_kernel(
    entries,  # Entries
    sums,  # Matrix [S, D], output
    BLOCK_E: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
):
    """Program (j, i) owns the i-th part of feature j's sum."""
    feature = tl.program_id(0).to(tl.int64)
    columns_1, columns_2 = columns_of_pieces(BLOCK_1, BLOCK_2)
    columns_1 += tl.program_id(1) * (BLOCK_1 + BLOCK_2)
    columns_2 += tl.program_id(1) * (BLOCK_1 + BLOCK_2)
    start = tl.load(entries.offsets + feature)
    count = (tl.load(entries.offsets + feature + 1) - start).to(tl.int32)
    sum_1, sum_2 = feature_sum(entries, start, count, columns_1, columns_2, BLOCK_E)
    write_row(sums, feature, columns_1, columns_2, entries.depth, sum_1, sum_2)


@on_device
def feature_sums(by_feature: FeatureOrder, weights: Tensor, vectors: Tensor, sums: Tensor) -> None:
    """The module's sums, written over `sums`.

    Args:
        by_feature: The entries by feature.
        weights: `[nnz]`, before ordering.
        vectors: `[N, D]`, any strides.
        sums: `[d_sae, D]`, any strides.
    """
    (d_sae, depth), config = sums.shape, row_config("feature_sums", vectors)
    _feature_sums_kernel[(d_sae, triton.cdiv(depth, config["BLOCK_1"] + config["BLOCK_2"]))](
        entries=entries_of(by_feature, weights, vectors), sums=matrix_of(sums), **config
    )
