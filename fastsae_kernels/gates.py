"""The JumpReLU gate and the sparsity penalty with their gradients: of entries, and of a tile of the dense backend.

    hidden_pre = W_enc.T[rows] @ x[tokens].T + b_enc       a tile, [C, T]: C features, T tokens
    acts       = hidden_pre * (hidden_pre > threshold)
    grad_acts  = W_dec[rows] @ grad_out[tokens].T          from which `gate_backward` tells how the others follow

A tile is gated here by PyTorch's ops, on a GPU by the kernels of `gpu.gates`. Gate and window of a tile are factors of 0 or 1,
so that NaN and Inf are not lost behind a closed one.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastsae_kernels.matmul import multiply
from fastsae_kernels.types import AutoencodeSpec


def penalty_terms(acts: Tensor, scale: Tensor | None, spec: AutoencodeSpec) -> Tensor:
    """The penalty of each activation (fp32, any shape): `[act > 0]`, `act * scale` or `tanh(c * act * scale)`."""
    if spec.penalty == "l0":
        return (acts > 0).float()
    scaled = acts if scale is None else acts * scale
    return scaled if spec.penalty == "l1" else torch.tanh(spec.tanh_scale * scaled)


def penalty_slope(acts: Tensor, scale: Tensor | None, spec: AutoencodeSpec) -> Tensor:
    """Derivative of `penalty_terms` with respect to `act * scale`: 1 for `l1`, `c * sech^2(c * act * scale)` for `tanh`."""
    if spec.penalty == "l1":
        return torch.ones_like(acts)
    scaled = acts if scale is None else acts * scale
    return spec.tanh_scale * (1 - torch.tanh(spec.tanh_scale * scaled) ** 2)


def gate_backward(
    active: Tensor, window: Tensor, threshold: Tensor, grad_acts: Tensor, grad_penalty: Tensor, spec: AutoencodeSpec
) -> tuple[Tensor, Tensor | None]:
    """Gradients behind the JumpReLU gate, element by element.

        estimate        = window * (threshold * grad_acts + [l0] grad_penalty) / bandwidth
        grad_hidden_pre = active * grad_acts (+ estimate, if ste_to_input)
        grad_threshold  = -estimate, still to be summed over tokens

    Args:
        active: Bool, any shape.
        window: Bool, same shape; ignored without a bandwidth.
        threshold: Same shape; overwritten.
        grad_acts: Gradient with respect to the feature activations, penalty slope included; overwritten.
        grad_penalty: Gradient with respect to the penalty of the element's token.
        spec: The options.

    Returns:
        `(grad_hidden_pre, grad_threshold)`; the second is None without a bandwidth.
    """
    if spec.bandwidth == 0:
        return grad_acts.masked_fill_(~active, 0), None
    estimate = threshold.mul_(grad_acts)
    if spec.penalty == "l0":
        estimate += grad_penalty
    estimate.masked_fill_(~window, 0).div_(spec.bandwidth)
    grad_hidden_pre = grad_acts.masked_fill_(~active, 0)
    if spec.ste_to_input:
        grad_hidden_pre += estimate
    return grad_hidden_pre, estimate.neg_()


class Features(NamedTuple):
    """What the features of a tile are gated with."""

    b_enc: Tensor  # [C]
    threshold: Tensor  # [C]
    scale: Tensor | None  # [C]: weights of the l1 and tanh penalties


class Gated(NamedTuple):
    """A tile after the gate."""

    acts: Tensor  # [C, T] feature activations in the dtype of products
    l0: Tensor  # [T] active features of each token
    counts: Tensor  # [C] tokens on which each feature is active
    penalty: Tensor  # [T]


class GatedGrads(NamedTuple):
    """The gradients of a tile; the last three are sums over its tokens."""

    acts: Tensor  # [C, T] feature activations, as the forward had them
    grad_hidden_pre: Tensor  # [C, T] in the dtype of products
    b_enc: Tensor  # [C]
    threshold: Tensor | None  # [C]; None without a window
    scale: Tensor | None  # [C]; None where the penalty weighs no feature


class Gates(Protocol):
    """The steps of `dense` between its products; this module and `gpu.gates` have them.

    `hidden_pre` is overwritten unless it is kept.
    """

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the pre-activations, where that of the products is `dtype`."""

    def hidden_pre(self, x: Tensor, W_enc_t: Tensor, features: Features, out: Tensor | None) -> Tensor:
        """A tile `[C, T]` from `x [T, d_in]` and `W_enc_t [C, d_in]`, in `out` where that is given; `gate_tile` may add b_enc."""

    def gate_tile(
        self, hidden_pre: Tensor, features: Features, spec: AutoencodeSpec, dtype: torch.dtype, is_kept: bool
    ) -> Gated:
        """The tile after the gate, in the dtype of products."""

    def gate_tile_backward(
        self,
        hidden_pre: Tensor,
        W_dec: Tensor,
        grad_out: Tensor,
        grad_penalty: Tensor,
        features: Features,
        spec: AutoencodeSpec,
        is_kept: bool,
    ) -> GatedGrads:
        """The gradients of the tile, from `W_dec [C, d_out]`, `grad_out [T, d_out]` and `grad_penalty [T]`."""


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least fp32."""
    return torch.promote_types(dtype, torch.float32)


def hidden_pre(x: Tensor, W_enc_t: Tensor, features: Features, out: Tensor | None) -> Tensor:
    """`[C, T]` pre-activations in at least fp32, features first: the layout in which every product here is fast."""
    if out is None:
        out = features.b_enc.new_empty(len(W_enc_t), len(x), dtype=kept_dtype(x.dtype))
    multiply(W_enc_t, x.t(), out)
    return out.add_(features.b_enc[:, None])


def _active(hidden_pre: Tensor, threshold: Tensor) -> Tensor:
    """`hidden_pre > threshold` as 0 and 1 of the same dtype: products with bool would convert it to a tensor of their own."""
    return torch.gt(hidden_pre, threshold, out=torch.empty_like(hidden_pre))


def gate_tile(hidden_pre: Tensor, features: Features, spec: AutoencodeSpec, dtype: torch.dtype, is_kept: bool) -> Gated:
    """The tile after the gate."""
    active = _active(hidden_pre, features.threshold[:, None])
    acts = torch.mul(hidden_pre, active, out=None if is_kept else hidden_pre)
    l0, counts = active.sum(0), active.sum(1)
    if spec.penalty == "l0":
        return Gated(acts.to(dtype), l0, counts, l0)
    scale = None if features.scale is None else features.scale[:, None]
    return Gated(acts.to(dtype), l0, counts, penalty_terms(acts, scale, spec).sum(0))


def gate_tile_backward(
    hidden_pre: Tensor,
    W_dec: Tensor,
    grad_out: Tensor,
    grad_penalty: Tensor,
    features: Features,
    spec: AutoencodeSpec,
    is_kept: bool,
) -> GatedGrads:
    """The gradients of the tile."""
    threshold, window = features.threshold[:, None], None
    if spec.bandwidth:  # 0 and 1, as the gate
        window = (hidden_pre - threshold).abs_().lt_(spec.bandwidth / 2)
    active = _active(hidden_pre, threshold)
    acts = torch.mul(hidden_pre, active, out=None if is_kept else hidden_pre)
    grad_acts = torch.empty_like(acts)
    multiply(W_dec, grad_out.t(), grad_acts)
    grad_scale = None
    if spec.penalty != "l0":
        scale = None if features.scale is None else features.scale[:, None]
        grad_scale = _penalty_backward(acts, scale, grad_penalty, grad_acts, spec)
    acts, estimate, grad_threshold = acts.to(W_dec.dtype), None, None
    if window is not None:
        estimate = _estimate(window, threshold, grad_acts, grad_penalty, spec)
        grad_threshold = -estimate.sum(1)
    grad_hidden_pre = grad_acts.mul_(active)
    if spec.ste_to_input and estimate is not None:
        grad_hidden_pre += estimate
    return GatedGrads(
        acts, grad_hidden_pre.to(W_dec.dtype), grad_hidden_pre.sum(1), grad_threshold, grad_scale
    )  # fmt: skip


def _penalty_backward(
    acts: Tensor, scale: Tensor | None, grad_penalty: Tensor, grad_acts: Tensor, spec: AutoencodeSpec
) -> Tensor | None:
    """Adds the slope of the `l1` or `tanh` penalty to `grad_acts`; the gradient of the scale, if there is one."""
    grad_scaled = penalty_slope(acts, scale, spec).mul_(grad_penalty)
    if scale is None:
        grad_acts += grad_scaled
        return None
    grad_acts.addcmul_(grad_scaled, scale)
    return grad_scaled.mul_(acts).sum(1)


def _estimate(
    window: Tensor, threshold: Tensor, grad_acts: Tensor, grad_penalty: Tensor, spec: AutoencodeSpec
) -> Tensor:
    """The straight-through estimate of `gate_backward`, in the memory of `window`."""
    if spec.penalty == "l0":
        window *= torch.addcmul(grad_penalty, threshold, grad_acts)
    else:
        window *= threshold * grad_acts
    return window.div_(spec.bandwidth)
