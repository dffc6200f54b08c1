"""SAEs that are kept at checkpoints: which stay, that they load and evaluate, and that a kill leaves whole ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import Stop, make_config, stopped_run

from fastsae import FusedBatchTopKSAE, SparseAutoencoder, UsageError, cli
from fastsae.distributed import Group
from fastsae.train import checkpoint
from fastsae.train.config import TrainConfig
from fastsae.train.run import train, train_many


@pytest.fixture
def config(tiny_model: Path, chats: Path) -> TrainConfig:
    return make_config(tiny_model, chats, checkpoint_every=4)  # 12 steps


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def kept(*steps: int) -> list[str]:
    return [f"sae-step-{step:09d}" for step in steps]


@pytest.mark.parametrize(("most", "steps"), [(1, (12,)), (2, (8, 12)), (9, (4, 8, 12))])
def test_the_newest_stay_at_the_end(config: TrainConfig, tmp_path: Path, most: int, steps: tuple[int, ...]) -> None:
    train(replace(config, keep_checkpoints=most), tmp_path / "run", progress=False)
    assert names(tmp_path / "run") == kept(*steps)


def test_none_stay_by_default_and_the_run_is_the_same(config: TrainConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "checkpoints").exists()
    for changes in ({}, {"architecture": "batchtopk", "k": 4}):
        runs = [replace(config, **changes), replace(config, keep_checkpoints=2, **changes)]  # type: ignore[arg-type]
        for i, run in enumerate(runs):
            train(run, tmp_path / f"{len(changes)}-{i}", progress=False)
        weights = [(tmp_path / f"{len(changes)}-{i}" / "sae_weights.safetensors").read_bytes() for i in range(2)]
        assert weights[0] == weights[1]


def test_a_kept_sae_is_the_one_of_its_step(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(config, keep_checkpoints=3), tmp_path / "run", progress=False)
    folders = [tmp_path / "run" / "checkpoints" / name for name in kept(4, 12)]
    first, last = map(SparseAutoencoder.load, folders)
    final = SparseAutoencoder.load(tmp_path / "run")
    assert torch.equal(last.W_enc, final.W_enc)
    assert torch.equal(last.b_dec, final.b_dec)
    assert not torch.equal(first.W_enc, final.W_enc)
    results = []
    for folder in (*folders, tmp_path / "run"):
        assert cli.main(["evaluate", str(folder), "--json", str(tmp_path / "m.json"), "--quiet"]) == 0
        results.append(json.loads((tmp_path / "m.json").read_text())["fvu"])
    assert results[1] == results[2] < results[0]


def test_a_batchtopk_sae_is_kept_with_a_threshold_that_gives_its_k(config: TrainConfig, tmp_path: Path) -> None:
    batchtopk = replace(config, architecture="batchtopk", k=4, keep_checkpoints=3)
    metrics = train(batchtopk, tmp_path / "run", progress=False)
    early = FusedBatchTopKSAE.load(tmp_path / "run" / "checkpoints" / kept(4)[0])
    assert early.topk_threshold > 0
    assert metrics["l0"] == pytest.approx(4, rel=0.3)


def test_each_of_several_keeps_its_own(config: TrainConfig, tmp_path: Path) -> None:
    runs = {name: replace(config, seed=seed, keep_checkpoints=2, data_seed=42) for seed, name in enumerate("ab")}
    train_many(runs, tmp_path / "many", progress=False)
    assert not (tmp_path / "many" / "checkpoints").exists()
    train(runs["b"], tmp_path / "alone", progress=False)
    for run in (tmp_path / "many" / "a", tmp_path / "many" / "b", tmp_path / "alone"):
        assert names(run) == kept(8, 12)
    for name in kept(8, 12):
        both = [
            run / "checkpoints" / name / "sae_weights.safetensors" for run in (tmp_path / "alone", tmp_path / "many/b")
        ]
        assert both[0].read_bytes() == both[1].read_bytes()


def test_a_resumed_run_keeps_what_the_whole_one_does(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, keep_checkpoints=2)
    train(config, tmp_path / "whole", progress=False)
    stopped_run(config, tmp_path / "run", at=10)
    assert names(tmp_path / "run") == [*kept(4, 8), "step-000000008"]
    train(config, tmp_path / "run", resume=True, progress=False)
    assert names(tmp_path / "run") == kept(8, 12)
    for name in kept(8, 12):
        for file in ("sae_weights.safetensors", "cfg.json", "config.json"):
            both = [tmp_path / run / "checkpoints" / name / file for run in ("run", "whole")]
            assert both[0].read_bytes() == both[1].read_bytes()


def killed(*_: Any) -> None:
    raise Stop


@pytest.mark.parametrize("moment", ["write_json", "remove", "save"])
def test_a_kill_at_any_moment_leaves_whole_ones_and_goes_on(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    config = replace(config, keep_checkpoints=1)
    stopped_run(config, tmp_path / "run", at=6)
    with (
        monkeypatch.context() as patch
    ):  # between the write and the removal, before the state is written, within a write
        place = "fastsae.train.run" if moment == "write_json" else "fastsae.train.checkpoint"
        patch.setattr(f"{place}.{moment}", killed)
        if moment == "write_json":
            patch.setattr("fastsae.train.run.write_configs", lambda *_: None)
        with pytest.raises(Stop):
            train(config, tmp_path / "run", resume=True, progress=False)
    whole = [name for name in names(tmp_path / "run") if not name.startswith(".")]
    assert kept(4)[0] in whole or kept(8)[0] in whole
    for name in whole:
        if name.startswith("sae"):
            SparseAutoencoder.load(tmp_path / "run" / "checkpoints" / name)
    train(config, tmp_path / "run", resume=True, progress=False)
    assert names(tmp_path / "run") == kept(12)


def test_a_full_disk_leaves_the_older_ones(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "file").write_text("whole")

    def full(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise OSError(28, "No space left on device")

    checkpoint.keep(tmp_path, 1, 1, write, Group())
    with pytest.raises(OSError, match="No space"):
        checkpoint.keep(tmp_path, 2, 1, full, Group())
    assert names(tmp_path) == kept(1)
    checkpoint.keep(tmp_path, 2, 1, write, Group())
    assert names(tmp_path) == kept(2)
    checkpoint.discard(tmp_path)
    assert names(tmp_path) == kept(2)
    (tmp_path / "checkpoints" / "sae-step-1-of-mine").mkdir()
    checkpoint.keep(tmp_path, 3, 1, write, Group())
    assert names(tmp_path) == [*kept(3), "sae-step-1-of-mine"]


def test_there_must_be_checkpoints(config: TrainConfig) -> None:
    with pytest.raises(UsageError, match="keep_checkpoints: expected --checkpoint-every above 0"):
        replace(config, keep_checkpoints=2, checkpoint_every=0)
