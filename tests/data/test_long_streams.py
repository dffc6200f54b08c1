"""The memory of a stream of activations does not grow with its length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae.data import sequencing
from fastsae.data.buffer import MixingBuffer
from fastsae.data.sequencing import FastSequencer
from fastsae.data.shared_forward import SharedForward
from fastsae.data.stream import ActivationStream
from tests.data.test_sequencing import make_tokenizer

N_TEXTS, N_IDS, D_IN = 20_000, 500, 4
IDS = list(range(N_IDS)) * 9


class Texts(Sequence[list[int]]):
    """Lists of 500 to 4,000 token ids, which are made when asked for."""

    def __len__(self) -> int:
        return N_TEXTS

    def __getitem__(self, index: Any) -> Any:
        return IDS[index % N_IDS :][: 500 + index * 7919 % 3500]


def memory() -> float:
    """The resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("n_tokens", [3_000_000, pytest.param(100_000_000, marks=pytest.mark.slow)])
def test_a_long_stream_for_two_layers_takes_the_memory_of_a_short_one(
    n_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequencing, "WINDOW", 128)
    table = torch.randn(N_IDS, D_IN, generator=torch.Generator().manual_seed(0))
    sequencer = FastSequencer(Texts(), range(N_TEXTS), make_tokenizer("qwen"), batch_tokens=16_384)
    forward = SharedForward(lambda batch: {3: table[batch.input_ids], 5: -table[batch.input_ids]}, sequencer, [3, 5])
    streams = [ActivationStream(layer.residual, layer, max_norm_multiple=1.5) for layer in forward.layers.values()]
    buffers = [MixingBuffer(stream, capacity=131_072, batch_size=16_384, seed=0) for stream in streams]
    served, early, sums = 0, 0.0, Tensor()
    while served < n_tokens:
        sums = torch.stack([next(buffer).acts.sum(dim=0) for buffer in buffers])
        served += 16_384
        early = early or (memory() if served > 1_000_000 else 0.0)
    assert torch.isfinite(sums).all()
    assert streams[0].counts.sinks > 0
    assert memory() - early < 24  # MiB; the rows of a layer that were served since then have 80 and more
