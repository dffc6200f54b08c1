"""Passes that can be differentiated once, and say so where somebody asks for more."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


class _Once(torch.autograd.Function):
    """A gradient as it is, made from `origins`; its own gradient raises."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *origins: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "x: expected one backward pass, got a second derivative through an op of fastsae_kernels, which has none; "
            "for a gradient penalty use fastsae_kernels.reference, the dense ops"
        )


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of an autograd Function: with `create_graph=True` its results raise where they are differentiated.

    PyTorch's `once_differentiable` does so only where the gradient that comes in requires grad itself. For a gradient
    penalty of `sae(x).sum()` it does not, and the penalty would reach no weight, in silence.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # it is where somebody asks for a graph of the gradients
            return results
        origins = [
            tensor for tensor in (*ctx.saved_tensors, *grads) if isinstance(tensor, Tensor) and tensor.requires_grad
        ]
        return tuple(None if grad is None else _Once.apply(grad, *origins) for grad in results)

    return once


def check_no_transform() -> None:
    """Raises RuntimeError inside of `torch.func.grad`, `vmap` and the like, which cannot pass through the ops."""
    is_inside = getattr(torch._C, "_are_functorch_transforms_active", None)
    if is_inside is not None and is_inside():
        raise RuntimeError(
            "x: expected no transform of torch.func around an op of fastsae_kernels, got one of grad, vjp, jvp or vmap; use "
            "torch.autograd.grad and a batch dimension, or fastsae_kernels.reference, the dense ops"
        )
