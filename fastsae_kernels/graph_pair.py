"""`encode` and `decode` as PyTorch's custom ops, for compiled graphs.

    fastsae::encode(...)     -> values, indices, row_offsets, row_counts
    fastsae::decode(...)     -> sae_out

and a backward of each. With `k` the size of what `encode` returns does not depend on the data; without it, it does, as for
`torch.nonzero`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from fastsae_kernels.backend import decode_gradients, encode_gradients, list_entries, sparse_backend
from fastsae_kernels.memory import laid_out
from fastsae_kernels.types import AutoencodeSpec, SparseActs


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
    return [grad_x.contiguous(), laid_out(grad_W_enc, W_enc), grad_b_enc, grad_threshold]


@_encode_backward.register_fake
def _(*inputs: Any) -> list[Tensor]:
    x, W_enc, threshold = inputs[4:7]
    of_features = [torch.empty_like(threshold) for _ in range(2)]
    return [x.new_empty(x.shape), laid_out(W_enc.new_empty(W_enc.shape), W_enc), *of_features]


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
