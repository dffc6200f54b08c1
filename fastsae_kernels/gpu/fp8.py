"""Encode in fp8, opt-in: candidates by an fp8 product with a margin, then each candidate's value in the working precision.

    x^, w^    = x and W_enc rounded to e4m3, one power of two as scale per row of x and per feature
    candidate : x^ . w^ + b_enc > threshold - bandwidth / 2 - margin
    margin    = sigmas * wide * (|x - x^| |w|_c + |x^| |w - w^|_c)               |v|_c^2 = sum_i c_i v_i^2
    entry     : a candidate whose `x . w + b_enc`, in the operands' precision and fp32 sums, is active or in the window

Only candidates are evaluated exactly, so every entry that is listed is exact: what `encode.list_entries` lists but for
rounding of its fp32 sums. What can happen is that an entry is not among the candidates: it is then missing. Hence off by
default.

How likely that is: the product's error is `sum_i (x - x^)_i w_i + x^_i (w - w^)_i`. The roundings of different dimensions
are taken to have independent signs. Then each of the two sums has mean 0, the variance `sum_i (x - x^)_i^2 w_i^2` (likewise
the other) and tails below a Gaussian's (Hoeffding: `P(error < -t std) <= exp(-t^2 / 2)`). Rounding to floating point is
relative, so `(x - x^)_i^2` is spread over the dimensions as `x_i^2` is. Its mean over the tokens, as a share of `|x|^2` and
averaged with 1 / d_in, is `c`: 1 / d_in everywhere without outlier dimensions. A token whose own shares p differ from it has
the margin `wide = sqrt(sum_i p_i^2 / c_i / 3)` times as large (at least 1; 3 is what Gaussian activations give).

The margin adds the two deviations, which is up to sqrt(2) more than the deviation of both sums together. So an entry right
at its gate is missed with a probability of `Q(sigmas)` to `Q(sqrt(2) sigmas)` (Gaussian tail), one further inside with less:

    sigmas        3         4         5         6         7
    at most       1.3e-3    3.2e-5    2.9e-7    1.0e-9    1.3e-12

Measured with PyTorch's float8 on a CPU (`tests/kernels/fp8_simulation.py`, which describes the data: 4,096 tokens, 8,192
features, each active on 0.4 % of the tokens; about 131,000 active entries a line, so 0 means fewer than one in that):

                           sigmas that the    missed, of the active entries    candidates per active entry
    data            d_in   worst entry needs  3        4        5, 6, 7        3     4     5     6     7     bound
    Gaussian         768   2.8                0        0        0              1.74  2.04  2.39  2.79  3.24  61
    Gaussian        2304   2.5                0        0        0              1.73  2.03  2.37  2.76  3.21  194
    Gaussian        4096   2.2                0        0        0              1.73  2.02  2.36  2.75  3.19  247
    outliers         768   1.9                0        0        0              2.63  3.42  4.38  5.51  6.81  84
    outliers        2304   2.1                0        0        0              2.53  3.24  4.09  5.09  6.25  162
    outliers        4096   1.9                0        0        0              2.40  3.04  3.80  4.69  5.71  211
    aligned          768   2.2                0        0        0              1.87  2.21  2.59  3.00  3.45  1.84
    aligned         4096   2.5                0        0        0              1.80  2.12  2.48  2.88  3.32  2.10
    sinks            768   1.8                0        0        0              2.92  3.81  4.55  5.16  5.68  6.4
    sinks           4096   2.3                0        0        0              2.46  3.36  4.27  5.06  5.73  30
    single           768   3.8                3.4e-4   0        0              1.63  2.07  2.50  2.93  3.44  3.6
    single          4096   3.1                1.5e-5   0        0              2.29  2.85  3.54  4.42  5.56  34
    demo model       256   3.7                4.1e-5   0        0              1.37  1.46  1.56  1.65  1.76  3.3

With a plain 1 / d_in for `c` and without `wide`, "aligned" (tokens and features both with most of their norm in three
dimensions) missed 5 to 7 % of its entries at six sigmas (2,048 tokens, 1,024 features).

The model fails where a feature lies in a dimension that is large on few tokens ("single" above: heavy tails and features of
one dimension each; the error of its worst pair, active or not, was nearly 10 sigmas). `sigmas=None` takes the bound of
Cauchy and Schwarz instead, `|x - x^| |w| + |x^| |w - w^|`: it holds for any input, never misses, and has the candidates of
the last column.

Tensor cores of Ada and Hopper keep 13 bits of an fp8 sum. The kernel therefore adds the partial product of at most 128
dimensions to an fp32 accumulator, and the margin has a share for what the partial sums lose.

A candidate takes a slot as an entry does, and a row with more candidates than slots stays flagged as overflowing, to be
recomputed by whoever handles overflows; what stands in its span then is not to be read. A row or feature with an infinity
or a NaN has all its pairs as candidates: none is lost.

Letters: `B` tokens, `D` d_in, `S` d_sae, `R` rows of either operand, `E` candidates of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.append import NOT_LISTED, append_in_turn
from fastsae_kernels.gpu.config import launch_config
from fastsae_kernels.gpu.fp8_quantise import Fp8Weights, fp8_weights, quantise
from fastsae_kernels.gpu.tiles import entry_index, gate, pack_entry

__all__ = ["Fp8Weights", "fp8_weights", "list_entries_fp8"]

# what the tensor cores lose of a sum of 128 products, relative to |x^| |w^|: of the 33 terms of each of 4 instructions, 13
# bits below the largest are kept
WORST_ACCUMULATION = 1 / 60
# the same in standard deviations where the terms have random signs, with room to spare
TYPICAL_ACCUMULATION = 1 / 256
# fp32 rounding of the threshold, the bias and their difference
ROUNDING = 2.0**-21


@triton.jit(do_not_specialize=["n_tokens", "first_feature"])
def _fp8_list_kernel(
    # inputs
    x_ptr,  # [B, D] fp8
    x_scales_ptr,  # [B] fp32
    x_slack_ptr,  # [2, B] fp32: what the norm and the error of a feature are multiplied by
    W_enc_ptr,  # [S, D] fp8
    W_scales_ptr,  # [S] fp32
    W_norms_ptr,  # [S] fp32
    W_errors_ptr,  # [S] fp32
    b_enc_ptr,  # [S]
    threshold_ptr,  # [S] fp32
    row_ends_ptr,  # [B] int32
    bounds_ptr,  # [B] fp32 or None
    # outputs
    cursors_ptr,  # [B] int32: moves on by every candidate, also those that find no slot
    entries_ptr,  # [nnz] int64: the candidate's index, with value 0
    # scalars and sizes
    half_bandwidth,
    first_feature,
    n_tokens,
    depth,  # D, a multiple of BLOCK_D
    d_sae,
    ROUNDING: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,  # dimensions that the tensor cores add up
    GROUP_B: tl.constexpr,
):
    """Program owns one tile: BLOCK_B tokens, BLOCK_S features; it lists the candidates of that tile."""
    pid = tl.program_id(0)
    tiles_b = tl.cdiv(n_tokens, BLOCK_B)
    tiles_s = tl.cdiv(d_sae, BLOCK_S)
    first_b = pid // (GROUP_B * tiles_s) * GROUP_B
    group = min(tiles_b - first_b, GROUP_B)
    pid_b = first_b + pid % (GROUP_B * tiles_s) % group
    pid_s = pid % (GROUP_B * tiles_s) // group

    offs_b = pid_b * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_s = pid_s * BLOCK_S + tl.arange(0, BLOCK_S)
    rows = offs_b % n_tokens
    columns = offs_s % d_sae
    offs_d = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * depth + offs_d[None, :]
    W_ptrs = W_enc_ptr + columns.to(tl.int64)[None, :] * depth + offs_d[:, None]
    product = tl.zeros((BLOCK_B, BLOCK_S), dtype=tl.float32)
    for _ in range(0, depth, BLOCK_D):
        product += tl.dot(tl.load(x_ptrs), tl.load(W_ptrs), max_num_imprecise_acc=BLOCK_D)
        x_ptrs += BLOCK_D
        W_ptrs += BLOCK_D

    b_enc = tl.load(b_enc_ptr + columns).to(tl.float32)
    b_enc += ROUNDING * tl.abs(b_enc)
    # products with 1 -+ ROUNDING: an infinite threshold stays one
    lowest = tl.load(threshold_ptr + columns) * (1.0 - ROUNDING) - half_bandwidth * (1.0 + ROUNDING) - b_enc
    lowest = lowest[None, :] + tl.zeros((BLOCK_B, 1), dtype=tl.float32)
    if bounds_ptr is not None:
        bounds = tl.load(bounds_ptr + rows)[:, None]
        lowest = tl.where(bounds > 0.0, tl.maximum(lowest, bounds * (1.0 - ROUNDING) - b_enc[None, :]), lowest)
    # one scale after the other: their product may be too small for a number
    gap = product * tl.load(x_scales_ptr + rows)[:, None] * tl.load(W_scales_ptr + columns)[None, :] - lowest
    gap += tl.load(x_slack_ptr + rows)[:, None] * tl.load(W_norms_ptr + columns)[None, :]
    gap += tl.load(x_slack_ptr + n_tokens + rows)[:, None] * tl.load(W_errors_ptr + columns)[None, :]
    listed = ~(gap <= 0.0) & (offs_b < n_tokens)[:, None] & (offs_s < d_sae)[None, :]  # not >: NaN is a candidate

    append_in_turn(
        tl.where(listed, 0.0, NOT_LISTED), rows, offs_s, first_feature, cursors_ptr, row_ends_ptr, entries_ptr
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_feature"])
def _fp8_rescore_kernel(
    # inputs
    x_ptr,  # [B, D]
    W_enc_ptr,  # [D, S]
    b_enc_ptr,  # [S]
    threshold_ptr,  # [S] fp32
    starts_ptr,  # [B] int32: where the candidates of each row start
    row_ends_ptr,  # [B] int32
    bounds_ptr,  # [B] fp32 or None
    # outputs
    cursors_ptr,  # [B] int32: behind the candidates, then behind the entries; left alone where the row overflowed
    entries_ptr,  # [nnz] int64: candidates, then entries
    # scalars and sizes
    half_bandwidth,
    first_feature,
    d_in,
    # strides
    stride_xb,
    stride_xd,
    stride_wd,
    stride_ws,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program owns one row: BLOCK_E candidates at a time, those that are entries move up to the front."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(cursors_ptr + row)
    if end > tl.load(row_ends_ptr + row):
        return
    cursor = tl.load(starts_ptr + row)
    for first in range(cursor, end, BLOCK_E):
        offs = first + tl.arange(0, BLOCK_E)
        mask = offs < end
        feature = tl.where(mask, entry_index(tl.load(entries_ptr + offs, mask=mask, other=0)), first_feature)
        columns = feature - first_feature
        terms = tl.zeros((BLOCK_E, BLOCK_D), dtype=tl.float32)
        for start in range(0, d_in, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
            mask_d = offs_d < d_in
            W_ptrs = W_enc_ptr + columns.to(tl.int64)[:, None] * stride_ws + offs_d[None, :] * stride_wd
            W = tl.load(W_ptrs, mask=mask[:, None] & mask_d[None, :], other=0.0)
            x = tl.load(x_ptr + row * stride_xb + offs_d * stride_xd, mask=mask_d, other=0.0)
            terms += x.to(W.dtype).to(tl.float32)[None, :] * W.to(tl.float32)
        hidden_pre = tl.sum(terms, 1) + tl.load(b_enc_ptr + columns).to(tl.float32)
        active, window = gate(hidden_pre, tl.load(threshold_ptr + columns), half_bandwidth)
        unordered = hidden_pre != hidden_pre
        value = tl.where(active | unordered, hidden_pre, 0.0)
        listed = (active | window | unordered) & mask
        if bounds_ptr is not None:
            listed = listed & ~(value < tl.load(bounds_ptr + row))
        position = cursor + tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.debug_barrier()  # no thread may still read what another overwrites
        tl.store(entries_ptr + position, pack_entry(feature, value), mask=listed)
        cursor += tl.sum(listed.to(tl.int32), 0)
    tl.store(cursors_ptr + row, cursor)


def list_entries_fp8(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    cursors: Tensor,
    row_ends: Tensor,
    entries: Tensor,
    *,
    bandwidth: float = 0.0,
    bounds: Tensor | None = None,
    first_feature: int = 0,
    weights: Fp8Weights,
) -> None:
    """`encode.list_entries`, where an entry may be missing with the probability in the module's docstring.

    Spans must have room for the candidates, more than twice the entries; a row with more moves its cursor past its end
    and holds nothing that may be read.

    Args:
        x, W_enc, b_enc, threshold, cursors, row_ends, entries, bandwidth, bounds, first_feature: As there. fp32 operands
            are fine: candidates are evaluated in IEEE fp32.
        weights: `fp8_weights(W_enc, x)`, or its `features` where W_enc is a range; made of other weights, entries go missing.

    Raises:
        TypeError: x is fp64.
        ValueError: `weights` has another shape, or a cursor could pass 2^31.
    """
    if x.dtype == torch.float64:
        raise TypeError("x: expected float32, bfloat16 or float16 on the Triton path, got float64")
    n_tokens, d_in = x.shape
    d_sae = W_enc.shape[1]
    if entries.numel() + first_feature + d_sae >= 2**31:  # a cursor may run that far past the last span
        raise ValueError(f"x: expected fewer than 2**31 entries in one call, got {entries.numel()}; split the tokens")
    x8, W8 = quantise(x, weights.spread, tokens=True), weights.quantised
    if W8.values.shape != (d_sae, x8.values.shape[1]):
        raise ValueError(f"weights: expected those of W_enc {tuple(W_enc.shape)}, got {tuple(W8.values.shape)}")
    if n_tokens == 0:
        return
    accumulation = WORST_ACCUMULATION if weights.spread is None else TYPICAL_ACCUMULATION
    # the margin of token n and feature j is slack[0, n] * W8.norms[j] + slack[1, n] * W8.errors[j]
    slack = weights.sigmas * torch.stack((x8.errors + accumulation * x8.norms, x8.norms))
    starts = cursors.clone()
    config = launch_config("fp8_list", x8.values)
    grid = (triton.cdiv(n_tokens, config["BLOCK_B"]) * triton.cdiv(d_sae, config["BLOCK_S"]),)
    _fp8_list_kernel[grid](
        x_ptr=x8.values,
        x_scales_ptr=x8.scales,
        x_slack_ptr=slack,
        W_enc_ptr=W8.values,
        W_scales_ptr=W8.scales,
        W_norms_ptr=W8.norms,
        W_errors_ptr=W8.errors,
        b_enc_ptr=b_enc,
        threshold_ptr=threshold,
        row_ends_ptr=row_ends,
        bounds_ptr=bounds,
        cursors_ptr=cursors,
        entries_ptr=entries,
        half_bandwidth=bandwidth / 2,
        first_feature=first_feature,
        n_tokens=n_tokens,
        depth=x8.values.shape[1],
        d_sae=d_sae,
        ROUNDING=ROUNDING,
        **config,
    )
    _fp8_rescore_kernel[(n_tokens,)](
        x_ptr=x,
        W_enc_ptr=W_enc,
        b_enc_ptr=b_enc,
        threshold_ptr=threshold,
        starts_ptr=starts,
        row_ends_ptr=row_ends,
        bounds_ptr=bounds,
        cursors_ptr=cursors,
        entries_ptr=entries,
        half_bandwidth=bandwidth / 2,
        first_feature=first_feature,
        d_in=d_in,
        stride_xb=x.stride(0),
        stride_xd=x.stride(1),
        stride_wd=W_enc.stride(0),
        stride_ws=W_enc.stride(1),
        **launch_config("fp8_rescore", x),
    )
