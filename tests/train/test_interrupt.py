"""Ctrl-C and SIGTERM: what was computed is saved first, and the resumed run ends as if nobody had interrupted it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stopped_runs import load_latest, without_times

from fastsae.data import stream
from fastsae.data.activations import ResidualStream
from fastsae.interrupt import Interrupted, Postponed, exit_status
from fastsae.train import checkpoint, run
from fastsae.train.config import TrainConfig
from fastsae.train.folder import read_config
from fastsae.train.run import train
from fastsae.train.trainer import Trainer

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """Python's own handlers, whatever the test runner has set."""
    earlier = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.fixture
def config(tiny_model: Path, chats: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setattr(stream, "SAMPLE_TOKENS", 100)  # so that the first piece of so short a run is not all of it
    return TrainConfig(
        model=str(tiny_model), dataset=str(chats), eval_dialogues=8, d_sae=64, tokens=64 * 24, batch_size=64,
        buffer_tokens=256, forward_tokens=256, init_l0=8, target_l0=4, log_every=5,
    )  # fmt: skip


def outcome(output: Path) -> tuple[bytes, dict[str, Any]]:
    metrics = json.loads((output / "metrics.json").read_text())
    return (output / "sae_weights.safetensors").read_bytes(), without_times(metrics)


def at_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, n: int, number: int) -> None:
    """Sends this process a signal in the `n`-th call of a method, before it does anything."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = iter(range(1, 10**6))

    def called(*arguments: Any, **options: Any) -> Any:
        if next(calls) == n:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, called)


def n_filling_calls(config: TrainConfig) -> int:
    """How many forward passes fill the buffer for the first time."""
    calls = 0
    original = ResidualStream.__call__

    def called(self: ResidualStream, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResidualStream, "__call__", called)
        pipeline = run.build_pipeline(config)
        run.Session(pipeline, {"": pipeline.resolved(config)}).initialize()
    return calls


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_a_step_saves_after_it(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    train(config, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        at_call(patch, Trainer, "train_step", 8, number)
        with pytest.raises(Interrupted, match=r"step 8 of 24.*--resume") as caught:
            train(config, tmp_path / "run", progress=False)
    assert exit_status(caught.value) == 128 + number
    saved = load_latest(tmp_path / "run")
    assert saved is not None
    assert saved["trainers"]["0"]["step"] == 8
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(read_config(tmp_path / "run"), tmp_path / "run", resume=True, progress=False)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("later", [1, 2, 3])
def test_a_signal_in_a_refill_saves_the_state_before_it(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: int
) -> None:
    train(config, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        at_call(patch, ResidualStream, "__call__", n_filling_calls(config) + later, signal.SIGINT)
        with pytest.raises(Interrupted, match="--resume"):
            train(config, tmp_path / "run", progress=False)
    saved = load_latest(tmp_path / "run")
    assert saved is not None
    assert 0 < saved["trainers"]["0"]["step"] < config.steps
    train(read_config(tmp_path / "run"), tmp_path / "run", resume=True, progress=False)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_signal_while_the_buffer_fills_leaves_nothing(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_call(monkeypatch, ResidualStream, "__call__", 1, signal.SIGINT)
    with pytest.raises(Interrupted, match="nothing was written"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_signal_in_the_evaluation_leaves_it_to_resume(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        at_call(patch, run, "evaluate_saes", 1, signal.SIGINT)
        with pytest.raises(Interrupted, match="training is done, the evaluation is left"):
            train(config, tmp_path / "run", progress=False)
    monkeypatch.setattr(Trainer, "train_step", None)  # no step is repeated
    train(read_config(tmp_path / "run"), tmp_path / "run", resume=True, progress=False)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_without_checkpoints_a_signal_says_that_there_is_none(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_call(monkeypatch, Trainer, "train_step", 3, signal.SIGINT)
    with pytest.raises(Interrupted, match=r"no checkpoint.*checkpoint_every is 0"):
        train(replace(config, checkpoint_every=0), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / checkpoint.FOLDER).exists()


def test_a_second_signal_ends_at_once_and_spoils_nothing(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_call(patch, Trainer, "train_step", 3, signal.SIGINT)
        at_call(patch, checkpoint, "digest", 1, signal.SIGINT)  # while the checkpoint is written
        with pytest.raises(Interrupted, match="there is no checkpoint"):
            train(config, tmp_path / "run", progress=False)
    assert [path.name for path in (tmp_path / "run").rglob("*.safetensors")] == []
    train(read_config(tmp_path / "run"), tmp_path / "run", resume=True, progress=False)


def test_another_thread_trains_without_handlers(config: TrainConfig, tmp_path: Path) -> None:
    thread = threading.Thread(target=train, args=(config, tmp_path / "run"), kwargs={"progress": False})
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "metrics.json").exists()


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as nohup does with another one
    with Postponed() as postponed:
        os.kill(os.getpid(), signal.SIGTERM)
        postponed.check()


COMMAND = """
import os, signal, sys, time
import torch
from fastsae import cli
from fastsae.train import run

def computes(*_, **__):
    number = signal.Signals[sys.argv[1]]
    pid = os.getpid()
    if os.fork() == 0:
        time.sleep(0.3)
        os.kill(pid, number)
        os._exit(0)
    values = torch.ones(2**24)
    while len(sys.argv) > 2:
        values.sin_()
    torch.linalg.svd(torch.randn(3_000, 3_000))  # half a minute, in which Python runs no handler

run.build_pipeline = computes
sys.exit(cli.main(["train", "--output", "run"]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child sends the signal")
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("kind", ["one long call", "many short ones"])
def test_the_command_ends_with_a_shells_status(tmp_path: Path, name: str, status: int, kind: str) -> None:
    arguments = [name] if kind == "one long call" else [name, "short"]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
