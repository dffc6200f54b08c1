"""A run that does not fit into memory is refused before anything of its size exists, by the option that takes most."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastsae.errors import UsageError
from fastsae.train import limits
from fastsae.train.config import TrainConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # 4 (weights, two means, and gradients that are clipped) * (2 matrices * 64 + b_enc + threshold) * 2e9 * 4 bytes
        ({"d_sae": 2_000_000_000}, r"^d_sae: .* 8\.0 GB of free memory, got 2,000,000,000, which alone takes 4,160\.0 GB"),
        ({"d_sae": 2_000_000_000, "clip_norm": 0}, r"^d_sae: .* which alone takes 3,120\.0 GB"),
        ({"expansion": 1_000_000}, r"^expansion: .* got 1,000,000, which alone takes 133\.1 GB"),  # 4 * 130 * 64e6 * 4
        ({"buffer_tokens": 10**9}, r"^buffer_tokens: .* which alone takes 280\.0 GB"),  # 1e9 * (64 * 4 + 24)
        ({"prefetch": 10**6, "tokens": 10**9}, r"^prefetch: .* got 1,000,000, which alone takes 280\.0 GB"),  # all tokens
        # the batch as it came, scaled, its reconstruction and its error: 4 * 64 * 1e8 * 4 bytes, and 32 entries of 40
        (
            {"batch_size": 10**8, "buffer_tokens": 2 * 10**8, "tokens": 10**9, "init_l0": 32.0},
            r"^batch_size: .* 230\.4 GB of the 286\.4 GB",
        ),
        ({"forward_tokens": 10**12, "max_length": 10**6}, r"^forward_tokens: .* which alone takes 524\.3 GB"),
    ],
)  # fmt: skip
def test_largest_need_is_named(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "free_memory", lambda device: 8_000_000_000)
    with pytest.raises(UsageError, match=message):
        limits.check_memory([TrainConfig(**options)], 64, 4, CPU)


def test_on_a_gpu_half_a_buffer_more_is_computed_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "free_memory", lambda device: 8_000_000_000)
    config = TrainConfig(buffer_tokens=20_000_000, tokens=10**9)  # 20e6 * 280 bytes, which would fit
    limits.check_memory([config], 64, 4, CPU)
    limits.check_memory([replace(config, prefetch=0)], 64, 4, torch.device("cuda"))
    with pytest.raises(UsageError, match=r"^buffer_tokens: .* which alone takes 8\.4 GB"):
        limits.check_memory([config], 64, 4, torch.device("cuda"))


def test_what_fits_or_is_not_known_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    limits.check_memory([TrainConfig()], 64, 4, CPU)
    config = TrainConfig(forward_tokens=10**12)  # never more than a window of dialogues of 8,192 tokens
    monkeypatch.setattr(limits, "free_memory", lambda device: 8_000_000_000)
    limits.check_memory([config], 64, 4, CPU)
    monkeypatch.setattr(limits, "free_memory", lambda device: None)
    limits.check_memory([TrainConfig(d_sae=2_000_000_000)], 64, 4, CPU)


def test_saes_that_are_trained_together_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    saes = [TrainConfig(d_sae=3_000_000, layer=layer, buffer_tokens=2048) for layer in (0, 1)]
    monkeypatch.setattr(limits, "free_memory", lambda device: 8_000_000_000)
    limits.check_memory(saes[:1], 64, 4, CPU)
    with pytest.raises(UsageError, match=r"^d_sae: .* which alone takes 12\.5 GB"):  # 2 * 4 * 130 * 3e6 * 4 bytes
        limits.check_memory(saes, 64, 4, CPU)
