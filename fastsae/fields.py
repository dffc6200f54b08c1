"""Values that come from a file: each is checked as it is read, and the error names it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.errors import shown

_REQUIRED: Any = object()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
"""The dtypes of numbers in files, of models and of SAEs, by their names."""


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no JSON, or nested too deeply.
    """
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinities; without a temporary tensor of its size."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # the extremes are NaN where any element is
    return all(math.isfinite(bound.item()) for bound in tensor.detach().aminmax())


class Fields:
    """The values of a JSON object, or of a state dict, by name.

    Every method reads one value and raises ValueError where it is missing or not what is expected; the message names
    the value, what was expected and what came.

    Args:
        values: The object, as it was found.
        place: What names begin with in messages, such as `metadata.`.

    Raises:
        ValueError: `values` is no object with texts as keys.
    """

    def __init__(self, values: Any, place: str = "") -> None:
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise ValueError(f"{place.rstrip('.') or 'content'}: expected an object, got {shown(values)}")
        self.values, self.place = values, place

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value as it is; `default` where it is missing or null."""
        value = self.values.get(name)
        if value is None:
            if default is _REQUIRED and name not in self.values:
                raise ValueError(f"{self.place}{name}: expected a value, but the key is missing")
            return None if default is _REQUIRED else default
        return value

    def wrong(self, name: str, expected: str) -> ValueError:
        """The error for a value that is not what was expected."""
        return ValueError(f"{self.place}{name}: expected {expected}, got {shown(self.values.get(name))}")

    def integer(self, name: str, low: int, high: int | None = None, *, default: Any = _REQUIRED) -> Any:
        """An integer from `low` to `high`."""
        value = self.get(name, default)
        if value is default:
            return value
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or value < low or (high is not None and value > high):
            raise self.wrong(name, f"an integer >= {low}" if high is None else f"an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float = -math.inf, *, above: bool = False, default: Any = _REQUIRED) -> Any:
        """A finite number, at least `low`, or `above` it."""
        value = self.get(name, default)
        if value is default:
            return value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) < 1e300 or value < low or (above and value == low):
            bound = "" if low == -math.inf else f" {'>' if above else '>='} {low:g}"
            raise self.wrong(name, f"a finite number{bound}")
        return float(value)

    def boolean(self, name: str, default: Any = _REQUIRED) -> Any:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def choice(self, name: str, choices: Collection[str], default: Any = _REQUIRED) -> Any:
        """One of some texts."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(name, " or ".join(choices))
        return value

    def fields(self, name: str, default: Any = _REQUIRED) -> Fields:
        """An object within."""
        return Fields(self.get(name, default), f"{self.place}{name}.")

    def tensor(self, name: str, shape: tuple[int | None, ...], dtypes: Collection[torch.dtype]) -> Tensor:
        """A tensor of a shape, in which None stands for any size, and one of some dtypes, without NaN and infinities."""
        value = self.get(name)
        fits = isinstance(value, Tensor) and value.dtype in dtypes and value.dim() == len(shape)
        if not fits or any(size not in (None, got) for size, got in zip(shape, value.shape, strict=True)):
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.wrong(name, f"a tensor {kinds} [{sizes}]")
        if not is_finite(value):
            raise ValueError(f"{self.place}{name}: expected finite numbers, got NaN or infinity")
        return value

    def check_names(self, known: Collection[str]) -> None:
        """Raises ValueError where the object has a name that is not known."""
        unknown = [name for name in self.values if name not in known]
        if unknown:
            raise ValueError(f"{self.place}{shown(unknown[0])[1:-1]}: expected no such key, only {', '.join(known)}")
