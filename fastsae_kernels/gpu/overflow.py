"""Rows with more entries than their capacity, computed exactly on the device, without a synchronisation.

Such a row has no list of entries (`topk.sort_rows` empties it), so the kernels here compute it anew, tile by tile:

    hidden_pre = x[rows] @ W_enc[:, tile] + b_enc ;  grad_acts = grad_out[rows] @ W_dec[tile].T
    rows:      sum over tiles of  acts @ W_dec[tile]  or  grad_hidden_pre @ W_enc[:, tile].T
               less the target, with the sum of squares of what is left, where one is given
    features:  sum over overflowing rows of  acts.T @ grad_out[rows]  and  grad_hidden_pre.T @ x[rows]

The kernels are launched in every step; their few programs leave at once where no row overflowed, and walk over the tiles
where some did. Letters: `B` tokens, `D` d_in or d_out, `S` d_sae. With top-k, a row whose active entries exceed `k` was
resolved before (`overflow_topk.resolve_overflow_topk`); what is left keeps everything.

Each tile is computed once and multiplied with all columns, block by block. What is added over several tiles lies in fp32
in a scratch of the program's own, so its size does not depend on how many rows overflowed. With few rows the features are
split over the programs, and a second kernel adds their sums in a fixed order. No atomics on floats: deterministic. The
tile is cast to the weights' dtype for the product, as in a dense step.

Traffic of few rows: both weight matrices are read once per pass, and the gradients of both are read and written once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import launch_config, tile_config
from fastsae_kernels.gpu.feature_chunks import FeatureGradients
from fastsae_kernels.gpu.overflow_tile import add_product, gated_tile, operands_of, upstream_of
from fastsae_kernels.types import AutoencodeSpec, OutputGrads, Overflow, PassInputs

# how many programs work on rows, each with a scratch; enough to read the weights at a good part of a device's rate
SCRATCH_PROGRAMS = 64
# how many programs work on features while one block holds all rows, which takes no scratch: enough to fill a device
FEATURE_PROGRAMS = 256
FEATURE_SCRATCHES = 16  # how many do where there are more rows: 9 MB where rows have 2 x 2,304 elements


class RowOutputs(NamedTuple):
    """What the tiles of a row are multiplied with, where their sum lies, and what becomes of it."""

    W_out: Tensor  # [S, D']: W_dec forward, W_enc.T for grad_x
    b_out: Tensor | None  # [D']: b_dec forward
    target: Tensor | None  # [B, D'], forward
    sums: Tensor  # [programs, BLOCK_B, D'] fp32 scratch
    penalty_sums: Tensor | None  # [programs, BLOCK_B] fp32 scratch, forward
    out: Tensor  # [B, D'] contiguous: sae_out (its residual with a target) or grad_x
    penalty: Tensor | None  # [B] fp32, forward
    squared_error: Tensor | None  # [B] fp32, with a target
    d_out: int  # D'
    stride_os: int
    stride_od: int
    stride_tb: int
    stride_td: int


@triton.jit
def _add_to(ptr, offs, mask, share):
    # masked, for past the last feature lies what another program writes
    tl.store(ptr + offs, share + tl.load(ptr + offs, mask=mask, other=0.0), mask=mask)


@triton.jit
def _splits(n_rows, d_sae, PROGRAMS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr):
    """`(n_splits, tiles)`: into how many splits the features of a block of rows go, and tiles of features in each.

    There are many splits when few rows overflowed, at least one, and none is empty.
    """
    n_tiles = tl.cdiv(d_sae, BLOCK_S)
    tiles = tl.cdiv(n_tiles, tl.maximum(PROGRAMS // tl.maximum(tl.cdiv(n_rows, BLOCK_B), 1), 1))
    return tl.cdiv(n_tiles, tiles), tiles


@triton.jit
def _finish_row(
    outputs, row, first, n_splits, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr
):  # fmt: skip
    """Write a row from the sums of its splits, which lie in every BLOCK_B-th row of the scratch from `first` on."""
    offs_n = tl.arange(0, BLOCK_N)
    if outputs.penalty is not None:
        penalty = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for split in range(0, n_splits, BLOCK_N):
            source = outputs.penalty_sums + first + (split + offs_n) * BLOCK_B
            penalty += tl.load(source, mask=split + offs_n < n_splits, other=0.0)
        tl.store(outputs.penalty + row, tl.sum(penalty, 0))
    square = tl.zeros((BLOCK_O,), dtype=tl.float32)
    for start in range(0, outputs.d_out, BLOCK_O):
        offs_o = start + tl.arange(0, BLOCK_O).to(tl.int64)
        mask_o = offs_o < outputs.d_out
        parts = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
        for split in range(0, n_splits, BLOCK_N):
            source = outputs.sums + (first + (split + offs_n) * BLOCK_B).to(tl.int64)[:, None] * outputs.d_out
            mask = (split + offs_n < n_splits)[:, None] & mask_o[None, :]
            parts += tl.load(source + offs_o[None, :], mask=mask, other=0.0)
        acc = tl.sum(parts, 0)
        if outputs.b_out is not None:
            acc += tl.load(outputs.b_out + offs_o, mask=mask_o, other=0.0).to(tl.float32)
        if outputs.target is not None:
            target_ptrs = outputs.target + row * outputs.stride_tb + offs_o * outputs.stride_td
            acc -= tl.load(target_ptrs, mask=mask_o, other=0.0).to(tl.float32)
            square += acc * acc
        tl.store(outputs.out + row * outputs.d_out + offs_o, acc.to(outputs.out.dtype.element_ty), mask=mask_o)
    if outputs.target is not None:
        tl.store(outputs.squared_error + row, tl.sum(square, 0))


@triton.jit
def _overflow_rows_kernel(
    operands,  # Operands
    upstream,  # Upstream for grad_x, None forward
    outputs,  # RowOutputs
    l0_ptr,  # [B] int64, added to, forward
    feature_counts_ptr,  # [S] int64, added to, forward
    BACKWARD: tl.constexpr,
    PENALTY: tl.constexpr,
    STE_TO_INPUT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    """Program walks over every PROGRAMS-th pair of a block of rows and a split of the features."""
    n_rows = tl.load(operands.n_rows)
    n_splits, tiles = _splits(n_rows, operands.d_sae, PROGRAMS, BLOCK_B, BLOCK_S)
    scratch_row = tl.program_id(0) * BLOCK_B
    sum_ptr = outputs.sums + scratch_row.to(tl.int64) * outputs.d_out
    for item in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_B) * n_splits, PROGRAMS):
        first_row = item // n_splits * BLOCK_B
        offs_r = first_row + tl.arange(0, BLOCK_B)
        mask_r = offs_r < n_rows
        rows = tl.load(operands.rows + offs_r % n_rows)
        penalty = tl.zeros((BLOCK_B,), dtype=tl.float32)
        l0 = tl.zeros((BLOCK_B,), dtype=tl.int32)
        first = item % n_splits * tiles * BLOCK_S
        for start in range(first, tl.minimum(first + tiles * BLOCK_S, operands.d_sae), BLOCK_S):
            offs_s = start + tl.arange(0, BLOCK_S)
            acts, active, grad_hidden_pre, _threshold_terms, penalty_shares = gated_tile(
                operands, upstream, rows, mask_r, offs_s, BACKWARD, PENALTY, STE_TO_INPUT,
                BLOCK_B, BLOCK_S, BLOCK_D, EVEN_D,
            )  # fmt: skip
            if outputs.penalty is not None:
                penalty += tl.sum(penalty_shares, 1)
                l0 += tl.sum(active.to(tl.int32), 1)
                firings = tl.sum(active.to(tl.int32), 0)
                tl.atomic_add(feature_counts_ptr + offs_s, firings, mask=firings > 0, sem="relaxed")
            add_product(
                grad_hidden_pre if BACKWARD else acts, outputs.W_out, offs_s, offs_s < operands.d_sae,
                outputs.stride_os, outputs.stride_od, outputs.d_out, sum_ptr, tl.where(start > first, outputs.d_out, 0),
                None, None, None, 0, BLOCK_O,
            )  # fmt: skip
        if outputs.penalty is not None:
            tl.store(outputs.penalty_sums + scratch_row + tl.arange(0, BLOCK_B), penalty)
            tl.atomic_add(l0_ptr + rows, l0, mask=mask_r, sem="relaxed")
            tl.debug_barrier()
        if n_splits == 1:
            for lane in range(0, tl.minimum(n_rows - first_row, BLOCK_B)):
                row = tl.load(operands.rows + first_row + lane)
                _finish_row(outputs, row, scratch_row + lane, 1, BLOCK_B, 1, BLOCK_O)
            tl.debug_barrier()


@triton.jit
def _finish_rows_kernel(
    operands,  # Operands
    outputs,  # RowOutputs
    PROGRAMS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,  # splits at once
    BLOCK_O: tl.constexpr,
):
    """Program walks over the overflowing rows whose features were split, and adds the sums in the order of the splits."""
    n_rows = tl.load(operands.n_rows)
    n_splits, _tiles = _splits(n_rows, operands.d_sae, PROGRAMS, BLOCK_B, BLOCK_S)
    for place in range(tl.program_id(0), tl.where(n_splits > 1, n_rows, 0), tl.num_programs(0)):
        row = tl.load(operands.rows + place)
        first = place // BLOCK_B * n_splits * BLOCK_B + place % BLOCK_B
        _finish_row(outputs, row, first, n_splits, BLOCK_B, BLOCK_N, BLOCK_O)


@triton.jit
def _overflow_features_kernel(
    operands,  # Operands
    upstream,  # Upstream
    sum_ptr,  # [SCRATCHES, BLOCK_S, D + D_out] fp32 scratch
    # outputs, added to
    grad_W_enc_ptr,  # [S, D] contiguous
    grad_W_dec_ptr,  # [S, D_out] contiguous
    grad_b_enc_ptr,  # [S] fp32
    grad_threshold_ptr,  # [S] fp32
    grad_scale_ptr,  # [S] fp32 or None
    PENALTY: tl.constexpr,
    STE_TO_INPUT: tl.constexpr,
    SCRATCHES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    """Program walks over blocks of BLOCK_S features and adds what the overflowing rows give to their gradients."""
    n_rows = tl.load(operands.n_rows)
    d_in, d_out = operands.d_in, upstream.d_out
    # one block of rows needs no scratch, so every program works
    programs = tl.where(n_rows <= BLOCK_B, tl.num_programs(0), tl.minimum(SCRATCHES, tl.num_programs(0)))
    n_tiles = tl.where((n_rows > 0) & (tl.program_id(0) < programs), tl.cdiv(operands.d_sae, BLOCK_S), 0)
    sum_enc_ptr = sum_ptr + tl.program_id(0).to(tl.int64) * BLOCK_S * (d_in + d_out)
    sum_dec_ptr = sum_enc_ptr + BLOCK_S * d_in
    for tile in range(tl.program_id(0), n_tiles, programs):
        offs_s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        mask_s = offs_s < operands.d_sae
        grad_b_enc = tl.zeros((BLOCK_S,), dtype=tl.float32)
        grad_threshold = tl.zeros((BLOCK_S,), dtype=tl.float32)
        grad_scale = tl.zeros((BLOCK_S,), dtype=tl.float32)
        for first in range(0, n_rows, BLOCK_B):
            offs_r = first + tl.arange(0, BLOCK_B)
            mask_r = offs_r < n_rows
            rows = tl.load(operands.rows + offs_r % n_rows)
            acts, _active, grad_hidden_pre, threshold_terms, scale_terms = gated_tile(
                operands, upstream, rows, mask_r, offs_s, True, PENALTY, STE_TO_INPUT,
                BLOCK_B, BLOCK_S, BLOCK_D, EVEN_D,
            )  # fmt: skip
            is_last = first + BLOCK_B >= n_rows
            add_product(
                tl.trans(grad_hidden_pre), operands.x, rows, mask_r, operands.stride_xb, operands.stride_xd, d_in,
                sum_enc_ptr, tl.where(first > 0, d_in, 0),
                grad_W_enc_ptr, offs_s, mask_s, tl.where(is_last, d_in, 0), BLOCK_O,
            )  # fmt: skip
            add_product(
                tl.trans(acts), upstream.grad_out, rows, mask_r, upstream.stride_gb, upstream.stride_gd, d_out,
                sum_dec_ptr, tl.where(first > 0, d_out, 0),
                grad_W_dec_ptr, offs_s, mask_s, tl.where(is_last, d_out, 0), BLOCK_O,
            )  # fmt: skip
            grad_b_enc += tl.sum(grad_hidden_pre, 0)
            grad_threshold += tl.sum(threshold_terms, 0)
            grad_scale += tl.sum(scale_terms, 0)
        _add_to(grad_b_enc_ptr, offs_s, mask_s, grad_b_enc)
        _add_to(grad_threshold_ptr, offs_s, mask_s, grad_threshold)
        if grad_scale_ptr is not None:
            _add_to(grad_scale_ptr, offs_s, mask_s, grad_scale)


def overflow_rows(
    overflow: Overflow,
    inputs: PassInputs,
    spec: AutoencodeSpec,
    out: Tensor,
    *,
    stats: tuple[Tensor, Tensor, Tensor] | None = None,
    squared_error: Tensor | None = None,
    grads: OutputGrads | None = None,
) -> None:
    """Overwrite the overflowing rows of `out`: with sae_out (and fill `stats`), or with grad_x where `grads` is given.

    Args:
        overflow: Which rows.
        inputs: The tensors of the pass, those over features contiguous.
        spec: The options.
        out: `[N, D']`, contiguous: sae_out (the residual, with a target) or grad_x.
        stats: `(penalty, l0, feature_counts)` of the other rows; written and added to. Forward only.
        squared_error: `[N]` fp32, that of the other rows; written, with a target. Forward only.
        grads: What comes back into the pass. Backward only.
    """
    x, W_enc, _, _, W_dec, *_ = inputs
    if x.shape[0] == 0:
        return
    W_out = W_dec if grads is None else W_enc.t()
    b_out, target = (inputs.b_dec, inputs.target) if grads is None else (None, None)
    upstream = None if grads is None else upstream_of(grads, W_dec, spec)
    penalty, l0, feature_counts = stats or (None, None, None)
    config = tile_config("overflow_rows", x, x.shape[1], *(() if grads is None else (W_dec.shape[1],)))
    operands = operands_of(overflow, *inputs[:4], inputs.feature_scale, spec)
    scratch = x.new_empty(SCRATCH_PROGRAMS, config["BLOCK_B"], W_out.shape[1], dtype=torch.float32)
    penalty_sums = None if stats is None else scratch.new_empty(SCRATCH_PROGRAMS, config["BLOCK_B"])
    outputs = RowOutputs(
        W_out, b_out, target, scratch, penalty_sums, out, penalty, squared_error, W_out.shape[1],
        *W_out.stride(), *((0, 0) if target is None else target.stride()),
    )  # fmt: skip
    _overflow_rows_kernel[(SCRATCH_PROGRAMS,)](
        operands=operands,
        upstream=upstream,
        outputs=outputs,
        l0_ptr=l0,
        feature_counts_ptr=feature_counts,
        BACKWARD=grads is not None,
        PENALTY=spec.penalty,
        STE_TO_INPUT=spec.ste_to_input,
        PROGRAMS=SCRATCH_PROGRAMS,
        **config,
    )
    _finish_rows_kernel[(SCRATCH_PROGRAMS,)](
        operands=operands,
        outputs=outputs,
        PROGRAMS=SCRATCH_PROGRAMS,
        BLOCK_B=config["BLOCK_B"],
        BLOCK_S=config["BLOCK_S"],
        **launch_config("finish_rows", x),
    )


def overflow_features(
    overflow: Overflow, inputs: PassInputs, spec: AutoencodeSpec, grads: OutputGrads, found: FeatureGradients
) -> None:
    """Add the overflowing rows' share to gradients of features that hold the other rows' already.

    Args:
        overflow: Which rows.
        inputs: The tensors of the pass, those over features contiguous.
        spec: The options.
        grads: What comes back into the pass.
        found: The gradients, contiguous, those of both weights among them.
    """
    x, W_dec = inputs.x, inputs.W_dec
    if x.shape[0] == 0:
        return
    config = tile_config("overflow_features", x, x.shape[1], W_dec.shape[1])
    operands = operands_of(overflow, *inputs[:4], inputs.feature_scale, spec)
    upstream = upstream_of(grads, W_dec, spec)
    programs = min(FEATURE_PROGRAMS, triton.cdiv(operands.d_sae, config["BLOCK_S"]))
    shape = (min(FEATURE_SCRATCHES, programs), config["BLOCK_S"], operands.d_in + upstream.d_out)
    _overflow_features_kernel[(programs,)](
        operands=operands,
        upstream=upstream,
        sum_ptr=x.new_empty(shape, dtype=torch.float32),
        grad_W_enc_ptr=found.W_enc,
        grad_W_dec_ptr=found.W_dec,
        grad_b_enc_ptr=found.b_enc,
        grad_threshold_ptr=found.threshold,
        grad_scale_ptr=found.scale,
        PENALTY=spec.penalty,
        STE_TO_INPUT=spec.ste_to_input,
        SCRATCHES=FEATURE_SCRATCHES,
        **config,
    )
