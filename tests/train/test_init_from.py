"""Training that goes on from a saved SAE: the same function at step 0, its options, and what contradicts it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import make_config, stopped_run

from fastsae import FastsaeError, FusedJumpReLUSAE, FusedTopKSAE, SparseAutoencoder, UsageError, cli
from fastsae.disk import digest
from fastsae.train import session
from fastsae.train.config import TrainConfig
from fastsae.train.init_from import load_source
from fastsae.train.run import train, train_many
from fastsae.train.trainer import Trainer, build_sae

KINDS: dict[str, dict[str, Any]] = {
    "jumprelu": {},
    "relu": {},
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
}


@pytest.fixture
def config(tiny_model: Path, chats: Path) -> TrainConfig:
    return make_config(tiny_model, chats, dead_tokens=10**9)


def of_kind(config: TrainConfig, architecture: str, **options: Any) -> TrainConfig:
    kind: Any = {"architecture": architecture, **KINDS[architecture], **options}
    return replace(config, **kind)


def saved(config: TrainConfig, folder: Path) -> SparseAutoencoder:
    """An SAE as a run would have left it: biases and thresholds of a data's size, decoder rows of any length."""
    torch.manual_seed(3)
    sae = build_sae(replace(config, init_from=None, d_sae=48), 16, torch.device("cpu"))
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1)
        sae.b_dec.normal_(0, 0.1)
        if isinstance(sae, FusedJumpReLUSAE):
            sae.threshold.uniform_(0, 0.3)
        if not config.is_topk or not config.normalize_decoder:
            sae.W_dec.mul_(torch.linspace(0.5, 2, 48)[:, None])
    sae.save(folder)
    return sae


def first_step(config: TrainConfig, output: Path) -> tuple[torch.Tensor, float, Any]:
    """Activations, their scale and the output of the first training step."""
    steps: list[Any] = []
    original = Trainer.train_step

    def train_step(self: Trainer, batch: Any) -> Any:
        found = original(self, batch)
        steps.append((batch.float(), self.scale, found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        train(config, output, progress=False)
    return steps[0]


@pytest.mark.parametrize("normalize_decoder", [True, False])
@pytest.mark.parametrize("normalize_activations", [True, False])
@pytest.mark.parametrize("architecture", KINDS)
def test_step_0_is_the_saved_sae(
    config: TrainConfig, tmp_path: Path, architecture: str, normalize_activations: bool, normalize_decoder: bool
) -> None:
    config = of_kind(config, architecture, d_sae=None, normalize_activations=normalize_activations)
    config = replace(config, init_from=str(tmp_path / "sae"), normalize_decoder=normalize_decoder)
    sae = saved(config, tmp_path / "sae")
    x, scale, found = first_step(config, tmp_path / "run")
    assert (scale != 1) is normalize_activations
    sae_out = sae.decode(sae.encode_sparse(x)) if architecture != "batchtopk" else None
    if sae_out is None:  # which chooses by batch in training
        sae_out = x - sae.training_forward(x).residual
    error = (x - sae_out).square().sum(1).mean()
    torch.testing.assert_close(found.losses["mse_loss"], scale**2 * error.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", KINDS)
def test_a_run_goes_on_where_another_one_ended(config: TrainConfig, tmp_path: Path, architecture: str) -> None:
    first = train(of_kind(config, architecture), tmp_path / "first", progress=False)
    again = replace(of_kind(config, architecture, lr=1e-12), init_from=str(tmp_path / "first"))
    if not again.is_topk:
        again = replace(again, **{f"l{1 if architecture == 'relu' else 0}_coefficient": 0.0})
    second = train(again, tmp_path / "second", progress=False)
    assert second["fvu"] == pytest.approx(first["fvu"], rel=0.02)  # BatchTopK calibrates anew
    assert second["l0"] == pytest.approx(first["l0"], rel=0.02)
    known = json.loads((tmp_path / "second" / "cfg.json").read_text())["metadata"]["init_from"]
    weights = tmp_path / "first" / "sae_weights.safetensors"
    assert known == {"path": str(tmp_path / "first"), "files": [{"file": weights.name, "sha256": digest(weights)}]}


def test_l0_starts_where_the_saved_sae_has_it(config: TrainConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "first", progress=False)
    starts = []
    original = session.Session.train

    def train_session(self: Any, *arguments: Any) -> None:
        trainer = self.trainers[""]
        starts.append((trainer.l0_control.start, trainer.sae))
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Session, "train", train_session)
        first = json.loads((tmp_path / "first" / "metrics.json").read_text())
        train(replace(config, init_from=str(tmp_path / "first")), tmp_path / "second", progress=False)
    assert starts[0][0] == pytest.approx(first["l0"], rel=0.2)
    assert starts[0][0] != config.init_l0


@pytest.mark.parametrize("architecture", ["jumprelu", "batchtopk"])
def test_a_resumed_run_needs_the_source_no_more(config: TrainConfig, tmp_path: Path, architecture: str) -> None:
    config = of_kind(config, architecture, d_sae=None, checkpoint_every=4, init_from=str(tmp_path / "sae"))
    saved(config, tmp_path / "sae")
    train(config, tmp_path / "whole", progress=False)
    stopped_run(config, tmp_path / "run", at=6)
    (tmp_path / "sae").rename(tmp_path / "moved")
    train(config, tmp_path / "run", resume=True, progress=False)
    for name in ("sae_weights.safetensors", "cfg.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_each_of_several_goes_on_from_its_own(config: TrainConfig, tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        FusedJumpReLUSAE(16, 32 + ord(name) % 2).save(tmp_path / name)
    runs = {name: replace(config, d_sae=None, init_from=str(tmp_path / name), data_seed=42) for name in ("a", "b")} | {
        "fresh": replace(config, data_seed=42)
    }
    train_many(runs, tmp_path / "many", progress=False)
    for name, run in runs.items():
        train(run, tmp_path / f"alone-{name}", progress=False)
        both = [tmp_path / "many" / name, tmp_path / f"alone-{name}"]
        assert len({(folder / "cfg.json").read_bytes() for folder in both}) == 1
        assert len({(folder / "sae_weights.safetensors").read_bytes() for folder in both}) == 1


def test_options_that_contradict_the_sae_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    FusedTopKSAE(16, 48, k=4).save(tmp_path / "topk")
    FusedJumpReLUSAE(8, 48).save(tmp_path / "narrow")
    FusedTopKSAE(16, 48, k=4, rescale_acts_by_decoder_norm=False, decoder_init_norm=0.1).save(tmp_path / "short")
    (tmp_path / "empty").mkdir()
    topk = of_kind(config, "topk", d_sae=None)
    for changed, name, error, message in (
        (config, "topk", UsageError, "architecture: expected topk, that of the SAE .*topk which training goes on from, got j"),
        (replace(topk, d_sae=32), "topk", UsageError, "d_sae: expected 48, .*, got 32"),
        (replace(topk, apply_b_dec_to_input=False), "topk", UsageError, "apply_b_dec_to_input: expected True, .* got False"),
        (replace(config, d_sae=None), "narrow", UsageError, "init_from: expected an SAE of the model's width 16, got 8"),
        (topk, "short", UsageError, "init_from: expected an SAE with decoder rows of length 1"),
        (config, "empty", UsageError, "init_from: .*cfg.json is missing"),
        (config, "none", UsageError, "init_from: .*cfg.json is missing"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            train(replace(changed, init_from=str(tmp_path / name)), tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()
    (tmp_path / "narrow" / "sae_weights.safetensors").write_bytes(b"broken")
    with pytest.raises(FastsaeError, match=r"init_from: .*corrupt"):
        load_source(replace(config, init_from=str(tmp_path / "narrow")))


def test_the_command_takes_architecture_size_and_k_from_the_sae(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FusedTopKSAE(16, 48, k=3).save(tmp_path / "sae")
    command = (
        f"train --model {config.model} --dataset {config.dataset} --eval-dialogues 8 --tokens 256 --batch-size 64 "
    )
    command += f"--buffer-tokens 256 --quiet --init-from {tmp_path / 'sae'} --output"
    assert cli.main([*command.split(), str(tmp_path / "run")]) == 0
    trained = FusedTopKSAE.load(tmp_path / "run")
    assert (trained.d_sae, trained.k) == (48, 3)
    assert cli.main([*command.split(), str(tmp_path / "other"), "--k", "2"]) == 0
    assert FusedTopKSAE.load(tmp_path / "other").k == 2
    assert cli.main([*command.split(), str(tmp_path / "none"), "--d-sae", "32"]) == 2
    assert "--d-sae: expected 48, that of the SAE" in capsys.readouterr().err
    assert cli.main([*command.replace("/sae ", "/nothing ").split(), str(tmp_path / "none")]) == 2
    assert "there is no such path" in capsys.readouterr().err
