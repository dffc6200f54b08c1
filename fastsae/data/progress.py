"""Progress bars of the work on data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

_T = TypeVar("_T")


def with_bar(items: Iterable[_T], desc: str, unit: str, *, total: int | None, progress: bool) -> Iterable[_T]:
    """Returns the items behind a progress bar, which appears only where they take more than a second."""
    if not progress:
        return items
    from tqdm import tqdm  # lazy: in the `train` extra, which reading a file does without

    bar: Iterable[_T] = tqdm(items, desc=desc, unit=unit, total=total, unit_scale=True, delay=1)
    return bar
