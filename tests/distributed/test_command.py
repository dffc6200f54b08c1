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
