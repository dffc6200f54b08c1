"""Collects a row for each provider, prints them after a run, and writes them where `--results DIR` says."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import floor
from benchmarks.harness import Case, GroupTimer, report
from benchmarks.shapes import QUICK

ROWS = pytest.StashKey[list[dict[str, Any]]]()
TIMER = pytest.StashKey[GroupTimer]()
STARTED = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="also write <machine>_<date>_<commit>.json to this folder")
    parser.addoption("--quick", action="store_true", help="small shapes and three rounds alone: less than 3 minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[STARTED] = [], time.time()
    config.stash[TIMER] = GroupTimer(config.getoption("--quick"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    cases = [getattr(item, "callspec", None) and item.callspec.params.get("case") for item in items]
    large = [
        item for item, case in zip(items, cases, strict=True) if isinstance(case, Case) and case.shape_name not in QUICK
    ]
    config.hook.pytest_deselected(items=large)
    items[:] = [item for item in items if item not in large]


@pytest.fixture
def timed_rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The rows of this run, to be added to."""
    return request.config.stash[ROWS]


@pytest.fixture
def timed(
    benchmark: Any, request: pytest.FixtureRequest, timed_rows: list[dict[str, Any]]
) -> Callable[[Case, str], None]:
    """Reports the time of a case's provider; fails where its numbers are wrong."""
    return lambda case, provider: report(benchmark, request.config.stash[TIMER], timed_rows, case, provider)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    clocks = [float(line.split(":", 1)[1]) for line in lines if "cpu MHz" in line]
    return {
        "processor": models[0] if models else name,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_units": getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)(),
        "threads": torch.get_num_threads(),
        "clock_mhz": round(max(clocks)) if clocks else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else None,
        "cuda": torch.version.cuda,
        "copy_gb_per_s": floor.copy_gb_per_s(),
        "gemm_tflop_per_s": {
            name: floor.product_tflop_per_s(dtype)
            for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items()
        },
    }


def commit() -> str:
    """Short hash of the checkout, `unknown` outside one."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _kept(folder: Path, stem: str, groups: set[str]) -> tuple[list[dict[str, Any]], int]:
    """Rows of the newest earlier file of this machine, of groups that were not measured again, and the seconds it took.

    Each names its commit. After a run of everything there are none, and none of the seconds.
    """
    earlier = [json.loads(path.read_text()) for path in folder.glob(f"{stem}_*.json")]
    newest = max(earlier, key=lambda result: result["finished"], default=None)
    if newest is None:
        return [], 0
    kept = [{"commit": newest["commit"], **row} for row in newest["results"] if row["group"] not in groups]
    return kept, newest["seconds"] if kept else 0


def _line(row: dict[str, Any]) -> str:
    """Time, ratio to the baseline (above 1: faster), error against fp64, peak memory beyond the start."""
    if row["status"] != "ok":
        return f"{row['group']:44} {row['provider']:30} {row['status']}: {row['reason']}"
    speedup = f"{row['speedup']:6.2f}x" if row["speedup"] else "      -"
    error = "-" if row["error"] is None else f"{row['error']:.1e}"
    memory = "" if row["peak_mib"] is None else f"  peak {row['peak_mib']:7.1f} MiB"
    share = f"  {row['floor_s'] / row['median_s']:4.0%} of the floor" if row["floor_s"] else ""
    times = f"{row['median_s'] * 1e3:9.3f} ms  IQR {(row['iqr_s'] or 0) * 1e3:8.3f}"
    return f"{row['group']:44} {row['provider']:30} {times} {speedup}  error {error}{memory}{share}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows or config.getoption("--benchmark-disable"):
        return
    terminalreporter.section("ratio to the first of each group (medians; above 1: faster)")
    for row in rows:
        terminalreporter.write_line(_line(row))
    info, now = machine(), datetime.now(timezone.utc)
    terminalreporter.write_line(", ".join(f"{key} {value}" for key, value in info.items()))
    folder = config.getoption("--results")
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    stem = "-".join((info["gpu"] or info["processor"]).split())
    path = folder / f"{stem}_{now.date()}_{commit()}.json"
    rows = [{**row, "commit": commit()} for row in rows]
    kept, seconds = _kept(folder, stem, {row["group"] for row in rows})
    result = {
        "machine": info,
        "commit": commit(),
        "date": str(now.date()),
        "finished": now.isoformat(timespec="seconds"),
        "seconds": round(time.time() - config.stash[STARTED]) + seconds,
        "results": rows + kept,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    terminalreporter.write_line(f"written to {path}")
