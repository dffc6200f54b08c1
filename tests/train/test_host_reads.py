"""A training step never waits for the device: what it counts stays there until a row of the curves is logged."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae.train.config import TrainConfig
from fastsae.train.trainer import DEAD_MASK_EVERY, Trainer, build_sae
from fastsae_kernels.activity import MAX_DENSITY

READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy")
SPARSE: dict[str, Any] = {"d_sae": 131072}  # so many that a GPU's steps take the sparse path
PACKAGE = str(Path(fastsae.__file__).parent)


def batches(device: str, n: int = 64, d_in: int = 16) -> Iterator[Tensor]:
    g = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(n, d_in, generator=g).to(device)


def trainer(device: str, **options: Any) -> Trainer:
    config = TrainConfig(**{"d_sae": 64, "batch_size": 64, "tokens": 64 * 100, **options})
    found = Trainer(build_sae(config, 16, torch.device(device)), batches(device), config)
    found.initialize(next(batches(device, 1024)))
    return found


@pytest.mark.parametrize("sparsity", ["quadratic", "tanh"])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_no_host_reads_outside_the_cpu_backend(
    monkeypatch: pytest.MonkeyPatch, sparsity: str, clip_norm: float
) -> None:
    subject = trainer("cpu", sparsity=sparsity, clip_norm=clip_norm)
    subject.train_step(next(subject.batches))
    reads: list[str] = []

    def watched(name: str) -> None:
        original = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *arguments: object) -> object:
            code = sys._getframe(1).f_code
            if code.co_filename.startswith(PACKAGE + "/"):
                reads.append(f"{name} in {code.co_filename}:{code.co_name}")
            return original(tensor, *arguments)

        monkeypatch.setattr(torch.Tensor, name, read)

    for name in READS:
        watched(name)
    for _ in range(3):
        subject._accumulate(subject.train_step(next(subject.batches)))
    assert subject.step < DEAD_MASK_EVERY
    assert not reads
    subject._log()
    assert reads  # they are seen where there are some


def test_sparse_steps_are_sparse_for_a_gpu() -> None:
    subject = trainer("cpu", **SPARSE)
    for _ in range(8):
        output = subject.train_step(next(subject.batches))
        assert output.l0.float().mean() < MAX_DENSITY["cuda"] * SPARSE["d_sae"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose host waits are reported by PyTorch")
def test_no_host_waits_on_a_gpu() -> None:
    subject = trainer("cuda", **SPARSE)
    for _ in range(5):
        subject.train_step(next(subject.batches))
    ready = [next(subject.batches) for _ in range(3)]
    torch.cuda.synchronize()
    assert not subject.sae._activity.is_dense(SPARSE["d_sae"], "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in ready:
            subject._accumulate(subject.train_step(batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
