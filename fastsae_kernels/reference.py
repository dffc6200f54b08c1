"""The specification: one plain, dense PyTorch function per op. Slow on purpose, differentiable by autograd.

Every other backend is tested against these functions in fp64. The straight-through estimates have no true derivative,
so `gradcheck` does not apply; tests/kernels/test_reference.py holds them to closed forms written in NumPy.

Conventions, where published code disagrees (all as SAELens):

- the gate is strict, `hidden_pre > threshold`; the window is open at both ends, `|hidden_pre - threshold| < bandwidth / 2`;
- the L0 estimate looks at `hidden_pre`, so inactive features in the window's lower half count;
- no ReLU stands before the gate (thresholds are non-negative); `threshold` is raw, a log parameter is exponentiated outside.

Source: Rajamanoharan et al. 2024, arXiv:2407.14435; formulas with every gradient in the docstring of `autoencode`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae_kernels.types import AutoencodeSpec


def in_window(hidden_pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """`|hidden_pre - threshold| < bandwidth / 2`, bool, compared in the threshold's precision."""
    return (hidden_pre - threshold).abs() < bandwidth / 2


class JumpReLU(torch.autograd.Function):
    """`hidden_pre * (hidden_pre > threshold)` with the straight-through gradient `-(threshold / bandwidth) * window`."""

    @staticmethod
    def forward(hidden_pre: Tensor, threshold: Tensor, bandwidth: float, ste_to_input: bool) -> Tensor:
        return hidden_pre * (hidden_pre > threshold)  # a product, so that NaN is not lost behind a closed gate

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        hidden_pre, threshold, ctx.bandwidth, ctx.ste_to_input = inputs
        ctx.save_for_backward(hidden_pre, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_pre, threshold = ctx.saved_tensors
        grad_hidden_pre = grad * (hidden_pre > threshold)
        if ctx.bandwidth == 0:
            return grad_hidden_pre, torch.zeros_like(threshold), None, None
        estimate = in_window(hidden_pre, threshold, ctx.bandwidth) * (threshold / ctx.bandwidth) * grad
        if ctx.ste_to_input:
            grad_hidden_pre = grad_hidden_pre + estimate.to(grad.dtype)
        return grad_hidden_pre, -estimate.flatten(0, -2).sum(0), None, None


class Step(torch.autograd.Function):
    """`hidden_pre > threshold` as a number, with the straight-through gradient `-(1 / bandwidth) * window`."""

    @staticmethod
    def forward(hidden_pre: Tensor, threshold: Tensor, bandwidth: float, ste_to_input: bool) -> Tensor:
        return (hidden_pre > threshold).to(threshold.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        hidden_pre, threshold, ctx.bandwidth, ctx.ste_to_input = inputs
        ctx.save_for_backward(hidden_pre, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_pre, threshold = ctx.saved_tensors
        if ctx.bandwidth == 0:
            return torch.zeros_like(hidden_pre), torch.zeros_like(threshold), None, None
        estimate = in_window(hidden_pre, threshold, ctx.bandwidth) * grad / ctx.bandwidth
        grad_hidden_pre = estimate.to(hidden_pre.dtype) if ctx.ste_to_input else torch.zeros_like(hidden_pre)
        return grad_hidden_pre, -estimate.flatten(0, -2).sum(0), None, None


def hidden_pre(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """`x @ W_enc + b_enc`, `[..., d_sae]`."""
    return x @ W_enc + b_enc


def topk_keep(acts: Tensor, k: int | None, batch_topk: bool = False) -> Tensor:
    """`[N, d_sae]` bool: True everywhere in rows with at most `k` active entries, else on the `k` largest (ties: lower index).

    With `batch_topk` the whole batch is one row with room for `k * N` entries, so that ties go to the lower token first.
    """
    if k is None:
        return torch.ones_like(acts, dtype=torch.bool)
    if batch_topk:
        return topk_keep(acts.reshape(1, -1), k * acts.shape[0]).view_as(acts)
    order = torch.argsort(acts, dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(acts, dtype=torch.bool).scatter_(-1, order[..., :k], True)
    return keep | ((acts > 0).sum(-1, keepdim=True) <= k)


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    *,
    bandwidth: float = 0.0,
    k: int | None = None,
    batch_topk: bool = False,
    ste_to_input: bool = False,
) -> Tensor:
    """Dense feature activations, `JumpReLU(x @ W_enc + b_enc)` then top-k, `[N, d_sae]`."""
    acts: Tensor = JumpReLU.apply(hidden_pre(x, W_enc, b_enc), threshold, bandwidth, ste_to_input)
    return acts * topk_keep(acts.detach(), k, batch_topk)


def decode(feature_acts: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """`feature_acts @ W_dec + b_dec`, `[N, d_out]`."""
    sae_out = feature_acts @ W_dec
    return sae_out if b_dec is None else sae_out + b_dec


class ReferenceOutput(NamedTuple):
    """What `autoencode` returns, dense."""

    sae_out: Tensor  # [N, d_out]
    penalty: Tensor  # [N]
    feature_acts: Tensor  # [N, d_sae]


def autoencode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    feature_scale: Tensor | None,
    spec: AutoencodeSpec,
    rank_scale: Tensor | None = None,
) -> ReferenceOutput:
    """Encode, gate, decode and penalise, densely.

        hidden_pre   = x @ W_enc + b_enc
        feature_acts = hidden_pre * (hidden_pre > threshold) * keep          keep: top-k, constant
                       gate and top-k look at hidden_pre * rank_scale, where there is one
        sae_out      = feature_acts @ W_dec + b_dec
        penalty      = sum_j of  (hidden_pre > threshold) * keep                            "l0"
                                 feature_acts * feature_scale                               "l1"
                                 tanh(tanh_scale * feature_acts * feature_scale)            "tanh"

    Gradients, with g = grad_penalty, K = window * keep, a = grad of feature_acts:

        grad_hidden_pre = active * keep * a   (+ K * (threshold * a + [l0] g) / bandwidth  if ste_to_input)
        grad_threshold  = - sum_n K * (threshold * a + [l0] g) / bandwidth

    Args:
        x: `[N, d_in]`.
        W_enc: `[d_in, d_sae]`.
        b_enc: `[d_sae]`.
        threshold: `[d_sae]`, >= 0.
        W_dec: `[d_sae, d_out]`.
        b_dec: `[d_out]`.
        feature_scale: `[d_sae]` weight of each feature in the `l1` and `tanh` penalties, None for ones.
        spec: The options.
        rank_scale: `[d_sae]`, >= 0, without a bandwidth; None for ones. It has no gradient, as no choice has.
    """
    pre = hidden_pre(x, W_enc, b_enc)
    scores = pre if rank_scale is None else pre.detach() * rank_scale
    gated: Tensor = JumpReLU.apply(scores, threshold, spec.bandwidth, spec.ste_to_input)
    keep = topk_keep(gated.detach(), spec.k, spec.batch_topk)
    acts = gated * keep if rank_scale is None else pre * (gated > 0) * keep
    if spec.penalty == "l0":
        step: Tensor = Step.apply(scores, threshold, spec.bandwidth, spec.ste_to_input)
        penalty = (step * keep).sum(-1)
    else:
        scaled = acts if feature_scale is None else acts * feature_scale
        penalty = (scaled if spec.penalty == "l1" else torch.tanh(spec.tanh_scale * scaled)).sum(-1)
    return ReferenceOutput(decode(acts, W_dec, b_dec), penalty, acts)
