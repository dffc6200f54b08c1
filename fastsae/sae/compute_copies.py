"""16-bit copies of the weight matrices for the products, written by the optimiser in its own pass over the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastsae_kernels.memory import version_of
from fastsae_kernels.once import differentiable_once

WrittenState = tuple[int | None, int]


def written_state(p: Tensor) -> WrittenState:
    """Differs once a tensor was written in place or got other memory; what goes through `p.data` in place is not seen."""
    return version_of(p), p.data_ptr()


class _Narrow(torch.autograd.Function):
    """The copy, with the master's gradient; what `master.to(dtype)` is."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = master.dtype
        ctx.set_materialize_grads(False)  # a pass that leaves its gradient to an optimiser hands none on
        return copy.detach()  # shares the count of writes

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        return None if grad is None else grad.to(ctx.dtype), None


class ComputeCopies:
    """A narrow copy of each master weight, in its shape and memory layout.

    Autocast casts both matrices in every step: 6 bytes of traffic per weight, 2 where the row that was just updated is
    rounded and stored.

    Args:
        masters: The weights.
        dtype: Of the copies.
    """

    def __init__(self, masters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._copies = {p: torch.empty_like(p, dtype=dtype, requires_grad=False) for p in masters}
        self._states: dict[nn.Parameter, WrittenState] = {}
        for p in self._copies:
            self.refresh(p)

    def of(self, p: nn.Parameter) -> Tensor | None:
        """The copy of a weight, like it in shape; None where somebody else has changed or moved the weight since."""
        copy = self._copies.get(p)
        is_current = copy is not None and copy.device == p.device and self._states.get(p) == written_state(p)
        return copy if is_current else None

    def take(self, W: Tensor) -> Tensor:
        """What an op is to be given for a weight: under autocast to the copies' dtype a current copy, else the weight."""
        if torch.compiler.is_compiling() or not isinstance(W, nn.Parameter):
            return W
        device_type = W.device.type
        if not torch.is_autocast_enabled(device_type) or torch.get_autocast_dtype(device_type) != self.dtype:
            return W
        copy = self.of(W)
        return W if copy is None else _Narrow.apply(W, copy)

    def to_write(self, p: nn.Parameter) -> Tensor:
        """The copy of a weight, whatever it holds; call `record` when it holds the weight."""
        if self._copies[p].device != p.device:
            self._copies[p] = torch.empty_like(p, dtype=self.dtype, requires_grad=False)
        return self._copies[p]

    def record(self, p: nn.Parameter) -> None:
        """Notes that the copy holds the weight as it is now."""
        torch.autograd.graph.increment_version(self._copies[p])  # kernels do not count what they write
        self._states[p] = written_state(p)

    @torch.no_grad()
    def refresh(self, p: nn.Parameter) -> None:
        """Copies the whole weight."""
        self.to_write(p).copy_(p)
        self.record(p)
