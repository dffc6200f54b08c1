"""The whole main job: `fastsae train` with its defaults, from the embedded model's activations to the evaluation."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, Provider, cases_and_providers, replay
from benchmarks.result import ROOT
from benchmarks.shapes import CPU_SHAPES

MAX_FVU, MAX_L0 = 0.20, 40.0  # what the default run promises
PROVIDER = "fastsae train"
# its own peak, told by itself: what the system counts of a child begins with all that this process has
PROGRAM = """
import json, pathlib, sys
from fastsae.cli import main
from benchmarks.peak import process_peak_mib
status = main(sys.argv[2:])
pathlib.Path(sys.argv[1]).write_text(json.dumps(process_peak_mib()))
sys.exit(status)
"""
CASE = Case("epoch", "embedded model", CPU_SHAPES["demo"], {PROVIDER: Provider(lambda: lambda: None)}, "fp32")


@cases_and_providers([CASE])
def test_epoch(benchmark: Any, run: Any, case: Case, provider: str, tmp_path: Path) -> None:
    """One run in a process of its own; red where the SAE that comes out is a bad one."""
    started = time.perf_counter()
    command = [sys.executable, "-c", PROGRAM, tmp_path / "peak", "train", "--output", tmp_path / "run"]
    subprocess.run(command, check=True, cwd=ROOT)
    seconds = time.perf_counter() - started
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    row = case.row(provider)
    row.error, row.error_limit = metrics["fvu"], MAX_FVU
    if metrics["fvu"] > MAX_FVU or metrics["l0"] > MAX_L0:
        found = f"FVU {metrics['fvu']:.3f} and L0 {metrics['l0']:.1f}"
        row.status, row.reason = "red", f"{found}, expected at most {MAX_FVU} and {MAX_L0:g}"
    else:
        row.median_s, row.rounds, row.calls = seconds, 1, 1
        row.peak_mib = json.loads((tmp_path / "peak").read_text())
    run.rows.append(row)
    run.save()
    assert row.status == "ok", row.reason
    benchmark.group = case.group
    replay(benchmark, [seconds])
