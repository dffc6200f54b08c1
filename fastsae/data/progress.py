"""Progress bars."""

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
def bar(
    desc: str, unit: str, *, total: int | None, progress: bool, done: int = 0, delay: float = 1, leave: bool = True
) -> Iterator[Callable[..., object]]:
    """Gives a function that advances a progress bar, and shows its keyword arguments beside it.

    Args:
        desc: What is done.
        unit: What is counted.
        total: How many there are, as far as is known.
        progress: False shows nothing.
        done: How many were done before.
        delay: Seconds after which it appears, when the function is called next; with 0 it appears at once.
        leave: Whether the bar stays when the work is done.
    """
    if not progress:
        yield lambda n, **beside: None
        return
    from tqdm import tqdm

    options = {"unit": unit, "unit_scale": True, "initial": done, "delay": delay, "leave": leave}
    with tqdm(desc=desc, total=total, **options) as shown:

        def advance(n: int, **beside: str) -> None:
            if beside:
                shown.set_postfix(beside, refresh=False)
            shown.update(n)

        yield advance
        shown.total = shown.n  # fewer where some were left out
