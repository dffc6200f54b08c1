"""The differentiable exchanges of an SAE whose features are held by several processes.

Every process computes the same loss. So what is summed in the forward pass is handed back as it is, and what all processes
read has a gradient that is summed over them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from fastsae.distributed.groups import Group, Pending
from fastsae_kernels.loss_terms import subtract_target, weighted_sum


class _Shared(torch.autograd.Function):
    """Returns a tensor that every process holds whole; its gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, name: str) -> Tensor:
        ctx.group, ctx.name = group, name
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.group.sum_(grad.contiguous().clone(), ctx.name), None, None


class _Summed(torch.autograd.Function):
    """A sum over the processes that is under way; the gradient of each part is that of the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, pending: Pending) -> Tensor:
        return pending.wait().view_as(part).to(part.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Residual(torch.autograd.Function):
    """`(sae_out - target, its squared norms)` from the parts of a reconstruction that are being summed, and `b_dec`.

    It keeps the residual alone: the gradient of each part is `2 * grad_squared_error[n] * residual[n]`.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, b_dec: Tensor, target: Tensor, pending: Pending) -> tuple[Tensor, Tensor]:
        total, squared_error = subtract_target(pending.wait(), target, b_dec)
        residual = total.to(part.dtype)
        ctx.save_for_backward(residual)
        ctx.dtypes = b_dec.dtype, target.dtype
        ctx.set_materialize_grads(False)
        return residual, squared_error

    @staticmethod
    def backward(ctx: Any, grad_residual: Tensor | None, grad_squared_error: Tensor | None) -> tuple[Any, ...]:
        (residual,) = ctx.saved_tensors
        bias_dtype, target_dtype = ctx.dtypes
        if grad_squared_error is None and grad_residual is None:
            return None, None, None, None
        grad_b_dec: Tensor | float = 0.0
        rows: Tensor | float = 0.0
        if grad_squared_error is not None:
            weights = 2 * grad_squared_error
            rows, grad_b_dec = residual * weights[:, None].to(residual.dtype), weighted_sum(weights, residual)
        if grad_residual is not None:
            rows, grad_b_dec = rows + grad_residual, grad_b_dec + weighted_sum(None, grad_residual)
        assert isinstance(rows, Tensor)
        assert isinstance(grad_b_dec, Tensor)
        return rows, grad_b_dec.to(bias_dtype), -rows.to(target_dtype) if ctx.needs_input_grad[2] else None, None


def shared(tensor: Tensor, group: Group, name: str) -> Tensor:
    """A tensor that every process of the group holds; its gradient is summed over them, and counted under `name`."""
    if group.size == 1 or not tensor.requires_grad or not torch.is_grad_enabled():
        return tensor
    out: Tensor = _Shared.apply(tensor, group, name)
    return out


def summed(part: Tensor, group: Group, name: str, pending: Pending | None = None) -> Tensor:
    """The sum of `part` over the processes; the gradient of each part is that of the sum.

    Args:
        part: The part of this process.
        group: The processes.
        name: The name under which `group.traffic` counts the sum.
        pending: The sum, where it is under way already.
    """
    if group.size == 1:
        return part
    out: Tensor = _Summed.apply(part, pending or group.start_sum_(part.detach().clone(), name))
    return out


def residual_of(part: Tensor, b_dec: Tensor, target: Tensor, pending: Pending) -> tuple[Tensor, Tensor]:
    """The residual `[N, d_out]` and its squared norms `[N]` in at least fp32, once the parts are summed."""
    residual, squared_error = _Residual.apply(part, b_dec, target, pending)
    return residual, squared_error


def start_sum(part: Tensor, group: Group, dtype: torch.dtype, name: str) -> Pending:
    """Starts the sum of `[N, d]` parts over the processes, in at least fp32, sent in `dtype`.

    In 16 bits each process sums some of the rows: it receives these rows of all parts, sums them in fp32, and sends the sums
    to all. So every number is rounded twice, however many processes there are. A ring's sum in 16 bits sends as many bytes.
    """
    wide = torch.promote_types(part.dtype, torch.float32)
    if dtype.itemsize != 2 or wide == torch.float64:
        own = part.detach()
        return group.start_sum_(own if own.dtype == wide and own.is_contiguous() else own.to(wide).contiguous(), name)
    rows = -(-len(part) // group.size)
    sent = part.new_zeros(group.size * rows, part.shape[1], dtype=dtype)
    sent[: len(part)] = part.detach()
    received = torch.empty_like(sent)
    group.traffic[name] += received.nbytes * (group.size - 1) // group.size
    # as bytes: not every collective takes every number format
    work = distributed.all_to_all_single(
        received.view(torch.uint8), sent.view(torch.uint8), group=group.processes, async_op=True
    )

    def finish() -> Tensor:
        own = received.view(group.size, rows, part.shape[1]).sum(0, dtype=wide).to(dtype)
        return group.gather(own.view(torch.uint8), name).view(dtype).reshape(sent.shape)[: len(part)].to(wide)

    return Pending(received, work, finish)
