"""A weight's gradient and its Adam step in one visit of each feature: the gradient is never written.

    g_j  = sum over the entries e of feature j of  weight_e * vector[token_e]     as in `backward`, in fp32
    g_j += extra_j                                                                another gradient, if the flag is set
    g_j -= (g_j . p_j) p_j                                                        `project`: rows of unit norm
    g_j *= scale                                                                  clipping by a norm found before
    m, v = beta1 m + (1 - beta1) g,  beta2 v + (1 - beta2) g^2
    p_j -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)           torch.optim.Adam's arithmetic
    p_j /= max(|p_j|, 1e-8)                                                       `unit_norm`
    copy_j = p_j                                                                  for the next product, 16 bits

Letters: `S` features, `D` the row's length, `B` tokens. A program holds one row whole, in registers, for projection and
norm need all of it; a feature that fires on every token is one long loop of one program.

Traffic per element of the parameter, fp32: 24 bytes (p, m, v read and written), 16 without m, 2 more for the copy; writing
the gradient and reading it back would add 8. The gathers are those of `backward`: one vector per entry. With beta1 = 0 a
row without entries moves nothing, if `last_step` says to when its v is up to date.

**Clipping by the exact global norm** needs every gradient before the first step, so `grad_norms` gathers all of them, and
`adam_rows` again: D vector elements per entry once more, and p once more with `project`. Writing the gradient costs 8 bytes
per element instead (and 4 of memory), so it is cheaper from 4 entries per feature and step on for vectors of 16 bits, from
2 for fp32, where they come from DRAM, and from half as many again where they come from the L2 cache.

Numerics: cast to fp32 after loading, accumulated in fp32 in a fixed order: deterministic. Moments in bf16 are rounded to the
nearest on their way out. That suits m; a v in bf16 stands still once a step changes it by less than 1 part in 512, so with
beta2 = 0.999 it does not decay any more: keep v in fp32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import launch_config, on_device
from fastsae_kernels.gpu.feature_sums import FeatureOrder
from fastsae_kernels.gpu.tiles import MAX_DEPTH
from fastsae_kernels.gpu.weight_gradients import keep_for_this_stream


class Entries(NamedTuple):
    """What the gradient of each row is the sum of; a kernel sees pointers in place of tensors."""

    offsets: Tensor  # [S + 1] int64
    order: Tensor  # [nnz] int64: entries by feature, then token
    tokens: Tensor | None  # [nnz] int64: token of each entry; None: entry // row_length
    weights: Tensor  # [nnz]
    vectors: Tensor  # [B, D]
    extra: Tensor | None  # [S, D]
    extra_flag: Tensor | None  # [1] int32: extra counts where it is not 0; None: it counts
    row_length: int
    depth: int  # D
    stride_vb: int
    stride_vd: int
    stride_xs: int
    stride_xd: int


@triton.jit
def _extent(entries, feature):
    """`(start, count, extra_depth)`: where a feature's entries lie, and D, or 0 where extra does not count."""
    start = tl.load(entries.offsets + feature)
    count = (tl.load(entries.offsets + feature + 1) - start).to(tl.int32)
    extra_depth = 0 if entries.extra is None else entries.depth
    if entries.extra_flag is not None:
        extra_depth = tl.where(tl.load(entries.extra_flag) != 0, entries.depth, 0)
    return start, count, extra_depth


@triton.jit
def _row_gradient(
    entries, feature, start, count, extra_depth, offs_d, mask_d, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """`[BLOCK_D]` fp32: the sum of weight * vector over a feature's entries, and its extra gradient."""
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(0, count, BLOCK_E):
        offs_e = first + tl.arange(0, BLOCK_E)
        mask_e = offs_e < count
        entry = tl.load(entries.order + start + offs_e, mask=mask_e, other=0)
        if entries.tokens is not None:
            token = tl.load(entries.tokens + entry, mask=mask_e, other=0)
        else:
            token = (entry.to(tl.int32) // entries.row_length).to(tl.int64)
        weight = tl.load(entries.weights + entry, mask=mask_e, other=0.0).to(tl.float32)
        v_ptrs = entries.vectors + token[:, None] * entries.stride_vb + offs_d[None, :] * entries.stride_vd
        used = mask_e & (weight != 0.0)
        vectors = tl.load(v_ptrs, mask=used[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(weight[:, None] * vectors, 0)
    if entries.extra is not None:
        x_ptrs = entries.extra + feature * entries.stride_xs + offs_d * entries.stride_xd
        acc += tl.load(x_ptrs, mask=offs_d < extra_depth, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _grad_norms_kernel(
    entries,  # Entries
    param_ptr,  # [S, D] fp32
    # output
    norms_ptr,  # [S] fp32
    stride_ps,
    stride_pd,
    PROJECT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program owns one feature: the squared norm of its gradient."""
    feature = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < entries.depth
    start, count, extra_depth = _extent(entries, feature)
    g = _row_gradient(entries, feature, start, count, extra_depth, offs_d, mask_d, BLOCK_E, BLOCK_D)
    if PROJECT:
        p = tl.load(param_ptr + feature * stride_ps + offs_d * stride_pd, mask=mask_d, other=0.0)
        g -= tl.sum(g * p, 0) * p
    tl.store(norms_ptr + feature, tl.sum(g * g, 0))


@triton.jit
def _row(ptrs, mask_d):
    return tl.load(ptrs, mask=mask_d, other=0.0).to(tl.float32)


# a step of 1 or a multiple of 16 must not compile again
@triton.jit(do_not_specialize=["step"])
def _adam_rows_kernel(
    entries,  # Entries
    scale_ptr,  # fp32 or None
    # inputs and outputs
    param_ptr,  # [S, D] fp32
    exp_avg_ptr,  # [S, D] or None: m is the gradient
    exp_avg_sq_ptr,  # [S, D]
    last_step_ptr,  # [S] int32 or None: the step to which each row of v has decayed
    # output
    copy_ptr,  # [S, D] or None
    # scalars
    step_size,
    beta1_rest,  # 1 - beta1, which fp32 would not give from beta1
    beta2,
    beta2_rest,
    log2_beta2,
    root2,  # sqrt(1 - beta2^t)
    eps,
    step,
    # strides
    stride_ps,
    stride_pd,
    stride_ms,
    stride_md,
    stride_qs,  # of exp_avg_sq
    stride_qd,
    stride_cs,
    stride_cd,
    PROJECT: tl.constexpr,
    UNIT_NORM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,  # 16 divides D: loads take 16 bytes, which leaves registers for more of them under way
):
    """Program owns one feature: its gradient, both moments, its row."""
    feature = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < entries.depth
    start, count, extra_depth = _extent(entries, feature)
    if last_step_ptr is not None:  # noqa: SIM102 a compile-time branch must stand alone
        if (count == 0) & (extra_depth == 0):
            return
    if last_step_ptr is not None:
        # ahead of the row: between its loads this costs spilled registers
        missed = step - 1 - tl.load(last_step_ptr + feature)
        catching_up = tl.exp2(missed.to(tl.float32) * log2_beta2)
    p_ptrs = param_ptr + feature * stride_ps + offs_d * stride_pd
    q_ptrs = exp_avg_sq_ptr + feature * stride_qs + offs_d * stride_qd
    if exp_avg_ptr is not None:
        m_ptrs = exp_avg_ptr + feature * stride_ms + offs_d * stride_md
    if EVEN:  # the row and its moments arrive during the gather
        p, v = _row(p_ptrs, mask_d), _row(q_ptrs, mask_d)
        if exp_avg_ptr is not None:
            m_before = _row(m_ptrs, mask_d)
    g = _row_gradient(entries, feature, start, count, extra_depth, offs_d, mask_d, BLOCK_E, BLOCK_D)
    if not EVEN:
        p, v = _row(p_ptrs, mask_d), _row(q_ptrs, mask_d)
        if exp_avg_ptr is not None:
            m_before = _row(m_ptrs, mask_d)
    if PROJECT:
        g -= tl.sum(g * p, 0) * p
    if scale_ptr is not None:
        g *= tl.load(scale_ptr)
    if last_step_ptr is not None:
        v *= catching_up
    v = v * beta2 + beta2_rest * g * g
    m = g
    if exp_avg_ptr is not None:
        m = m_before + beta1_rest * (g - m_before)
    if EVEN:
        # to 2 units in the last place; correctly rounded, each would call a slow path where v is 0
        p -= step_size * (m / (tl.sqrt(v) / root2 + eps))
    else:
        # in line, a division of elements that are loaded one by one spills registers
        p -= step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root2) + eps)
    if UNIT_NORM:
        # with eps = 0 the lanes behind the row are 0 / 0
        norm = tl.sqrt_rn(tl.sum(tl.where(mask_d, p * p, 0.0), 0))
        norm = tl.maximum(norm, 1e-8, propagate_nan=tl.PropagateNan.ALL)
        p = p / norm if EVEN else tl.div_rn(p, norm)
    # last_step, and an element of a short row, is read by several threads and written by one
    tl.debug_barrier()
    tl.store(p_ptrs, p, mask=mask_d)
    tl.store(q_ptrs, v.to(exp_avg_sq_ptr.dtype.element_ty), mask=mask_d)
    if exp_avg_ptr is not None:
        tl.store(m_ptrs, m.to(exp_avg_ptr.dtype.element_ty), mask=mask_d)
    if copy_ptr is not None:
        c_ptrs = copy_ptr + feature * stride_cs + offs_d * stride_cd
        tl.store(c_ptrs, p.to(copy_ptr.dtype.element_ty), mask=mask_d)
    if last_step_ptr is not None:
        tl.store(last_step_ptr + feature, step)


def _strides(matrix: Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else (matrix.stride(0), matrix.stride(1))


@on_device
def _launch(
    param: Tensor,
    kernel: Any,
    table: str,
    by_feature: FeatureOrder,
    weights: Tensor,
    vectors: Tensor,
    extra: Tensor | None,
    extra_flag: Tensor | None,
    project: bool,
    **others: Any,
) -> None:
    """One program per row of `param`, as many warps as the row's length asks for."""
    n_rows, depth = param.shape
    if depth > MAX_DEPTH:
        raise ValueError(f"param: expected rows of at most {MAX_DEPTH} elements, got {depth}")
    config = launch_config(table, vectors, odd=depth % 16 != 0)
    block_d = triton.next_power_of_2(depth)
    entries = Entries(
        by_feature.offsets, by_feature.order, by_feature.tokens, weights.contiguous(), vectors, extra, extra_flag,
        by_feature.row_length, depth, vectors.stride(0), vectors.stride(1), *_strides(extra),
    )  # fmt: skip
    kernel[(n_rows,)](
        entries=entries,
        param_ptr=param,
        stride_ps=param.stride(0),
        stride_pd=param.stride(1),
        PROJECT=project,
        BLOCK_E=config["BLOCK_E"],
        BLOCK_D=block_d,
        num_warps=max(1, block_d // config["D_PER_WARP"]),
        **others,
    )
    keep_for_this_stream(*entries[:7])


def grad_norms(
    by_feature: FeatureOrder,
    weights: Tensor,
    vectors: Tensor,
    param: Tensor,
    *,
    extra: Tensor | None = None,
    extra_flag: Tensor | None = None,
    project: bool = False,
) -> Tensor:
    """Squared norm of each row's gradient, `[S]` fp32, before `scale`; arguments as in `adam_rows`.

    `scale = (max_norm / (sum over all parameters).sqrt()).clamp(max=1)` clips by the global norm without a synchronisation.
    """
    norms = torch.empty(param.shape[0], dtype=torch.float32, device=param.device)
    operands = (by_feature, weights, vectors, extra, extra_flag)
    _launch(param, _grad_norms_kernel, "grad_norms", *operands, project, norms_ptr=norms)
    return norms


def adam_rows(
    by_feature: FeatureOrder,
    weights: Tensor,
    vectors: Tensor,
    param: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    extra: Tensor | None = None,
    extra_flag: Tensor | None = None,
    project: bool = False,
    unit_norm: bool = False,
    scale: Tensor | None = None,
    last_step: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """One step of Adam on the rows of `param`, in place and outside autograd; the formulas are the module's.

    Args:
        by_feature: The entries by feature.
        weights: `[nnz]` weight of each entry, before ordering.
        vectors: `[B, D]`, what the weights weigh.
        param: `[S, D]` fp32, any strides, `D` at most 8192.
        exp_avg: `[S, D]` fp32 or bf16; None exactly where `beta1` is 0.
        exp_avg_sq: `[S, D]` fp32 or bf16.
        lr, beta1, beta2, eps: As in `torch.optim.Adam`.
        step: Number of this step, from 1.
        extra: `[S, D]`, added to the gradient.
        extra_flag: `[1]` int32: `extra` is read and added where it is not 0, alone; None: `extra` is.
        project: Remove the gradient's part along the row, which has unit norm.
        unit_norm: Divide the row by its norm afterwards.
        scale: 0-d fp32, what the gradient is multiplied with.
        last_step: `[S]` int32, zeros at first, with `beta1 = 0` alone: rows without entries are left as they are, unless
            `extra` is added; their v decays when next they are touched, and lacks `beta2 ** (step - last_step)` until
            then. Under `unit_norm` rows must have had unit norm before, under `copy` the copy must have been whole.
        copy: `[S, D]` bf16 or fp16, overwritten with the row.

    Raises:
        ValueError: A row is too long, or `beta1` disagrees with `exp_avg` or `last_step`.
    """
    if (exp_avg is None) != (beta1 == 0):
        raise ValueError(f"exp_avg: expected None exactly where beta1 is 0, got beta1 = {beta1}")
    if last_step is not None and beta1 != 0:
        raise ValueError(f"last_step: expected beta1 = 0, for otherwise every row moves in every step, got {beta1}")
    stride_ms, stride_md = _strides(exp_avg)
    stride_cs, stride_cd = _strides(copy)
    _launch(
        param,
        _adam_rows_kernel,
        "adam_rows",
        by_feature,
        weights,
        vectors,
        extra,
        extra_flag,
        project,
        scale_ptr=scale,
        exp_avg_ptr=exp_avg,
        exp_avg_sq_ptr=exp_avg_sq,
        last_step_ptr=last_step,
        copy_ptr=copy,
        step_size=lr / (1 - beta1**step),
        beta1_rest=1 - beta1,
        beta2=beta2,
        beta2_rest=1 - beta2,
        log2_beta2=math.log2(max(beta2, 1e-30)),  # beta2 = 0 forgets all of v, however little this leaves of it
        root2=math.sqrt(1 - beta2**step),
        eps=eps,
        step=step,
        stride_ms=stride_ms,
        stride_md=stride_md,
        stride_qs=exp_avg_sq.stride(0),
        stride_qd=exp_avg_sq.stride(1),
        stride_cs=stride_cs,
        stride_cd=stride_cd,
        UNIT_NORM=unit_norm,
        EVEN=param.shape[1] % 16 == 0,
    )
