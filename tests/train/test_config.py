"""Options out of range give one message that names them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsae.errors import UsageError
from fastsae.train.config import TrainConfig
from fastsae.train.presets import PRESETS
from fastsae.train.trainer import Trainer, build_sae


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 10**5000}, "tokens: expected a whole number from 1 to 1,000,000,000,000, got a number of about 5,001 digits"),
        ({"tokens": True}, "tokens: expected a whole number from 1 to 1,000,000,000,000, got true"),
        ({"tokens": 2e6}, "tokens: expected a whole number from 1 to 1,000,000,000,000, got 2000000.0"),
        ({"lr": 10**400}, "lr: expected a number from 1e-12 to 1000.0, got a number of about 401 digits"),
        ({"lr": float("nan")}, "lr: expected a number from 1e-12 to 1000.0, got nan"),
        ({"lr": "3e-4"}, "lr: expected a number from 1e-12 to 1000.0, got '3e-4'"),
        ({"log_threshold": 1}, "log_threshold: expected true or false, got 1"),
        ({"model": None}, "model: expected text, got none"),
        ({"model": "a\0b"}, r"model: expected a name that is not empty and has no control characters, got 'a\x00b'"),
        ({"dataset": []}, "dataset: expected text, got a list"),
        ({"split": ""}, "split: expected a name that is not empty and has no control characters, got ''"),
        ({"model": "~nobody-has-this-name/x"}, "model: expected a path in the home folder of a user of this system, got"),
        ({"dataset": "x" * 5000}, "dataset: expected a name of at most 255 bytes, or a path of at most 4095, got 'xxx"),
        ({"device": "cuda:-1"}, "device: expected auto, cpu, cuda or cuda:N, got 'cuda:-1'"),
        ({"model_dtype": "int8"}, "model_dtype: expected float32 or bfloat16 or float16, got 'int8'"),
        ({"seed": 2**64}, "seed: expected a whole number from 0 to 9,223,372,036,854,775,807, got 18,446,744,073,709,551,616"),
        ({"warm_up": 0.9}, "warm_up: expected at most 1 together with --decay, got 0.9 + 0.2"),
    ],
)  # fmt: skip
def test_message_says_what_was_expected_and_what_came(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        TrainConfig(**options)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_numbers_too() -> None:
    options = dict.fromkeys(
        ("lr", "lr_end", "beta1", "beta2", "warm_up", "decay", "clip_norm", "init_l0", "target_l0"), 1
    )
    config = TrainConfig(d_sae=8, **{**options, "beta1": 0, "beta2": 0, "decay": 0})
    sae = build_sae(config, 4, torch.device("cpu"))
    batch = torch.randn(16, 4)
    trainer = Trainer(sae, iter([batch]), config)
    trainer.initialize(batch)
    assert trainer.train_step(batch).loss.isfinite()
