"""What PyTorch may keep in memory, said before its first product; nothing here imports it."""

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
