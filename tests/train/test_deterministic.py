"""Two runs in PyTorch's deterministic mode end with the same bits, on every backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae_kernels as kernels
from fastsae.train.config import TrainConfig
from fastsae.train.trainer import Trainer, build_sae
from tests.kernels.gpu_helpers import DEVICE, few_programs_here, needs_kernels

D_IN, D_SAE, BATCH, STEPS = 16, 64, 32, 12
CONFIG = TrainConfig(
    d_sae=D_SAE, batch_size=BATCH, tokens=BATCH * STEPS, target_l0=4.0, bandwidth=0.3, pre_act_loss_coefficient=3e-6
)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def batches(config: TrainConfig, device: str) -> Iterator[Tensor]:
    g = torch.Generator().manual_seed(3)
    for _ in range(config.steps):
        yield torch.randn(BATCH, D_IN, generator=g).to(device)


def final_state(config: TrainConfig, device: str) -> dict[str, Tensor]:
    trainer = Trainer(build_sae(config, D_IN, torch.device(device)), batches(config, device), config)
    trainer.initialize(torch.randn(256, D_IN, generator=torch.Generator().manual_seed(4)).to(device))
    trainer.run()
    state = {f"sae.{name}": tensor for name, tensor in trainer.sae.state_dict().items()}
    for i, moments in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{i}.{name}": tensor for name, tensor in moments.items()}
    return state


def assert_bit_equal(config: TrainConfig, device: str = "cpu") -> None:
    first, second = final_state(config, device), final_state(config, device)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("backend", ["cpu", "dense", None], ids=["cpu", "dense", "by activity"])
@pytest.mark.parametrize("options", [{}, {"beta1": 0.0}, {"clip_norm": 0.0}, {"dtype": "bfloat16"}], ids=str)
def test_cpu(backend: Any, options: dict[str, Any]) -> None:
    with kernels.use_backend(backend):
        assert_bit_equal(replace(CONFIG, **options))


@pytest.mark.parametrize("options", [{"architecture": "topk", "k": 4}, {"architecture": "batchtopk", "k": 4}], ids=str)
def test_top_k(options: dict[str, Any]) -> None:
    assert_bit_equal(replace(CONFIG, **options))


@needs_kernels
def test_triton() -> None:
    with kernels.use_backend("triton"), few_programs_here():
        assert_bit_equal(replace(CONFIG, tokens=BATCH * 3), DEVICE)
