"""How much memory calls take beyond what they start with."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from benchmarks import allocator
from benchmarks.allocator import MIB

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory_bytes() -> int:
    """All memory of the device."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Peak:
    """Within `with`, the peak over the start; `mib` afterwards, None where the system does not tell (no Linux).

    Memory that glibc keeps or cannot fill again would hide what is taken, or add to it: meanwhile each tensor is mapped alone.
    """

    mib: float | None = None

    def __enter__(self) -> Peak:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / MIB
            return self
        self._exact = allocator.use(allocator.EXACT)
        self._exact.__enter__()
        try:
            RESET.write_text("5")  # sets the high-water mark to what is in use
            self._before = _field("VmRSS")
        except OSError:
            self._before = math.nan
        return self

    def __exit__(self, *error: object) -> None:
        if torch.cuda.is_available():
            self.mib = torch.cuda.max_memory_allocated() / MIB - self._before
            return
        if not math.isnan(self._before):
            self.mib = _field("VmHWM") - self._before
        self._exact.__exit__(None, None, None)


def peak_mib() -> float | None:
    """The most that this process has held at a time; None where the system does not tell."""
    return _field("VmHWM") if STATUS.exists() else None


def _field(name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024
