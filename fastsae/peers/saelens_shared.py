"""An accelerated SAE of SAELens of which this process may hold a part: the ops of all that hold one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastsae_kernels as kernels
from fastsae.distributed import Sharding
from fastsae.errors import UsageError
from fastsae.peers.handle import Accelerated

N_COMPARED = 256  # numbers of a step's tokens that processes compare
# The share of their norm by which they may differ: where each process ran the language model, the same tokens differ by rounding.
MAX_DIFFERENCE = 0.1


class MaybeShared(Accelerated):
    """An accelerated SAE of SAELens, whole or a part of one."""

    b_dec: Any

    @property
    def sharding(self) -> Sharding | None:
        """Which features this process holds, where several share them; it averages gradients, and clips them."""
        return self._fastsae.sharding

    @property
    def _is_shared(self) -> bool:
        """Whether other processes take part in every call."""
        return self.sharding is not None and self.sharding.world.size > 1

    @property
    def _ops(self) -> Any:
        """Who runs autoencode, encode and decode: the kernels, or several processes on their parts of the features."""
        return self.sharding if self._is_shared else kernels

    def _is_fused(self, method: str, reason: str | None) -> bool:
        if reason is not None:
            self._check_whole(method, reason)
        return super()._is_fused(method, reason)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # which would lose the error
    def _check_whole(self, method: str, reason: str) -> None:
        """Raises UsageError where this process has a part of the SAE, with the reason why that is not enough."""
        if self._is_shared:
            raise UsageError(
                f"{method}: expected a call that the fused ops cover, since this process has a part of the SAE alone, but "
                f"{reason}; handle.undo() in every process puts the whole SAE together"
            )

    def _is_compiled(self, method: str) -> bool:
        """Whether a call is traced by `torch.compile`, which takes the peer's code."""
        if not torch.compiler.is_compiling():
            return False
        if self._is_shared:  # asked for here, since the check would end a graph
            self._check_whole(method, "torch.compile is around it")
        return True

    @torch.no_grad()
    def _check_same_tokens(self, x: Tensor) -> None:
        """Raises UsageError where the first training step of processes that share features has other tokens in some of them."""
        if not self._is_shared or self._fastsae.has_compared:
            return
        assert self.sharding is not None
        sample = x.new_zeros(N_COMPARED + 1, dtype=torch.float64)
        found = x.flatten()[:: max(1, x.numel() // N_COMPARED)][:N_COMPARED]
        sample[: len(found)], sample[-1] = found, len(x)
        samples = self.sharding.features.gather(sample, "x")
        n_tokens, numbers = samples[:, -1], samples[:, :-1]
        is_other = (numbers - numbers[0]).norm(dim=1) > MAX_DIFFERENCE * numbers[0].norm()
        if bool(is_other.any()) or len(n_tokens.unique()) > 1:
            raise UsageError(
                f"sae_in: expected the same tokens in all {len(samples)} processes that share the features of an SAE, got "
                "others; give each of them the same data in the same order"
            )
        self._fastsae.has_compared = True

    def _pre_bias(self) -> Tensor:
        """`b_dec` where it is subtracted from x: each process then has the gradient of its own features alone."""
        b_dec: Tensor = self.b_dec
        return b_dec if self.sharding is None else self.sharding.share(b_dec)

    def _own(self, mask: Tensor) -> Tensor:
        """The part of a mask of all features that this process holds."""
        return mask if self.sharding is None else self.sharding.own_part("b_enc", mask)

    def _sum_of_parts(self, part: Tensor, x: Tensor) -> Tensor:
        """What the features of all processes give from `x`, whose gradient they exchange even where some give nothing."""
        return part if self.sharding is None else self.sharding.sum_of_parts(part + x[:0].sum())
