"""Prints each provider's ratio to dense eager after a run, and keeps the run where `--results DIR` says."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

BASELINE = "dense eager fp32"


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
    }


def commit() -> str:
    """Short hash of the checkout, `unknown` outside one."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    timed = [bench for bench in getattr(session, "benchmarks", []) if bench.stats.rounds]
    if not timed:
        return
    rows = [{"group": b.group, **b.extra_info, "median_s": b.stats.median, "iqr_s": b.stats.iqr} for b in timed]
    baselines = {row["group"]: row["median_s"] for row in rows if row["provider"] == BASELINE}
    terminalreporter.section(f"ratio to {BASELINE} (median of each)")
    for row in rows:
        row["speedup"] = baselines[row["group"]] / row["median_s"] if row["group"] in baselines else None
        ratio = f"{row['speedup']:5.2f}x" if row["speedup"] else "    -"
        error = f"{row['max_relative_gradient_error']:.1e}"
        times = f"{row['median_s'] * 1e3:9.1f} ms  IQR {row['iqr_s'] * 1e3:7.1f} ms"
        terminalreporter.write_line(
            f"{row['group']:36} {row['provider']:30} {times} {ratio}  worst gradient error {error}"
        )
    info = machine()
    terminalreporter.write_line(", ".join(f"{key} {value}" for key, value in info.items()))
    folder = config.getoption("--results")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        stem = info["gpu"] or info["processor"]
        name = f"{'-'.join(stem.split())}_{date.today()}_{commit()}.json"
        (folder / name).write_text(json.dumps({"machine": info, "commit": commit(), "results": rows}, indent=2) + "\n")
        terminalreporter.write_line(f"written to {folder / name}")
