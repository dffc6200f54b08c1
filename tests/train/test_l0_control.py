"""L0 arrives at its target within a short run, whatever the start and the scale, and a run that misses it says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae import FusedBatchTopKSAE, FusedJumpReLUSAE, FusedReLUSAE
from fastsae.train.config import TrainConfig
from fastsae.train.l0_control import L0Control, l0_metrics
from fastsae.train.trainer import Trainer, build_sae

D_IN, D_SAE, BATCH = 32, 256, 256


def batches(scale: float) -> Iterator[Tensor]:
    """Sums of four entries of a dictionary, twice as long in some directions as in others, beside a constant vector."""
    g = torch.Generator().manual_seed(0)
    dictionary = torch.randn(D_SAE, D_IN, generator=g) * torch.linspace(1, 2, D_IN)
    offset = torch.randn(D_IN, generator=g)
    while True:
        chosen = torch.rand(BATCH, D_SAE, generator=g).topk(4, dim=1).indices
        weights = 0.5 + torch.rand(BATCH, 4, generator=g)
        acts = torch.zeros(BATCH, D_SAE).scatter_(1, chosen, weights) @ dictionary + offset
        yield scale * acts


def trained(scale: float = 1.0, **options: Any) -> tuple[Trainer, float]:
    """A trainer after its last step, and L0 on new tokens."""
    config = TrainConfig(**{"tokens": 250 * BATCH, "batch_size": BATCH, "d_sae": D_SAE, "init_l0": 40.0, **options})
    source = batches(scale)
    trainer = Trainer(build_sae(config, D_IN, torch.device("cpu")), source, config)
    trainer.initialize(torch.cat([next(source) for _ in range(8)]))
    trainer.run()
    trainer.calibrate(torch.cat([next(source) for _ in range(8)]))
    held_out = torch.cat([next(source) for _ in range(16)])
    with torch.no_grad():
        acts = trainer.sae.encode_sparse(held_out * trainer.scale).active()
    return trainer, acts.l0().double().mean().item()


@pytest.mark.parametrize("architecture", ["jumprelu", "relu"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_l0": 4.0},
        {"target_l0": 12.0},
        {"target_l0": 40.0, "init_l0": 4.0},
        {"target_l0": 8.0, "init_l0": None},
        {"target_l0": 8.0, "sparsity_warm_up": 0.0},
        {"target_l0": 8.0, "scale": 300.0, "normalize_activations": False, "lr": 3e-2},
    ],
    ids=["low", "middle", "rising", "from half of the features", "at once", "long activations"],
)
def test_l0_arrives_within_a_short_run(architecture: str, options: dict[str, Any]) -> None:
    _, l0 = trained(architecture=architecture, **options)
    assert l0 == pytest.approx(options["target_l0"], rel=0.1)


def test_logarithmic_thresholds_arrive_too() -> None:
    _, l0 = trained(target_l0=8.0, log_threshold=True)
    assert l0 == pytest.approx(8.0, rel=0.1)


@pytest.mark.parametrize("sparsity", ["step", "tanh", "quadratic"])
def test_every_penalty_arrives(sparsity: str) -> None:
    _, l0 = trained(target_l0=8.0, sparsity=sparsity)
    assert l0 == pytest.approx(8.0, rel=0.1)


@pytest.mark.parametrize("options", [{"l0_coefficient": 0.1}, {"architecture": "relu", "l1_coefficient": 2.0}])
def test_a_given_weight_is_left_alone(options: dict[str, Any]) -> None:
    trainer, _ = trained(tokens=20 * BATCH, **options)
    assert trainer.l0_control is None
    assert trainer.config.expected_l0 is None


@pytest.mark.parametrize("steps", [20, 100])
def test_batch_topk_has_k_features_at_inference_after_few_steps(steps: int) -> None:
    _, l0 = trained(architecture="batchtopk", k=8, tokens=steps * BATCH)
    assert l0 == pytest.approx(8, rel=0.05)


def test_calibration_counts_exactly() -> None:
    torch.manual_seed(0)
    sae = FusedBatchTopKSAE(D_IN, D_SAE, 8)
    x = torch.randn(512, D_IN)
    sae.calibrate_threshold_(x)
    assert sae.encode_sparse(x).active().l0().sum() == 8 * 512
    sae.b_enc.data.fill_(-1e6)
    before = sae.topk_threshold.clone()
    sae.calibrate_threshold_(x)  # nothing is active: there is nothing to learn from
    assert sae.topk_threshold == before


@pytest.mark.parametrize("log_threshold", [False, True])
def test_shifted_gates_of_a_jumprelu(log_threshold: bool) -> None:
    sae = FusedJumpReLUSAE(4, 8, init_threshold=0.5, log_threshold=log_threshold)
    for shift, threshold, b_enc in ((0.25, 0.75, 0.0), (-1.0, 0.0, 0.25), (0.5, 0.5, 0.25)):
        sae.shift_gates_(torch.tensor(shift))
        torch.testing.assert_close(sae.gate_threshold(), torch.full((8,), threshold))
        torch.testing.assert_close(sae.b_enc.detach(), torch.full((8,), b_enc))


def test_shifted_gates_of_a_relu() -> None:
    sae = FusedReLUSAE(4, 8)
    sae.shift_gates_(torch.tensor(0.25))
    torch.testing.assert_close(sae.b_enc.detach(), torch.full((8,), -0.25))


def test_target_moves_by_the_same_factor_in_every_step() -> None:
    config = TrainConfig(
        tokens=100 * BATCH, batch_size=BATCH, d_sae=D_SAE, init_l0=64.0, target_l0=4.0, sparsity_warm_up=0.1
    )
    control = L0Control(build_sae(config, D_IN, torch.device("cpu")), config)
    targets = [control.target(step) for step in range(100)]
    assert targets[4] == pytest.approx(16.0)
    assert targets[9:] == pytest.approx([4.0] * 91)


def test_silence_and_noise_move_l0_by_little() -> None:
    config = TrainConfig(tokens=100 * BATCH, batch_size=BATCH, d_sae=D_SAE, architecture="relu")
    sae = build_sae(config, D_IN, torch.device("cpu"))
    control = L0Control(sae, config)
    for l0, direction in ((0.0, -1), (1e9, 1)):
        weight, bias = control.coefficient.log().item(), sae.b_enc[0].item()
        control.update(5, torch.tensor(l0))
        assert control.coefficient.log().item() - weight == pytest.approx(0.3 * direction)
        assert bias - sae.b_enc[0].item() == pytest.approx(0.295 * direction, rel=1e-3)
    for _ in range(100):
        control.update(5, torch.tensor(1e9))
    assert control.coefficient.item() == pytest.approx(100)  # from where it soon finds back


class TestMetrics:
    def test_a_target_that_is_met_needs_no_words(self) -> None:
        found = l0_metrics(TrainConfig(), 33.0, 32.0)
        assert found == {"target_l0": 32.0, "l0_missed_percent": pytest.approx(3.125), "warnings": []}

    def test_without_a_target_there_is_nothing_to_miss(self) -> None:
        assert l0_metrics(TrainConfig(l0_coefficient=1.0), 500.0, 500.0) == {"warnings": []}
        assert l0_metrics(TrainConfig(), None, 32.0) == {"warnings": []}

    def test_too_few_steps(self) -> None:
        (warning,) = l0_metrics(TrainConfig(tokens=10_240), 64.0, 70.0)["warnings"]
        assert warning.startswith("L0 is 64.0, 100 % above the target of 32. The run had 10 steps")
        assert "204,800 tokens or more" in warning

    def test_held_out_dialogues_of_another_kind(self) -> None:
        (warning,) = l0_metrics(TrainConfig(), 24.0, 32.1)["warnings"]
        assert "25 % below the target of 32" in warning
        assert "The last training steps had an L0 of 32.1" in warning

    def test_out_of_reach(self) -> None:
        (warning,) = l0_metrics(TrainConfig(target_l0=3000.0), 2000.0, 2000.0)["warnings"]
        assert "choose another --target-l0" in warning

    def test_batch_topk_is_held_to_five_percent(self) -> None:
        config = TrainConfig(architecture="batchtopk", k=32)
        assert l0_metrics(config, 33.0, 32.0)["warnings"] == []
        assert len(l0_metrics(config, 34.0, 32.0)["warnings"]) == 1
