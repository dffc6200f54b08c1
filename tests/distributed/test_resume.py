"""A run on two processes that share the features, one of which is killed: one process alone goes on, or two with others."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from started import TORCHRUN, environment
from torch import distributed

from fastsae import FusedTopKSAE
from fastsae.train import checkpoint

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available() and Path("/proc").is_dir()),
    reason="this PyTorch has no gloo, or the system does not say which processes torchrun has started",
)
LIMIT = 120  # seconds for a run
OPTIONS = (
    "--shard-features 2 --d-sae 23 --architecture topk --k 3 --layer 1 --tokens 4000 --batch-size 50 --buffer-tokens 400 "
    "--checkpoint-every 10 --eval-dialogues 2 --quiet"
).split()


def start(output: Path, *options: str) -> subprocess.Popen[str]:
    command = [
        *TORCHRUN,
        "--nproc-per-node",
        "2",
        "-m",
        "fastsae",
        "train",
        "--output",
        str(output),
        *options,
    ]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_one(torchrun: subprocess.Popen[str], output: Path) -> None:
    """Kills the second process once the run has a checkpoint."""
    limit = time.monotonic() + LIMIT
    while checkpoint.latest(output) is None:
        assert time.monotonic() < limit
        assert torchrun.poll() is None, torchrun.communicate()
        time.sleep(0.01)
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)


def resumed(output: Path, *launcher: str) -> FusedTopKSAE:
    options = ["-m", "fastsae", "train", "--output", str(output), "--resume", "--shard-features", "1", "--quiet"]
    subprocess.run([*launcher, *options], env=environment(), timeout=LIMIT, check=True)
    return FusedTopKSAE.load(output)


def test_other_processes_go_on(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    killed, alone = tmp_path / "killed", tmp_path / "alone"
    process = start(killed, "--model", str(tiny_model), "--dataset", str(chats), *OPTIONS)
    kill_one(process, killed)
    process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    shutil.copytree(killed, alone)
    for sae in (resumed(killed, *TORCHRUN, "--nproc-per-node", "2"), resumed(alone, sys.executable)):
        assert (sae.d_sae, sae.k) == (23, 3)
    assert checkpoint.latest(killed) is checkpoint.latest(alone) is None
