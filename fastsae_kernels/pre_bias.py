"""A bias that is subtracted before the encoder, whose gradient is a matrix-vector product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae_kernels.loss_terms import weighted_sum
from fastsae_kernels.once import differentiable_once


class _PreBias(torch.autograd.Function):
    """`b_enc` as it is; its gradient also reaches the bias that was subtracted from x."""

    @staticmethod
    def forward(ctx: Any, pre_bias: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        ctx.save_for_backward(W_enc)
        ctx.dtype = pre_bias.dtype
        return b_enc.clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor]:
        (W_enc,) = ctx.saved_tensors
        grad_pre_bias = -weighted_sum(grad, W_enc.t()).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return grad_pre_bias, None, grad


def subtract_pre_bias(x: Tensor, pre_bias: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor]:
    """`(x - pre_bias, b_enc)` for an op on `x @ W_enc + b_enc`, without asking that op for the gradient of x.

        grad_pre_bias = - sum over tokens of grad_x = - W_enc @ (sum over tokens of grad_hidden_pre) = - W_enc @ grad_b_enc

    `d_in * d_sae` multiplications, where autograd's own way would take a sixth product of all tokens (or a gather of a row of
    `W_enc` per active feature). Holds for every op in which `b_enc` appears only as it does above.

    Args:
        x: `[..., d_in]`.
        pre_bias: `[d_in]`.
        W_enc: `[d_in, d_sae]`.
        b_enc: `[d_sae]`.

    Returns:
        `x - pre_bias`, differentiable in `x` alone, and `b_enc`, differentiable in `pre_bias` too: hand both to the same op.

    Source:
        Gao et al. 2024, arXiv:2406.04093, whose kernels do the same.
    """
    return x - pre_bias.detach(), _PreBias.apply(pre_bias, W_enc, b_enc)
