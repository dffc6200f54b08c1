"""Whole runs on a tiny model: the files they leave, and resuming as if never killed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stopped_runs import without_times

from fastsae import (
    FastsaeError,
    FusedBatchTopKSAE,
    FusedJumpReLUSAE,
    FusedReLUSAE,
    FusedTopKSAE,
    SparseAutoencoder,
    UsageError,
)
from fastsae.train import checkpoint
from fastsae.train.config import TrainConfig
from fastsae.train.evaluation import evaluate_folder
from fastsae.train.folder import read_config
from fastsae.train.run import train
from fastsae.train.trainer import Trainer

KEYS = (
    "mse mse_log2 special_mse special_mse_log2 fvu l0 dead_share ce ce_spliced delta_loss_percent recovered seconds tokens"
).split()


@pytest.fixture
def config(tiny_model: Path, chats: Path) -> TrainConfig:
    return TrainConfig(
        model=str(tiny_model),
        dataset=str(chats),
        eval_dialogues=8,
        d_sae=64,
        tokens=64 * 24,
        batch_size=64,
        buffer_tokens=512,
        forward_tokens=256,
        init_l0=8,
        target_l0=4,
        log_every=5,
        checkpoint_every=6,
        pre_act_loss_coefficient=1e-3,
        dead_tokens=300,
    )


def run_and_compare(
    config: TrainConfig, output: Path, **options: Any
) -> tuple[bytes, dict[str, Any], list[dict[str, float]]]:
    """Weights, metrics and curves of a run: everything that must not depend on whether it was killed, no clock times."""
    trainers: list[Trainer] = []
    original = Trainer.__init__

    def made(self: Trainer, *args: Any) -> None:
        trainers.append(self)
        original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__init__", made)
        metrics = train(config, output, progress=False, **options)
    history = [without_times(row) for row in trainers[0].history]
    return (output / "sae_weights.safetensors").read_bytes(), without_times(metrics), history


def test_run_leaves_what_it_promises(config: TrainConfig, tmp_path: Path) -> None:
    output = tmp_path / "run"
    returned = train(config, output, progress=False)
    names = {path.name for path in output.iterdir()}
    assert names == {
        "cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
        "dialogues.npz",
        "config.json",
        "metrics.json",
        "metrics.jsonl",
        "report.html",
    }
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics == returned
    assert set(KEYS) <= metrics.keys()
    assert metrics["tokens"] == config.tokens
    assert 0 <= metrics["fvu"] < 1
    assert metrics["mse_log2"] == pytest.approx(torch.tensor(metrics["mse"]).log2().item(), abs=1e-4)
    assert read_config(output) == replace(config, layer=1, model_dtype="float32")
    sae = SparseAutoencoder.load(output)
    assert isinstance(sae, FusedJumpReLUSAE)
    again = evaluate_folder(output, read_config(output), progress=False).metrics
    assert again["fvu"] == pytest.approx(metrics["fvu"], rel=1e-6)
    assert again["ce_spliced"] == pytest.approx(metrics["ce_spliced"], rel=1e-6)


def test_training_learns(config: TrainConfig, tmp_path: Path) -> None:
    rows: list[dict[str, float]] = []
    original = Trainer._log

    def log(self: Trainer) -> dict[str, float]:
        row = original(self)
        rows.append(row)
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_log", log)
        train(replace(config, tokens=64 * 100), tmp_path / "run", progress=False)
    assert rows[-1]["fvu"] < 0.6 * rows[0]["fvu"]


@pytest.mark.parametrize(
    ("killed_at", "options"),
    [
        (3, {}),
        (7, {}),
        (20, {}),
        # at 27 a mask of dead features, made at step 25, is in the checkpoint
        (31, {"architecture": "topk", "k": 4, "tokens": 64 * 40, "normalize_decoder": False}),
        (31, {"architecture": "batchtopk", "k": 4, "tokens": 64 * 40}),
    ],
    ids=str,
)
def test_killed_run_resumes_bit_for_bit(
    config: TrainConfig, tmp_path: Path, killed_at: int, options: dict[str, Any]
) -> None:
    config = replace(config, **options)
    whole = run_and_compare(config, tmp_path / "whole")
    step = Trainer.train_step

    def killed(self: Trainer, batch: Any) -> Any:
        if self.step == killed_at:
            raise KeyboardInterrupt
        return step(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "killed", progress=False)
    assert not (tmp_path / "killed" / "metrics.json").exists()
    resumed = run_and_compare(read_config(tmp_path / "killed"), tmp_path / "killed", resume=True)
    assert resumed == whole
    assert len(whole[2]) == config.steps
    if "k" in options:
        assert whole[2][-1]["auxiliary_reconstruction_loss"] > 0
    with pytest.raises(UsageError, match="complete"):
        train(config, tmp_path / "killed", resume=True, progress=False)


def test_failed_evaluation_does_not_cost_the_training(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsae.train import evaluation

    def fail(*_: Any, **__: Any) -> None:
        raise FastsaeError("evaluation failed")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate_many", fail)
        with pytest.raises(FastsaeError, match="evaluation failed"):
            train(config, tmp_path / "run", progress=False)
    SparseAutoencoder.load(tmp_path / "run")
    monkeypatch.setattr(Trainer, "train_step", fail)  # resumed behind the last step, so no step is repeated
    train(read_config(tmp_path / "run"), tmp_path / "run", resume=True, progress=False)
    assert (tmp_path / "run" / "metrics.json").exists()


def test_checkpoint_of_another_run_is_reported(config: TrainConfig, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 6, {"trainer": {"step": 6}})
    with pytest.raises(FastsaeError, match="checkpoint of this run"):
        train(config, tmp_path, resume=True, progress=False)


def test_relu_architecture(config: TrainConfig, tmp_path: Path) -> None:
    train(replace(config, architecture="relu", l1_coefficient=0.5), tmp_path / "run", progress=False)
    assert isinstance(SparseAutoencoder.load(tmp_path / "run"), FusedReLUSAE)


@pytest.mark.parametrize("cls", [FusedTopKSAE, FusedBatchTopKSAE])
@pytest.mark.parametrize("normalize", [False, True])
def test_topk_architectures(config: TrainConfig, tmp_path: Path, cls: Any, normalize: bool) -> None:
    config = replace(config, architecture=cls.architecture, k=4, normalize_decoder=normalize, tokens=64 * 40)
    trained: list[SparseAutoencoder] = []
    with pytest.MonkeyPatch.context() as patch:
        step = Trainer.train_step

        def train_step(self: Trainer, batch: Any) -> Any:
            if self.step == 0:
                assert not self.sae.b_enc.any()
                trained.append(self.sae)
            output = step(self, batch)
            assert output.l0 <= 4
            return output

        patch.setattr(Trainer, "train_step", train_step)
        metrics = train(config, tmp_path / "run", progress=False)
    loaded = SparseAutoencoder.load(tmp_path / "run")
    assert type(loaded) is cls
    assert loaded.k == 4
    assert loaded.apply_b_dec_to_input
    assert loaded.rescale_acts_by_decoder_norm is not normalize
    assert loaded.config() == trained[0].config()
    x = torch.randn(50, 16) * 3
    torch.testing.assert_close(loaded(x), trained[0](x))
    assert evaluate_folder(tmp_path / "run", config, progress=False).metrics["fvu"] == pytest.approx(metrics["fvu"])
    if cls is FusedTopKSAE:  # after 40 steps the running threshold has come a third of its way
        assert 0 < metrics["fvu"] < 1
        assert metrics["l0"] <= 4


def test_threshold_of_a_batchtopk_run_is_in_units_of_the_activations(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, architecture="batchtopk", k=4)
    before: list[tuple[float, float]] = []
    fold = FusedBatchTopKSAE.fold_activation_scale_

    def folding(self: FusedBatchTopKSAE, scale: float) -> None:
        before.append((self.topk_threshold.item(), scale))
        fold(self, scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedBatchTopKSAE, "fold_activation_scale_", folding)
        train(config, tmp_path / "run", progress=False)
    ((threshold, scale),) = before
    assert threshold > 0
    assert scale != 1
    assert FusedBatchTopKSAE.load(tmp_path / "run").topk_threshold.item() == threshold / scale


def test_bf16_products_keep_fp32_weights(config: TrainConfig, tmp_path: Path) -> None:
    wide = train(config, tmp_path / "wide", progress=False)
    narrow = train(replace(config, dtype="bfloat16"), tmp_path / "narrow", progress=False)
    assert SparseAutoencoder.load(tmp_path / "narrow").dtype == torch.float32
    assert narrow["fvu"] == pytest.approx(wide["fvu"], rel=0.05)
    assert narrow["fvu"] != wide["fvu"]


def test_existing_output_is_kept(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with pytest.raises(UsageError, match="--output"):
        train(config, tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_wrong_arguments_leave_no_folder(config: TrainConfig, tmp_path: Path) -> None:
    for wrong in ({"layer": 9}, {"eval_dialogues": 40}, {"d_sae": 4, "k": 4, "model": "/no/such"}):
        with pytest.raises(UsageError):
            train(replace(config, **wrong), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_diverging_run_names_the_step(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsae.train.trainer.learning_rate", lambda step, config: 1e30)
    with pytest.raises(FastsaeError, match="not finite"):
        train(replace(config, clip_norm=0, normalize_decoder=False), tmp_path / "run", progress=False)


def test_evaluating_on_another_layer_is_said(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsae.train import evaluation

    warnings: list[str] = []
    monkeypatch.setattr(evaluation.logger, "warning", lambda text, *values: warnings.append(text % values))
    FusedJumpReLUSAE(16, 32).save(tmp_path, hook_name="blocks.0.hook_resid_post")
    evaluate_folder(tmp_path, replace(config, layer=0), progress=False)
    FusedJumpReLUSAE(16, 32).save(tmp_path, hook_name="model.layers.0")
    evaluate_folder(tmp_path, replace(config, layer=0), progress=False)
    assert warnings == []
    evaluate_folder(tmp_path, replace(config, layer=1), progress=False)
    assert len(warnings) == 1
    assert "model.layers.0" in warnings[0]


def test_model_broken_behind_the_layer_is_reported(config: TrainConfig, tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(tiny_model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    FusedJumpReLUSAE(16, 32).save(tmp_path / "sae")
    with pytest.raises(FastsaeError, match="a later layer is broken"):
        evaluate_folder(tmp_path / "sae", replace(config, model=str(broken), layer=0), progress=False)


def test_model_files_without_some_weights_are_refused(config: TrainConfig, tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(tiny_model, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FastsaeError, match="down_proj"):
        train(replace(config, model=str(broken)), tmp_path / "run", progress=False)


def test_evaluate_refuses_an_sae_of_another_width_before_it_reads_the_data(config: TrainConfig, tmp_path: Path) -> None:
    FusedJumpReLUSAE(8, 16).save(tmp_path)
    with pytest.raises(UsageError, match=r"model '.*': expected activations of the SAE's width d_in = 8, got 16"):
        evaluate_folder(tmp_path, replace(config, dataset="/no/such/chats.jsonl"), progress=False)
