"""Every gradient that a feature has, in one visit: its decoder row stays in registers while its tokens pass once.

    grad_acts[e]  = row_scale[token_e] * (grad_out[token_e] . W_dec[j])     for each entry e of feature j
    grad_hidden_pre[e], and the shares of grad_threshold[j], grad_scale[j]  `tiles.gate_gradients`
    grad_W_dec[j] = sum over e of value_e * row_scale[token_e] * grad_out[token_e]
    grad_W_enc[j] = sum over e of grad_hidden_pre[e] * x[token_e]
    grad_b_enc[j] = sum over e of grad_hidden_pre[e]

Letters: `B` tokens, `I` d_in, `O` d_out, `S` d_sae, `C` slots. It does in one pass what `entry_grads` and two `feature_sums`
of `backward` do in three; those stay for decode and encode by themselves and for rows longer than `MAX_DEPTH`.

Traffic, counted and not measured: an entry moves a row of grad_out and one of x, a feature with entries its decoder row once;
the three passes move all three rows per entry. For 16 bits, d = 2304, 8,192 tokens of 64 entries and 65,536 features that is
5.1 GB instead of 7.3: per entry 9.2 KB and its share of 0.6 KB of a decoder row, instead of 13.8 KB. What is saved came from
a table of 302 MB, what remains from two of 38 MB, of which a cache holds a part. Besides, the shares of the threshold's and
the scale's gradient are not written and read back, and entries are not sorted through twice. Each gradient is written once.

A feature with more entries than a chunk is visited by several programs, see `feature_chunks`.

Numerics: cast to fp32 after loading, accumulated in fp32 in an order that the entries alone decide: deterministic, no
atomics. Gradients are stored in the dtype of their parameter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.adam import MAX_DEPTH
from fastsae_kernels.gpu.backward import FeatureGradients, FeatureOrder
from fastsae_kernels.gpu.config import launch_config
from fastsae_kernels.gpu.feature_chunks import chunk_plan, join_chunks, n_slots_for, store_row
from fastsae_kernels.gpu.tiles import gate_gradients
from fastsae_kernels.types import AutoencodeSpec


@triton.jit
def _gather(ptr, token, stride_b, stride_d, offs_d, depth, used):
    """`[BLOCK_E, BLOCK_D]` fp32: the tokens' rows at some columns, zero where an entry is not used."""
    ptrs = ptr + token[:, None] * stride_b + offs_d[None, :] * stride_d
    return tl.load(ptrs, mask=used[:, None] & (offs_d < depth)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _feature_visit_kernel(
    # inputs
    feature_offsets_ptr,  # [S + 1] int64
    order_ptr,  # [nnz] int64: entries by feature, then token
    tokens_ptr,  # [nnz] int64: token of each entry; None: entry // span
    values_ptr,  # [nnz] fp32
    x_ptr,  # [B, I], None without weight gradients
    W_dec_ptr,  # [S, O]
    grad_out_ptr,  # [B, O]
    row_scale_ptr,  # [B] fp32 or None
    grad_penalty_ptr,  # [B] fp32
    threshold_ptr,  # [S] fp32
    scale_ptr,  # [S] fp32 or None
    # the plan of the chunks, None where no feature can be long
    chunk_length_ptr,  # int64
    slot_ends_ptr,  # [S] int64
    slot_features_ptr,  # [C] int64
    # outputs
    grad_entries_ptr,  # [nnz] fp32
    grad_W_enc_ptr,  # [S, I] or None
    grad_W_dec_ptr,  # [S, O] or None
    grad_b_enc_ptr,  # [S] fp32
    grad_threshold_ptr,  # [S] fp32
    grad_scale_ptr,  # [S] fp32 or None
    # outputs of chunks
    slots_enc_ptr,  # [C, I] fp32 or None
    slots_dec_ptr,  # [C, O] fp32 or None
    slots_scalar_ptr,  # [3, C] fp32
    # scalars, sizes, strides
    half_bandwidth,
    inv_bandwidth,
    tanh_scale,
    n_slots,  # C
    n_features,  # S
    span,
    d_in,
    d_out,
    stride_xb,
    stride_xd,
    stride_ws,
    stride_wd,
    stride_gb,
    stride_gd,
    stride_row_scale,
    stride_penalty,
    PENALTY: tl.constexpr,
    STE_TO_INPUT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_I1: tl.constexpr,  # a row of x in two pieces
    BLOCK_I2: tl.constexpr,  # 0: one is enough
    BLOCK_O1: tl.constexpr,  # a row of grad_out
    BLOCK_O2: tl.constexpr,
):
    """Program p < C owns the chunk of slot p, program C + j feature j unless it is cut into chunks."""
    pid = tl.program_id(0)
    feature = (pid - n_slots).to(tl.int64)
    is_chunk = pid < n_slots
    if chunk_length_ptr is not None:
        feature = tl.where(is_chunk, tl.load(slot_features_ptr + pid, mask=is_chunk, other=0), feature)
        if feature >= n_features:  # a slot that is left over
            return
    start = tl.load(feature_offsets_ptr + feature)
    count = tl.load(feature_offsets_ptr + feature + 1) - start
    if chunk_length_ptr is not None:
        length = tl.load(chunk_length_ptr)
        if (count > length) & (pid >= n_slots):
            return
        first_slot = tl.load(slot_ends_ptr + feature) - tl.cdiv(count, length)
        skipped = tl.where(is_chunk, (pid - first_slot) * length, 0)
        start += skipped
        count = tl.minimum(count - skipped, length)
    count = count.to(tl.int32)

    o_1 = tl.arange(0, BLOCK_O1).to(tl.int64)
    i_1 = tl.arange(0, BLOCK_I1).to(tl.int64)
    # a feature without entries needs no decoder row
    w_row, w_depth = W_dec_ptr + feature * stride_ws, tl.where(count > 0, d_out, 0)
    w_1 = tl.load(w_row + o_1 * stride_wd, mask=o_1 < w_depth, other=0.0)
    dec_1 = tl.zeros((BLOCK_O1,), dtype=tl.float32)
    enc_1 = tl.zeros((BLOCK_I1,), dtype=tl.float32)
    if BLOCK_O2 > 0:
        o_2 = BLOCK_O1 + tl.arange(0, BLOCK_O2).to(tl.int64)
        w_2 = tl.load(w_row + o_2 * stride_wd, mask=o_2 < w_depth, other=0.0)
        dec_2 = tl.zeros((BLOCK_O2,), dtype=tl.float32)
    if BLOCK_I2 > 0:
        i_2 = BLOCK_I1 + tl.arange(0, BLOCK_I2).to(tl.int64)
        enc_2 = tl.zeros((BLOCK_I2,), dtype=tl.float32)
    threshold = tl.load(threshold_ptr + feature)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + feature)
    else:
        scale = 1.0
    b_enc_sum = tl.zeros((BLOCK_E,), dtype=tl.float32)
    threshold_sum = tl.zeros((BLOCK_E,), dtype=tl.float32)
    scale_sum = tl.zeros((BLOCK_E,), dtype=tl.float32)
    # entry and value are read one block ahead, for gathers wait for them
    offs_e = tl.arange(0, BLOCK_E)
    entry = tl.load(order_ptr + start + offs_e, mask=offs_e < count, other=0)
    value = tl.load(values_ptr + entry, mask=offs_e < count, other=0.0)
    for first in range(0, count, BLOCK_E):
        mask_e = first + offs_e < count
        if tokens_ptr is not None:
            token = tl.load(tokens_ptr + entry, mask=mask_e, other=0)
        else:
            token = (entry.to(tl.int32) // span).to(tl.int64)
        # an inactive entry is listed only where it lies in the window
        active = value > 0.0
        window = mask_e & ((value == 0.0) | (tl.abs(value - threshold) < half_bandwidth))
        # every gather stands ahead of the product, which decides the weight of x: all are on their way at once
        g_1 = _gather(grad_out_ptr, token, stride_gb, stride_gd, o_1, d_out, mask_e)
        if BLOCK_O2 > 0:
            g_2 = _gather(grad_out_ptr, token, stride_gb, stride_gd, o_2, d_out, mask_e)
        if x_ptr is not None:
            used = active | window if STE_TO_INPUT else active
            x_1 = _gather(x_ptr, token, stride_xb, stride_xd, i_1, d_in, used)
            if BLOCK_I2 > 0:
                x_2 = _gather(x_ptr, token, stride_xb, stride_xd, i_2, d_in, used)
        grad_penalty = tl.load(grad_penalty_ptr + token * stride_penalty, mask=mask_e, other=0.0)
        if row_scale_ptr is not None:
            row_scale = tl.load(row_scale_ptr + token * stride_row_scale, mask=mask_e, other=0.0)
        next_mask = first + BLOCK_E + offs_e < count
        next_entry = tl.load(order_ptr + start + first + BLOCK_E + offs_e, mask=next_mask, other=0)
        next_value = tl.load(values_ptr + next_entry, mask=next_mask, other=0.0)
        grad_acts = tl.sum(g_1 * w_1[None, :].to(tl.float32), 1)
        if BLOCK_O2 > 0:
            grad_acts += tl.sum(g_2 * w_2[None, :].to(tl.float32), 1)
        weight = value
        if row_scale_ptr is not None:
            grad_acts *= row_scale
            weight *= row_scale
        grad_hidden_pre, grad_threshold, grad_scale = gate_gradients(
            value, active, window, grad_acts, grad_penalty, threshold, scale,
            inv_bandwidth, tanh_scale, PENALTY, STE_TO_INPUT,
        )  # fmt: skip
        tl.store(grad_entries_ptr + entry, grad_hidden_pre, mask=mask_e)
        b_enc_sum += grad_hidden_pre
        threshold_sum += grad_threshold
        scale_sum += grad_scale
        if x_ptr is not None:
            dec_1 += tl.sum(weight[:, None] * g_1, 0)
            if BLOCK_O2 > 0:
                dec_2 += tl.sum(weight[:, None] * g_2, 0)
            enc_1 += tl.sum(grad_hidden_pre[:, None] * x_1, 0)
            if BLOCK_I2 > 0:
                enc_2 += tl.sum(grad_hidden_pre[:, None] * x_2, 0)
        entry, value = next_entry, next_value

    if chunk_length_ptr is not None:  # noqa: SIM102 a compile-time branch must stand alone
        if is_chunk:
            if x_ptr is not None:
                slot = pid.to(tl.int64)
                store_row(slots_dec_ptr, slot, o_1, d_out, dec_1)
                store_row(slots_enc_ptr, slot, i_1, d_in, enc_1)
                if BLOCK_O2 > 0:
                    store_row(slots_dec_ptr, slot, o_2, d_out, dec_2)
                if BLOCK_I2 > 0:
                    store_row(slots_enc_ptr, slot, i_2, d_in, enc_2)
            tl.store(slots_scalar_ptr + pid, tl.sum(b_enc_sum, 0))
            tl.store(slots_scalar_ptr + n_slots + pid, tl.sum(threshold_sum, 0))
            if grad_scale_ptr is not None:
                tl.store(slots_scalar_ptr + 2 * n_slots + pid, tl.sum(scale_sum, 0))
            return
    if x_ptr is not None:
        store_row(grad_W_dec_ptr, feature, o_1, d_out, dec_1)
        store_row(grad_W_enc_ptr, feature, i_1, d_in, enc_1)
        if BLOCK_O2 > 0:
            store_row(grad_W_dec_ptr, feature, o_2, d_out, dec_2)
        if BLOCK_I2 > 0:
            store_row(grad_W_enc_ptr, feature, i_2, d_in, enc_2)
    tl.store(grad_b_enc_ptr + feature, tl.sum(b_enc_sum, 0))
    tl.store(grad_threshold_ptr + feature, tl.sum(threshold_sum, 0))
    if grad_scale_ptr is not None:
        tl.store(grad_scale_ptr + feature, tl.sum(scale_sum, 0))


def _pieces(depth: int) -> tuple[int, int]:
    """A row as one or two powers of two, whichever leaves fewer lanes idle: 2304 is 2048 and 256, not 4096."""
    whole = triton.next_power_of_2(depth)
    rest = triton.next_power_of_2(max(depth - whole // 2, 1))
    return (whole // 2, rest) if whole // 2 + rest < whole else (whole, 0)


def feature_gradients(
    by_feature: FeatureOrder,
    values: Tensor,
    x: Tensor,
    W_dec: Tensor,
    grad_out: Tensor,
    grad_penalty: Tensor,
    threshold: Tensor,
    feature_scale: Tensor | None,
    spec: AutoencodeSpec,
    *,
    row_scale: Tensor | None = None,
    with_weights: bool = True,
) -> FeatureGradients:
    """Gradients of one pass over listed entries, but those of x and b_dec; the formulas are the module's.

    Args:
        by_feature: The entries by feature.
        values: `[nnz]` fp32, 0 where an entry is in the window only; before ordering.
        x: `[N, d_in]`. Strides are free, here and below, but for vectors over features, which are contiguous.
        W_dec: `[d_sae, d_out]`, dtype of x.
        grad_out: `[N, d_out]`.
        grad_penalty: `[N]` fp32.
        threshold: `[d_sae]` fp32, >= 0.
        feature_scale: `[d_sae]` fp32, or None for ones.
        spec: The options.
        row_scale: `[N]` fp32, or None for ones: row n of the gradient of sae_out is `row_scale[n] * grad_out[n]`.
        with_weights: Whether to sum the weight gradients; otherwise x is not read.

    Returns:
        Weight gradients in the dtype of x.

    Raises:
        ValueError: A row is longer than `MAX_DEPTH`, so that no program can hold it; `backward` takes such rows.
    """
    (n_tokens, d_in), (d_sae, d_out), nnz = x.shape, W_dec.shape, values.numel()
    if max(d_in, d_out) > MAX_DEPTH:
        raise ValueError(f"x, W_dec: expected rows of at most {MAX_DEPTH} elements, got {d_in} and {d_out}")
    device = x.device
    config = launch_config("feature_visit", x, odd=d_in % 16 != 0 or d_out % 16 != 0)
    # a token has an entry once, so no feature is longer than the batch
    shortest = config["CHUNK"]
    n_slots = n_slots_for(nnz, shortest) if n_tokens > shortest else 0
    length = slot_ends = slot_features = None
    if n_slots:
        length, slot_ends, slot_features = chunk_plan(by_feature.offsets, n_slots, shortest)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    grads = FeatureGradients(
        torch.zeros(nnz, dtype=torch.float32, device=device),
        make(d_sae, d_in, dtype=x.dtype) if with_weights else None,
        make(d_sae, d_out, dtype=x.dtype) if with_weights else None,
        make(d_sae),
        make(d_sae),
        None if feature_scale is None else make(d_sae),
    )
    shared: dict[str, Any] = {
        "feature_offsets_ptr": by_feature.offsets,
        "chunk_length_ptr": length,
        "slot_ends_ptr": slot_ends,
        "slot_features_ptr": slot_features,
        "slots_enc_ptr": make(n_slots, d_in) if n_slots and with_weights else None,
        "slots_dec_ptr": make(n_slots, d_out) if n_slots and with_weights else None,
        "slots_scalar_ptr": make(3, n_slots) if n_slots else None,
        "grad_W_enc_ptr": grads.W_enc,
        "grad_W_dec_ptr": grads.W_dec,
        "grad_b_enc_ptr": grads.b_enc,
        "grad_threshold_ptr": grads.threshold,
        "grad_scale_ptr": grads.scale,
        "n_slots": n_slots,
        "n_features": d_sae,
        "d_in": d_in,
        "d_out": d_out,
    }
    blocks_i, blocks_o = _pieces(d_in), _pieces(d_out)
    lanes = max(sum(blocks_i) if with_weights else 1, sum(blocks_o))
    _feature_visit_kernel[(n_slots + d_sae,)](
        order_ptr=by_feature.order,
        tokens_ptr=by_feature.tokens,
        values_ptr=values,
        x_ptr=x if with_weights else None,
        W_dec_ptr=W_dec,
        grad_out_ptr=grad_out,
        row_scale_ptr=row_scale,
        grad_penalty_ptr=grad_penalty,
        threshold_ptr=threshold,
        scale_ptr=feature_scale,
        grad_entries_ptr=grads.grad_hidden_pre,
        half_bandwidth=spec.bandwidth / 2,
        inv_bandwidth=1 / spec.bandwidth if spec.bandwidth > 0 else 0.0,
        tanh_scale=spec.tanh_scale,
        span=by_feature.span,
        stride_xb=x.stride(0),
        stride_xd=x.stride(1),
        stride_ws=W_dec.stride(0),
        stride_wd=W_dec.stride(1),
        stride_gb=grad_out.stride(0),
        stride_gd=grad_out.stride(1),
        stride_row_scale=row_scale.stride(0) if row_scale is not None else 0,
        stride_penalty=grad_penalty.stride(0),
        PENALTY=spec.penalty,
        STE_TO_INPUT=spec.ste_to_input,
        BLOCK_E=config["BLOCK_E"],
        BLOCK_I1=blocks_i[0],
        BLOCK_I2=blocks_i[1],
        BLOCK_O1=blocks_o[0],
        BLOCK_O2=blocks_o[1],
        num_warps=triton.next_power_of_2(triton.cdiv(lanes, config["D_PER_WARP"])),
        **shared,
    )
    if n_slots:
        join_chunks(n_slots, max(d_in, d_out) if with_weights else 1, x, shared)
    return grads
