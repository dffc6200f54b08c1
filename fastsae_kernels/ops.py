"""The public, differentiable ops: check the arguments, choose a backend, hide the path that ran.

Legend: N tokens, D d_in, S d_sae. Leading dimensions are flattened here, outside the autograd Functions, so that a rank
never changes what is compiled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae_kernels import chunked, cpu
from fastsae_kernels.checks import check_decode, check_encode, check_feature_scale
from fastsae_kernels.dispatch import MAX_DENSITY, ActivityHint, backend_of, forced_backend, not_compiled
from fastsae_kernels.gradients import AutoencodeGrads, AutoencodeNeeds, AutoencodeOutput
from fastsae_kernels.sparse_acts import SparseActs
from fastsae_kernels.spec import AutoencodeSpec


def _gpu() -> Any:
    from fastsae_kernels import gpu  # Triton is optional, so its kernels are imported on first use

    return gpu


def _sparse_backend(x: Tensor) -> Any:
    """The module with the sparse ops for where `x` lies."""
    return _gpu() if x.is_cuda or backend_of(x) == "triton" else cpu


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as a linear layer would take them; thresholds are never cast."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device_type)) for tensor in tensors)


class _Autoencode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Any, ...]:
        *tensors, spec, hint = inputs
        x, W_enc, b_enc, threshold, W_dec, b_dec, feature_scale = tensors
        output, ctx.saved_by_gpu = _run_forward(tensors, spec, hint)
        ctx.spec, ctx.acts = spec, output.acts
        ctx.save_for_backward(x, W_enc, b_enc, threshold, W_dec, b_dec, feature_scale)
        ctx.mark_non_differentiable(output.l0, output.feature_counts, *_given(output.min_active))
        return tuple(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_penalty: Tensor, *_: Any) -> tuple[Any, ...]:
        x, W_enc, b_enc, threshold, W_dec, _, feature_scale = ctx.saved_tensors
        asked = ctx.needs_input_grad
        needs = AutoencodeNeeds(x=asked[0], W_enc=asked[1], W_dec=asked[4])
        grad_out = grad_out.contiguous()
        shared = (threshold, W_dec, feature_scale, ctx.spec, grad_out, grad_penalty, needs)
        if ctx.saved_by_gpu is not None:
            grads = _gpu().autoencode_backward(ctx.saved_by_gpu, grad_out, grad_penalty, needs.x)
        elif ctx.acts is not None:
            grads = cpu.autoencode_backward(ctx.acts, x, W_enc, *shared)
        else:
            grads = chunked.autoencode_backward(x, W_enc, b_enc, *shared)
        return (*_in_dtype_of(grads, ctx.saved_tensors), None, None)


def _given(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else (tensor,)


def _in_dtype_of(grads: AutoencodeGrads, inputs: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    pairs = zip(grads, inputs, strict=True)
    return [None if grad is None or like is None else grad.to(like.dtype) for grad, like in pairs]


def _run_forward(
    tensors: list[Any], spec: AutoencodeSpec, hint: ActivityHint | None
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
            output, saved = _gpu().autoencode_forward(*arguments, hint.capacity(d_sae))
            hint.update(saved.listed)
            return output._replace(acts=None), saved  # rows that outgrew the capacity are not among its entries
    if backend == "cpu":
        limit = None if spec.k is not None or forced_backend() else int(MAX_DENSITY["cpu"] * x.shape[0] * d_sae)
        output = cpu.autoencode_forward(*arguments, limit)
        if output is not None:
            return output, None
    if spec.k is not None:
        raise ValueError("x, W_enc: expected finite values where k is given, got NaN or Inf")
    output = chunked.autoencode_forward(*arguments)
    if hint is not None and x.is_cuda:
        hint.update(output.l0)
    return output, None


@not_compiled
def autoencode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    spec: AutoencodeSpec,
    feature_scale: Tensor | None = None,
    hint: ActivityHint | None = None,
) -> AutoencodeOutput:
    """Encode, gate, decode and penalise in one differentiable pass that never holds an `[N, d_sae]` tensor.

        hidden_pre   = x @ W_enc + b_enc
        feature_acts = hidden_pre * (hidden_pre > threshold) * keep          keep: the k largest of a token, or all
        sae_out      = feature_acts @ W_dec + b_dec
        penalty      = sum over features of [active], feature_acts * feature_scale, or tanh (see `AutoencodeSpec`)

    Equivalent to `fastsae_kernels.reference.autoencode`. Where activity is dense (early training) the same numbers come
    from products in feature chunks, and from the sparse path again when activity falls.

    Args:
        x: `[..., d_in]`, fp32, bf16, fp16 or fp64.
        W_enc: `[d_in, d_sae]`, any strides; fastest stored feature-major.
        b_enc: `[d_sae]`.
        threshold: `[d_sae]` fp32 (or fp64), >= 0, in activation units.
        W_dec: `[d_sae, d_out]`.
        b_dec: `[d_out]`.
        spec: Bandwidth, top-k and penalty.
        feature_scale: `[d_sae]` weight of each feature in the `l1` and `tanh` penalties; None for ones.
        hint: On a GPU, what earlier passes knew of the activity; a module keeps one.

    Returns:
        `sae_out` `[..., d_out]`, `penalty` `[...]` fp32 (fp64 for fp64), the counts `l0` `[...]` and `feature_counts` `[d_sae]`;
        `acts` over the flattened tokens, None where the dense path ran and on a GPU.

    Raises:
        ValueError: Shapes disagree, `k` exceeds `d_sae`, or NaN or Inf meets `k`.
        TypeError: Mixed or unsupported dtypes.

    Numerics:
        Products run in the dtype of the arguments, under `torch.autocast` in its dtype, and accumulate in fp32; gates
        compare in fp32; gradients are returned in each parameter's dtype. On a CPU the result is
        deterministic. Gradients of `threshold` are straight-through estimates.

    Source:
        Rajamanoharan et al. 2024, arXiv:2407.14435.
    """
    x, W_enc, b_enc, W_dec, b_dec = _autocast(x, W_enc, b_enc, W_dec, b_dec)
    check_encode(x, W_enc, b_enc, threshold, spec.k)
    check_decode(W_enc.shape[1], x.dtype, x.device, W_dec, b_dec)
    check_feature_scale(feature_scale, threshold)
    flat = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        outputs = _Autoencode.apply(flat, W_enc, b_enc, threshold, W_dec, b_dec, feature_scale, spec, hint)
    output = AutoencodeOutput(*outputs)
    leading = x.shape[:-1]
    return output._replace(
        sae_out=output.sae_out.reshape(*leading, W_dec.shape[1]),
        penalty=output.penalty.reshape(leading),
        l0=output.l0.reshape(leading),
    )


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, SparseActs]:
        x, W_enc, b_enc, threshold, bandwidth, k = inputs
        ctx.backend = _sparse_backend(x)
        acts = ctx.backend.encode(x, W_enc, b_enc, threshold, bandwidth=bandwidth, k=k)
        if acts is None:
            raise ValueError(f"x, W_enc, b_enc, threshold: expected finite values, got NaN or Inf {_share_bad(x)}")
        # detached, or values -> grad_fn -> ctx -> values would live until the garbage collector comes by
        ctx.acts, ctx.bandwidth = replace(acts, values=acts.values.detach()), bandwidth
        ctx.save_for_backward(x, W_enc, threshold)
        return acts.values, acts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor, _: Any) -> tuple[Any, ...]:
        x, W_enc, threshold = ctx.saved_tensors
        acts: SparseActs = ctx.acts
        theta = threshold[acts.indices.long()]
        grad_hidden_pre = grad_values * (acts.values > 0)
        grad_x, grad_W_enc, grad_b_enc = ctx.backend.encode_backward(
            acts, x, W_enc, grad_hidden_pre, ctx.needs_input_grad[0]
        )
        grad_threshold = None
        if ctx.bandwidth:
            window = (acts.values == 0) | (acts.values - theta < ctx.bandwidth / 2)
            valid = acts.valid()
            estimate = torch.where(window if valid is None else window & valid, theta * grad_values, 0)
            grad_threshold = torch.zeros_like(threshold)
            grad_threshold.index_add_(0, acts.indices.long(), -estimate.to(threshold.dtype) / ctx.bandwidth)
        grad_x = None if grad_x is None else grad_x.to(x.dtype)
        return grad_x, grad_W_enc.to(W_enc.dtype), grad_b_enc.to(W_enc.dtype), grad_threshold, None, None


def _share_bad(x: Tensor) -> str:
    share = 1 - torch.isfinite(x).double().mean().item()
    return f"({share:.2%} of x is not finite)"


@not_compiled
def encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, *, bandwidth: float = 0.0, k: int | None = None
) -> SparseActs:
    """The active features of each token, `JumpReLU(x @ W_enc + b_enc)` then top-k, without a dense tensor.

        hidden_pre = x @ W_enc + b_enc ;  listed: hidden_pre > threshold, among them the k largest of a token

    Equivalent to `fastsae_kernels.reference.encode`. Differentiable in `values`. With a `bandwidth` the inactive entries
    of the straight-through window are listed too, with value 0, and `threshold` receives its estimate.

    Args:
        x: `[N, d_in]`, fp32, bf16, fp16 or fp64.
        W_enc: `[d_in, d_sae]`, any strides; fastest stored feature-major.
        b_enc: `[d_sae]`.
        threshold: `[d_sae]` fp32 (or fp64), >= 0.
        bandwidth: Width of the window, in activation units; 0 lists active entries only.
        k: Keep at most this many active features of a token, ties to the lower index; None keeps all.

    Raises:
        ValueError: Shapes disagree, `k` is out of range, or a value is NaN or Inf.
        TypeError: Mixed or unsupported dtypes.

    Numerics:
        `values` are fp32 (fp64 for fp64 inputs). On a GPU this call synchronises with the host once.

    Source:
        Rajamanoharan et al. 2024, arXiv:2407.14435.
    """
    AutoencodeSpec(bandwidth=bandwidth, k=k)
    x, W_enc, b_enc = _autocast(x, W_enc, b_enc)
    check_encode(x, W_enc, b_enc, threshold, k)
    if x.dim() != 2:
        raise ValueError(f"x: expected two dimensions [n_tokens, d_in], got shape {tuple(x.shape)}")
    values, acts = _Encode.apply(x, W_enc, b_enc, threshold, bandwidth, k)
    return replace(acts, values=values)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _, W_dec, b_dec, acts = inputs
        ctx.acts, ctx.has_bias = acts, b_dec is not None
        ctx.save_for_backward(W_dec)
        ctx.backend = _sparse_backend(W_dec)
        return ctx.backend.decode(acts, W_dec, b_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        (W_dec,) = ctx.saved_tensors
        grad_values, grad_W_dec = ctx.backend.decode_backward(ctx.acts, W_dec, grad_out.contiguous())
        grad_b_dec = grad_out.sum(0) if ctx.has_bias else None
        return grad_values.to(ctx.acts.values.dtype), grad_W_dec.to(W_dec.dtype), grad_b_dec, None


@not_compiled
def decode(acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """The reconstruction from sparse activations: `sae_out[n] = b_dec + sum of value * W_dec[index]`, `[N, d_out]`.

    Equivalent to `fastsae_kernels.reference.decode` of `acts.to_dense()`. Differentiable in `acts.values`, `W_dec`, `b_dec`.

    Args:
        acts: From `encode`, or built by hand.
        W_dec: `[d_sae, d_out]`.
        b_dec: `[d_out]` or None (a partial sum over a shard of features adds it once elsewhere).

    Raises:
        ValueError: Shapes disagree.
        TypeError: Mixed or unsupported dtypes.

    Numerics:
        Accumulates in fp32, returns the dtype of `W_dec`; deterministic.
    """
    W_dec, *bias = _autocast(W_dec, *([] if b_dec is None else [b_dec]))
    b_dec = bias[0] if bias else None
    check_decode(acts.shape[1], W_dec.dtype, acts.device, W_dec, b_dec)
    detached = replace(acts, values=acts.values.detach())
    out: Tensor = _Decode.apply(acts.values, W_dec, b_dec, detached)
    return out
