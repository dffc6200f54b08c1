"""How much memory a call takes beyond what it starts with."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 2**20


def memory_bytes() -> int:
    """All memory of the device."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_mib(call: Callable[[], object]) -> float | None:
    """Peak of one call over its start, in MiB, what it returns included; None where the system does not tell (no Linux)."""
    call()
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):  # freed memory that is kept would hide what the call takes
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # sets the high-water mark to what is in use
    except OSError:
        return None
    before = _field(status, "VmRSS")
    result = call()
    peak = _field(status, "VmHWM") - before
    del result
    return peak


def _field(status: Path, name: str) -> float:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024
