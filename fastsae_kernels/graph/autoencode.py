"""The training pass as PyTorch's custom ops.

    fastsae::autoencode(...)           -> sae_out, penalty, l0, feature_counts, min_active, squared_error, saved
    fastsae::autoencode_backward(...)  -> one gradient per parameter, empty where not asked for

A graph needs sizes that do not depend on the data, so what the backward needs is `saved` in a fixed number of places:
on a GPU those of the kernels, on a CPU as many as the sparse path can ever use, of which only the used ones are touched.
Eager code takes the shorter way in `autograd.py` with exact sizes; both run the same backends.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from fastsae_kernels import chunked, cpu
from fastsae_kernels.dispatch import MAX_DENSITY, ActivityHint, Backend, backend_of, forced_backend
from fastsae_kernels.gradients import AutoencodeGrads, AutoencodeNeeds, AutoencodeOutput
from fastsae_kernels.residual import row_gradients, scaled
from fastsae_kernels.sparse_acts import SparseActs
from fastsae_kernels.spec import AutoencodeSpec

BY_ACTIVITY = -1  # as a capacity: a CPU looks at the activity itself
DENSE = 0  # as a capacity: the chunked dense path
GRAPH_CAPACITY = ActivityHint.UNKNOWN  # a row with more entries is exact and slower
Parameters = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]
BITS = {4: torch.int32, 8: torch.int64}  # saved values travel as integers, which have no gradient


def _backend(x: Tensor, capacity: int) -> Backend:
    return "dense" if capacity == DENSE else backend_of(x)


def _row_places(spec: AutoencodeSpec, d_sae: int, capacity: int) -> int:
    """Places of a row in what the kernels save."""
    from fastsae_kernels.gpu import row_topk, topk  # Triton is optional, so its kernels are imported on first use

    capacity = GRAPH_CAPACITY if capacity == BY_ACTIVITY else capacity
    if spec.k is None:
        return min(capacity, d_sae, topk.MAX_SORT)
    if spec.batch_topk or spec.bandwidth == 0:
        return min(spec.k, d_sae)
    return row_topk.capacity_of(min(spec.k, d_sae), d_sae)


def _never_overflows(spec: AutoencodeSpec, d_sae: int, capacity: int) -> bool:
    only_active = spec.k is not None and spec.bandwidth == 0
    return only_active or _row_places(spec, d_sae, capacity) == d_sae


def _places(x: Tensor, d_sae: int, spec: AutoencodeSpec, capacity: int) -> int:
    """Places for the entries of a pass."""
    n_tokens, backend = x.shape[0], _backend(x, capacity)
    if backend == "dense":
        return 1
    if backend == "triton":
        return n_tokens * _row_places(spec, d_sae, capacity)
    # rounded up: what is sparse outside of a graph is sparse inside
    share = int(MAX_DENSITY["cpu"] * d_sae) + 1 if forced_backend() is None else d_sae
    if spec.k is not None:
        share = min(spec.k if spec.bandwidth == 0 else spec.k + share, d_sae)
    return n_tokens * share + 1


@library.custom_op("fastsae::autoencode", mutates_args=())
def autoencode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    feature_scale: Tensor | None,
    target: Tensor | None,
    bandwidth: float,
    k: int | None,
    batch_topk: bool,
    penalty: str,
    tanh_scale: float,
    ste_to_input: bool,
    capacity: int,
    hint: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The forward pass; `saved` holds `row_offsets, row_counts, indices, value bits, overflowed`."""
    spec = AutoencodeSpec(bandwidth, k, batch_topk, penalty, tanh_scale, ste_to_input)  # type: ignore[arg-type]
    tensors = (x, W_enc, b_enc, threshold, W_dec, b_dec, feature_scale)
    known = ActivityHint.of(hint)
    places = _places(x, W_enc.shape[1], spec, capacity)
    output, saved = _forward(tensors, target, spec, capacity, places, known)
    min_active, squared_error = output.min_active, output.squared_error
    if min_active is None:
        min_active = torch.full((), float("inf"), dtype=output.penalty.dtype, device=x.device)
    if squared_error is None:
        squared_error = output.penalty.new_empty(0)
    return output.sae_out, output.penalty, output.l0, output.feature_counts, min_active, squared_error, saved


def _forward(
    tensors: Parameters,
    target: Tensor | None,
    spec: AutoencodeSpec,
    capacity: int,
    places: int,
    hint: ActivityHint | None,
) -> tuple[AutoencodeOutput, list[Tensor]]:
    x, W_enc, _, threshold, *_ = tensors
    backend = _backend(x, capacity)
    if backend == "triton":
        from fastsae_kernels import gpu

        places_of_row = GRAPH_CAPACITY if capacity == BY_ACTIVITY else capacity
        output, state = gpu.autoencode_forward(*tensors, spec, places_of_row, target)
        if hint is not None:
            hint.plan_next(state.listed, W_enc.shape[1])
        return output, _pack_gpu(state, x)
    if backend == "cpu":
        output_or_none = cpu.autoencode_forward(*tensors, spec, places if spec.k is None else None, target)
        if output_or_none is not None and output_or_none.acts is not None:
            return output_or_none, _pack(output_or_none.acts, places)
    if spec.k is not None:
        raise ValueError("x, W_enc, b_enc: expected finite values where k is given, got NaN or Inf")
    output = chunked.autoencode_forward(*tensors, spec, target)
    if hint is not None:
        hint.plan_next(output.l0, W_enc.shape[1])
    return output, _empty_saved(x, threshold, places)


def _empty_saved(x: Tensor, threshold: Tensor, places: int) -> list[Tensor]:
    """`row_offsets, row_counts, indices, value bits, overflowed`: counts of -1 say that the dense path ran."""
    n_tokens = x.shape[0]
    return [
        x.new_zeros(n_tokens + 1, dtype=torch.int32),
        x.new_full((n_tokens,), -1, dtype=torch.int32),
        x.new_empty(places, dtype=torch.int32),
        x.new_empty(places, dtype=BITS[threshold.element_size()]),
        x.new_zeros(n_tokens, dtype=torch.bool),
    ]


def _pack(acts: SparseActs, places: int) -> list[Tensor]:
    if acts.indices.numel() > places:
        raise ValueError(
            f"bandwidth: expected a window with at most {places} entries where a graph is compiled, got {acts.indices.numel()}"
        )
    saved = _empty_saved(acts.row_offsets, acts.values, places)
    saved[0] = acts.row_offsets.int()
    saved[1] = acts.row_offsets.diff().int()
    saved[2][: acts.indices.numel()] = acts.indices
    saved[3][: acts.values.numel()] = acts.values.detach().view(saved[3].dtype)
    saved[4] = torch.zeros(acts.shape[0], dtype=torch.bool)
    return saved


def _pack_gpu(state: Any, x: Tensor) -> list[Tensor]:
    acts, overflow = state.acts, state.overflow
    flagged = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    if overflow is not None:
        order = torch.arange(x.shape[0], device=x.device)
        flagged[overflow.rows] = order < overflow.n_rows
    counts = acts.row_offsets.diff() if acts.row_counts is None else acts.row_counts
    return [acts.row_offsets, counts.int(), acts.indices, acts.values.view(torch.int32), flagged]


@autoencode.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    x, W_enc, _, threshold, W_dec, _, _, target = inputs[:8]
    *options, capacity, _ = inputs[8:]
    n_tokens, d_sae = x.shape[0], W_enc.shape[1]
    places = _places(x, d_sae, AutoencodeSpec(*options), capacity)
    return (
        x.new_empty(n_tokens, W_dec.shape[1]),
        threshold.new_empty(n_tokens),
        x.new_empty(n_tokens, dtype=torch.int64),
        x.new_empty(d_sae, dtype=torch.int64),
        threshold.new_empty(()),
        threshold.new_empty(0 if target is None else n_tokens),
        _empty_saved(x, threshold, places),
    )


@library.custom_op("fastsae::autoencode_backward", mutates_args=())
def autoencode_backward(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    feature_scale: Tensor | None,
    saved: list[Tensor],
    grad_out: Tensor,
    grad_penalty: Tensor,
    row_scale: Tensor | None,
    bandwidth: float,
    k: int | None,
    batch_topk: bool,
    penalty: str,
    tanh_scale: float,
    ste_to_input: bool,
    capacity: int,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of the seven tensors, in order; an empty tensor where none is asked for.

    That of row n of sae_out is `row_scale[n] * grad_out[n]`.
    """
    spec = AutoencodeSpec(bandwidth, k, batch_topk, penalty, tanh_scale, ste_to_input)  # type: ignore[arg-type]
    wanted = _wanted(needs)
    shared = (threshold, W_dec, feature_scale, spec, grad_out, grad_penalty, wanted, row_scale)
    acts = _unpack(saved, W_enc.shape[1], threshold.dtype)
    backend = _backend(x, capacity)
    if backend == "triton":
        from fastsae_kernels import gpu

        overflow = None if _never_overflows(spec, W_enc.shape[1], capacity) else gpu.Overflow(*gpu.flag_rows(saved[4]))
        state = gpu.Saved(
            x, W_enc, b_enc, threshold, W_dec, b_dec, feature_scale, spec, acts, overflow, listed=saved[1]
        )
        grads = gpu.autoencode_backward(state, grad_out, grad_penalty, wanted, row_scale)
    elif backend == "cpu" and (x.shape[0] == 0 or int(saved[1][0]) >= 0):
        grads = cpu.autoencode_backward(_packed(acts), x, W_enc, *shared)
    else:
        grads = chunked.autoencode_backward(x, W_enc, b_enc, *shared)
    return _given_or_empty(grads, (x, W_enc, b_enc, threshold, W_dec, b_dec, feature_scale), wanted)


def _wanted(needs: list[bool]) -> AutoencodeNeeds:
    x, W_enc, W_dec = needs
    return AutoencodeNeeds(x, W_enc, W_dec)


def _unpack(saved: list[Tensor], d_sae: int, dtype: torch.dtype) -> SparseActs:
    row_offsets, row_counts, indices, bits, _ = saved
    return SparseActs(row_offsets, indices, bits.view(dtype), (row_counts.numel(), d_sae), row_counts)


def _packed(acts: SparseActs) -> SparseActs:
    used = int(acts.row_offsets[-1])
    return SparseActs(acts.row_offsets, acts.indices[:used], acts.values[:used], acts.shape)


def _given_or_empty(grads: AutoencodeGrads, inputs: tuple[Tensor | None, ...], needs: AutoencodeNeeds) -> list[Tensor]:
    """Fresh contiguous tensors in the layout that the fake op promises; `W_enc`'s gradient feature-major."""
    asked = (needs.x, needs.W_enc, True, True, needs.W_dec, True, True)
    return [
        like.new_empty(0)
        if like is not None and (grad is None or not want)
        else laid_out(grad.to(like.dtype), like)
        if like is not None and grad is not None
        else grads.threshold.new_empty(0)
        for grad, like, want in zip(grads, inputs, asked, strict=True)
    ]


def laid_out(grad: Tensor, like: Tensor) -> Tensor:
    """A fresh tensor in the order of `like`: what a fake op can promise."""
    transposed = like.dim() == 2 and like.stride(0) == 1 and like.stride(1) != 1
    return grad.t().contiguous().t() if transposed else grad.contiguous()


@autoencode_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    inputs, threshold, wanted = arguments[:7], arguments[3], _wanted(arguments[-1])
    asked = (wanted.x, wanted.W_enc, True, True, wanted.W_dec, True, True)
    return [
        threshold.new_empty(0)
        if like is None
        else laid_out(like.new_empty(like.shape), like)
        if want
        else like.new_empty(0)
        for like, want in zip(inputs, asked, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *tensors, target = inputs[:8]
    ctx.options = inputs[8:-1]
    ctx.target_dtype = None if target is None else target.dtype
    ctx.save_for_backward(*tensors, None if target is None else output[0], *output[-1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_penalty: Tensor | None, *others: Any) -> tuple[Any, ...]:
    saved_tensors = ctx.saved_tensors  # once, for checkpointing
    *tensors, residual, row_offsets, row_counts, indices, bits, overflowed = saved_tensors
    grad_squared_error = others[-2] if residual is not None else None
    saved = [row_offsets, row_counts, indices, bits, overflowed]
    asked = ctx.needs_input_grad
    if grad_out is None and grad_squared_error is None:
        grad_out = tensors[0].new_zeros(tensors[0].shape[0], tensors[4].shape[1])
    if grad_penalty is None:
        grad_penalty = tensors[3].new_zeros(tensors[0].shape[0])
    rows, row_scale = row_gradients(residual, grad_out, grad_squared_error)
    needs = [asked[0], asked[1], asked[4]]
    grads = torch.ops.fastsae.autoencode_backward(*tensors, saved, rows, grad_penalty, row_scale, *ctx.options, needs)
    given = [grad if wants else None for grad, wants in zip(grads, asked[:7], strict=True)]
    grad_target = -scaled(rows, row_scale).to(ctx.target_dtype) if asked[7] else None
    return (*given, grad_target, *[None] * (len(ctx.options) + 1))


autoencode.register_autograd(_backward, setup_context=_setup_context)
