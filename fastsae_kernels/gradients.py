"""What every backend's `autoencode` returns, and the element-wise part of its backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae_kernels.sparse_acts import SparseActs
from fastsae_kernels.spec import AutoencodeSpec


class AutoencodeOutput(NamedTuple):
    """One forward pass over N tokens."""

    sae_out: Tensor  # [N, d_out] in the input's dtype, the reconstruction; less the target, where one is given
    penalty: Tensor  # [N] fp32 (fp64 for fp64 inputs)
    l0: Tensor  # [N] int64, active features of each token
    feature_counts: Tensor  # [d_sae] int64, tokens on which each feature is active
    acts: SparseActs | None  # the entries; None where none were kept for the caller
    min_active: Tensor | None = None  # [] fp32, the smallest surviving activation, inf without one; BatchTopK only
    squared_error: Tensor | None = None  # [N] fp32 (fp64 for fp64 inputs), of the residual; only with a target


@dataclass(frozen=True)
class AutoencodeNeeds:
    """Which of the large gradients are asked for: a frozen SAE between a model's layers needs none of its own."""

    x: bool = True
    W_enc: bool = True
    W_dec: bool = True
    weight_dtype: torch.dtype | None = None  # a wider one of the weights, which a CPU then need not round to that of x


class AutoencodeGrads(NamedTuple):
    """Gradients of one pass, each with the shape of its parameter; None where not asked for."""

    x: Tensor | None
    W_enc: Tensor | None
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor | None
    b_dec: Tensor
    feature_scale: Tensor | None


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
