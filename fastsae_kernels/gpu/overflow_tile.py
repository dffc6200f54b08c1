"""One tile of rows that overflowed: its pre-activations and gradients, and its product with all columns of a matrix.

    hidden_pre = x[rows] @ W_enc[:, tile] + b_enc ;  grad_acts = grad_out[rows] @ W_dec[tile].T

Every kernel of `overflow` and `overflow_topk` computes its tiles here, from arguments of one kind. Letters: `B` tokens, `D`
d_in or d_out, `S` d_sae.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.tiles import gate, gate_gradients, penalty_terms, tile_product
from fastsae_kernels.types import AutoencodeSpec, OutputGrads, Overflow


class Operands(NamedTuple):
    """What a tile of pre-activations is computed from; a kernel sees pointers in place of tensors."""

    x: Tensor  # [B, D]
    W_enc: Tensor  # [D, S]
    b_enc: Tensor  # [S]
    threshold: Tensor  # [S] fp32
    scale: Tensor | None  # [S] fp32
    rows: Tensor  # [B] int64
    n_rows: Tensor  # [1] int32
    d_in: int
    d_sae: int
    stride_xb: int
    stride_xd: int
    stride_wd: int
    stride_ws: int
    half_bandwidth: float
    tanh_scale: float


class Upstream(NamedTuple):
    """What a tile of gradients is computed from, besides the operands."""

    grad_out: Tensor  # [B, D_out]
    W_dec: Tensor  # [S, D_out]
    grad_penalty: Tensor  # [B] fp32
    row_scale: Tensor | None  # [B] fp32: factor of grad_out
    d_out: int
    stride_gb: int
    stride_gd: int
    stride_ds: int
    stride_dd: int
    stride_penalty: int
    stride_scale: int
    inv_bandwidth: float


def operands_of(
    overflow: Overflow,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    feature_scale: Tensor | None = None,
    spec: AutoencodeSpec | None = None,
) -> Operands:
    """The operands of a pass; without a spec those of its active entries alone."""
    half_bandwidth, tanh_scale = (0.0, 1.0) if spec is None else (spec.bandwidth / 2, spec.tanh_scale)
    return Operands(
        x, W_enc, b_enc, threshold, feature_scale, overflow.rows, overflow.n_rows, W_enc.shape[0], W_enc.shape[1],
        x.stride(0), x.stride(1), W_enc.stride(0), W_enc.stride(1), half_bandwidth, tanh_scale,
    )  # fmt: skip


def upstream_of(grads: OutputGrads, W_dec: Tensor, spec: AutoencodeSpec) -> Upstream:
    """What comes back into a pass."""
    grad_out, row_scale, grad_penalty = grads
    return Upstream(
        grad_out, W_dec, grad_penalty, row_scale, W_dec.shape[1],
        grad_out.stride(0), grad_out.stride(1), W_dec.stride(0), W_dec.stride(1),
        grad_penalty.stride(0), 0 if row_scale is None else row_scale.stride(0),
        1 / spec.bandwidth if spec.bandwidth > 0 else 0.0,
    )  # fmt: skip


@triton.jit
def gated_tile(
    operands, upstream, rows, mask_r, offs_s, BACKWARD: tl.constexpr, PENALTY: tl.constexpr, STE_TO_INPUT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """`(acts, active, grad_hidden_pre, threshold_terms, other)` of some rows and features, 0 outside of them.

    `other` is each entry's share of the penalty, or backward that of the scale's gradient; `acts` are then weighted by the
    row's scale. Forward `upstream` is None and there are no gradients: acts stand in their place.
    """
    columns = offs_s % operands.d_sae
    inside = mask_r[:, None] & (offs_s < operands.d_sae)[None, :]
    hidden_pre = tile_product(
        operands.x, rows, operands.stride_xb, operands.stride_xd,
        operands.W_enc, columns, operands.stride_wd, operands.stride_ws, operands.d_in,
        BLOCK_B, BLOCK_S, BLOCK_D, EVEN_D,
    )  # fmt: skip
    hidden_pre += tl.load(operands.b_enc + columns).to(tl.float32)[None, :]
    threshold = tl.load(operands.threshold + columns)[None, :]
    active, window = gate(hidden_pre, threshold, operands.half_bandwidth)
    active = active & inside
    acts = tl.where(active | ((hidden_pre != hidden_pre) & inside), hidden_pre, 0.0)
    scale = tl.full((1, BLOCK_S), 1.0, tl.float32)
    if operands.scale is not None:
        scale = tl.load(operands.scale + columns).to(tl.float32)[None, :]
    # a flag, for Triton 3.6 cannot compare a tuple with None where a field of it is None
    if not BACKWARD:
        return acts, active, acts, acts, penalty_terms(acts, active, scale, operands.tanh_scale, PENALTY)
    else:
        grad_acts = tile_product(
            upstream.grad_out, rows, upstream.stride_gb, upstream.stride_gd,
            upstream.W_dec, columns, upstream.stride_dd, upstream.stride_ds, upstream.d_out,
            BLOCK_B, BLOCK_S, BLOCK_D, EVEN_D,
        )  # fmt: skip
        weighted = acts
        if upstream.row_scale is not None:
            row_scale = tl.load(upstream.row_scale + rows * upstream.stride_scale)[:, None]
            grad_acts *= row_scale
            weighted *= row_scale
        grad_penalty = tl.load(upstream.grad_penalty + rows * upstream.stride_penalty)[:, None]
        grad_hidden_pre, threshold_terms, scale_terms = gate_gradients(
            acts, active, window & inside, grad_acts, grad_penalty, threshold, scale,
            upstream.inv_bandwidth, operands.tanh_scale, PENALTY, STE_TO_INPUT,
        )  # fmt: skip
        return weighted, active, grad_hidden_pre, threshold_terms, scale_terms


@triton.jit
def add_product(
    tile,  # [M, K]
    matrix_ptr,  # [., D]
    index,  # [K] rows of the matrix
    mask_k,  # [K]
    stride_k,
    stride_d,
    depth,  # D
    sum_ptr,  # [M, D] fp32 scratch: the sum of the tiles before
    sum_depth,  # D, or 0 where there is none before
    total_ptr,  # [., D] contiguous, to which the sum of all tiles is added; None: it stays in the scratch
    total_index,  # [M] rows of the total
    mask_m,  # [M]
    total_depth,  # D where this is the last tile, else 0
    BLOCK_O: tl.constexpr,
):
    """Add `tile @ matrix[index]` to what came before, block by block of its columns."""
    sum_rows = tl.arange(0, tile.shape[0]).to(tl.int64)[:, None] * depth
    matrix_rows = matrix_ptr + index.to(tl.int64)[:, None] * stride_k
    for start in range(0, depth, BLOCK_O):
        offs = (start + tl.arange(0, BLOCK_O).to(tl.int64))[None, :]
        matrix = tl.load(matrix_rows + offs * stride_d, mask=mask_k[:, None] & (offs < depth), other=0.0)
        acc = tl.load(sum_ptr + sum_rows + offs, mask=offs < sum_depth, other=0.0)
        acc = tl.dot(tile.to(matrix.dtype), matrix, acc, input_precision="ieee")
        tl.store(sum_ptr + sum_rows + offs, acc, mask=(offs < depth) & (offs >= total_depth))
        if total_ptr is not None:
            totals = total_ptr + total_index.to(tl.int64)[:, None] * depth + offs
            mask = mask_m[:, None] & (offs < total_depth)
            acc += tl.load(totals, mask=mask, other=0.0).to(tl.float32)
            tl.store(totals, acc.to(total_ptr.dtype.element_ty), mask=mask)
    # the next tile reads what other threads wrote
    tl.debug_barrier()
