"""Nothing that was computed is lost: to NaN, to a full disk, to a folder that cannot be written."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import load_latest, make_config, stopped_run

from fastsae import FastsaeError, UsageError, cli
from fastsae.train import checkpoint, run
from fastsae.train.folder import is_new, read_config
from fastsae.train.run import train
from fastsae.train.trainer import Trainer


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_nan_never_replaces_a_good_checkpoint(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: Any
) -> None:
    options: dict[str, Any] = {"architecture": architecture, "k": 4 if architecture == "topk" else None}
    config = make_config(tiny_model, chats, checkpoint_every=1, **options)
    train(config, tmp_path / "whole", progress=False)
    step = Trainer.train_step

    def spoiled(self: Trainer, batch: Any) -> Any:
        output = step(self, batch)
        if self.step == 6:
            with torch.no_grad():
                self.sae.W_enc[0, 0] = math.nan
        return output

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", spoiled)
        with pytest.raises(FastsaeError, match=r"step 6: .*W_enc holds NaN.*--lr"):
            train(config, tmp_path / "run", progress=False)
    newest = checkpoint.latest(tmp_path / "run")
    assert newest is not None
    assert checkpoint.step_of(newest) == 5
    train(read_config(tmp_path / "run"), tmp_path / "run", resume=True, progress=False)
    weights = [(tmp_path / name / "sae_weights.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("every", [0, 500])
def test_a_run_whose_weights_end_as_nan_writes_no_sae(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    step = Trainer.train_step

    def spoiled(self: Trainer, batch: Any) -> Any:
        output = step(self, batch)
        if self.step == self.config.steps:
            self.sae.b_enc.data[0] = math.inf
        return output

    monkeypatch.setattr(Trainer, "train_step", spoiled)
    with pytest.raises(FastsaeError, match="b_enc holds NaN or infinity"):
        train(make_config(tiny_model, chats, checkpoint_every=every), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "cfg.json").exists()


def test_a_batch_without_variance_has_no_fvu(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    config = replace(
        make_config(tiny_model, chats, checkpoint_every=2), batch_size=1, buffer_tokens=64, tokens=12, eval_dialogues=4
    )
    output = stopped_run(config, tmp_path / "run", at=9)
    state = load_latest(output)
    assert state is not None
    assert [row["fvu"] for row in state["trainers"]["0"]["history"]] == [None] * 8
    train(read_config(output), output, resume=True, progress=False)
    assert "<h1>" in (output / "report.html").read_text()


class FullDisk:
    """Lets so many files be written, then none."""

    def __init__(self, n: int) -> None:
        self.left, self.fsync = n, os.fsync

    def __call__(self, handle: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")
        self.fsync(handle)


def test_a_full_disk_at_any_write_loses_nothing(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tiny_model, chats, checkpoint_every=6)
    train(config, tmp_path / "whole", progress=False)
    arguments = ["train", "--resume", "--quiet", "--output", str(tmp_path / "run")]
    flags = {"model": tiny_model, "dataset": chats, "eval-dialogues": 8, "d-sae": 32, "tokens": 768, "batch-size": 64,
             "buffer-tokens": 256, "forward-tokens": 256, "init-l0": 8, "target-l0": 4, "log-every": 4,
             "checkpoint-every": 6}  # fmt: skip
    first = ["train", "--quiet", "--output", str(tmp_path / "run")]
    first += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    for n in range(100):
        is_new_run = is_new(tmp_path / "run")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", FullDisk(n))
            status = cli.main(first if is_new_run else arguments)
        err = capsys.readouterr().err
        if status == 0:
            break
        assert status == 1
        assert "the disk is full" in err
        assert not list((tmp_path / "run").rglob(".*")), "something half-written is left"
    assert n > 5
    weights = [(tmp_path / name / "sae_weights.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]


def test_an_output_that_cannot_be_written_is_refused_at_once(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(run, "build_pipeline", None)  # before anything is loaded
    config = make_config(tiny_model, chats)
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match=r"--output: expected a folder, but .*file exists"):
            train(config, output, progress=False)
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))  # root may write anywhere
    with pytest.raises(UsageError, match=r"--output: .* that can be written"):
        train(config, tmp_path / "locked" / "run", progress=False)
    assert (
        cli.main(["evaluate", str(tmp_path), "--model", "m", "--dataset", "d", "--layer", "0", "--json", str(tmp_path)])
        == 2
    )
