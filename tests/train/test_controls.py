"""Controls: an SAE of which one matrix never learns, and a language model that has learnt nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import make_config, stopped_run

from fastsae.data.random_model import with_random_weights
from fastsae.sae import SparseAutoencoder
from fastsae.train.run import train
from fastsae.train.session import Session


@pytest.mark.parametrize("architecture", ["jumprelu", "topk", "batchtopk", "relu"])
@pytest.mark.parametrize("frozen", ["encoder", "decoder"])
def test_a_frozen_matrix_stays_as_it_was_drawn(
    architecture: str, frozen: str, tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(make_config(tiny_model, chats), architecture=architecture, k=4, frozen=frozen)
    started: list[dict[str, torch.Tensor]] = []
    initialize = Session.initialize

    def noted(session: Session, *sources: Any) -> None:
        initialize(session, *sources)
        (trainer,) = session.trainers.values()
        started.append({name: tensor.clone() for name, tensor in trainer.sae.state_dict().items()})

    monkeypatch.setattr(Session, "initialize", noted)
    train(config, tmp_path / "run", progress=False)
    after = SparseAutoencoder.load(tmp_path / "run").state_dict()
    kept, learnt = ("W_enc", "W_dec") if frozen == "encoder" else ("W_dec", "W_enc")
    cosine = torch.nn.functional.cosine_similarity(after[kept].flatten(), started[0][kept].flatten(), dim=0)
    assert cosine > 1 - 1e-6, "the scale of the activations, which is folded in, is all that changes"
    assert not torch.allclose(after[learnt] / after[learnt].norm(), started[0][learnt] / started[0][learnt].norm())


def test_a_frozen_run_resumes_to_the_same_bits(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    config = replace(make_config(tiny_model, chats, checkpoint_every=2), frozen="decoder")
    train(config, tmp_path / "whole", progress=False)
    stopped_run(config, tmp_path / "stopped", at=5)
    train(config, tmp_path / "stopped", resume=True, progress=False)
    name = "sae_weights.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


def test_a_random_model_has_the_architecture_and_none_of_the_weights(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    before = torch.random.get_rng_state()
    first, again, other = (with_random_weights(model, seed) for seed in (10, 10, 11))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.dtype == model.dtype
    assert not first.training
    for (name, a), b, c, trained in zip(
        first.named_parameters(), again.parameters(), other.parameters(), model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert a.shape == trained.shape
        assert not a.requires_grad
        if a.dim() > 1:
            assert not any(torch.equal(a, b) for b in (c, trained)), name
