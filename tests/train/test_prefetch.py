"""The model runs ahead in a thread: the same bits, resumable from anywhere, and nobody computes what nobody needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import Stop, load_latest, make_config, outcome

from fastsae import FastsaeError
from fastsae.data import stream
from fastsae.data.activations import ResidualStream
from fastsae.interrupt import Interrupted
from fastsae.train import checkpoint
from fastsae.train.config import TrainConfig
from fastsae.train.folder import read_config, read_configs
from fastsae.train.grid import with_one_order
from fastsae.train.run import train, train_many
from fastsae.train.session import Session
from fastsae.train.trainer import Trainer


@pytest.fixture
def config(tiny_model: Path, chats: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setattr(stream, "SAMPLE_TOKENS", 100)  # so that the first piece of so short a run is not all of it
    made = make_config(tiny_model, chats, checkpoint_every=5)
    return replace(made, tokens=64 * 40, buffer_tokens=512, prefetch=2, max_norm_multiple=1.2)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "fastsae prefetch"]


def several(config: TrainConfig) -> dict[str, TrainConfig]:
    """Two layers with different sinks, one of them with two SAEs."""
    return with_one_order(
        {
            "first": replace(config, layer=0, seed=0),
            "batchtopk": replace(config, layer=0, architecture="batchtopk", k=4),
            "topk": replace(config, layer=1, architecture="topk", k=4),
        }
    )


class Forwards:
    """Counts the passes of the model, and remembers the threads that computed them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: list[str] = []
        original = ResidualStream._forward

        def called(residual: ResidualStream, *arguments: Any) -> Any:
            self.threads.append(threading.current_thread().name)
            return original(residual, *arguments)

        monkeypatch.setattr(ResidualStream, "_forward", called)


# the second run reads no more after training, as the calibration of a BatchTopK SAE does
@pytest.mark.parametrize(("n_ahead", "names"), [(1, "first batchtopk topk"), (2, "first topk")])
def test_every_bit_is_the_same_and_no_pass_of_the_model_is_made_in_vain(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_ahead: int, names: str
) -> None:
    counts, chosen = {}, {name: several(config)[name] for name in names.split()}
    for n in (0, n_ahead):
        with monkeypatch.context() as patch:
            forwards = Forwards(patch)
            configs = {name: replace(own, prefetch=n) for name, own in chosen.items()}
            metrics = train_many(configs, tmp_path / str(n), progress=False)
            counts[n] = len(forwards.threads)
            assert ("fastsae prefetch" in forwards.threads) is (n > 0)
    assert counts[n_ahead] == counts[0]
    assert metrics["first"]["sinks_left_out"] != metrics["topk"]["sinks_left_out"]
    for name in chosen:
        assert outcome(tmp_path / str(n_ahead) / name) == outcome(tmp_path / "0" / name), name


def test_the_model_computes_while_the_saes_are_trained(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step has ended the thread has computed what the next refill takes."""
    forwards, step = Forwards(monkeypatch), Trainer.train_step

    def train_step(self: Trainer, batch: Any) -> Any:
        for _ in range(2000):
            if self.step > 0 or forwards.threads.count("fastsae prefetch") == 2:
                return step(self, batch)
            time.sleep(0.005)
        raise AssertionError("nothing ran ahead")

    monkeypatch.setattr(Trainer, "train_step", train_step)
    train(config, tmp_path / "run", progress=False)


@pytest.mark.parametrize("at", [7, 23, 38])
@pytest.mark.parametrize("resumed_with", [0, 2])
def test_resume_goes_on_behind_what_was_trained_on_and_not_behind_what_was_read(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, resumed_with: int
) -> None:
    chosen = {name: several(config)[name] for name in ("first", "topk")}
    train_many({name: replace(own, prefetch=0) for name, own in chosen.items()}, tmp_path / "whole", progress=False)
    step = Trainer.train_step

    def train_step(self: Trainer, batch: Any) -> Any:
        if self.step == at:
            raise Stop
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        with pytest.raises(Stop):
            train_many(chosen, tmp_path / "run", progress=False)
    again = {name: replace(own, prefetch=resumed_with) for name, own in read_configs(tmp_path / "run").items()}
    train_many(again, tmp_path / "run", resume=True, progress=False)
    for name in chosen:
        assert outcome(tmp_path / "run" / name) == outcome(tmp_path / "whole" / name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("n_passes", [1, 4, 8])
def test_a_signal_while_the_thread_computes_loses_nothing(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, n_passes: int
) -> None:
    train(replace(config, prefetch=0), tmp_path / "whole", progress=False)
    original, earlier = ResidualStream._forward, signal.signal(signal.SIGINT, signal.default_int_handler)
    calls = 0

    def called(self: ResidualStream, *arguments: Any) -> Any:
        nonlocal calls
        if threading.current_thread().name == "fastsae prefetch":
            calls += 1
            if calls == n_passes:
                os.kill(os.getpid(), number)
        return original(self, *arguments)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(ResidualStream, "_forward", called)
            with pytest.raises(Interrupted, match="--resume"):
                train(config, tmp_path / "run", progress=False)
    finally:
        signal.signal(signal.SIGINT, earlier)
    saved = load_latest(tmp_path / "run")
    assert saved is not None
    assert 0 < saved["trainers"]["0"]["step"] < config.steps
    train(read_config(tmp_path / "run"), tmp_path / "run", resume=True, progress=False)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


KILLED = """
import os, signal, sys
from pathlib import Path
from fastsae.data import stream
from fastsae.train.folder import read_config
from fastsae.train.run import train
from fastsae.train.config import TrainConfig
from fastsae.train.trainer import Trainer

stream.SAMPLE_TOKENS = 100
step = Trainer.train_step

def train_step(self, batch):
    if self.step == 18:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)

Trainer.train_step = train_step
train(read_config(Path(sys.argv[1])), sys.argv[2], progress=False)
"""


def test_a_run_killed_at_once_is_resumed_to_the_same_bits(config: TrainConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "whole", progress=False)
    command = [sys.executable, "-c", KILLED, tmp_path / "whole", tmp_path / "run"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    newest = checkpoint.latest(tmp_path / "run")
    assert newest is not None
    assert checkpoint.step_of(newest) == 15
    train(read_config(tmp_path / "run"), tmp_path / "run", resume=True, progress=False)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_an_error_of_the_model_is_the_runs_own_error(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ResidualStream.checked

    def checked(self: ResidualStream, acts: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
        if threading.current_thread().name == "fastsae prefetch":
            acts = acts * torch.nan
        return original(self, acts, *arguments)

    monkeypatch.setattr(ResidualStream, "checked", checked)
    with pytest.raises(FastsaeError, match=r"layer 1: the activations of 100 % of the tokens are NaN or infinite"):
        train(config, tmp_path / "run", progress=False)


def test_the_evaluation_has_the_model_for_itself(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Session.calibrate
    seen = []

    def calibrate(self: Session) -> None:
        seen.append([thread.name for thread in threading.enumerate()])
        original(self)

    monkeypatch.setattr(Session, "calibrate", calibrate)
    train(config, tmp_path / "run", progress=False)
    assert len(seen) == 1
    assert "fastsae prefetch" not in seen[0]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_both_speeds_are_told(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefetch: int, capsys: Any
) -> None:
    """A model that takes 0.4 seconds for each pass, and faster SAEs."""
    original = ResidualStream._forward

    def slow(self: ResidualStream, *arguments: Any) -> Any:
        time.sleep(0.4)
        return original(self, *arguments)

    monkeypatch.setattr(ResidualStream, "_forward", slow)
    config = replace(config, prefetch=prefetch, tokens=64 * 16, checkpoint_every=0)
    metrics = train(config, tmp_path / "run", progress=True)
    model, sae = metrics["model_tokens_per_second"], metrics["sae_tokens_per_second"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"model_tokens_per_second", "sae_tokens_per_second", "tokens_per_second"} < rows[-1].keys()
    assert rows[-1]["model_tokens_per_second"] == pytest.approx(model)
    assert 20 < model < config.forward_tokens / 0.4 < sae
    shown = capsys.readouterr().err
    assert "model=" in shown
    assert "sae=" in shown
