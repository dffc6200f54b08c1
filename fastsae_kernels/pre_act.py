"""The pre-activation loss: pulls features that have died back towards their threshold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsae_kernels.dense import MIN_CHUNK


class _PreActChunk(torch.autograd.Function):
    """`sum over tokens and a chunk's features of relu(threshold - hidden_pre) * norm`, the product redone in backward."""

    @staticmethod
    def forward(ctx, x, W_enc_t, b_enc, threshold, norms):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, W_enc_t, b_enc, threshold, norms)
        gap = _gap(x, W_enc_t, b_enc, threshold)
        return (gap.sum(1) * norms).sum()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, W_enc_t, b_enc, threshold, norms = ctx.saved_tensors
        gap = _gap(x, W_enc_t, b_enc, threshold)
        below = (gap > 0) * (norms[:, None] * grad)
        counts = below.sum(1)
        below = below.to(x.dtype)
        grad_x = -(below.t() @ W_enc_t) if ctx.needs_input_grad[0] else None
        return grad_x, -(below @ x), -counts.to(b_enc.dtype), counts, gap.sum(1) * grad


def _gap(x: Tensor, W_enc_t: Tensor, b_enc: Tensor, threshold: Tensor) -> Tensor:
    """`relu(threshold - hidden_pre)`, `[C, N]` in at least fp32."""
    product = W_enc_t @ x.t()
    return torch.relu((threshold - b_enc)[:, None] - product)


def pre_act_loss(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, decoder_norms: Tensor, dead_mask: Tensor
) -> Tensor:
    """Mean over tokens of `sum over dead features of relu(threshold - hidden_pre) * |W_dec|`.

    Works on the dead features alone, in chunks: no `[N, d_sae]` tensor. Selecting them synchronises a GPU once.

    Args:
        x: `[N, d_in]`.
        W_enc: `[d_in, d_sae]`.
        b_enc: `[d_sae]`.
        threshold: `[d_sae]` fp32.
        decoder_norms: `[d_sae]` fp32.
        dead_mask: `[d_sae]` bool.

    Raises:
        ValueError: `dead_mask` has the wrong shape or dtype.

    Source:
        Anthropic, "Circuits Updates - January 2025"; on dead features only, as SAELens.
    """
    if torch.compiler.is_compiling():
        loss: Tensor = _outside_of_graphs()(x, W_enc, b_enc, threshold, decoder_norms, dead_mask)
        return loss
    if dead_mask.dtype != torch.bool or dead_mask.shape != threshold.shape:
        raise ValueError(
            f"dead_mask: expected bool of shape {tuple(threshold.shape)}, got {dead_mask.dtype} {tuple(dead_mask.shape)}"
        )
    dead = dead_mask.nonzero().squeeze(1)
    total = threshold.new_zeros(())
    W_enc_t = W_enc.t()
    with torch.autocast(x.device.type, enabled=False):  # else the products would differ between forward and backward
        for ids in dead.split(MIN_CHUNK * 8):
            chunk = (W_enc_t[ids], b_enc[ids], threshold[ids], decoder_norms[ids])
            total = total + _PreActChunk.apply(x, *chunk)
    return total / max(1, x.shape[0])


_uncompiled: Callable[..., Any] | None = None


def _outside_of_graphs() -> Callable[..., Any]:
    """`pre_act_loss` as eager code that compiled code calls: how many features are dead depends on the data.

    It is made on first use: a decorator would import the compiler, which sets an environment variable and a filter of warnings.
    """
    global _uncompiled
    if _uncompiled is None:
        _uncompiled = torch.compiler.disable(pre_act_loss)
    return _uncompiled
