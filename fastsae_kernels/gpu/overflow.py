"""Rows with more entries than their span holds, computed exactly on the device, without a synchronisation.

Such a row has no list of entries (`topk.sort_rows` empties it), so every kernel here recomputes it, tile by tile:

    hidden_pre = x[rows] @ W_enc[:, block] + b_enc ;  grad_acts = grad_out[rows] @ W_dec[block].T
    rows' pass:      sum over feature blocks of  acts @ W_dec[block]  or  grad_hidden_pre @ W_enc[:, block].T
                     less the target, with the sum of squares of what is left, where one is given
    features' pass:  sum over overflowing rows of  acts.T @ grad_out[rows]  and  grad_hidden_pre.T @ x[rows]

The kernels are launched in every step and leave at once where no row overflowed. Letters: `B` tokens, `R` overflowing
rows, `D` d_in or d_out, `S` d_sae. With top-k, a row whose active entries exceed `k` was resolved before
(`overflow_topk.resolve_overflow_topk`); what is left keeps everything.

This is the safety net, not the fast path: a program owns a block of rows (or features) and of columns and recomputes
`hidden_pre` for each column block. With few rows the features are split over programs, whose partial sums a second kernel
adds in a fixed order. Accumulated in fp32 without atomics on floats: deterministic. The tile of activations is cast to
the weights' dtype for the product, as in a dense step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import launch_config
from fastsae_kernels.gpu.tiles import gate, gate_gradients, penalty_terms, tile_product
from fastsae_kernels.spec import AutoencodeSpec

# programs that share the features when few rows overflow; bounds the scratch to MAX_SPLITS x BLOCK_B x d_out
MAX_SPLITS = 64


class Overflow(NamedTuple):
    """Which rows overflowed, on the device."""

    rows: Tensor  # [N] int64: the overflowing rows first
    n_rows: Tensor  # [1] int32: how many they are


@triton.jit
def _splits(n_rows, BLOCK_B: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Programs per row block: many when few rows overflowed, at least one."""
    return tl.maximum(MAX_SPLITS // tl.maximum(tl.cdiv(n_rows, BLOCK_B), 1), 1)


@triton.jit
def _overflow_rows_kernel(
    # inputs
    x_ptr,  # [B, D]
    W_enc_ptr,  # [D, S]
    b_enc_ptr,  # [S]
    threshold_ptr,  # [S] fp32
    scale_ptr,  # [S] fp32 or None
    rows_ptr,  # [B] int64
    n_rows_ptr,  # [1] int32
    W_out_ptr,  # [S, D']: W_dec forward, W_enc.T for grad_x
    target_ptr,  # [B, D'] or None, forward
    # inputs of grad_x, None forward
    grad_out_ptr,  # [B, D_out]
    W_dec_ptr,  # [S, D_out]
    grad_penalty_ptr,  # [B] fp32
    row_scale_ptr,  # [B] fp32 or None: factor of grad_out
    # outputs
    partial_ptr,  # [MAX_SPLITS, BLOCK_B, D'] fp32
    partial_penalty_ptr,  # [MAX_SPLITS, BLOCK_B] fp32, forward
    squares_ptr,  # [B, D' / BLOCK_O] fp32 by place in rows, with a target
    penalty_ptr,  # [B] fp32, forward
    l0_ptr,  # [B] int64, added to, forward
    feature_counts_ptr,  # [S] int64, added to, forward
    out_ptr,  # [B, D']: sae_out (its residual with a target) or grad_x
    b_out_ptr,  # [D'] or None: b_dec forward
    # scalars and sizes
    half_bandwidth,
    inv_bandwidth,
    tanh_scale,
    d_in,
    d_sae,
    d_dec,  # D_out
    d_out,  # D'
    # strides
    stride_xb,
    stride_xd,
    stride_wd,
    stride_ws,
    stride_os,
    stride_od,
    stride_gb,
    stride_gd,
    stride_ds,
    stride_dd,
    stride_penalty,
    stride_scale,
    stride_tb,
    stride_td,
    GRAD: tl.constexpr,  # False: sae_out and statistics; True: grad_x
    PENALTY: tl.constexpr,
    STE_TO_INPUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Program (w, i) owns columns i * BLOCK_O .. of row block w // splits, over the features of split w % splits."""
    n_rows = tl.load(n_rows_ptr)
    n_splits = _splits(n_rows, BLOCK_B, MAX_SPLITS)
    work = tl.program_id(0)
    pid_o = tl.program_id(1)
    if work >= tl.cdiv(n_rows, BLOCK_B) * n_splits:
        return
    offs_r = work // n_splits * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_r = offs_r < n_rows
    rows = tl.load(rows_ptr + offs_r % n_rows)
    offs_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O).to(tl.int64)
    mask_o = offs_o < d_out

    blocks = tl.cdiv(tl.cdiv(d_sae, BLOCK_S), n_splits)
    first = work % n_splits * blocks * BLOCK_S
    acc = tl.zeros((BLOCK_B, BLOCK_O), dtype=tl.float32)
    penalty = tl.zeros((BLOCK_B,), dtype=tl.float32)
    l0 = tl.zeros((BLOCK_B,), dtype=tl.int32)
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + rows * stride_scale)[:, None]
    for start in range(first, tl.minimum(first + blocks * BLOCK_S, d_sae), BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        columns = offs_s % d_sae
        inside = mask_r[:, None] & (offs_s < d_sae)[None, :]
        hidden_pre = tile_product(
            x_ptr, rows, stride_xb, stride_xd, W_enc_ptr, columns, stride_wd, stride_ws, d_in,
            BLOCK_B, BLOCK_S, BLOCK_D, EVEN_D,
        )  # fmt: skip
        hidden_pre += tl.load(b_enc_ptr + columns).to(tl.float32)[None, :]
        threshold = tl.load(threshold_ptr + columns)[None, :]
        active, window = gate(hidden_pre, threshold, half_bandwidth)
        active = active & inside
        tile = tl.where(active | ((hidden_pre != hidden_pre) & inside), hidden_pre, 0.0)
        scale = tl.full((1, BLOCK_S), 1.0, tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + columns).to(tl.float32)[None, :]
        if GRAD:
            grad_acts = tile_product(
                grad_out_ptr, rows, stride_gb, stride_gd, W_dec_ptr, columns, stride_dd, stride_ds, d_dec,
                BLOCK_B, BLOCK_S, BLOCK_D, False,
            )  # fmt: skip
            if row_scale_ptr is not None:
                grad_acts *= row_scale
            g = tl.load(grad_penalty_ptr + rows * stride_penalty)[:, None]
            tile, _, _ = gate_gradients(
                tile, active, window & inside, grad_acts, g, threshold, scale, inv_bandwidth, tanh_scale,
                PENALTY, STE_TO_INPUT,
            )  # fmt: skip
        elif pid_o == 0:
            penalty += tl.sum(penalty_terms(tile, active, scale, tanh_scale, PENALTY), 1)
            l0 += tl.sum(active.to(tl.int32), 1)
            firings = tl.sum(active.to(tl.int32), 0)
            tl.atomic_add(feature_counts_ptr + columns, firings, mask=firings > 0, sem="relaxed")
        w_ptrs = W_out_ptr + columns.to(tl.int64)[:, None] * stride_os + offs_o[None, :] * stride_od
        w = tl.load(w_ptrs, mask=(offs_s < d_sae)[:, None] & mask_o[None, :], other=0.0)
        acc = tl.dot(tile.to(w.dtype), w, acc, input_precision="ieee")

    if not GRAD:  # noqa: SIM102 a compile-time branch must stand alone
        if pid_o == 0:
            if n_splits == 1:
                tl.store(penalty_ptr + rows, penalty, mask=mask_r)
            else:
                tl.store(partial_penalty_ptr + work * BLOCK_B + tl.arange(0, BLOCK_B), penalty)
            tl.atomic_add(l0_ptr + rows, l0, mask=mask_r, sem="relaxed")
    if n_splits == 1:
        if b_out_ptr is not None:
            acc += tl.load(b_out_ptr + offs_o, mask=mask_o, other=0.0).to(tl.float32)[None, :]
        if target_ptr is not None:
            target_ptrs = target_ptr + rows[:, None] * stride_tb + offs_o[None, :] * stride_td
            acc -= tl.load(target_ptrs, mask=mask_o[None, :], other=0.0).to(tl.float32)
            square = tl.sum(tl.where(mask_o[None, :], acc * acc, 0.0), 1)
            tl.store(squares_ptr + offs_r.to(tl.int64) * tl.num_programs(1) + pid_o, square, mask=mask_r)
        out_ptrs = out_ptr + rows[:, None] * d_out + offs_o[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_r[:, None] & mask_o[None, :])
    else:
        slots = (work * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
        tl.store(partial_ptr + slots[:, None] * d_out + offs_o[None, :], acc, mask=mask_o[None, :])


@triton.jit
def _reduce_rows_kernel(
    # inputs
    partial_ptr,  # [MAX_SPLITS, BLOCK_B, D']
    partial_penalty_ptr,  # [MAX_SPLITS, BLOCK_B] or None
    rows_ptr,  # [B] int64
    n_rows_ptr,  # [1] int32
    b_out_ptr,  # [D'] or None
    target_ptr,  # [B, D'] or None
    # outputs
    out_ptr,  # [B, D']
    penalty_ptr,  # [B] fp32 or None
    squares_ptr,  # [B, D' / BLOCK_O] fp32 by place in rows, with a target
    # size and strides
    d_out,
    stride_tb,
    stride_td,
    MAX_SPLITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Program (r, i) adds the partial sums of overflowing row r, columns i * BLOCK_O .., in the order of the splits."""
    n_rows = tl.load(n_rows_ptr)
    n_splits = _splits(n_rows, BLOCK_B, MAX_SPLITS)
    slot = tl.program_id(0)
    if slot >= n_rows or n_splits == 1:
        return
    row = tl.load(rows_ptr + slot)
    first = slot // BLOCK_B * n_splits
    lane = slot % BLOCK_B
    if penalty_ptr is not None:  # noqa: SIM102 a compile-time branch must stand alone
        if tl.program_id(1) == 0:
            penalty = 0.0
            for split in range(0, n_splits):
                penalty += tl.load(partial_penalty_ptr + (first + split) * BLOCK_B + lane)
            tl.store(penalty_ptr + row, penalty)
    offs_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O).to(tl.int64)
    mask_o = offs_o < d_out
    acc = tl.zeros((BLOCK_O,), dtype=tl.float32)
    if b_out_ptr is not None:
        acc += tl.load(b_out_ptr + offs_o, mask=mask_o, other=0.0).to(tl.float32)
    for split in range(0, n_splits):
        source = ((first + split) * BLOCK_B + lane).to(tl.int64)
        acc += tl.load(partial_ptr + source * d_out + offs_o, mask=mask_o, other=0.0)
    if target_ptr is not None:
        acc -= tl.load(target_ptr + row * stride_tb + offs_o * stride_td, mask=mask_o, other=0.0).to(tl.float32)
        tl.store(squares_ptr + slot.to(tl.int64) * tl.num_programs(1) + tl.program_id(1), tl.sum(acc * acc, 0))
    tl.store(out_ptr + row * d_out + offs_o, acc.to(out_ptr.dtype.element_ty), mask=mask_o)


@triton.jit
def _sum_squares_kernel(
    # inputs
    squares_ptr,  # [B, columns] fp32 by place in rows
    rows_ptr,  # [B] int64
    n_rows_ptr,  # [1] int32
    # output
    squared_error_ptr,  # [B] fp32
    # size
    columns,
    BLOCK_B: tl.constexpr,
):
    """Program owns BLOCK_B overflowing rows and adds their columns' squares, in order."""
    n_rows = tl.load(n_rows_ptr)
    first = tl.program_id(0) * BLOCK_B
    if first >= n_rows:
        return
    offs_r = first + tl.arange(0, BLOCK_B).to(tl.int64)
    mask_r = offs_r < n_rows
    total = tl.zeros((BLOCK_B,), dtype=tl.float32)
    for column in range(0, columns):
        total += tl.load(squares_ptr + offs_r * columns + column, mask=mask_r, other=0.0)
    tl.store(squared_error_ptr + tl.load(rows_ptr + offs_r, mask=mask_r, other=0), total, mask=mask_r)


def overflow_rows(
    overflow: Overflow,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    feature_scale: Tensor | None,
    spec: AutoencodeSpec,
    out: Tensor,
    W_out: Tensor,
    *,
    b_out: Tensor | None = None,
    stats: tuple[Tensor, Tensor, Tensor] | None = None,
    target: Tensor | None = None,
    squared_error: Tensor | None = None,
    grads: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None,
) -> None:
    """Overwrite the overflowing rows of `out`: with sae_out (and fill `stats`), or with grad_x where `grads` is given.

    Args:
        overflow: Which rows.
        x, W_enc, b_enc, threshold, feature_scale, spec: As in `autoencode_forward`.
        out: `[N, D']`, contiguous: sae_out (the residual, with a target) or grad_x.
        W_out: `[S, D']`: W_dec or W_enc.T.
        b_out: `[D']`: b_dec, or None.
        stats: `(penalty, l0, feature_counts)` of the other rows; written and added to. Forward only.
        target: `[N, D']`, any strides, or None. Forward only.
        squared_error: `[N]` fp32, that of the other rows; written, with a target. Forward only.
        grads: `(grad_out, W_dec, grad_penalty, row_scale)`. Backward only.
    """
    n_tokens, d_in = x.shape
    d_sae, d_out = W_out.shape
    if n_tokens == 0:
        return
    penalty, l0, feature_counts = stats or (None, None, None)
    grad_out, W_dec, grad_penalty, row_scale = grads or (None, None, None, None)
    config = launch_config("overflow_rows", x)
    row_blocks = triton.cdiv(n_tokens, config["BLOCK_B"])
    columns = triton.cdiv(d_out, config["BLOCK_O"])
    partial = x.new_empty(MAX_SPLITS, config["BLOCK_B"], d_out, dtype=torch.float32)
    partial_penalty = None if stats is None else x.new_empty(MAX_SPLITS, config["BLOCK_B"], dtype=torch.float32)
    squares = None if target is None else x.new_empty(n_tokens, columns, dtype=torch.float32)
    target_strides = (0, 0) if target is None else target.stride()
    _overflow_rows_kernel[(max(MAX_SPLITS, row_blocks), columns)](
        x_ptr=x,
        W_enc_ptr=W_enc,
        b_enc_ptr=b_enc,
        threshold_ptr=threshold,
        scale_ptr=feature_scale,
        rows_ptr=overflow.rows,
        n_rows_ptr=overflow.n_rows,
        W_out_ptr=W_out,
        target_ptr=target,
        grad_out_ptr=grad_out,
        W_dec_ptr=W_dec,
        grad_penalty_ptr=grad_penalty,
        row_scale_ptr=row_scale,
        partial_ptr=partial,
        partial_penalty_ptr=partial_penalty,
        squares_ptr=squares,
        penalty_ptr=penalty,
        l0_ptr=l0,
        feature_counts_ptr=feature_counts,
        out_ptr=out,
        b_out_ptr=b_out,
        half_bandwidth=spec.bandwidth / 2,
        inv_bandwidth=1 / spec.bandwidth if spec.bandwidth > 0 else 0.0,
        tanh_scale=spec.tanh_scale,
        d_in=d_in,
        d_sae=d_sae,
        d_dec=d_out if W_dec is None else W_dec.shape[1],
        d_out=d_out,
        stride_xb=x.stride(0),
        stride_xd=x.stride(1),
        stride_wd=W_enc.stride(0),
        stride_ws=W_enc.stride(1),
        stride_os=W_out.stride(0),
        stride_od=W_out.stride(1),
        stride_gb=0 if grad_out is None else grad_out.stride(0),
        stride_gd=0 if grad_out is None else grad_out.stride(1),
        stride_ds=0 if W_dec is None else W_dec.stride(0),
        stride_dd=0 if W_dec is None else W_dec.stride(1),
        stride_penalty=0 if grad_penalty is None else grad_penalty.stride(0),
        stride_scale=0 if row_scale is None else row_scale.stride(0),
        stride_tb=target_strides[0],
        stride_td=target_strides[1],
        GRAD=grads is not None,
        PENALTY=spec.penalty,
        STE_TO_INPUT=spec.ste_to_input,
        EVEN_D=d_in % config["BLOCK_D"] == 0,
        MAX_SPLITS=MAX_SPLITS,
        **config,
    )
    # more overflowing rows than these leave one split each, and nothing to add
    split_rows = min(n_tokens, MAX_SPLITS // 2 * config["BLOCK_B"])
    _reduce_rows_kernel[(split_rows, columns)](
        partial_ptr=partial,
        partial_penalty_ptr=partial_penalty,
        rows_ptr=overflow.rows,
        n_rows_ptr=overflow.n_rows,
        b_out_ptr=b_out,
        target_ptr=target,
        out_ptr=out,
        penalty_ptr=penalty,
        squares_ptr=squares,
        d_out=d_out,
        stride_tb=target_strides[0],
        stride_td=target_strides[1],
        MAX_SPLITS=MAX_SPLITS,
        BLOCK_B=config["BLOCK_B"],
        BLOCK_O=config["BLOCK_O"],
    )
    if squares is not None:
        _sum_squares_kernel[(row_blocks,)](
            squares_ptr=squares,
            rows_ptr=overflow.rows,
            n_rows_ptr=overflow.n_rows,
            squared_error_ptr=squared_error,
            columns=columns,
            BLOCK_B=config["BLOCK_B"],
        )
