"""Weight gradients between `FusedSAEAdam.backward` and `step`: what they are sums of is there, the sums are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, distributed, nn

from fastsae.errors import UsageError
from fastsae.sae.compute_copies import ComputeCopies
from fastsae_kernels import Collector, WeightGradients

if TYPE_CHECKING:
    from fastsae_kernels.gpu.weight_gradients import RowSums

NAMES = ("W_enc", "W_dec")


class Collecting(Protocol):
    """An SAE whose passes hand their weight gradients over: one of ours, or a peer's that runs on the ops."""

    W_enc: Any
    W_dec: Any

    @property
    def collector(self) -> Collector: ...
    @property
    def d_in(self) -> int: ...
    @property
    def d_sae(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them."""

    def store_by_feature_(self) -> None:
        """Stores `W_enc` as the kernels read it fastest."""

    def use_compute_copies(self, copies: ComputeCopies) -> None:
        """Takes 16-bit copies of the weights instead of casting them."""


class PendingGradient(Tensor):
    """What stands in `.grad` of a weight matrix until its gradient is summed; it holds no numbers, and reading it raises.

    So gradient clipping, a GradScaler, an average over ranks or a log cannot miss the gradient in silence. Setting `.grad`
    to None throws the gradient away, as it does with any other.

    Args:
        parameter: The weight matrix.
        name: Its name, for messages.
    """

    @staticmethod
    def __new__(cls, parameter: Tensor, name: str) -> PendingGradient:
        pending: PendingGradient = Tensor._make_wrapper_subclass(
            cls, parameter.shape, strides=parameter.stride(), dtype=parameter.dtype, device=parameter.device
        )
        return pending

    def __init__(self, parameter: Tensor, name: str) -> None:
        self.parameter_name = name

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PendingGradient({self.parameter_name}, {tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        values = [item for value in args for item in (value if isinstance(value, list | tuple) else [value])]
        name = next((value.parameter_name for value in values if isinstance(value, cls)), "weight")
        raise UsageError(
            f"{name}.grad: expected nothing but step() and zero_grad() after optimizer.backward(loss), which leaves the gradient "
            f"to be summed in step(), got {func}; for gradient clipping (max_grad_norm apart), GradScaler, averages over "
            "ranks or logs call loss.backward() instead, for every loss of the step"
        )


class PendingGradients:
    """The gradients of an SAE's two weight matrices that an optimiser will sum itself.

    Args:
        sae: Whose passes are collected.
        matrices: Its `W_enc` and `W_dec`.
    """

    def __init__(self, sae: Collecting, matrices: tuple[nn.Parameter, nn.Parameter]) -> None:
        self._sae, self._matrices = sae, matrices
        self._collected = WeightGradients(*matrices)
        self._marks: dict[nn.Parameter, PendingGradient] = {}

    def __contains__(self, p: nn.Parameter) -> bool:
        return p in self._marks

    def backward(self, loss: Tensor, retain_graph: bool | None) -> None:
        """`FusedSAEAdam.backward`."""
        self.follow_grads()
        self.check()
        self.write_row_sums()  # a GPU collects from one pass
        if not self._may_collect():
            for p in list(self._marks):
                p.grad = self._written_out(p)
            loss.backward(retain_graph=retain_graph)
            return
        for p in self._marks:
            p.grad = None  # what comes another way is to find nothing there
        try:
            with self._sae.collector.collecting(self._collected):
                loss.backward(retain_graph=retain_graph)
        finally:
            self._settle()

    def _may_collect(self) -> bool:
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            sharding = getattr(self._sae, "sharding", None)
            if sharding is None or sharding.data.size > 1:
                return False  # whoever averages gradients, DDP for one, finds them in `.grad`
        for p in self._matrices:
            if p.grad is not None and p.grad is not self._marks.get(p):
                return False
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                return False
        return True

    def _settle(self) -> None:
        """Leaves each gradient in one place: in `.grad` where a part of it is there, else to be summed."""
        for i, (p, name) in enumerate(zip(self._matrices, NAMES, strict=True)):
            if not self._collected.has(i):
                continue
            if p.grad is None:
                p.grad = self._marks[p] = PendingGradient(p, name)
            else:
                whole = self._written_out(p)
                p.grad += whole

    def write_row_sums(self) -> None:
        """Sums what a pass on a GPU left into `.grad`."""
        for p in self._matrices:
            if self.row_sums(p) is not None:
                p.grad = self._written_out(p)

    @torch.no_grad()
    def _written_out(self, p: nn.Parameter) -> Tensor:
        """The whole gradient of a weight matrix, which is pending no longer."""
        i, sums = self._index(p), self.row_sums(p)
        whole = torch.empty_like(p)
        grad = next(self._collected.chunks(i, len(self._matrices[1])))[1] if sums is None else sums.dense()
        self.by_feature(p, whole).copy_(grad)
        self._collected.drop(i)
        self._marks.pop(p, None)
        return whole

    def follow_grads(self) -> None:
        """Forgets what was thrown away: `sae.zero_grad()` and the like set `.grad` to None."""
        for p, mark in list(self._marks.items()):
            if p.grad is not mark:
                self._collected.drop(self._index(p))
                del self._marks[p]

    def clear(self) -> None:
        """Forgets all of them."""
        for p, mark in self._marks.items():
            if p.grad is mark:
                p.grad = None
        self._marks.clear()
        self._collected.clear()

    def check(self) -> None:
        """Raises UsageError where a tensor of a pass was written since its `backward`, or another optimiser's gradient waits."""
        for p in self._matrices:
            if isinstance(p.grad, PendingGradient) and p.grad is not self._marks.get(p):
                raise UsageError(
                    f"{p.grad.parameter_name}.grad: expected a gradient, got one that another optimiser's backward left pending"
                )
        if not self._collected.is_unchanged():
            raise UsageError(
                "x, loss: expected the tensors of a pass as optimizer.backward(loss) left them, from which step() sums the "
                "gradients, got one that was overwritten in place; copy it, or call loss.backward()"
            )

    def _index(self, p: nn.Parameter) -> int:
        return 0 if p is self._matrices[0] else 1

    def row_sums(self, p: nn.Parameter) -> RowSums | None:
        """What a GPU's kernel sums in its pass over the weights."""
        return self._collected.row_sums(self._index(p))

    def chunks(self, p: nn.Parameter, size: int) -> Iterator[tuple[slice, Tensor]]:
        """`(rows, gradient [C, d])` of a weight matrix by feature, pending or in `.grad`, for `size` features at a time."""
        if p in self:
            yield from self._collected.chunks(self._index(p), size)
        elif p.grad is not None:
            whole = self.by_feature(p, p.grad)
            for start in range(0, len(self._matrices[1]), size):
                rows = slice(start, start + size)
                yield rows, whole[rows]

    def touched(self) -> Tensor:
        """`[d_sae]` bool, which features have an entry."""
        return self._collected.touched()

    def by_feature(self, p: nn.Parameter, tensor: Tensor) -> Tensor:
        """A tensor in the shape of the weight matrix `p`, as `[d_sae, d_in]`."""
        return tensor if p is self._matrices[1] else tensor.t()
