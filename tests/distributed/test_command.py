"""`fastsae` under `torchrun`, as a user starts it: what it refuses, and several SAEs that are placed on processes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from started import TORCHRUN, environment
from torch import distributed

from fastsae import SparseAutoencoder

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this PyTorch has no gloo"
)
SMALL = [
    "--max-length", "64", "--dedup-words", "0", "--model-dtype", "float32", "--batch-size", "32", "--tokens", "640",
    "--buffer-tokens", "128", "--forward-tokens", "256", "--target-l0", "4", "--init-l0", "8", "--no-pages", "--quiet",
]  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, "--nproc-per-node", "2", "-m", "fastsae", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=180)


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of fastsae on stderr but for those that point to another process."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("fastsae:")]
    return [line for line in lines if "that process" not in line]


def test_only_training_takes_several_processes(tmp_path: Path) -> None:
    done = run("evaluate", str(tmp_path))
    assert done.returncode
    assert len(told(done)) == 1
    assert "expected fastsae train, which several processes can share, got evaluate" in told(done)[0]


def test_an_sae_that_needs_all_features_in_one_process_is_refused(tmp_path: Path) -> None:
    done = run("train", "--output", str(tmp_path / "run"), "--k", "3", "--shard-features", "2", *SMALL)
    assert done.returncode
    assert len(told(done)) == 1
    assert "--k: expected none where processes share the features of a jumprelu SAE, got 3" in told(done)[0]
    assert not (tmp_path / "run").exists()


def test_a_process_without_dialogues_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "What is two plus two?"}, {"role": "assistant", "content": "It is four."}]
    chats.write_text(f"{json.dumps({'messages': messages})}\n" * 2)
    options = ["--model", str(tiny_model), "--dataset", str(chats), "--eval-dialogues", "1", "--d-sae", "30"]
    done = run("train", "--output", str(tmp_path / "run"), *options, *SMALL)
    assert done.returncode
    assert len(told(done)) == 1
    assert "dialogues: expected at least one for each of the 2 processes, got 1; start fewer" in told(done)[0]


def test_saes_that_are_placed_on_processes(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    """Each learns from the tokens of both processes, as one SAE does whose gradients they average."""
    output = tmp_path / "grid"
    data = ["--model", str(tiny_model), "--dataset", str(chats), "--eval-dialogues", "4", "--checkpoint-every", "4"]
    done = run("train", "--output", str(output), *data, "--layers", "0,1", "--d-sae", "30,50", *SMALL)
    assert done.returncode == 0, done.stderr
    names = json.loads((output / "saes.json").read_text())["saes"]
    assert len(names) == 4
    metrics = json.loads((output / "metrics.json").read_text())["saes"]
    assert list(metrics) == names
    for name in names:
        lines = (output / name / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == 20
    assert done.stdout.count("SAEs, 640 tokens") == 1
    alone = tmp_path / "alone"
    assert run("train", "--output", str(alone), *data, "--layer", "1", "--d-sae", "50", *SMALL).returncode == 0
    both = [SparseAutoencoder.load(folder).state_dict() for folder in (output / "layer-1-d-sae-50", alone)]
    for key, value in both[1].items():
        assert (both[0][key] - value).norm() <= 0.01 * value.norm(), key


FAILING = """
import os, sys, torch
from fastsae.cli import main
from fastsae.errors import FastsaeError
from fastsae.train import curves, run
from fastsae.train.session import Session
from fastsae.train.trainer import Trainer

step = Trainer.train_step

def spoiled(self, acts):
    if self.config.d_sae in map(int, os.environ["FAIL"].split()) and self.step == 5:
        self.sae.b_enc.data.fill_(float("nan"))
    return step(self, acts)

class Logger:
    __init__ = log = lambda self, *_: None
    close = lambda self: None

def stopped(self):
    raise FastsaeError("stopped")

Trainer.train_step, curves._LOGGERS["tensorboard"], run.check_loggers = spoiled, Logger, lambda _: None
if "STOP" in os.environ:
    Session.calibrate = stopped
more = [] if "--resume" in sys.argv else ["--log", "tensorboard"]  # which torchrun would take for one of its own
sys.exit(main(sys.argv[1:] + more))
"""


def test_the_only_sae_of_a_process_fails(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one goes on with the tokens of both processes, also after a resume; where all fail, one message says so."""
    (tmp_path / "failing.py").write_text(FAILING)

    def started(name: str, *more: str) -> subprocess.CompletedProcess[str]:
        data = ["--model", str(tiny_model), "--dataset", str(chats), "--eval-dialogues", "4", "--checkpoint-every", "8"]
        options = [*data, "--d-sae", "30,50", *SMALL]
        command = [str(tmp_path / "failing.py"), "train", "--output", str(tmp_path / name)]
        command += more or options
        return subprocess.run(
            [*TORCHRUN, "--nproc-per-node", "2", *command],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=180,
        )

    monkeypatch.setenv("FAIL", "50")
    monkeypatch.setenv("STOP", "1")
    assert "stopped" in started("run").stderr
    monkeypatch.delenv("STOP")
    done = started("run", "--resume", "--quiet")
    assert "1 of 2 SAEs failed, the others are complete. d-sae-50: step" in done.stderr
    assert json.loads((tmp_path / "run" / "d-sae-30" / "metrics.json").read_text())["tokens"] == 640
    assert not (tmp_path / "run" / "d-sae-50" / "metrics.json").exists()
    monkeypatch.setenv("FAIL", "30 50")
    done = started("all")
    assert (
        done.stderr.count("all SAEs failed. d-sae-50: step") + done.stderr.count("all SAEs failed. d-sae-30: step") == 1
    )


def test_another_size_is_refused_on_resume(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    data = ["--model", str(tiny_model), "--dataset", str(chats), "--eval-dialogues", "4", "--checkpoint-every", "4"]
    options = ["--output", str(output), *data, *SMALL, "--shard-features", "2"]
    assert run("train", *options, "--d-sae", "30").returncode == 0
    (output / "metrics.json").unlink()
    done = run("train", *options, "--d-sae", "31", "--resume")
    assert done.returncode
    assert len(told(done)) == 1
    assert "d_sae" in told(done)[0] or "d-sae" in told(done)[0]
