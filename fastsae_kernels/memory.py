"""Large arrays whose pages come cheap.

Linux hands memory out zeroed, on the first write to each page. For pages of 4 KB that takes several times what writing the
numbers does, and PyTorch's allocator asks for no others; NumPy asks for pages of 2 MB from 4 MB on. A page that nobody
writes is never handed out: of a gradient of zeros only those with a row of an active feature are.
"""

from __future__ import annotations

import math
import sys

import numpy as np
import torch
from torch import Tensor

LARGE_BYTES = 2**25  # the C library keeps the memory of smaller arrays for the next


def is_large(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether an array of this shape would get fresh memory."""
    return math.prod(shape) * dtype.itemsize >= LARGE_BYTES


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`torch.zeros(shape, dtype=dtype)` on a CPU."""
    if not is_large(shape, dtype):
        return torch.zeros(shape, dtype=dtype)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


class Spare:
    """Hands out zeroed arrays, and a large one again once nobody holds it any more: its pages are there already.

    It keeps the last one's memory; a copy of it, and one that was pickled, keeps none.
    """

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []  # of bytes; one at most

    def __reduce__(self) -> tuple[type[Spare], tuple[()]]:
        return Spare, ()

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """`torch.zeros(shape, dtype=dtype)` on a CPU."""
        if not is_large(shape, dtype):
            return torch.zeros(shape, dtype=dtype)
        try:
            kept = self._kept.pop()  # by one thread alone
        except IndexError:
            kept = np.zeros(0, dtype=np.uint8)
        n_bytes = math.prod(shape) * dtype.itemsize
        nobodys = np.zeros(0, dtype=np.uint8)  # a tensor of the kept memory, or a view of one, refers to it besides
        if kept.size == n_bytes and sys.getrefcount(kept) == sys.getrefcount(nobodys):
            tensor = torch.from_numpy(kept).zero_()
        else:
            kept = np.zeros(n_bytes, dtype=np.uint8)
            tensor = torch.from_numpy(kept)
        self._kept[:] = [kept]
        return tensor.view(dtype).view(shape)


def empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous array of a tensor's shape on its device, whatever it holds."""
    if tensor.device.type == "cpu" and is_large(tuple(tensor.shape), dtype):
        return zeros(tuple(tensor.shape), dtype)
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, its memory layout included, for tensors of any device."""
    if tensor.device.type != "cpu" or tensor.dtype == dtype or not is_large(tuple(tensor.shape), dtype):
        return tensor.to(dtype)
    if tensor.dim() == 2 and tensor.t().is_contiguous():
        return narrowed(tensor.t(), dtype).t()
    return zeros(tuple(tensor.shape), dtype).copy_(tensor)


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written in place; None for one made under `torch.inference_mode`, which does not count."""
    try:
        return tensor._version
    except RuntimeError:  # no `is_inference()`, which cannot be traced
        return None


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A contiguous tensor, or one that is contiguous once transposed where `like` is: what a fake op can promise."""
    transposed = like.dim() == 2 and like.stride(0) == 1 and like.stride(1) != 1
    return tensor.t().contiguous().t() if transposed else tensor.contiguous()
