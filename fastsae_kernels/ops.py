"""The public, differentiable ops: they check the arguments, flatten, and hand over to the driver of eager code or of graphs.

Legend: N tokens, D d_in, S d_sae. Leading dimensions are flattened here, outside of what is compiled for a GPU, so that a
rank never compiles a kernel again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastsae_kernels import autograd, graph, graph_pair
from fastsae_kernels.activity import ActivityHint
from fastsae_kernels.checks import check_decode, check_encode, check_scale, check_target
from fastsae_kernels.memory import narrowed
from fastsae_kernels.types import AutoencodeOutput, AutoencodeSpec, PassInputs, SparseActs
from fastsae_kernels.weight_gradients import PassCollector


def _autocast(name: str, factors: tuple[Tensor, ...], biases: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """All tensors; where autocast is on those of products in its dtype, as matrix products take them.

    Biases join sums in fp32, so they and their gradients are not rounded. Thresholds are never cast, nor anything beside
    factors in float64, which PyTorch's autocast leaves alone.

    Raises:
        ValueError: The first, of the given name, has a device without autocast, such as meta.
    """
    device_type = factors[0].device.type
    # torch 2.11 cannot trace the question
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device_type):
        raise ValueError(f"{name}: expected a tensor of a CPU or a GPU, got device {device_type}")
    if torch.is_autocast_enabled(device_type) and factors[0].dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        narrow = Tensor.to if torch.compiler.is_compiling() else narrowed
        factors = tuple(narrow(tensor, dtype) for tensor in factors)
        biases = tuple(bias if bias.dtype == dtype else bias.to(torch.float32) for bias in biases)
    return *factors, *biases


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    # entering autocast takes longer than all checks together
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def autoencode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    spec: AutoencodeSpec,
    target: Tensor | None = None,
    feature_scale: Tensor | None = None,
    rank_scale: Tensor | None = None,
    hint: ActivityHint | None = None,
    collector: PassCollector | None = None,
) -> AutoencodeOutput:
    """Encode, gate, decode and penalise in one differentiable pass that holds no `[N, d_sae]` tensor while activity is sparse.

        hidden_pre   = x @ W_enc + b_enc
        feature_acts = hidden_pre * (hidden_pre > threshold) * keep          keep: the k largest of a token, or all
        sae_out      = feature_acts @ W_dec + b_dec
        penalty      = sum over features of [active], feature_acts * feature_scale, or tanh (see `AutoencodeSpec`)

    With a `target`, which is what a training step wants, the loss is part of the pass:

        residual      = sae_out - target                in place of sae_out, which is never written
        squared_error = sum over d_out of residual^2    whose backward reads the residual and nothing else

    Equivalent to `fastsae_kernels.reference.autoencode`. Where activity is dense (early training) the same numbers come
    from products in feature chunks, and from the sparse path again when activity falls. Of a dense pass of at most 2^24
    pre-activations (64 MB) these are kept for the backward, which would be slower than eager PyTorch otherwise.

    Args:
        x: `[..., d_in]`, fp32, bf16, fp16 or fp64.
        W_enc: `[d_in, d_sae]`, any strides; fastest stored feature-major.
        b_enc: `[d_sae]`, in the dtype of x or, beside 16 bits, in fp32; so `b_dec` too.
        threshold: `[d_sae]` fp32 (or fp64), >= 0, in activation units.
        W_dec: `[d_sae, d_out]`.
        b_dec: `[d_out]`.
        spec: Bandwidth, top-k and penalty.
        target: `[..., d_out]`, floating-point of any dtype, what is to be reconstructed; differentiable.
        feature_scale: `[d_sae]` weight of each feature in the `l1` and `tanh` penalties; None for ones.
        rank_scale: `[d_sae]` >= 0, only with `k` and without a bandwidth: gate and top-k look at `hidden_pre * rank_scale`,
            nothing else does. It has no gradient. With decoder norms features are chosen as if these were 1, and so is
            SAELens' rescaling by them, which cancels out but for the choice.
        hint: What earlier passes left for later ones, and a module keeps: on a GPU what is known of the activity, on a CPU the
            memory of the weights' last gradients, once nobody holds them.
        collector: While somebody collects with it, takes what the gradients of `W_enc` and `W_dec` are sums of in their place
            (where the sparse path ran; on a GPU from one pass). Both must be its parameters, or copies with their gradients.

    Returns:
        `sae_out` `[..., d_out]` (the residual, with a target); `penalty` and `squared_error` `[...]` fp32 (fp64 for fp64);
        the counts `l0` `[...]` and `feature_counts` `[d_sae]`; `acts` over the flattened tokens, None where the dense path
        ran and on a GPU.

    Raises:
        ValueError: Shapes disagree, `k` exceeds `d_sae`, NaN or Inf meets `k`, `rank_scale` comes without `k` or with a
            bandwidth, or, in a compiled graph with `k`, more than an eighth of the features lie in the window.
        TypeError: Mixed or unsupported dtypes.

    Numerics:
        Products run in the dtype of the arguments, under `torch.autocast` in its dtype, and accumulate in fp32; gates
        compare in fp32; gradients are returned in each parameter's dtype. Autocast rounds neither biases nor their
        gradients, nor on a CPU's sparse path those of the weights. On a CPU the result is deterministic. Gradients of
        `threshold` are straight-through estimates.

    Source:
        Rajamanoharan et al. 2024, arXiv:2407.14435.
    """
    compiling = torch.compiler.is_compiling()
    x, b_enc, b_dec = _autocast("x", (x,), (b_enc, b_dec))
    if compiling:  # else inside the pass, whose gradients of the weights then are not rounded
        W_enc, W_dec = _autocast("W_enc", (W_enc, W_dec), ())
    autocasts = torch.is_autocast_enabled(x.device.type)
    check_encode(x, W_enc, b_enc, threshold, spec.k, narrows=autocasts)
    check_decode(W_enc.shape[1], x.dtype, x.device, W_dec, b_dec, narrows=autocasts)
    check_scale("feature_scale", feature_scale, threshold)
    check_scale("rank_scale", rank_scale, threshold)
    if rank_scale is not None and (spec.k is None or spec.bandwidth > 0):
        raise ValueError(f"rank_scale: expected None without k or with a bandwidth, got it with {spec}")
    if target is not None:
        check_target(target, (*x.shape[:-1], W_dec.shape[1]), x.device)
        target = target.reshape(-1, W_dec.shape[1])
    x_rows = x.reshape(-1, x.shape[-1])
    rank_scale = None if rank_scale is None else rank_scale.detach()
    inputs = PassInputs(x_rows, W_enc, b_enc, threshold, W_dec, b_dec, feature_scale, target, rank_scale)
    driver = graph if compiling else autograd
    with _without_autocast(x.device.type):
        output = driver.autoencode(inputs, spec, hint, collector)
    leading = x.shape[:-1]
    return AutoencodeOutput(  # no `_replace`, which torch 2.8 cannot trace
        output.sae_out.reshape(*leading, W_dec.shape[1]),
        output.penalty.reshape(leading),
        output.l0.reshape(leading),
        output.feature_counts,
        output.acts,
        output.min_active,
        None if output.squared_error is None else output.squared_error.reshape(leading),
    )


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    *,
    bandwidth: float = 0.0,
    k: int | None = None,
    batch_topk: bool = False,
) -> SparseActs:
    """The active features of each token, `JumpReLU(x @ W_enc + b_enc)` then top-k, without a dense tensor.

        hidden_pre = x @ W_enc + b_enc ;  listed: hidden_pre > threshold, among them the k largest of a token

    Equivalent to `fastsae_kernels.reference.encode`. Differentiable in `values`. With a `bandwidth` the inactive entries
    of the straight-through window are listed too, with value 0, and `threshold` receives its estimate.

    Args:
        x: `[N, d_in]`, fp32, bf16, fp16 or fp64.
        W_enc: `[d_in, d_sae]`, any strides; fastest stored feature-major.
        b_enc: `[d_sae]`, in the dtype of x or, beside 16 bits, in fp32.
        threshold: `[d_sae]` fp32 (or fp64), >= 0.
        bandwidth: Width of the window, in activation units; 0 lists active entries only.
        k: Keep at most this many active features of a token, ties to the lower index; None keeps all.
        batch_topk: Keep the `k * N` largest of the batch instead, ties to the lower token, then the lower feature.

    Raises:
        ValueError: Shapes disagree, `k` is out of range, or a value is NaN or Inf.
        TypeError: Mixed or unsupported dtypes.

    Numerics:
        `values` are fp32 (fp64 for fp64 inputs); on a CPU those of 16-bit operands may have been rounded to 16 bits. On a GPU
        this call synchronises with the host once. Without `k` the number of entries depends on the data: a graph that is
        compiled whole needs `torch._dynamo.config.capture_dynamic_output_shape_ops`, as for `torch.nonzero`.

    Source:
        Rajamanoharan et al. 2024, arXiv:2407.14435.
    """
    spec = AutoencodeSpec(bandwidth, k, batch_topk)
    x, W_enc, b_enc = _autocast("x", (x, W_enc), (b_enc,))
    check_encode(x, W_enc, b_enc, threshold, k)
    if x.dim() != 2:
        raise ValueError(f"x: expected two dimensions [n_tokens, d_in], got shape {tuple(x.shape)}")
    driver = graph_pair if torch.compiler.is_compiling() else autograd
    with _without_autocast(x.device.type):
        return driver.encode(x, W_enc, b_enc, threshold, spec)


def decode(acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """The reconstruction from sparse activations: `sae_out[n] = b_dec + sum of value * W_dec[index]`, `[N, d_out]`.

    Equivalent to `fastsae_kernels.reference.decode` of `acts.to_dense()`. Differentiable in `acts.values`, `W_dec`, `b_dec`.

    Args:
        acts: From `encode`, or built by hand.
        W_dec: `[d_sae, d_out]`.
        b_dec: `[d_out]`, in the dtype of `W_dec` or fp32, or None (a partial sum over a shard of features adds it once
            elsewhere).

    Raises:
        ValueError: Shapes disagree.
        TypeError: Mixed or unsupported dtypes.

    Numerics:
        Accumulates in fp32, returns the dtype of `W_dec`; deterministic.
    """
    W_dec, *bias = _autocast("W_dec", (W_dec,), () if b_dec is None else (b_dec,))
    b_dec = bias[0] if bias else None
    check_decode(acts.shape[1], W_dec.dtype, acts.device, W_dec, b_dec)
    driver = graph_pair if torch.compiler.is_compiling() else autograd
    return driver.decode(acts, W_dec, b_dec)
