"""Every gradient that a feature has, in one kernel: its decoder row stays in registers while its tokens pass once.

    grad_acts[e]  = row_scale[token_e] * (grad_out[token_e] . W_dec[j])     for each entry e of feature j
    grad_hidden_pre[e], and the shares of grad_threshold[j], grad_scale[j]  `tiles.gate_gradients`
    grad_W_dec[j] = sum over e of value_e * row_scale[token_e] * grad_out[token_e]
    grad_W_enc[j] = sum over e of grad_hidden_pre[e] * x[token_e]
    grad_b_enc[j] = sum over e of grad_hidden_pre[e]

Letters: `B` tokens, `I` d_in, `O` d_out, `S` d_sae, `C` slots. A row is held in two pieces, powers of two, so that few lanes
idle: 2304 is 2048 and 256. Of a row longer than `MAX_DEPTH`, which no program can hold, the product alone is formed here,
piece by piece; `gradients` then has `feature_sums` add up the weights' gradients.

Traffic, counted and not measured: an entry moves a row of grad_out and one of x, a feature with entries its decoder row once.
For 16 bits, d = 2304, 8,192 tokens of 64 entries and 65,536 features that is 5.1 GB. Each gradient is written once.

A feature with more entries than a chunk is shared by several programs, see `feature_chunks`.

Numerics: cast to fp32 after loading, accumulated in fp32 in an order that the entries alone decide: deterministic, no
atomics. Gradients are stored in the dtype of their parameter, `grad_W_enc` feature-major (`[d_sae, d_in]` storage).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import launch_config
from fastsae_kernels.gpu.feature_chunks import FeatureGradients, join_chunks, plan_chunks, program_entries, slots_for
from fastsae_kernels.gpu.feature_sums import FeatureOrder, token_of
from fastsae_kernels.gpu.tiles import (
    MAX_DEPTH,
    add_three,
    columns_of_pieces,
    gate_gradients,
    gather_pieces,
    gather_rows,
    matrix_of,
    pieces_of,
    store_pieces,
)
from fastsae_kernels.types import AutoencodeSpec

# columns of a row longer than MAX_DEPTH that are multiplied at a time
LONG_ROW_BLOCK = 2048


@triton.jit
def _long_product(matrix, rows, w_row, stride_wd, depth, used, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[BLOCK_E]` fp32: the products of some rows with one of W_dec, all of them too long for the registers."""
    products = tl.zeros((BLOCK_E, BLOCK_D), dtype=tl.float32)
    for first in range(0, depth, BLOCK_D):
        offs_d = first + tl.arange(0, BLOCK_D).to(tl.int64)
        w = tl.load(w_row + offs_d * stride_wd, mask=offs_d < depth, other=0.0).to(tl.float32)
        gathered = gather_rows(matrix.rows, rows, matrix.stride_row, matrix.stride_column, offs_d, depth, used)
        products += gathered * w[None, :]
    return tl.sum(products, 1)


@triton.jit
def _fused_backward_kernel(
    # inputs
    by_feature,  # FeatureOrder
    values_ptr,  # [nnz]
    x,  # Matrix [B, I], None without W_enc's gradient
    W_dec,  # Matrix [S, O]
    grad_out,  # Matrix [B, O]
    row_scale_ptr,  # [B] fp32 or None
    grad_penalty_ptr,  # [B] fp32
    threshold_ptr,  # [S] fp32
    scale_ptr,  # [S] fp32 or None
    plan,  # ChunkPlan
    # outputs
    grads,  # FeatureGradients
    slots,  # Slots
    # scalars, sizes, strides
    half_bandwidth,
    inv_bandwidth,
    tanh_scale,
    n_features,  # S
    d_in,
    d_out,
    stride_row_scale,
    stride_penalty,
    GATED: tl.constexpr,  # without a gate every entry passes its gradient on
    WINDOW: tl.constexpr,  # there is a window
    PENALTY: tl.constexpr,
    STE_TO_INPUT: tl.constexpr,
    LONG: tl.constexpr,  # rows of W_dec and grad_out are too long for the registers
    BLOCK_E: tl.constexpr,
    BLOCK_I1: tl.constexpr,  # a row of x in two pieces
    BLOCK_I2: tl.constexpr,
    BLOCK_O1: tl.constexpr,  # a row of grad_out
    BLOCK_O2: tl.constexpr,
):
    """Program p < C owns the chunk of slot p, program C + j feature j unless it is cut into chunks."""
    pid = tl.program_id(0)
    feature, start, count = program_entries(pid, by_feature.offsets, plan, n_features)
    if count < 0:
        return

    o_1, o_2 = columns_of_pieces(BLOCK_O1, BLOCK_O2)
    i_1, i_2 = columns_of_pieces(BLOCK_I1, BLOCK_I2)
    w_row = W_dec.rows + feature * W_dec.stride_row
    if not LONG:
        # a feature without entries needs no decoder row
        w_depth = tl.where(count > 0, d_out, 0)
        w_1 = tl.load(w_row + o_1.to(tl.int64) * W_dec.stride_column, mask=o_1 < w_depth, other=0.0)
        w_2 = tl.load(w_row + o_2.to(tl.int64) * W_dec.stride_column, mask=o_2 < w_depth, other=0.0)
    dec_1 = tl.zeros((BLOCK_O1,), dtype=tl.float32)
    dec_2 = tl.zeros((BLOCK_O2,), dtype=tl.float32)
    enc_1 = tl.zeros((BLOCK_I1,), dtype=tl.float32)
    enc_2 = tl.zeros((BLOCK_I2,), dtype=tl.float32)
    threshold = tl.load(threshold_ptr + feature)
    scale = tl.load(scale_ptr + feature) if scale_ptr is not None else 1.0
    b_enc_sum = tl.zeros((BLOCK_E,), dtype=tl.float32)
    threshold_sum = tl.zeros((BLOCK_E,), dtype=tl.float32)
    scale_sum = tl.zeros((BLOCK_E,), dtype=tl.float32)
    # entry, value and token are read one block ahead, for gathers wait for them; as uint32 a token takes a register less
    offs_e = tl.arange(0, BLOCK_E)
    entry = tl.load(by_feature.order + start + offs_e, mask=offs_e < count, other=0)
    value = tl.load(values_ptr + entry, mask=offs_e < count, other=0.0).to(tl.float32)
    next_token = token_of(entry, by_feature.tokens, by_feature.row_length, offs_e < count).to(tl.uint32)
    for first in range(0, count, BLOCK_E):
        mask_e = first + offs_e < count
        token = next_token.to(tl.int64)
        # an inactive entry is listed only where it lies in the window
        active = value > 0.0 if GATED else mask_e
        window = tl.zeros((BLOCK_E,), dtype=tl.int1)
        if WINDOW:
            window = mask_e & ((value == 0.0) | (tl.abs(value - threshold) < half_bandwidth))
        # every gather stands ahead of the product, which decides the weight of x: all are on their way at once
        if not LONG:
            g_1, g_2 = gather_pieces(grad_out, token, o_1, o_2, d_out, mask_e)
        if x is not None:
            used = active | window if STE_TO_INPUT else active
            x_1, x_2 = gather_pieces(x, token, i_1, i_2, d_in, used)
        grad_penalty = tl.load(grad_penalty_ptr + token * stride_penalty, mask=mask_e, other=0.0)
        row_scale = tl.full((BLOCK_E,), 1.0, tl.float32)
        if row_scale_ptr is not None:
            row_scale = tl.load(row_scale_ptr + token * stride_row_scale, mask=mask_e, other=0.0)
        next_mask = first + BLOCK_E + offs_e < count
        next_entry = tl.load(by_feature.order + start + first + BLOCK_E + offs_e, mask=next_mask, other=0)
        next_value = tl.load(values_ptr + next_entry, mask=next_mask, other=0.0).to(tl.float32)
        next_token = token_of(next_entry, by_feature.tokens, by_feature.row_length, next_mask).to(tl.uint32)
        if LONG:
            grad_acts = _long_product(
                grad_out, token, w_row, W_dec.stride_column, d_out, mask_e, BLOCK_E, BLOCK_O1
            )  # fmt: skip
        else:
            grad_acts = tl.sum(g_1 * w_1[None, :].to(tl.float32), 1) + tl.sum(g_2 * w_2[None, :].to(tl.float32), 1)
        grad_hidden_pre, grad_threshold, grad_scale = gate_gradients(
            value, active, window, row_scale * grad_acts, grad_penalty, threshold, scale,
            inv_bandwidth, tanh_scale, PENALTY, STE_TO_INPUT,
        )  # fmt: skip
        tl.store(grads.grad_hidden_pre + entry, grad_hidden_pre, mask=mask_e)
        b_enc_sum += grad_hidden_pre
        threshold_sum += grad_threshold
        scale_sum += grad_scale
        if grads.W_dec is not None:
            weight = value * row_scale
            dec_1 += tl.sum(weight[:, None] * g_1, 0)
            dec_2 += tl.sum(weight[:, None] * g_2, 0)
        if x is not None:
            enc_1 += tl.sum(grad_hidden_pre[:, None] * x_1, 0)
            enc_2 += tl.sum(grad_hidden_pre[:, None] * x_2, 0)
        entry, value = next_entry, next_value

    b_enc, threshold_total, scale_total = tl.reduce((b_enc_sum, threshold_sum, scale_sum), 0, add_three)
    if plan.length is not None:  # noqa: SIM102 a compile-time branch must stand alone
        if pid < plan.n_slots:
            slot = pid.to(tl.int64)
            if grads.W_dec is not None:
                store_pieces(slots.W_dec, slot, o_1, o_2, d_out, dec_1, dec_2)
            if x is not None:
                store_pieces(slots.W_enc, slot, i_1, i_2, d_in, enc_1, enc_2)
            tl.store(slots.scalars + slot, b_enc)
            tl.store(slots.scalars + plan.n_slots + slot, threshold_total)
            if grads.scale is not None:
                tl.store(slots.scalars + 2 * plan.n_slots + slot, scale_total)
            return
    if grads.W_dec is not None:
        store_pieces(grads.W_dec, feature, o_1, o_2, d_out, dec_1, dec_2)
    if x is not None:
        store_pieces(grads.W_enc, feature, i_1, i_2, d_in, enc_1, enc_2)
    tl.store(grads.b_enc + feature, b_enc)
    tl.store(grads.threshold + feature, threshold_total)
    if grads.scale is not None:
        tl.store(grads.scale + feature, scale_total)


def fused_backward(
    by_feature: FeatureOrder,
    values: Tensor,
    x: Tensor | None,
    W_dec: Tensor,
    grad_out: Tensor,
    grad_penalty: Tensor,
    threshold: Tensor,
    feature_scale: Tensor | None,
    spec: AutoencodeSpec,
    row_scale: Tensor | None,
    with_W_dec: bool,
    gated: bool = True,
) -> FeatureGradients:
    """The gradients of the module, from entries by feature.

    Args:
        by_feature: The entries by feature.
        values: `[nnz]` fp32, 0 where an entry is in the window only; before ordering.
        W_dec, threshold, feature_scale, spec: As in `types.PassInputs`, vectors over features contiguous.
        grad_out, grad_penalty, row_scale: As in `types.OutputGrads`.
        x: `[N, d_in]` where the gradient of W_enc is asked for, else None.
        with_W_dec: Whether the gradient of W_dec is asked for.
        gated: Whether the entries went through the gate; otherwise each passes its gradient on, whatever its value.

    A gradient of the weights takes rows of at most `MAX_DEPTH`.
    """
    (d_sae, d_out), nnz, device = W_dec.shape, values.numel(), W_dec.device
    d_in = 1 if x is None else x.shape[1]
    is_odd = d_out % 16 != 0 or (x is not None and d_in % 16 != 0)
    config = dict(launch_config("fused_backward", W_dec, odd=is_odd))
    plan = plan_chunks(by_feature.offsets, nnz, grad_out.shape[0], config.pop("CHUNK"))

    def per_feature() -> Tensor:
        return torch.empty(d_sae, dtype=torch.float32, device=device)

    grads = FeatureGradients(
        torch.zeros(nnz, dtype=torch.float32, device=device),
        None if x is None else torch.empty(d_sae, d_in, dtype=x.dtype, device=device),
        torch.empty(d_sae, d_out, dtype=W_dec.dtype, device=device) if with_W_dec else None,
        per_feature(),
        per_feature(),
        None if feature_scale is None else per_feature(),
    )
    slots = slots_for(plan, grads)
    is_long = d_out > MAX_DEPTH
    blocks_i, blocks_o = pieces_of(d_in), (LONG_ROW_BLOCK, 1) if is_long else pieces_of(d_out)
    lanes = max(sum(blocks_i) if x is not None else 1, sum(blocks_o))
    num_warps = triton.next_power_of_2(triton.cdiv(lanes, config.pop("D_PER_WARP")))
    _fused_backward_kernel[(plan.n_slots + d_sae,)](
        by_feature=by_feature,
        values_ptr=values,
        x=None if x is None else matrix_of(x),
        W_dec=matrix_of(W_dec),
        grad_out=matrix_of(grad_out),
        row_scale_ptr=row_scale,
        grad_penalty_ptr=grad_penalty,
        threshold_ptr=threshold,
        scale_ptr=feature_scale,
        plan=plan,
        grads=grads,
        slots=slots,
        half_bandwidth=spec.bandwidth / 2,
        inv_bandwidth=1 / spec.bandwidth if spec.bandwidth > 0 else 0.0,
        tanh_scale=spec.tanh_scale,
        n_features=d_sae,
        d_in=d_in,
        d_out=d_out,
        stride_row_scale=0 if row_scale is None else row_scale.stride(0),
        stride_penalty=grad_penalty.stride(0),
        GATED=gated,
        WINDOW=spec.bandwidth > 0,
        PENALTY=spec.penalty,
        STE_TO_INPUT=spec.ste_to_input,
        LONG=is_long,
        BLOCK_I1=blocks_i[0],
        BLOCK_I2=blocks_i[1],
        BLOCK_O1=blocks_o[0],
        BLOCK_O2=blocks_o[1],
        num_warps=num_warps,
        **config,
    )
    if plan.n_slots:
        join_chunks(by_feature.offsets, plan, slots, grads, like=W_dec)
    return grads
