"""The sparsity term of a saved SAE is the one that it was trained with, in its own units."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsae import FastsaeError, FusedJumpReLUSAE, FusedReLUSAE, SparseAutoencoder
from fastsae.sae.token_gradients import SparsityTerm
from fastsae.train.config import TrainConfig
from fastsae.train.gradients import sparsity_term
from fastsae.train.run import train

SCALE = 0.2  # of the activations in training


@pytest.mark.parametrize("form", ["step", "quadratic", "tanh", "l1"])
def test_the_loss_of_the_saved_sae_is_that_of_training(form: Any) -> None:
    cls = FusedReLUSAE if form == "l1" else FusedJumpReLUSAE
    sae: Any = cls(8, 32, dtype=torch.float64)
    config = TrainConfig(sparsity="step" if form == "l1" else form, target_l0=5.0)
    x = 3 * torch.randn(20, 8).double()
    options = {} if form == "l1" else {"sparsity": form, "target_l0": config.target_l0}
    expected = sae.training_forward(SCALE * x, 0.7, **options).loss / SCALE**2
    sae.fold_activation_scale_(SCALE)
    sae.metadata = {"sparsity_coefficient": 0.7, "activation_scale": SCALE}
    term = sparsity_term(sae, config)
    if form != "l1":
        options |= {"tanh_scale": term.tanh_scale}
    found = sae.training_forward(x, term.coefficient, **options).loss
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_an_sae_of_elsewhere_has_its_reconstruction_alone() -> None:
    assert sparsity_term(FusedJumpReLUSAE(8, 32), TrainConfig()) == SparsityTerm(0.0, "step", 32.0, 4.0)


@pytest.mark.parametrize("bad", [{"activation_scale": 0}, {"sparsity_coefficient": "much"}])
def test_metadata_that_are_no_numbers(bad: dict[str, Any]) -> None:
    sae = FusedJumpReLUSAE(8, 32)
    sae.metadata = bad
    with pytest.raises(FastsaeError, match=r"metadata\.\w+: expected a finite number"):
        sparsity_term(sae, TrainConfig())


@pytest.mark.parametrize("own", [{}, {"architecture": "topk", "k": 4}])
def test_a_run_saves_the_weight_of_its_penalty(
    tiny_model: Path, chats: Path, tmp_path: Path, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[Any] = []
    original = train.__globals__["Session"].__init__

    def start(session: Any, *arguments: Any, **options: Any) -> None:
        original(session, *arguments, **options)
        trainers.extend(session.trainers.values())

    monkeypatch.setattr(train.__globals__["Session"], "__init__", start)
    config = TrainConfig(
        model=str(tiny_model), dataset=str(chats), eval_dialogues=2, d_sae=32, tokens=512, batch_size=64
    )
    train(replace(config, buffer_tokens=256, forward_tokens=256, **own), tmp_path / "run", progress=False)
    metadata = SparseAutoencoder.load(tmp_path / "run").metadata
    (trainer,) = trainers
    assert metadata["activation_scale"] == trainer.scale != 1
    if own.get("architecture") == "topk":
        assert metadata["sparsity_coefficient"] is None
    else:
        assert metadata["sparsity_coefficient"] == float(trainer.l0_control.coefficient) > 0
