"""An option of a training run: a field of `TrainConfig`, with what the command line shows and checks of it."""

from __future__ import annotations

from dataclasses import field
from typing import Any

ANY_WHOLE = (0, 2**63 - 1)
COUNT = (1, 10**12)
SHARE = (0, 1)
WEIGHT = (0, 1e9)
DECAY_RATE = (0, 0.999999)


def option(
    default: Any,
    group: str,
    text: str,
    bounds: tuple[float, float] | None = None,
    used_by: tuple[str, ...] = (),
) -> Any:
    """A field with what the command line shows and checks.

    Args:
        default: Its default value.
        group: The heading under which the help lists it.
        text: What the help says of it.
        bounds: The smallest and the largest number that are allowed.
        used_by: The architectures that it has an effect on; empty for all of them.
    """
    return field(default=default, metadata={"help": text, "group": group, "bounds": bounds, "used_by": used_by})
