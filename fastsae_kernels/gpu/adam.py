"""A weight's gradient and its Adam step in one pass over each row: the gradient is never written.

    g_j  = sum over the entries e of feature j of  weight_e * vector[token_e]     as in `backward`, in fp32
    g_j += extra_j                                                                another gradient, if the flag is set
    g_j -= (g_j . p_j) p_j                                                        `project`: rows of unit norm
    g_j *= scale                                                                  clipping by a norm found before
    m, v = beta1 m + (1 - beta1) g,  beta2 v + (1 - beta2) g^2
    p_j -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)           torch.optim.Adam's arithmetic
    p_j /= max(|p_j|, 1e-8)                                                       `unit_norm`
    copy_j = p_j                                                                  for the next product, 16 bits

Letters: `S` features, `D` the row's length, `B` tokens. A program holds one row whole, in registers, for projection and
norm need all of it, as two pieces that leave few lanes idle (`tiles.pieces_of`); a feature that fires on every token is one
long loop of one program.

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

from fastsae_kernels.gpu.config import on_device
from fastsae_kernels.gpu.feature_sums import entries_of, feature_sum, row_config
from fastsae_kernels.gpu.tiles import MAX_DEPTH, Matrix, columns_of_pieces, matrix_of, read_row, write_row
from fastsae_kernels.gpu.weight_gradients import RowSums, keep_for_this_stream


@triton.jit
def _extent(entries, feature):
    """`(start, count)`: where a feature's entries lie."""
    start = tl.load(entries.offsets + feature)
    return start, (tl.load(entries.offsets + feature + 1) - start).to(tl.int32)


@triton.jit
def _extra_depth(entries, extra, extra_flag_ptr):
    """D, or 0 where the extra gradient does not count."""
    depth = 0 if extra is None else entries.depth
    if extra_flag_ptr is not None:
        depth = tl.where(tl.load(extra_flag_ptr) != 0, entries.depth, 0)
    return depth


@triton.jit
def _row_gradient(entries, extra, extra_flag_ptr, feature, start, count, columns_1, columns_2, BLOCK_E: tl.constexpr):
    """Both pieces of a row, fp32: the sum of weight * vector over a feature's entries, and its extra gradient."""
    g_1, g_2 = feature_sum(entries, start, count, columns_1, columns_2, BLOCK_E)
    if extra is not None:
        # the flag is read after the gather, during which it would take a register
        extra_depth = _extra_depth(entries, extra, extra_flag_ptr)
        extra_1, extra_2 = read_row(extra, feature, columns_1, columns_2, extra_depth)
        g_1 += extra_1
        g_2 += extra_2
    return g_1, g_2


@triton.jit
def _without_part_along(g_1, g_2, p_1, p_2):
    """Both pieces of a gradient less its part along a row of unit norm."""
    along = tl.sum(g_1 * p_1, 0) + tl.sum(g_2 * p_2, 0)
    return g_1 - along * p_1, g_2 - along * p_2


@triton.jit
def _grad_norms_kernel(
    entries,  # Entries
    extra,  # Matrix or None
    extra_flag_ptr,  # [1] int32: extra counts where it is not 0; None: it counts
    param,  # Matrix, fp32
    # output
    norms_ptr,  # [S] fp32
    PROJECT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
):
    """Program owns one feature: the squared norm of its gradient."""
    feature = tl.program_id(0).to(tl.int64)
    columns_1, columns_2 = columns_of_pieces(BLOCK_1, BLOCK_2)
    start, count = _extent(entries, feature)
    g_1, g_2 = _row_gradient(entries, extra, extra_flag_ptr, feature, start, count, columns_1, columns_2, BLOCK_E)
    if PROJECT:
        p_1, p_2 = read_row(param, feature, columns_1, columns_2, entries.depth)
        g_1, g_2 = _without_part_along(g_1, g_2, p_1, p_2)
    tl.store(norms_ptr + feature, tl.sum(g_1 * g_1, 0) + tl.sum(g_2 * g_2, 0))


class Step(NamedTuple):
    """The numbers of one step of Adam."""

    size: float  # lr / (1 - beta1^t)
    beta1_rest: float  # 1 - beta1, which fp32 would not give from beta1
    beta2: float
    beta2_rest: float
    log2_beta2: float
    root2: float  # sqrt(1 - beta2^t)
    eps: float


@triton.jit
def _moved(p, m, v, step):
    """One piece of a row after a step, from its moments after it."""
    # to 2 units in the last place; correctly rounded, each would call a slow path where v is 0
    return p - step.size * (m / (tl.sqrt(v) / step.root2 + step.eps))


# a step of 1 or a multiple of 16 must not compile again
@triton.jit(do_not_specialize=["number"])
def _adam_rows_kernel(
    entries,  # Entries
    extra,  # Matrix or None
    extra_flag_ptr,  # [1] int32: extra counts where it is not 0; None: it counts
    scale_ptr,  # fp32 or None
    # inputs and outputs
    param,  # Matrix, fp32
    exp_avg,  # Matrix, or None: m is the gradient
    exp_avg_sq,  # Matrix
    last_step_ptr,  # [S] int32 or None: the step to which each row of v has decayed
    # output
    copy,  # Matrix or None
    # scalars
    step,  # Step
    number,  # of the step
    PROJECT: tl.constexpr,
    UNIT_NORM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
):
    """Program owns one feature: its gradient, both moments, its row."""
    feature = tl.program_id(0).to(tl.int64)
    columns_1, columns_2 = columns_of_pieces(BLOCK_1, BLOCK_2)
    depth = entries.depth
    start, count = _extent(entries, feature)
    if last_step_ptr is not None:  # noqa: SIM102 a compile-time branch must stand alone
        if (count == 0) & (_extra_depth(entries, extra, extra_flag_ptr) == 0):
            return
    if last_step_ptr is not None:
        # ahead of the row: between its loads this costs spilled registers
        missed = number - 1 - tl.load(last_step_ptr + feature)
        catching_up = tl.exp2(missed.to(tl.float32) * step.log2_beta2)
    # the row and its moments arrive during the gather
    p_1, p_2 = read_row(param, feature, columns_1, columns_2, depth)
    v_1, v_2 = read_row(exp_avg_sq, feature, columns_1, columns_2, depth)
    if exp_avg is not None:
        m_1, m_2 = read_row(exp_avg, feature, columns_1, columns_2, depth)
    g_1, g_2 = _row_gradient(entries, extra, extra_flag_ptr, feature, start, count, columns_1, columns_2, BLOCK_E)
    if PROJECT:
        g_1, g_2 = _without_part_along(g_1, g_2, p_1, p_2)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
        g_1 *= scale
        g_2 *= scale
    if last_step_ptr is not None:
        v_1 *= catching_up
        v_2 *= catching_up
    v_1 = v_1 * step.beta2 + step.beta2_rest * g_1 * g_1
    v_2 = v_2 * step.beta2 + step.beta2_rest * g_2 * g_2
    if exp_avg is not None:
        m_1 += step.beta1_rest * (g_1 - m_1)
        m_2 += step.beta1_rest * (g_2 - m_2)
    else:
        m_1, m_2 = g_1, g_2
    p_1 = _moved(p_1, m_1, v_1, step)
    p_2 = _moved(p_2, m_2, v_2, step)
    if UNIT_NORM:
        # with eps = 0 the lanes behind the row are 0 / 0
        square = tl.sum(tl.where(columns_1 < depth, p_1 * p_1, 0.0), 0)
        square += tl.sum(tl.where(columns_2 < depth, p_2 * p_2, 0.0), 0)
        norm = tl.maximum(tl.sqrt_rn(square), 1e-8, propagate_nan=tl.PropagateNan.ALL)
        p_1 /= norm
        p_2 /= norm
    # last_step, and an element of a short row, is read by several threads and written by one
    tl.debug_barrier()
    write_row(param, feature, columns_1, columns_2, depth, p_1, p_2)
    write_row(exp_avg_sq, feature, columns_1, columns_2, depth, v_1, v_2)
    if exp_avg is not None:
        write_row(exp_avg, feature, columns_1, columns_2, depth, m_1, m_2)
    if copy is not None:
        write_row(copy, feature, columns_1, columns_2, depth, p_1, p_2)
    if last_step_ptr is not None:
        tl.store(last_step_ptr + feature, number)


def _matrix(rows: Tensor | None) -> Matrix | None:
    return None if rows is None else matrix_of(rows)


@on_device
def _launch(param: Tensor, kernel: Any, table: str, sums: RowSums, project: bool, **others: Any) -> None:
    """One program per row of `param`, as many warps as the row's length asks for."""
    n_rows, depth = param.shape
    if depth > MAX_DEPTH:
        raise ValueError(f"param: expected rows of at most {MAX_DEPTH} elements, got {depth}")
    entries = entries_of(sums.by_feature, sums.weights, sums.vectors)
    kernel[(n_rows,)](
        entries=entries,
        extra=_matrix(sums.extra),
        extra_flag_ptr=sums.extra_flag,
        param=_matrix(param),
        PROJECT=project,
        **row_config(table, sums.vectors),
        **others,
    )
    keep_for_this_stream(*entries[:5], sums.extra, sums.extra_flag)


def grad_norms(sums: RowSums, param: Tensor, *, project: bool = False) -> Tensor:
    """Squared norm of each row's gradient, `[S]` fp32, before `scale`; arguments as in `adam_rows`.

    `scale = (max_norm / (sum over all parameters).sqrt()).clamp(max=1)` clips by the global norm without a synchronisation.
    """
    norms = torch.empty(param.shape[0], dtype=torch.float32, device=param.device)
    _launch(param, _grad_norms_kernel, "feature_sums", sums, project, norms_ptr=norms)
    return norms


def adam_rows(
    sums: RowSums,
    param: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    project: bool = False,
    unit_norm: bool = False,
    scale: Tensor | None = None,
    last_step: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """One step of Adam on the rows of `param`, in place and outside autograd; the formulas are the module's.

    Args:
        sums: What the gradient is the sum of.
        param: `[S, D]` fp32, any strides, `D` at most 8192.
        exp_avg: `[S, D]` fp32 or bf16; None exactly where `beta1` is 0.
        exp_avg_sq: `[S, D]` fp32 or bf16.
        lr, beta1, beta2, eps: As in `torch.optim.Adam`.
        step: Number of this step, from 1.
        project: Remove the gradient's part along the row, which has unit norm.
        unit_norm: Divide the row by its norm afterwards.
        scale: 0-d fp32, what the gradient is multiplied with.
        last_step: `[S]` int32, zeros at first, with `beta1 = 0` alone: rows without entries are left as they are, unless
            `sums.extra` is added; their v decays when next they are touched, and lacks `beta2 ** (step - last_step)` until
            then. Under `unit_norm` rows must have had unit norm before, under `copy` the copy must have been whole.
        copy: `[S, D]` bf16 or fp16, overwritten with the row.

    Raises:
        ValueError: A row is too long, or `beta1` disagrees with `exp_avg` or `last_step`.
    """
    if (exp_avg is None) != (beta1 == 0):
        raise ValueError(f"exp_avg: expected None exactly where beta1 is 0, got beta1 = {beta1}")
    if last_step is not None and beta1 != 0:
        raise ValueError(f"last_step: expected beta1 = 0, for otherwise every row moves in every step, got {beta1}")
    numbers = Step(
        size=lr / (1 - beta1**step),
        beta1_rest=1 - beta1,
        beta2=beta2,
        beta2_rest=1 - beta2,
        log2_beta2=math.log2(max(beta2, 1e-30)),  # beta2 = 0 forgets all of v, however little this leaves of it
        root2=math.sqrt(1 - beta2**step),
        eps=eps,
    )
    _launch(
        param,
        _adam_rows_kernel,
        "adam_rows",
        sums,
        project,
        scale_ptr=scale,
        exp_avg=_matrix(exp_avg),
        exp_avg_sq=_matrix(exp_avg_sq),
        last_step_ptr=last_step,
        copy=_matrix(copy),
        step=numbers,
        number=step,
        UNIT_NORM=unit_norm,
    )
