"""What a computation takes at its peak, added up tensor by tensor: no allocator's gaps, the same on every machine."""

from __future__ import annotations

import tracemalloc
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Counts bytes of storages that operations make, of NumPy's arrays while `tracemalloc` runs, and of a CUDA sort."""

    def __init__(self, *, remembers: bool = False) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0
        self.history: list[tuple[dict[int, int], int]] | None = [] if remembers else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in given if tensor.layout == torch.strided}
        for leaf in tree_leaves(result):
            is_dense = isinstance(leaf, Tensor) and leaf.layout == torch.strided
            storage = leaf.untyped_storage() if is_dense else None
            if storage is not None and storage._cdata not in known | self.live.keys():
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        # positions, and a second copy of keys and positions
        on_cuda = "aten.sort" in str(func) and given[0].device.type != "cpu"
        sorting = given[0].numel() * (8 + 8 + given[0].element_size()) if on_cuda else 0
        arrays = tracemalloc.get_traced_memory()[0]
        self.peak = max(self.peak, sum(self.live.values()) + sorting + arrays)
        if self.history is not None:  # which `tracemalloc` would count
            self.history.append((dict(self.live), sorting + arrays))
        return result

    def peak_beside(self, *returned: Tensor) -> int:
        """The peak of everything but some tensors that still live, for a meter that remembers."""
        assert self.history is not None
        left_out = {tensor.untyped_storage()._cdata for tensor in returned}
        return max(sum(n for key, n in live.items() if key not in left_out) + more for live, more in self.history)
