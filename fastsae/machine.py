"""What this machine has left for a run, and what PyTorch may keep of it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# Where the two versions of control groups tell the limit of a container, and what it uses: only the entry of
# this name counts, because the rest is a cache of files, which the system gives back when memory is needed
CONTAINERS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.stat", "anon"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.stat", "total_rss"),
)

# PyTorch and oneDNN beneath it each keep the code of their last 1,024 products of two bf16 matrices, one for each shape, and
# about half a megabyte of memory for each of them. A language model's batches have hundreds of shapes, which hardly come again;
# the blocks of one pass, all of the same shapes, need a handful.
_PRODUCTS_KEPT = "32"


def bound_product_caches() -> None:
    """Lets PyTorch keep the code of few products of bf16 matrices, unless the user's environment says how many.

    It has an effect only before the first such product of the process.
    """
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" not in os.environ:  # the older name of the first
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _PRODUCTS_KEPT)
    os.environ.setdefault("LRU_CACHE_CAPACITY", _PRODUCTS_KEPT)


def free_memory(device: torch.device) -> int | None:
    """Returns the bytes that can still be allocated on a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = [
        free for free in (_of_the_machine(), *(_of_a_container(*place) for place in CONTAINERS)) if free is not None
    ]
    return min(known, default=None)


def _of_the_machine() -> int | None:
    available = _entries("/proc/meminfo").get("MemAvailable:")
    if available is not None:
        return available * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # macOS
    except (OSError, ValueError, AttributeError):
        return None


def _of_a_container(limit: str, statistics: str, used: str) -> int | None:
    try:
        return max(0, int(Path(limit).read_text()) - _entries(statistics).get(used, 0))
    except (OSError, ValueError):  # no container, or the word `max`
        return None


def _entries(path: str) -> dict[str, int]:
    """The numbers of a file with a name and a number in each line; none where it cannot be read."""
    try:
        lines = [line.split() for line in Path(path).read_text(encoding="ascii").splitlines()]
        return {line[0]: int(line[1]) for line in lines if len(line) > 1}
    except (OSError, ValueError):
        return {}
