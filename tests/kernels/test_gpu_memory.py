"""What encoding takes at its peak, added up on tensors without data: kernels are left out, for they allocate nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_helpers import needs_kernels
from meter import Meter
from torch import Tensor

pytestmark = needs_kernels

N_TOKENS, D_IN, D_SAE, K = 8192, 2304, 65536, 64
DENSE = N_TOKENS * D_SAE * 2


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
