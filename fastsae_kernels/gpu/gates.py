"""What happens to a tile of the dense backend between its products: one kernel in each direction; formulas in `..gates`.

PyTorch's ops would read and write the tile some twenty times. A kernel here reads each element that a product left once, in the
dtype of the products, and writes in its place what the next product takes.

Letters: `C` features of a tile, `T` tokens, which are innermost. Bytes per element of a 16-bit tile, beside those of the
products: forward 4, backward 8.

Numerics: a tile is rounded to the dtype of the products, as dense PyTorch's is, and gated and summed in fp32. Sums of fp32 have a
fixed order; atomics add integers alone. So two runs are equal bit by bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gates import Features, Gated, GatedGrads
from fastsae_kernels.gpu.config import launch_config, on_device
from fastsae_kernels.gpu.tiles import add_three, gate, gate_gradients, penalty_terms
from fastsae_kernels.matmul import multiply
from fastsae_kernels.types import AutoencodeSpec

SPLITS = 8  # into which a tile's features go, so that there are enough programs


@triton.jit(do_not_specialize=["n_features"])
def _gate_tile_kernel(
    hidden_pre_ptr,  # [C, T], without the bias
    b_enc_ptr,  # [C]
    threshold_ptr,  # [C] fp32
    scale_ptr,  # [C] fp32 or None
    # outputs
    acts_ptr,  # [C, T], perhaps the memory of hidden_pre
    l0_ptr,  # [splits, T] int32
    penalty_ptr,  # [splits, T] fp32; None where it is l0
    counts_ptr,  # [C] int64, added to
    # sizes, strides, scalar
    n_features,  # C
    n_tokens,  # T
    stride_c,  # of hidden_pre
    tanh_scale,
    PENALTY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Program (i, j) gates BLOCK_T tokens and every num_programs(1)-th block of BLOCK_C features, from the j-th on."""
    split = tl.program_id(1)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < n_tokens
    l0 = tl.zeros((BLOCK_T,), dtype=tl.int32)
    penalty = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for first in range(split * BLOCK_C, n_features, tl.num_programs(1) * BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C).to(tl.int64)
        mask_c = offs_c < n_features
        mask = mask_c[:, None] & mask_t[None, :]
        hidden_pre = tl.load(hidden_pre_ptr + offs_c[:, None] * stride_c + offs_t[None, :], mask=mask, other=0.0)
        hidden_pre = hidden_pre.to(tl.float32) + tl.load(b_enc_ptr + offs_c, mask=mask_c).to(tl.float32)[:, None]
        threshold = tl.load(threshold_ptr + offs_c, mask=mask_c)[:, None]
        active, _ = gate(hidden_pre, threshold, 0.0)
        active = active & mask
        acts = hidden_pre * active.to(tl.float32)
        l0 += tl.sum(active.to(tl.int32), 0)
        if penalty_ptr is not None:
            scale = tl.full((BLOCK_C, 1), 1.0, tl.float32)
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0)[:, None]
            penalty += tl.sum(tl.where(mask, penalty_terms(acts, active, scale, tanh_scale, PENALTY), 0.0), 0)
        tl.store(acts_ptr + offs_c[:, None] * n_tokens + offs_t[None, :], acts.to(acts_ptr.dtype.element_ty), mask=mask)
        fired = tl.sum(active.to(tl.int32), 1)
        tl.atomic_add(counts_ptr + offs_c, fired.to(tl.int64), mask=fired > 0, sem="relaxed")
    tl.store(l0_ptr + split * n_tokens + offs_t, l0, mask=mask_t)
    if penalty_ptr is not None:
        tl.store(penalty_ptr + split * n_tokens + offs_t, penalty, mask=mask_t)


@triton.jit(do_not_specialize=["n_features"])
def _gate_tile_backward_kernel(
    hidden_pre_ptr,  # [C, T], without the bias
    b_enc_ptr,  # [C]
    threshold_ptr,  # [C] fp32
    scale_ptr,  # [C] fp32 or None
    grad_penalty_ptr,  # [T] fp32
    # input and output
    grad_ptr,  # [C, T]: the gradient of acts, then that of hidden_pre
    # outputs
    acts_ptr,  # [C, T], perhaps the memory of hidden_pre
    grad_b_enc_ptr,  # [C] fp32
    grad_threshold_ptr,  # [C] fp32
    grad_scale_ptr,  # [C] fp32
    # sizes, strides, scalars
    n_features,  # C
    n_tokens,  # T
    stride_c,  # of hidden_pre
    stride_penalty,
    half_bandwidth,
    inv_bandwidth,
    tanh_scale,
    PENALTY: tl.constexpr,
    STE_TO_INPUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Program owns BLOCK_C features and all their tokens."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    mask_c = offs_c < n_features
    b_enc = tl.load(b_enc_ptr + offs_c, mask=mask_c).to(tl.float32)[:, None]
    threshold = tl.load(threshold_ptr + offs_c, mask=mask_c)[:, None]
    scale = tl.full((BLOCK_C, 1), 1.0, tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0)[:, None]
    b_enc_sum = tl.zeros((BLOCK_C, BLOCK_T), dtype=tl.float32)
    threshold_sum = tl.zeros((BLOCK_C, BLOCK_T), dtype=tl.float32)
    scale_sum = tl.zeros((BLOCK_C, BLOCK_T), dtype=tl.float32)
    for first in range(0, n_tokens, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        mask_t = offs_t < n_tokens
        mask = mask_c[:, None] & mask_t[None, :]
        hidden_pre = tl.load(hidden_pre_ptr + offs_c[:, None] * stride_c + offs_t[None, :], mask=mask, other=0.0)
        hidden_pre = hidden_pre.to(tl.float32) + b_enc
        active, window = gate(hidden_pre, threshold, half_bandwidth)
        acts = hidden_pre * active.to(tl.float32)
        grad_ptrs = grad_ptr + offs_c[:, None] * n_tokens + offs_t[None, :]
        grad_acts = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
        penalty_ptrs = grad_penalty_ptr + offs_t.to(tl.int64) * stride_penalty
        grad_penalty = tl.load(penalty_ptrs, mask=mask_t, other=0.0)[None, :]
        # the gradients behind an open gate and window, which both then are factors of 0 or 1
        is_open = tl.full((BLOCK_C, BLOCK_T), True, tl.int1)
        grad_hidden_pre, grad_threshold, grad_scale = gate_gradients(
            acts, is_open, is_open, grad_acts, grad_penalty, threshold, scale, inv_bandwidth, tanh_scale, PENALTY, False
        )
        grad_hidden_pre = grad_hidden_pre * active.to(tl.float32)
        grad_threshold = grad_threshold * window.to(tl.float32)
        if STE_TO_INPUT:
            grad_hidden_pre -= grad_threshold
        if grad_threshold_ptr is not None:
            threshold_sum += tl.where(mask, grad_threshold, 0.0)
        b_enc_sum += tl.where(mask, grad_hidden_pre, 0.0)
        scale_sum += tl.where(mask, grad_scale, 0.0)
        dtype = acts_ptr.dtype.element_ty
        tl.store(acts_ptr + offs_c[:, None] * n_tokens + offs_t[None, :], acts.to(dtype), mask=mask)
        tl.store(grad_ptrs, grad_hidden_pre.to(dtype), mask=mask)
    b_enc_total, threshold_total, scale_total = tl.reduce((b_enc_sum, threshold_sum, scale_sum), 1, add_three)
    tl.store(grad_b_enc_ptr + offs_c, b_enc_total, mask=mask_c)
    if grad_threshold_ptr is not None:
        tl.store(grad_threshold_ptr + offs_c, threshold_total, mask=mask_c)
    if grad_scale_ptr is not None:
        tl.store(grad_scale_ptr + offs_c, scale_total, mask=mask_c)


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of the products."""
    return dtype


def hidden_pre(x: Tensor, W_enc_t: Tensor, features: Features, out: Tensor | None) -> Tensor:
    """The product of a tile, `[C, T]`; the kernels add `b_enc`."""
    out = x.new_empty(len(W_enc_t), len(x)) if out is None else out
    multiply(W_enc_t, x.t(), out)
    return out


@on_device
def gate_tile(hidden_pre: Tensor, features: Features, spec: AutoencodeSpec, dtype: torch.dtype, is_kept: bool) -> Gated:
    """`..gates.gate_tile`."""
    n_features, n_tokens = hidden_pre.shape
    config = launch_config("gate_tile", hidden_pre)
    splits = min(SPLITS, triton.cdiv(n_features, config["BLOCK_C"]))
    acts = hidden_pre.new_empty(hidden_pre.shape) if is_kept else hidden_pre
    l0 = hidden_pre.new_empty(splits, n_tokens, dtype=torch.int32)
    penalty = None if spec.penalty == "l0" else torch.empty_like(l0, dtype=torch.float32)
    counts = hidden_pre.new_zeros(n_features, dtype=torch.int64)
    if n_tokens > 0:
        _gate_tile_kernel[(triton.cdiv(n_tokens, config["BLOCK_T"]), splits)](
            hidden_pre_ptr=hidden_pre,
            b_enc_ptr=features.b_enc,
            threshold_ptr=features.threshold,
            scale_ptr=features.scale,
            acts_ptr=acts,
            l0_ptr=l0,
            penalty_ptr=penalty,
            counts_ptr=counts,
            n_features=n_features,
            n_tokens=n_tokens,
            stride_c=hidden_pre.stride(0),
            tanh_scale=spec.tanh_scale,
            PENALTY=spec.penalty,
            **config,
        )
    active = l0.sum(0)
    return Gated(acts, active, counts, active if penalty is None else penalty.sum(0))


@on_device
def gate_tile_backward(
    hidden_pre: Tensor,
    W_dec: Tensor,
    grad_out: Tensor,
    grad_penalty: Tensor,
    features: Features,
    spec: AutoencodeSpec,
    is_kept: bool,
) -> GatedGrads:
    """`..gates.gate_tile_backward`."""
    (n_features, n_tokens), config = hidden_pre.shape, launch_config("gate_tile_backward", hidden_pre)
    acts = hidden_pre.new_empty(hidden_pre.shape) if is_kept else hidden_pre
    grad = torch.empty_like(acts)
    multiply(W_dec, grad_out.t(), grad)
    grad_b_enc, grad_threshold, grad_scale = hidden_pre.new_empty(3, n_features, dtype=torch.float32)
    found = GatedGrads(
        acts,
        grad,
        grad_b_enc,
        grad_threshold if spec.bandwidth else None,
        None if features.scale is None else grad_scale,
    )
    _gate_tile_backward_kernel[(triton.cdiv(n_features, config["BLOCK_C"]),)](
        hidden_pre_ptr=hidden_pre,
        b_enc_ptr=features.b_enc,
        threshold_ptr=features.threshold,
        scale_ptr=features.scale,
        grad_penalty_ptr=grad_penalty,
        grad_ptr=grad,
        acts_ptr=acts,
        grad_b_enc_ptr=grad_b_enc,
        grad_threshold_ptr=found.threshold,
        grad_scale_ptr=found.scale,
        n_features=n_features,
        n_tokens=n_tokens,
        stride_c=hidden_pre.stride(0),
        stride_penalty=grad_penalty.stride(0),
        half_bandwidth=spec.bandwidth / 2,
        inv_bandwidth=1 / spec.bandwidth if spec.bandwidth > 0 else 0.0,
        tanh_scale=spec.tanh_scale,
        PENALTY=spec.penalty,
        STE_TO_INPUT=spec.ste_to_input and spec.bandwidth > 0,
        **config,
    )
    return found
