"""What encoding takes at its peak, added up on tensors without data: kernels are left out, for they allocate nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_helpers import needs_kernels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytestmark = needs_kernels

N_TOKENS, D_IN, D_SAE, K = 8192, 2304, 65536, 64
DENSE = N_TOKENS * D_SAE * 2


class Meter(TorchDispatchMode):
    """Counts the bytes of storages that operations make, and that a CUDA sort takes on top of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in given}
        for leaf in tree_leaves(result):
            storage = leaf.untyped_storage() if isinstance(leaf, Tensor) else None
            if storage is not None and storage._cdata not in known | self.live.keys():
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        # positions, and a second copy of keys and positions
        sorting = given[0].numel() * (8 + 8 + given[0].element_size()) if "aten.sort" in str(func) else 0
        self.peak = max(self.peak, sum(self.live.values()) + sorting)
        return result


def jumprelu(*operands: Tensor) -> None:
    from fastsae_kernels.gpu.encode import DEFAULT_CAPACITY, list_all_entries, padded_offsets, sort_rows

    row_offsets = padded_offsets(N_TOKENS, DEFAULT_CAPACITY, operands[0].device)
    counts, entries = list_all_entries(*operands, row_offsets, N_TOKENS * DEFAULT_CAPACITY, 0.0)
    sort_rows(counts, entries, row_offsets, (N_TOKENS, D_SAE), None)


def topk(*operands: Tensor) -> None:
    from fastsae_kernels.gpu.row_topk import list_topk

    list_topk(*operands, K, 0.0, 0)


def batch_topk(*operands: Tensor) -> None:
    from fastsae_kernels.gpu.batch_topk import encode_batch_topk

    encode_batch_topk(*operands, K)


@pytest.mark.parametrize("encode", [jumprelu, topk, batch_topk])
def test_less_than_3_percent_of_the_dense_tensor(encode: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import KernelInterface

    from fastsae_kernels.gpu import config

    monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: lambda **arguments: None)
    x = torch.empty(N_TOKENS, D_IN, dtype=torch.bfloat16, device="meta")
    W_enc = torch.empty(D_SAE, D_IN, dtype=torch.bfloat16, device="meta").t()
    b_enc, threshold = torch.empty(D_SAE, dtype=torch.bfloat16, device="meta"), torch.empty(D_SAE, device="meta")
    with config.override("sm_90"), Meter() as meter:
        encode(x, W_enc, b_enc, threshold)
    assert 0.01 * DENSE < meter.peak < 0.03 * DENSE
