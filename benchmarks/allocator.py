"""Lets the C library keep the memory that is freed, so that no provider's time includes the finding of its pages.

By default glibc gives a large tensor's pages back to the system when it is freed, and the next call faults them in again, one
by one: that is a third of the time of an eager dense step of 4,096 tokens. Whoever trains with another allocator, or with
`MALLOC_TRIM_THRESHOLD_` and `MALLOC_MMAP_MAX_` set, does not pay it. So rounds have one setting in turn, and where page faults
cost a provider time, its better setting counts.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from benchmarks.shapes import DEVICE

MIB = 2**20
DEFAULT, TUNED, EXACT = "default", "tuned", "exact"
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4  # names of mallopt, in glibc's malloc.h
OPTIONS = {
    # what glibc starts with; the two thresholds at the values up to which it raises them by itself
    DEFAULT: {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 * MIB, TRIM_THRESHOLD: 64 * MIB, TOP_PAD: 128 * 1024},
    # nothing is mapped for itself, and nothing that is freed goes back
    TUNED: {MMAP_MAX: 0, TRIM_THRESHOLD: -1, TOP_PAD: 64 * MIB},
    # every tensor is mapped for itself and goes back when it is freed: for measuring memory, not time
    EXACT: {MMAP_THRESHOLD: MIB // 4},
}
FAULT_S = 1e-6  # finding and clearing a page takes about so long
# a call with fewer page faults, or with a smaller share of its time in them, is as fast under either setting
FEWEST_FAULTS, SMALLEST_SHARE = 32, 0.01


@cache
def _libc() -> ctypes.CDLL | None:
    """Returns the C library if it is glibc, whose settings can be changed while a process runs."""
    if DEVICE != "cpu" or not sys.platform.startswith("linux"):  # a GPU has an allocator of its own
        return None
    found = ctypes.CDLL(None)
    return found if hasattr(found, "gnu_get_libc_version") and hasattr(found, "mallopt") else None


def setting_of(number: int) -> str:
    """Returns the setting of the round with that number."""
    return TUNED if number % 2 and _libc() is not None else DEFAULT


@contextmanager
def use(setting: str) -> Iterator[None]:
    """Runs the block under a setting; memory that is kept without being used is given back at its start and at its end."""
    libc = _libc()
    if setting == DEFAULT or libc is None:
        yield
        return
    libc.malloc_trim(0)
    _set(libc, setting)
    try:
        yield
    finally:
        _set(libc, DEFAULT)
        libc.malloc_trim(0)


def _set(libc: ctypes.CDLL, setting: str) -> None:
    for option, value in OPTIONS[setting].items():
        if not libc.mallopt(option, value):
            raise OSError(f"mallopt({option}, {value}) was refused")


def page_faults() -> int:
    """Returns how many pages this process has been given so far; 0 where there is one setting alone."""
    if _libc() is None:
        return 0
    import resource  # which only Unix has, as it has mallopt

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def matters(faults: float, seconds: float) -> bool:
    """Returns whether the page faults of a call take a share of its seconds that can be measured."""
    return faults >= FEWEST_FAULTS and faults * FAULT_S > SMALLEST_SHARE * seconds
