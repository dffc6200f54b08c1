"""Prints each provider's ratio to the baseline of its group after a run, and keeps the run where `--results DIR` says."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="also write <machine>_<date>_<commit>.json to this folder")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return {
        "processor": name,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_units": getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else None,
        "cuda": torch.version.cuda,
    }


def commit() -> str:
    """Short hash of the checkout, `unknown` outside one."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _row(bench: Any) -> dict[str, Any]:
    calls = bench.extra_info.get("calls", 1)
    return {
        "group": bench.group,
        **bench.extra_info,
        "median_s": bench.stats.median / calls,
        "iqr_s": bench.stats.iqr / calls,
    }


def _line(row: dict[str, Any]) -> str:
    """Time, ratio to the baseline (above 1: faster), error against fp64, peak memory beyond the start."""
    speedup = f"{row['speedup']:6.2f}x" if row["speedup"] else "      -"
    error = "-" if row.get("error") is None else f"{row['error']:.1e}"
    memory = "" if row.get("peak_mib") is None else f"  peak {row['peak_mib']:7.1f} MiB"
    times = f"{row['median_s'] * 1e3:9.3f} ms  IQR {row['iqr_s'] * 1e3:8.3f}"
    return f"{row['group']:44} {row['provider']:30} {times} {speedup}  error {error}{memory}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    timed = [bench for bench in getattr(session, "benchmarks", []) if bench.stats.rounds]
    if not timed:
        return
    rows = [_row(bench) for bench in timed]
    times = {(row["group"], row["provider"]): row["median_s"] for row in rows}
    terminalreporter.section("ratio to the first of each group (medians; above 1: faster)")
    for row in rows:
        baseline = times.get((row["group"], row["baseline"]))
        row["speedup"] = baseline / row["median_s"] if baseline else None
        terminalreporter.write_line(_line(row))
    info = machine()
    terminalreporter.write_line(", ".join(f"{key} {value}" for key, value in info.items()))
    folder = config.getoption("--results")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        stem = info["gpu"] or info["processor"]
        name = f"{'-'.join(stem.split())}_{date.today()}_{commit()}.json"
        (folder / name).write_text(json.dumps({"machine": info, "commit": commit(), "results": rows}, indent=2) + "\n")
        terminalreporter.write_line(f"written to {folder / name}")
