"""A run killed at any file operation is resumed to the very same result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("killed_runs.py")
FEW = "6"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a child per run")
@pytest.mark.parametrize("moments", [FEW, pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("architecture", "sequencing"), [("jumprelu", "fast"), ("topk", "packed"), ("batchtopk", "block")]
)
def test_killed_at_a_file_operation(
    tiny_model: Path, chats: Path, tmp_path: Path, moments: str, architecture: str, sequencing: str
) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, tiny_model, chats, tmp_path, moments, architecture, sequencing],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.strip().splitlines()[-1])
    print(counts)  # noqa: T201
    assert counts["kills"] == (counts["operations"] if moments == "all" else int(FEW))
    assert counts["operations"] > 50
    assert counts["resumed"] > 0
