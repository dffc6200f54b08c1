"""The driver for compiled graphs: the ops as PyTorch's custom ops, for `torch.compile(fullgraph=True)` and CUDA graphs.

    fastsae::autoencode(...) -> sae_out, penalty, l0, feature_counts, min_active, squared_error, kept
    fastsae::encode(...)     -> values, indices, row_offsets, row_counts
    fastsae::decode(...)     -> sae_out

and a backward of each. A graph needs sizes that do not depend on the data. What a pass keeps for its backward therefore has
the size that its backend promises (`kept_size`), of which a CPU touches the used part alone; so has what `encode` returns with
`k`. Without `k` that depends on the data, as for `torch.nonzero`. Eager code takes the shorter way in `autograd.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from fastsae_kernels.activity import ActivityHint
from fastsae_kernels.backend import (
    BackendName,
    backend_module,
    choose,
    decode_gradients,
    encode_gradients,
    list_entries,
    sparse_backend,
)
from fastsae_kernels.loss_terms import output_grads, target_gradient
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
N_INPUTS = len(PassInputs._fields)
N_KEPT_INPUTS = 7  # those that a backward reads: not `target`, nor `rank_scale`
N_OPTIONS = 6


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
        else _laid_out(torch.zeros_like(like) if grad is None else grad.to(like.dtype), like)
        for grad, like, want in zip(grads, inputs[:N_KEPT_INPUTS], asked, strict=True)
    ]


def _laid_out(grad: Tensor, like: Tensor) -> Tensor:
    """A fresh tensor in the order of `like`: what a fake op can promise."""
    transposed = like.dim() == 2 and like.stride(0) == 1 and like.stride(1) != 1
    return grad.t().contiguous().t() if transposed else grad.contiguous()


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


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, spec: AutoencodeSpec) -> SparseActs:
    """`ops.encode` of checked tensors as one op."""
    options = (spec.bandwidth, spec.k, spec.batch_topk)
    values, indices, row_offsets, row_counts = torch.ops.fastsae.encode(x, W_enc, b_enc, threshold, *options)
    return SparseActs(row_offsets, indices, values, (x.shape[0], W_enc.shape[1]), row_counts)


def decode(acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """`ops.decode` of checked tensors as one op."""
    counts = acts.row_offsets.diff() if acts.row_counts is None else acts.row_counts
    out: Tensor = torch.ops.fastsae.decode(acts.values, acts.indices, acts.row_offsets, counts, W_dec, b_dec)
    return out


def _entries(values: Tensor, indices: Tensor, row_offsets: Tensor, row_counts: Tensor, d_sae: int) -> SparseActs:
    """The structure of these tensors; on a CPU without the unused ones at the end, which its backends do not know."""
    n_tokens = row_counts.numel()
    if values.is_cuda or n_tokens == 0:
        return SparseActs(row_offsets, indices, values, (n_tokens, d_sae), row_counts)
    row_offsets = row_offsets.clone()
    row_offsets[-1] = row_offsets[-2] + row_counts[-1]
    used = int(row_offsets[-1])
    return SparseActs(row_offsets, indices[:used], values[:used], (n_tokens, d_sae))


@library.custom_op("fastsae::encode", mutates_args=())
def _encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
    k: int | None,
    batch_topk: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The entries; with `k` and no window there is room for `k * N`, whose unused part belongs to the last row."""
    spec = AutoencodeSpec(bandwidth, k, batch_topk)
    acts = list_entries(x, W_enc, b_enc, threshold, spec).packed()
    counts = acts.row_offsets.diff().int()
    if k is None or bandwidth > 0:
        return acts.values.clone(), acts.indices.clone(), acts.row_offsets.int().clone(), counts
    size = _encode_size(x.shape[0], W_enc.shape[1], k)
    indices, values = acts.indices.new_zeros(size), acts.values.new_zeros(size)
    indices[: acts.indices.numel()], values[: acts.values.numel()] = acts.indices, acts.values
    row_offsets = acts.row_offsets.int().clone()
    row_offsets[-1] = size
    return values, indices, row_offsets, counts


def _encode_size(n_tokens: int, d_sae: int, k: int) -> int:
    return n_tokens * min(k, d_sae)


@_encode.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, W_enc, _, threshold, bandwidth, k, *_ = inputs
    if k is None or bandwidth > 0:
        size: Any = library.get_ctx().new_dynamic_size()
    else:
        size = _encode_size(x.shape[0], W_enc.shape[1], k)
    offsets, counts = (x.new_empty(n, dtype=torch.int32) for n in (x.shape[0] + 1, x.shape[0]))
    return threshold.new_empty(size), x.new_empty(size, dtype=torch.int32), offsets, counts


@library.custom_op("fastsae::encode_backward", mutates_args=())
def _encode_backward(
    values: Tensor,
    indices: Tensor,
    row_offsets: Tensor,
    row_counts: Tensor,
    x: Tensor,
    W_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
    grad_values: Tensor,
) -> list[Tensor]:
    """Gradients of x, `W_enc`, `b_enc` (in the dtype of `threshold`) and `threshold`."""
    acts = _entries(values, indices, row_offsets, row_counts, W_enc.shape[1])
    grad_x, grad_W_enc, grad_b_enc, grad_threshold = encode_gradients(
        sparse_backend(x), acts, x, W_enc, threshold, bandwidth, grad_values[: acts.values.numel()], needs_x=True
    )
    assert grad_x is not None
    grad_threshold = torch.zeros_like(threshold) if grad_threshold is None else grad_threshold
    return [grad_x.contiguous(), _laid_out(grad_W_enc, W_enc), grad_b_enc, grad_threshold]


@_encode_backward.register_fake
def _(*inputs: Any) -> list[Tensor]:
    x, W_enc, threshold = inputs[4:7]
    of_features = [torch.empty_like(threshold) for _ in range(2)]
    return [x.new_empty(x.shape), _laid_out(W_enc.new_empty(W_enc.shape), W_enc), *of_features]


def _setup_encode(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, W_enc, b_enc, threshold, ctx.bandwidth, *_ = inputs
    ctx.bias_dtype = b_enc.dtype
    ctx.save_for_backward(*output, x, W_enc, threshold)


def _backward_of_encode(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    saved = (*ctx.saved_tensors, ctx.bandwidth, grads[0])
    grad_x, grad_W_enc, grad_b_enc, grad_threshold = torch.ops.fastsae.encode_backward(*saved)
    return (grad_x, grad_W_enc, grad_b_enc.to(ctx.bias_dtype), grad_threshold, *[None] * 3)


_encode.register_autograd(_backward_of_encode, setup_context=_setup_encode)


@library.custom_op("fastsae::decode", mutates_args=())
def _decode(
    values: Tensor, indices: Tensor, row_offsets: Tensor, row_counts: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    """The reconstruction from entries."""
    acts = _entries(values, indices, row_offsets, row_counts, W_dec.shape[0])
    return sparse_backend(W_dec).decode(acts, W_dec, b_dec)


@_decode.register_fake
def _(*inputs: Any) -> Tensor:
    _, _, _, row_counts, W_dec, _ = inputs
    out: Tensor = W_dec.new_empty(row_counts.shape[0], W_dec.shape[1])
    return out


@library.custom_op("fastsae::decode_backward", mutates_args=())
def _decode_backward(
    values: Tensor, indices: Tensor, row_offsets: Tensor, row_counts: Tensor, W_dec: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the values and `W_dec`."""
    acts = _entries(values, indices, row_offsets, row_counts, W_dec.shape[0])
    grad_values = torch.zeros_like(values)
    grad_values[: acts.values.numel()], grad_W_dec = decode_gradients(sparse_backend(W_dec), acts, W_dec, grad_out)
    return grad_values, grad_W_dec.contiguous()


@_decode_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(inputs[0]), inputs[4].new_empty(inputs[4].shape)


def _setup_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, b_dec = inputs
    ctx.bias_dtype = None if b_dec is None else b_dec.dtype
    ctx.save_for_backward(*tensors)


def _backward_of_decode(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grad_values, grad_W_dec = torch.ops.fastsae.decode_backward(*ctx.saved_tensors, grad_out)
    grad_b_dec = grad_out.sum(0, dtype=ctx.bias_dtype) if ctx.bias_dtype else None
    return grad_values, None, None, None, grad_W_dec, grad_b_dec


_decode.register_autograd(_backward_of_decode, setup_context=_setup_decode)
