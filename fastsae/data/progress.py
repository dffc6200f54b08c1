"""Progress bars of the work on data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

_T = TypeVar("_T")


def with_bar(items: Iterable[_T], desc: str, unit: str, *, total: int | None, progress: bool) -> Iterable[_T]:
    """Returns the items behind a progress bar, which appears only where they take more than a second."""
    if not progress:
        return items
    from tqdm import tqdm  # lazy: in the `train` extra, which reading a file does without

    shown: Iterable[_T] = tqdm(items, desc=desc, unit=unit, total=total, unit_scale=True, delay=1)
    return shown


@contextmanager
def bar(desc: str, unit: str, *, total: int, progress: bool) -> Iterator[Callable[[int], object]]:
    """Gives a function that advances a progress bar, which appears only after a second and goes when the work is done."""
    if not progress:
        yield lambda n: None
        return
    from tqdm import tqdm

    with tqdm(desc=desc, unit=unit, total=total, unit_scale=True, delay=1, leave=False) as shown:
        yield shown.update
