"""What the environment says: which process of a run this is, and what PyTorch may keep in memory; nothing here imports it."""

from __future__ import annotations

import os

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


def n_processes() -> int:
    """How many processes `torchrun` has started for the run; 1 without it."""
    text = os.environ.get("WORLD_SIZE", "")
    return int(text) if text.isdecimal() else 1


def n_processes_here() -> int:
    """How many of them `torchrun` has started on this machine."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if text.isdecimal() else n_processes()


def rank() -> int:
    """The number of this process in the run."""
    text = os.environ.get("RANK", "")
    return int(text) if text.isdecimal() and n_processes() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that shows log, bars and results: number 0, which is the only one without `torchrun`."""
    return rank() == 0


def is_restart() -> bool:
    """Whether `torchrun --max-restarts` has started the processes again, because one of them had failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
