"""Options out of range give one message that names them."""

from __future__ import annotations

from typing import Any

import pytest

from fastsae.errors import UsageError
from fastsae.train.config import PRESETS, TrainConfig


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 0},
        {"batch_size": -1},
        {"lr": 0.0},
        {"bandwidth": 0.0},
        {"warm_up": 1.5},
        {"warm_up": 0.6, "decay": 0.6},
        {"k": 0},
        {"d_sae": 8, "k": 9},
        {"sparsity": "l2"},
        {"architecture": "gated"},
        {"buffer_tokens": 1024},
        {"tokens": 10},
        {"eval_dialogues": 0},
        {"beta1": 1.0},
        {"seed": -1},
        {"bandwidth": float("inf")},
        {"dtype": "float16"},
        {"b_dec_init": "median"},
        {"aux_loss_coefficient": -1.0},
        {"architecture": "topk", "d_sae": 8, "k": 9},
        {"log_threshold": True, "init_threshold": 0.0},
    ],
    ids=str,
)
def test_bad_option_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        TrainConfig(**options)
    message = str(caught.value)
    assert list(options)[-1] in message
    assert "expected" in message


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_topk_needs_k(architecture: str) -> None:
    with pytest.raises(
        UsageError, match=rf"^k: expected the number of .* --architecture {architecture} needs, got none$"
    ):
        TrainConfig(architecture=architecture)
    config = TrainConfig(architecture=architecture, k=32)
    assert config.subtracts_b_dec
    assert config.dead_features_learn
    assert not TrainConfig(architecture=architecture, k=32, apply_b_dec_to_input=False).subtracts_b_dec
    assert not TrainConfig(architecture=architecture, k=32, aux_loss_coefficient=0.0).dead_features_learn
    assert not TrainConfig().subtracts_b_dec
    assert not TrainConfig().dead_features_learn
    assert TrainConfig(pre_act_loss_coefficient=0.1).dead_features_learn


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str) -> None:
    TrainConfig(**PRESETS[name])


def test_paper_preset_has_the_papers_step_counts() -> None:
    config = TrainConfig(**PRESETS["fast-paper"])
    assert config.steps == 320_000
    assert [round(config.steps * share) for share in (config.warm_up, config.decay, config.sparsity_warm_up)] == [
        16_000,
        64_000,
        10_000,
    ]
