"""The eager driver: autograd Functions over a backend, with entries of exact size.

Legend: N tokens, D d_in, S d_sae.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastsae_kernels.activity import ActivityHint
from fastsae_kernels.backend import (
    backend_module,
    choose,
    decode_gradients,
    encode_gradients,
    list_entries,
    sparse_backend,
)
from fastsae_kernels.loss_terms import output_grads, target_gradient
from fastsae_kernels.memory import narrowed
from fastsae_kernels.once import check_no_transform, differentiable_once
from fastsae_kernels.types import AutoencodeNeeds, AutoencodeOutput, AutoencodeSpec, PassInputs, SparseActs
from fastsae_kernels.weight_gradients import PassCollector


class _Autoencode(torch.autograd.Function):
    """`autoencode`; differentiable in all tensors but `rank_scale`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Any, ...]:
        *tensors, ctx.spec, hint, ctx.collector, keeps_dense = arguments
        inputs = PassInputs(*tensors)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        dtype = inputs.x.dtype  # under autocast that of the products
        inputs = inputs._replace(W_enc=narrowed(inputs.W_enc, dtype), W_dec=narrowed(inputs.W_dec, dtype))
        name, capacity = choose(inputs, ctx.spec, hint)
        ctx.backend, ctx.spares = backend_module(name), None if hint is None else hint.spares
        output, kept = ctx.backend.forward(inputs, ctx.spec, capacity, keeps_dense)
        if hint is not None and kept.listed is not None:
            hint.update(kept.listed, inputs.d_sae)
        residual = None if inputs.target is None else output.sae_out
        # what is large is saved as a tensor, whose memory comes back with the end of the backward
        ctx.save_for_backward(*inputs[:7], residual, kept.hidden_pre)
        ctx.kept = kept._replace(hidden_pre=None)
        minimum = () if output.min_active is None else (output.min_active,)
        ctx.mark_non_differentiable(output.l0, output.feature_counts, *minimum)
        ctx.set_materialize_grads(False)
        return tuple(output)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor | None, grad_penalty: Tensor | None, *others: Any) -> tuple[Any, ...]:
        # once: non-reentrant checkpointing unpacks a tensor a single time
        *tensors, residual, hidden_pre = ctx.saved_tensors
        inputs, asked = PassInputs(*tensors), list(ctx.needs_input_grad)
        kept = ctx.kept._replace(hidden_pre=hidden_pre)
        collected = None if ctx.collector is None else ctx.collector.now()
        if collected is not None:
            # PyTorch gives no gradient to a parameter that was frozen since the forward pass, so neither do we
            asked[1] &= collected.matrices[0].requires_grad
            asked[4] &= collected.matrices[1].requires_grad
        # at least that of x: a bf16 number of x may be too large for weights in fp16
        weight_dtype = torch.promote_types(torch.promote_types(ctx.dtypes[1], ctx.dtypes[4]), inputs.x.dtype)
        needs = AutoencodeNeeds(asked[0], asked[1], asked[4], weight_dtype, ctx.spares)
        grads = output_grads(inputs, residual, grad_out, grad_penalty, others[-1])
        results = ctx.backend.backward(inputs, kept, ctx.spec, grads, needs, collected)
        pairs = zip(results, ctx.dtypes[:7], strict=True)
        given = [None if grad is None or dtype is None else grad.to(dtype) for grad, dtype in pairs]
        return (*given, target_gradient(grads, ctx.dtypes[7]) if asked[7] else None, *[None] * 5)


def autoencode(
    inputs: PassInputs, spec: AutoencodeSpec, hint: ActivityHint | None, collector: PassCollector | None
) -> AutoencodeOutput:
    """`ops.autoencode` of checked tensors."""
    check_no_transform()
    needs_backward = any(tensor is not None and tensor.requires_grad for tensor in inputs)
    keeps_dense = needs_backward and torch.is_grad_enabled()  # which it never is inside of the Function
    return AutoencodeOutput(*_Autoencode.apply(*inputs, spec, hint, collector, keeps_dense))


class _Encode(torch.autograd.Function):
    """`(values, acts)` of `encode`; differentiable in `values`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, SparseActs]:
        x, W_enc, b_enc, threshold, spec = inputs
        ctx.backend = sparse_backend(x)  # a backward may run outside of `use_backend`
        acts = list_entries(x, W_enc, b_enc, threshold, spec)
        # detached, or values -> grad_fn -> ctx -> values would live until the garbage collector comes by
        ctx.acts, ctx.bandwidth = replace(acts, values=acts.values.detach()), spec.bandwidth
        ctx.bias_dtype = b_enc.dtype
        ctx.save_for_backward(x, W_enc, threshold)
        return acts.values, acts

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_values: Tensor, _: Any) -> tuple[Any, ...]:
        x, W_enc, threshold = ctx.saved_tensors
        grad_x, grad_W_enc, grad_b_enc, grad_threshold = encode_gradients(
            ctx.backend, ctx.acts, x, W_enc, threshold, ctx.bandwidth, grad_values, ctx.needs_input_grad[0]
        )
        return grad_x, grad_W_enc, grad_b_enc.to(ctx.bias_dtype), grad_threshold, None


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, spec: AutoencodeSpec) -> SparseActs:
    """`ops.encode` of checked tensors."""
    check_no_transform()
    if not torch.is_grad_enabled():
        return list_entries(x, W_enc, b_enc, threshold, spec)
    values, acts = _Encode.apply(x, W_enc, b_enc, threshold, spec)
    return replace(acts, values=values)


class _Decode(torch.autograd.Function):
    """`decode`; differentiable in the values, `W_dec` and `b_dec`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _, W_dec, b_dec, acts = inputs
        ctx.acts, ctx.bias_dtype = acts, None if b_dec is None else b_dec.dtype
        ctx.save_for_backward(W_dec)
        ctx.backend = sparse_backend(W_dec)
        return ctx.backend.decode(acts, W_dec, b_dec)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        (W_dec,) = ctx.saved_tensors
        grad_values, grad_W_dec = decode_gradients(ctx.backend, ctx.acts, W_dec, grad_out)
        return grad_values, grad_W_dec, grad_out.sum(0, dtype=ctx.bias_dtype) if ctx.bias_dtype else None, None


def decode(acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """`ops.decode` of checked tensors."""
    check_no_transform()
    if not torch.is_grad_enabled():
        return sparse_backend(W_dec).decode(acts, W_dec, b_dec)
    out: Tensor = _Decode.apply(acts.values, W_dec, b_dec, replace(acts, values=acts.values.detach()))
    return out
