"""The errors a user can act on; the command line prints them without a traceback."""

from __future__ import annotations

import math
from typing import Any

_KINDS: dict[type, str] = {dict: "an object", list: "a list"}


class FastsaeError(Exception):
    """A run failed for a reason that the message names (exit status 1).

    Attributes:
        reported_by: Where several processes end together, the number of the one that prints the message; None where they have
            not agreed on one. Other exceptions that end a process get it as well.
    """

    reported_by: int | None = None


class UsageError(FastsaeError):
    """An argument is wrong; the message says what was expected and what came (exit status 2)."""


def shown(value: Any) -> str:
    """A value as a message shows it: on one line and short, without what objects, lists and tensors hold."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int):
        digits = math.floor(abs(value).bit_length() * math.log10(2))
        return f"{value:,}" if digits < 24 else f"a number of about {digits + 1:,} digits"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        text = repr(value) if value.isprintable() else ascii(value)
        return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"
    if hasattr(value, "dtype") and hasattr(value, "shape"):  # a tensor of PyTorch, whose import takes seconds
        return f"a tensor {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return _KINDS.get(type(value), type(value).__name__)


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, PyTorch on a CPU or PyTorch on a GPU says that there is no memory left."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
