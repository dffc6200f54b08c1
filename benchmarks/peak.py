"""How much memory calls take beyond what they start with."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import allocator
from benchmarks.allocator import MIB

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory_bytes() -> int:
    """Returns the size of the device's whole memory."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def process_peak_mib() -> float | None:
    """Returns the most that this process has held at a time; None where the system does not tell."""
    return _status_mib("VmHWM") if STATUS.exists() else None


def resident_mib() -> float:
    """Returns what this process holds; NaN where the system does not tell."""
    return _status_mib("VmRSS") if STATUS.exists() else math.nan


@dataclass
class Peak:
    """The peak over what a block started with; None where the system does not tell (it is no Linux)."""

    mib: float | None = None


@contextmanager
def measured() -> Iterator[Peak]:
    """Measures the block's peak.

    Memory that glibc keeps or cannot fill again would hide what is taken, or add to it, so each tensor is mapped alone.
    """
    peak = Peak()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.mib = (torch.cuda.max_memory_allocated() - before) / MIB
        return
    with allocator.use(allocator.EXACT):
        try:
            RESET.write_text("5")  # sets the high-water mark to what is in use
            start = resident_mib()
        except OSError:
            start = math.nan
        yield peak
        peak.mib = None if math.isnan(start) else _status_mib("VmHWM") - start


def _status_mib(name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024
