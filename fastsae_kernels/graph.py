"""The driver for compiled graphs: a whole pass as one of PyTorch's custom ops, for `torch.compile(fullgraph=True)`.

    fastsae::autoencode(...) -> sae_out, penalty, l0, feature_counts, min_active, squared_error, kept

and its backward, for CUDA graphs too. A graph needs sizes that do not depend on the data. What a pass keeps for its backward
therefore has the size that its backend promises (`kept_size`), of which a CPU touches the used part alone. `graph_pair.py`
does the same for `encode` and `decode`. Eager code takes the shorter way in `autograd.py`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, library

from fastsae_kernels.activity import ActivityHint
from fastsae_kernels.backend import BackendName, backend_module, choose
from fastsae_kernels.loss_terms import output_grads, target_gradient
from fastsae_kernels.memory import laid_out
from fastsae_kernels.types import (
    AutoencodeGrads,
    AutoencodeNeeds,
    AutoencodeOutput,
    AutoencodeSpec,
    Capacity,
    Kept,
    KeptSize,
    OutputGrads,
    Overflow,
    PassInputs,
    SparseActs,
)
from fastsae_kernels.weight_gradients import PassCollector

BITS = {4: torch.int32, 8: torch.int64}  # kept values travel as integers, which have no gradient
# an op takes no objects: its arguments are the fields of `PassInputs`, then those of `AutoencodeSpec`, each in their order
N_INPUTS, N_OPTIONS = len(PassInputs._fields), len(fields(AutoencodeSpec))
N_KEPT_INPUTS = 7  # those that a backward reads: not `target`, nor `rank_scale`


def autoencode(
    inputs: PassInputs, spec: AutoencodeSpec, hint: ActivityHint | None, collector: PassCollector | None
) -> AutoencodeOutput:
    """`ops.autoencode` of checked tensors as one op, from which no optimiser collects."""
    follows = inputs.x.is_cuda and hint is not None and spec.k is None
    capacity = hint.plan if follows and hint is not None else ActivityHint.UNKNOWN
    key = 0 if hint is None else hint.key
    results = torch.ops.fastsae.autoencode(*inputs, *_options(spec), *capacity, key)
    sae_out, penalty, l0, feature_counts, min_active, squared_error, _ = results
    min_active = min_active.detach() if spec.batch_topk else None
    squared_error = None if inputs.target is None else squared_error
    return AutoencodeOutput(sae_out, penalty, l0, feature_counts, None, min_active, squared_error)


@library.custom_op("fastsae::autoencode", mutates_args=())
def _autoencode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    feature_scale: Tensor | None,
    target: Tensor | None,
    rank_scale: Tensor | None,
    bandwidth: float,
    k: int | None,
    batch_topk: bool,
    penalty: str,
    tanh_scale: float,
    ste_to_input: bool,
    row_capacity: int,
    mean_capacity: int,
    hint: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    spec = AutoencodeSpec(bandwidth, k, batch_topk, penalty, tanh_scale, ste_to_input)  # type: ignore[arg-type]
    inputs = PassInputs(x, W_enc, b_enc, threshold, W_dec, b_dec, feature_scale, target, rank_scale)
    name, capacity = choose(inputs, spec, Capacity(row_capacity, mean_capacity))
    backend, known = backend_module(name), ActivityHint.of(hint)
    output, kept = backend.forward(inputs, spec, capacity)
    if known is not None and kept.listed is not None:
        known.update(kept.listed, inputs.d_sae)
    min_active, squared_error = output.min_active, output.squared_error
    if min_active is None:
        min_active = torch.full((), float("inf"), dtype=output.penalty.dtype, device=x.device)
    if squared_error is None:
        squared_error = output.penalty.new_empty(0)
    packed = _pack(kept, inputs, backend.kept_size(len(x), inputs.d_sae, spec, capacity))
    return output.sae_out, output.penalty, output.l0, output.feature_counts, min_active, squared_error, packed


@_autoencode.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    inputs, spec, capacity = _unflattened(arguments)
    name, capacity = choose(inputs, spec, capacity)
    n_tokens, d_sae = inputs.x.shape[0], inputs.d_sae
    return (
        inputs.x.new_empty(n_tokens, inputs.W_dec.shape[1]),
        inputs.threshold.new_empty(n_tokens),
        inputs.x.new_empty(n_tokens, dtype=torch.int64),
        inputs.x.new_empty(d_sae, dtype=torch.int64),
        inputs.threshold.new_empty(()),
        inputs.threshold.new_empty(0 if inputs.target is None else n_tokens),
        _empty_kept(inputs, backend_module(name).kept_size(n_tokens, d_sae, spec, capacity)),
    )


def _options(spec: AutoencodeSpec) -> tuple[Any, ...]:
    return spec.bandwidth, spec.k, spec.batch_topk, spec.penalty, spec.tanh_scale, spec.ste_to_input


def _unflattened(arguments: tuple[Any, ...]) -> tuple[PassInputs, AutoencodeSpec, Capacity]:
    """The arguments of the op without the hint."""
    spec = AutoencodeSpec(*arguments[N_INPUTS : N_INPUTS + N_OPTIONS])
    return PassInputs(*arguments[:N_INPUTS]), spec, Capacity(*arguments[N_INPUTS + N_OPTIONS :][:2])


def _empty_kept(inputs: PassInputs, size: KeptSize) -> list[Tensor]:
    """`row_offsets, row_counts, indices, value bits, overflowing rows, their number`; counts of -1: the dense path ran."""
    x, n_tokens = inputs.x, inputs.x.shape[0]
    return [
        x.new_zeros(n_tokens + 1, dtype=torch.int32),
        x.new_full((n_tokens,), -1, dtype=torch.int32),
        x.new_empty(size.entries, dtype=torch.int32),
        x.new_empty(size.entries, dtype=BITS[inputs.threshold.element_size()]),
        x.new_empty(n_tokens if size.overflows else 0, dtype=torch.int64),
        x.new_empty(1 if size.overflows else 0, dtype=torch.int32),
    ]


def _pack(kept: Kept, inputs: PassInputs, size: KeptSize) -> list[Tensor]:
    acts = kept.acts
    if acts is None:
        return _empty_kept(inputs, size)
    nnz = acts.indices.numel()
    if nnz > size.entries:
        raise ValueError(
            f"bandwidth: expected a window with at most {size.entries} entries where a graph is compiled, got {nnz}"
        )
    counts = acts.row_offsets.diff() if acts.row_counts is None else acts.row_counts
    bits = acts.values.detach().view(BITS[acts.values.element_size()])
    entries = [_with_room(acts.indices, size.entries), _with_room(bits, size.entries)]
    overflow = kept.overflow or (counts.new_empty(0, dtype=torch.int64), counts.new_empty(0, dtype=torch.int32))
    return [acts.row_offsets.int(), counts.int(), *entries, *overflow]


def _with_room(used: Tensor, size: int) -> Tensor:
    if used.numel() == size:
        return used
    out = used.new_empty(size)
    out[: used.numel()] = used
    return out


def _unpack(packed: list[Tensor], inputs: PassInputs, backend: BackendName) -> Kept:
    row_offsets, row_counts, indices, bits, rows, n_rows = packed
    n_tokens = inputs.x.shape[0]
    if backend == "dense" or (backend == "cpu" and n_tokens > 0 and int(row_counts[0]) < 0):
        return Kept(None)
    values, shape = bits.view(inputs.threshold.dtype), (n_tokens, inputs.d_sae)
    if backend == "cpu":
        used = int(row_offsets[-1])
        return Kept(SparseActs(row_offsets, indices[:used], values[:used], shape))
    acts = SparseActs(row_offsets, indices, values, shape, row_counts)
    return Kept(acts, overflow=Overflow(rows, n_rows) if n_rows.numel() else None)


@library.custom_op("fastsae::autoencode_backward", mutates_args=())
def _autoencode_backward(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    feature_scale: Tensor | None,
    kept: list[Tensor],
    grad_out: Tensor,
    row_scale: Tensor | None,
    grad_penalty: Tensor,
    bandwidth: float,
    k: int | None,
    batch_topk: bool,
    penalty: str,
    tanh_scale: float,
    ste_to_input: bool,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of the seven tensors, in order; an empty tensor where none is asked for."""
    spec = AutoencodeSpec(bandwidth, k, batch_topk, penalty, tanh_scale, ste_to_input)  # type: ignore[arg-type]
    inputs = PassInputs(x, W_enc, b_enc, threshold, W_dec, b_dec, feature_scale)
    name: BackendName = backend  # type: ignore[assignment]
    wanted = AutoencodeNeeds(x=needs[0], W_enc=needs[1], W_dec=needs[2])
    output_grads = OutputGrads(grad_out, row_scale, grad_penalty)
    grads = backend_module(name).backward(inputs, _unpack(kept, inputs, name), spec, output_grads, wanted)
    return _given_or_empty(grads, inputs, needs)


@_autoencode_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    inputs = PassInputs(*arguments[:N_KEPT_INPUTS])
    likes = [None if like is None else like.new_empty(like.shape) for like in inputs[:N_KEPT_INPUTS]]
    return _given_or_empty(AutoencodeGrads(*likes), inputs, arguments[-1])  # type: ignore[arg-type]


def _given_or_empty(grads: AutoencodeGrads, inputs: PassInputs, needs: list[bool]) -> list[Tensor]:
    """Fresh contiguous tensors in the layout that the fake op promises; `W_enc`'s gradient feature-major."""
    x, W_enc, W_dec = needs
    asked = (x, W_enc, True, True, W_dec, True, True)
    return [
        inputs.threshold.new_empty(0)
        if like is None or not want
        else laid_out(torch.zeros_like(like) if grad is None else grad.to(like.dtype), like)
        for grad, like, want in zip(grads, inputs[:N_KEPT_INPUTS], asked, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    arguments, ctx.spec, capacity = _unflattened(inputs)
    ctx.backend, _ = choose(arguments, ctx.spec, capacity)  # the thread of a backward knows no `use_backend`
    target = arguments.target
    ctx.target_dtype = None if target is None else target.dtype
    ctx.save_for_backward(*arguments[:N_KEPT_INPUTS], None if target is None else output[0], *output[-1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_penalty: Tensor | None, *others: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once, for checkpointing
    inputs, residual = PassInputs(*saved[:N_KEPT_INPUTS]), saved[N_KEPT_INPUTS]
    kept = list(saved[N_KEPT_INPUTS + 1 :])
    asked = ctx.needs_input_grad
    grads = output_grads(inputs, residual, grad_out, grad_penalty, others[-2])
    needs = [asked[0], asked[1], asked[4]]
    arguments = inputs[:N_KEPT_INPUTS]
    results = torch.ops.fastsae.autoencode_backward(*arguments, kept, *grads, *_options(ctx.spec), ctx.backend, needs)
    given = [grad if wants else None for grad, wants in zip(results, asked[:N_KEPT_INPUTS], strict=True)]
    grad_target = target_gradient(grads, ctx.target_dtype) if asked[N_KEPT_INPUTS] else None
    return (*given, grad_target, *[None] * (N_OPTIONS + 4))


_autoencode.register_autograd(_backward, setup_context=_setup_context)
