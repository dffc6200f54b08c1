"""A command on several processes, of which one is killed: `torchrun` starts them again, and the result is the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from started import TORCHRUN, environment
from torch import distributed

pytestmark = [
    pytest.mark.skipif(
        not (distributed.is_available() and distributed.is_gloo_available()), reason="this PyTorch has no gloo"
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="reads the numbers of processes from /proc"),
]
STEPS, BATCH, LIMIT = 60, 32, 240
OPTIONS = [
    "--max-length", "64", "--eval-dialogues", "4", "--dedup-words", "0", "--layer", "0", "--model-dtype", "float32",
    "--d-sae", "30", "--batch-size", f"{BATCH}", "--tokens", f"{STEPS * BATCH}", "--buffer-tokens", f"{4 * BATCH}",
    "--forward-tokens", "256",
    "--checkpoint-every", "4", "--log-every", "5", "--target-l0", "4", "--init-l0", "8", "--no-pages", "--quiet",
]  # fmt: skip


def command(output: Path, model: Path, chats: Path, n_shards: int) -> list[str]:
    return [
        *TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "3", "-m", "fastsae", "train", "--output", str(output),
        "--model", str(model), "--dataset", str(chats), "--shard-features", str(n_shards), *OPTIONS,
    ]  # fmt: skip


def outcome(folder: Path) -> tuple[bytes, dict[str, Any]]:
    metrics = json.loads((folder / "metrics.json").read_text())
    times = {name for name in metrics if "second" in name}
    return (folder / "sae_weights.safetensors").read_bytes(), {k: v for k, v in metrics.items() if k not in times}


def workers(launcher: int) -> list[int]:
    """The processes that `torchrun` has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(") ")[2].split()[1])
            if parent == launcher and b"fastsae" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except (OSError, ValueError):
            continue
    return sorted(found)


def newest_step(output: Path) -> int:
    steps = [int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*[0-9]")]
    return max(steps, default=0)


def killed(
    arguments: list[str], output: Path, at_step: int, delay: float, rank: int
) -> subprocess.CompletedProcess[str]:
    """Runs the command, and kills one of its processes so long after the checkpoint of a step."""
    process = subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        end = time.monotonic() + LIMIT
        while newest_step(output) < at_step or len(workers(process.pid)) < 2:
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(delay)
        for pid in workers(process.pid)[rank : rank + 1]:
            os.kill(pid, signal.SIGKILL)
        out, err = process.communicate(timeout=LIMIT)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_a_restart_after_the_end_of_the_run_has_nothing_to_do(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = command(output, tiny_model, chats, 1)[len(TORCHRUN) + 4 :]
    for restarts in ("0", "1"):
        variables = environment(TORCHELASTIC_RESTART_COUNT=restarts)
        done = subprocess.run(
            [sys.executable, *arguments], env=variables, capture_output=True, text=True, timeout=LIMIT
        )
        assert done.returncode == 0, done.stderr
        assert ("is complete" in done.stderr) == (restarts == "1")


@pytest.mark.parametrize("n_kills", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("n_shards", [1, 2])
def test_a_killed_process_changes_nothing(
    tiny_model: Path, chats: Path, tmp_path: Path, n_shards: int, n_kills: int
) -> None:
    whole = tmp_path / "whole"
    subprocess.run(command(whole, tiny_model, chats, n_shards), env=environment(), check=True, timeout=LIMIT)
    draw = random.Random(n_kills)
    for i in range(n_kills):
        output = tmp_path / f"killed-{i}"
        at_step = draw.randrange(STEPS - 8) if i else 12
        done = killed(command(output, tiny_model, chats, n_shards), output, at_step, draw.random(), draw.randrange(2))
        assert done.returncode == 0, done.stderr
        assert outcome(output) == outcome(whole), f"killed at step {at_step}"
        assert not (output / "checkpoints").exists()  # a complete run needs none
