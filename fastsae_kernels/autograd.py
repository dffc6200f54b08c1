"""The eager form of the ops: autograd Functions over the backends, with entries of exact size.

Legend: N tokens, D d_in, S d_sae.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastsae_kernels import chunked, cpu
from fastsae_kernels.dispatch import MAX_DENSITY, ActivityHint, backend_of, forced_backend
from fastsae_kernels.gradients import AutoencodeGrads, AutoencodeNeeds, AutoencodeOutput
from fastsae_kernels.memory import narrowed
from fastsae_kernels.once import differentiable_once
from fastsae_kernels.residual import row_gradients, scaled
from fastsae_kernels.sparse_acts import SparseActs
from fastsae_kernels.spec import AutoencodeSpec


def _gpu() -> Any:
    from fastsae_kernels import gpu  # Triton is optional, so its kernels are imported on first use

    return gpu


def _sparse_backend(x: Tensor) -> Any:
    """The module with the sparse ops for where `x` lies."""
    return _gpu() if x.is_cuda or backend_of(x) == "triton" else cpu


class Autoencode(torch.autograd.Function):
    """`autoencode`; differentiable in the seven tensors and the target."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Any, ...]:
        x, W_enc, b_enc, threshold, W_dec, b_dec, feature_scale, target, spec, hint, ctx.collector = inputs
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:7]]
        W_enc, W_dec = narrowed(W_enc, x.dtype), narrowed(W_dec, x.dtype)  # those of autocast
        tensors = [x, W_enc, b_enc, threshold, W_dec, b_dec, feature_scale]
        output, ctx.saved_by_gpu = _run_forward(tensors, target, spec, hint)
        ctx.spec, ctx.acts = spec, output.acts
        ctx.target_dtype = None if target is None else target.dtype
        residual = None if target is None else output.sae_out
        ctx.save_for_backward(x, W_enc, b_enc, threshold, W_dec, b_dec, feature_scale, residual)
        ctx.mark_non_differentiable(output.l0, output.feature_counts, *_given(output.min_active))
        ctx.set_materialize_grads(False)
        return tuple(output)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor | None, grad_penalty: Tensor | None, *others: Any) -> tuple[Any, ...]:
        # once: non-reentrant checkpointing unpacks a tensor a single time
        x, W_enc, b_enc, threshold, W_dec, _, feature_scale, residual = ctx.saved_tensors
        asked = list(ctx.needs_input_grad)
        collected = None if ctx.collector is None else ctx.collector.now()
        if collected is not None:
            # PyTorch gives no gradient to a parameter that was frozen since the forward pass, so neither do we
            asked[1] &= collected.matrices[0].requires_grad
            asked[4] &= collected.matrices[1].requires_grad
        # of x too: numbers of bf16 may lie outside of what weights in fp16 can hold
        weight_dtype = torch.promote_types(torch.promote_types(ctx.dtypes[1], ctx.dtypes[4]), x.dtype)
        needs = AutoencodeNeeds(x=asked[0], W_enc=asked[1], W_dec=asked[4], weight_dtype=weight_dtype)
        grad_squared_error = others[-1]
        if grad_out is None and grad_squared_error is None:
            grad_out = x.new_zeros(x.shape[0], W_dec.shape[1])
        if grad_penalty is None:
            grad_penalty = torch.zeros((), dtype=threshold.dtype, device=x.device).expand(x.shape[0])
        rows, row_scale = row_gradients(residual, grad_out, grad_squared_error)
        shared = (threshold, W_dec, feature_scale, ctx.spec, rows, grad_penalty, needs, row_scale)
        if ctx.saved_by_gpu is not None:
            grads = _gpu().autoencode_backward(ctx.saved_by_gpu, rows, grad_penalty, needs, row_scale, collected)
        elif ctx.acts is not None:
            grads = cpu.autoencode_backward(ctx.acts, x, W_enc, *shared, collected)
        else:
            grads = chunked.autoencode_backward(x, W_enc, b_enc, *shared)
        grad_target = -scaled(rows, row_scale).to(ctx.target_dtype) if asked[7] else None
        return (*_in_dtypes(grads, ctx.dtypes), grad_target, None, None, None)


def _given(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else (tensor,)


def _in_dtypes(grads: AutoencodeGrads, dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
    pairs = zip(grads, dtypes, strict=True)
    return [None if grad is None or dtype is None else grad.to(dtype) for grad, dtype in pairs]


def _run_forward(
    tensors: list[Any], target: Tensor | None, spec: AutoencodeSpec, hint: ActivityHint | None
) -> tuple[AutoencodeOutput, Any | None]:
    """The output, and what a GPU backward needs beside it."""
    x, W_enc, b_enc, threshold, W_dec, b_dec, feature_scale = tensors
    arguments = (x, W_enc, b_enc, threshold, W_dec, b_dec, feature_scale, spec)
    d_sae = W_enc.shape[1]
    backend = backend_of(x)
    if backend == "triton":
        follows_hint = hint is not None and spec.k is None and forced_backend() is None
        if follows_hint and hint is not None and hint.is_dense(d_sae, x.device.type):
            backend = "dense"
        else:
            hint = hint or ActivityHint()
            output, saved = _gpu().autoencode_forward(
                *arguments, hint.capacity(d_sae), target, hint.mean_capacity(d_sae)
            )
            hint.update(saved.listed)
            return output._replace(acts=None), saved  # rows that outgrew the capacity are not among its entries
    if backend == "cpu":
        limit = None if spec.k is not None or forced_backend() else int(MAX_DENSITY["cpu"] * x.shape[0] * d_sae)
        output = cpu.autoencode_forward(*arguments, limit, target)
        if output is not None:
            return output, None
    if spec.k is not None:
        raise ValueError("x, W_enc, b_enc: expected finite values where k is given, got NaN or Inf")
    output = chunked.autoencode_forward(*arguments, target)
    if hint is not None and x.is_cuda:
        hint.update(output.l0)
    return output, None


class Encode(torch.autograd.Function):
    """`(values, acts)` of `encode`; differentiable in `values`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, SparseActs]:
        x, W_enc, b_enc, threshold, spec = inputs
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
            ctx.acts, x, W_enc, threshold, ctx.bandwidth, grad_values, ctx.needs_input_grad[0]
        )
        return grad_x, grad_W_enc, grad_b_enc.to(ctx.bias_dtype), grad_threshold, None


def list_entries(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, spec: AutoencodeSpec) -> SparseActs:
    """The entries by the backend of x.

    Raises:
        ValueError: A value is NaN or Inf (CPU; a GPU lists NaN with its value).
    """
    acts: SparseActs | None
    if _sparse_backend(x) is cpu:
        acts = cpu.encode(x, W_enc, b_enc, threshold, bandwidth=spec.bandwidth, k=spec.k, batch_topk=spec.batch_topk)
    elif spec.k is None:
        acts = _gpu().encode(x, W_enc, b_enc, threshold, bandwidth=spec.bandwidth)
    elif spec.batch_topk:
        acts = _gpu().encode_batch_topk(x, W_enc, b_enc, threshold, spec.k).acts
    else:
        acts = _gpu().encode_topk(x, W_enc, b_enc, threshold, bandwidth=spec.bandwidth, k=spec.k)
    if acts is None:
        raise ValueError(f"x, W_enc, b_enc, threshold: expected finite values, got NaN or Inf {_share_bad(x)}")
    return acts


def _share_bad(x: Tensor) -> str:
    share = 1 - torch.isfinite(x).double().mean().item()
    return f"({share:.2%} of x is not finite)"


def encode_gradients(
    acts: SparseActs,
    x: Tensor,
    W_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
    grad_values: Tensor,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Gradients of `encode` for x (on demand), `W_enc`, `b_enc` (in at least fp32) and `threshold` (with a bandwidth)."""
    grad_hidden_pre = grad_values * (acts.values > 0)
    grad_x, grad_W_enc, grad_b_enc = _sparse_backend(x).encode_backward(acts, x, W_enc, grad_hidden_pre, needs_x)
    grad_threshold = None
    if bandwidth:
        theta = threshold[acts.indices.long()]
        window = (acts.values == 0) | (acts.values - theta < bandwidth / 2)
        valid = acts.valid()
        estimate = torch.where(window if valid is None else window & valid, theta * grad_values, 0)
        grad_threshold = torch.zeros_like(threshold)
        grad_threshold.index_add_(0, acts.indices.long(), -estimate.to(threshold.dtype) / bandwidth)
    grad_x = None if grad_x is None else grad_x.to(x.dtype)
    return grad_x, grad_W_enc.to(W_enc.dtype), grad_b_enc, grad_threshold


class Decode(torch.autograd.Function):
    """`decode`; differentiable in the values, `W_dec` and `b_dec`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _, W_dec, b_dec, acts = inputs
        ctx.acts, ctx.bias_dtype = acts, None if b_dec is None else b_dec.dtype
        ctx.save_for_backward(W_dec)
        return decode_entries(acts, W_dec, b_dec)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        (W_dec,) = ctx.saved_tensors
        grad_values, grad_W_dec = decode_gradients(ctx.acts, W_dec, grad_out)
        return grad_values, grad_W_dec, grad_out.sum(0, dtype=ctx.bias_dtype) if ctx.bias_dtype else None, None


def decode_entries(acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """The reconstruction by the backend of `W_dec`."""
    out: Tensor = _sparse_backend(W_dec).decode(acts, W_dec, b_dec)
    return out


def decode_gradients(acts: SparseActs, W_dec: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `decode` for the values and `W_dec`, in their dtypes."""
    grad_values, grad_W_dec = _sparse_backend(W_dec).decode_backward(acts, W_dec, grad_out.contiguous())
    return grad_values.to(acts.values.dtype), grad_W_dec.to(W_dec.dtype)
