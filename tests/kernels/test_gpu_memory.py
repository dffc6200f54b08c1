"""What a step takes at its peak, added up on tensors without data: kernels are left out, for they allocate nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from gpu_helpers import CHECKED, needs_kernels
from meter import Meter
from torch import Tensor

from fastsae_kernels import ActivityHint, AutoencodeSpec, WeightGradients
from fastsae_kernels.types import AutoencodeNeeds, Capacity, OutputGrads, PassInputs

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(
        CHECKED, reason="launches no kernel; its tensors have no data, and ttsem says that all are on a GPU"
    ),
]

N_TOKENS, D_IN, D_SAE, K = 8192, 2304, 65536, 64
DENSE = N_TOKENS * D_SAE * 2


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from triton.runtime.jit import KernelInterface

    from fastsae_kernels.gpu import config

    monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: lambda **arguments: None)
    with config.override("sm_90"):
        yield


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def operands() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(x, W_enc, b_enc, threshold)`."""
    W_enc = empty(D_SAE, D_IN, dtype=torch.bfloat16).t()
    return empty(N_TOKENS, D_IN, dtype=torch.bfloat16), W_enc, empty(D_SAE, dtype=torch.bfloat16), empty(D_SAE)


def jumprelu(*operands: Tensor) -> None:
    from fastsae_kernels.gpu.encode import DEFAULT_CAPACITY, list_all_entries, padded_offsets, sort_rows

    row_offsets = padded_offsets(N_TOKENS, DEFAULT_CAPACITY, operands[0].device)
    counts, entries = list_all_entries(*operands, row_offsets, N_TOKENS * DEFAULT_CAPACITY, 0.0)
    sort_rows(counts, entries, row_offsets, (N_TOKENS, D_SAE), None)


def topk(*operands: Tensor) -> None:
    from fastsae_kernels.gpu.row_topk import list_topk

    list_topk(*operands, K, 0.0)


def batch_topk(*operands: Tensor) -> None:
    from fastsae_kernels.gpu.batch_topk import encode_batch_topk

    encode_batch_topk(*operands, K)


@pytest.mark.parametrize("encode", [jumprelu, topk, batch_topk])
def test_encoding_takes_less_than_3_percent_of_the_dense_tensor(encode: Callable[..., None]) -> None:
    given = operands()
    with Meter() as meter:
        encode(*given)
    assert 0.01 * DENSE < meter.peak < 0.03 * DENSE


def counts(outliers: int) -> Tensor:
    """Entries of each token: 69 on average, with a spread of half of that, and some tokens with a thousand."""
    listed = torch.distributions.LogNormal(torch.tensor(69.0).log() - 0.11, 0.47).sample((N_TOKENS,)).int()
    listed[:outliers] = 1000
    return listed


@pytest.mark.parametrize("collected", [False, True], ids=["gradients", "collected"])
@pytest.mark.parametrize("outliers", [0, 1])
@pytest.mark.parametrize(
    "spec",
    [AutoencodeSpec(bandwidth=0.05), AutoencodeSpec(k=K), AutoencodeSpec(k=K, batch_topk=True)],
    ids=["jumprelu", "topk", "batch topk"],
)
def test_a_step_takes_less_than_5_percent_of_the_dense_tensor(
    spec: AutoencodeSpec, outliers: int, collected: bool
) -> None:
    """Forward and backward, beside what they return: the residual, and the gradients that no optimiser sums itself."""
    from fastsae_kernels import gpu

    hint = ActivityHint()
    hint.update(counts(outliers), D_SAE)
    x, W_enc, b_enc, threshold = operands()
    W_dec, b_dec, target = empty(D_SAE, D_IN, dtype=torch.bfloat16), empty(D_IN), empty(N_TOKENS, D_IN)
    collector = WeightGradients(W_enc, W_dec) if collected else None
    if collector is not None:
        collector.buffer(D_SAE * 2 * D_IN, like=x)  # of rows that overflow, made once
    inputs, needs = PassInputs(x, W_enc, b_enc, threshold, W_dec, b_dec, target=target), AutoencodeNeeds(x=False)
    with Meter(remembers=True) as meter:
        output, kept = gpu.forward(inputs, spec, hint.capacity(D_SAE))
        output_grads = OutputGrads(output.sae_out, empty(N_TOKENS), empty(1).expand(N_TOKENS))
        grads = gpu.backward(inputs, kept, spec, output_grads, needs, collector)
    returned = [output.sae_out] + [grad for grad in (grads.W_enc, grads.W_dec) if grad is not None]
    assert len(returned) == (1 if collected else 3)
    assert 0.01 * DENSE < meter.peak_beside(*returned) < 0.05 * DENSE


def test_the_dense_path_takes_less_than_15_percent_of_the_dense_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Early training, forward and backward, beside what they return: a tile of each product, and sums in fp32."""
    from fastsae_kernels import dense
    from fastsae_kernels.gpu import gates

    monkeypatch.setattr(dense, "_gates", lambda x: gates)
    monkeypatch.setattr(dense, "weighted_sum", lambda weights, rows: empty(D_IN))  # meta tensors know no autocast
    x, W_enc, b_enc, threshold = operands()
    W_dec, b_dec, target = empty(D_SAE, D_IN, dtype=torch.bfloat16), empty(D_IN), empty(N_TOKENS, D_IN)
    inputs, needs = PassInputs(x, W_enc, b_enc, threshold, W_dec, b_dec, target=target), AutoencodeNeeds(x=False)
    spec = AutoencodeSpec(bandwidth=0.05)
    with Meter(remembers=True) as meter:
        output, kept = dense.forward(inputs, spec, Capacity(0, 0))
        output_grads = OutputGrads(output.sae_out, empty(N_TOKENS), empty(1).expand(N_TOKENS))
        grads = dense.backward(inputs, kept, spec, output_grads, needs)
    assert grads.W_enc is not None
    assert grads.W_dec is not None
    assert 0.1 * DENSE < meter.peak_beside(output.sae_out, grads.W_enc, grads.W_dec) < 0.15 * DENSE
