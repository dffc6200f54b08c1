"""What stands in `.grad` of a weight matrix whose gradient is not summed yet."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastsae.errors import UsageError


class PendingGradient(Tensor):
    """`.grad` of a weight matrix from `FusedSAEAdam.backward` to `step`; it holds no numbers, and reading it raises.

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
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [value.parameter_name for value in _flat([*args, *(kwargs or {}).values()]) if isinstance(value, cls)]
        raise UsageError(
            f"{names[0]}.grad: expected nothing to read or change it, as optimizer.backward(loss) left it to be summed in "
            f"optimizer.step(), got {func}; for clipping (beyond max_grad_norm), GradScaler, averages over ranks or logs "
            "call loss.backward() instead, for every loss of the step"
        )


def _flat(values: list[Any]) -> list[Any]:
    return [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
