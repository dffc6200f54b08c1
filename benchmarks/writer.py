"""Writes what a run measured: rows of tables for people, `<machine>_<date>_<commit>.json` for `benchmarks.report`."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
import warnings
from datetime import datetime, timezone
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import floor
from benchmarks.outcome import is_unsteady

ROOT, CPUINFO = Path(__file__).parents[1], Path("/proc/cpuinfo")
SMI = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
Content = dict[str, Any]


@cache
def machine() -> Content:
    """Returns what the numbers were measured on."""
    has_gpu = torch.cuda.is_available()
    return {
        "processor": processor(CPUINFO.read_text() if CPUINFO.exists() else ""),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_units": getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)(),
        "threads": torch.get_num_threads(),
        "clock_mhz": clock_mhz(),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        # some builds are installed under another name, so metadata would not find it
        "triton": import_module("triton").__version__ if find_spec("triton") else None,
        "cuda": torch.version.cuda,
        "copy_gb_per_s": floor.copy_gb_per_s(),
        "gemm_tflop_per_s": {
            dtype: floor.product_tflop_per_s(dtype) for dtype in ("fp32", *(("tf32",) if has_gpu else ()), "bf16")
        },
    }


def processor(cpuinfo: str) -> str:
    """Returns its name, with what tells two generations apart that go by the same name in a virtual machine."""
    about = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", cpuinfo, re.MULTILINE))
    if "model name" not in about:
        return platform.processor() or platform.machine()
    numbers = [f"{name.removeprefix('cpu ')} {about[name]}" for name in ("cpu family", "model") if name in about]
    return " ".join([about["model name"].strip(), *numbers])


def clock_mhz() -> float | None:
    """Returns the MHz of the GPU's multiprocessors, or of the fastest core; None where the system does not tell."""
    try:
        if torch.cuda.is_available():
            which = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
            return float(subprocess.run([*SMI, which], capture_output=True, text=True, check=True).stdout)
        found = re.findall(r"^cpu MHz\s*: ([\d.]+)", CPUINFO.read_text(), re.MULTILINE)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
    return max(map(float, found), default=None)


def commit_of(root: Path = ROOT) -> str:
    """Returns a checkout's short hash; `unknown` outside of one, also where the copy lies inside another repository."""
    if not (root / ".git").exists():
        return "unknown"
    try:
        command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return "unknown"
    return found.stdout.strip() or "unknown"


def line(row: Content) -> str:
    """Returns time, ratio to the baseline (above 1: faster), error against fp64, and peak memory beyond the start."""
    if row["status"] != "ok":
        return f"{row['group']:44} {row['provider']:30} {row['status']}: {row['reason']}"
    speedup = f"{row['speedup']:6.2f}x" if row["speedup"] else "      -"
    error = "-" if row["error"] is None else f"{row['error']:.1e}"
    memory = "" if row["peak_mib"] is None else f"  peak {row['peak_mib']:7.1f} MiB"
    share = f"  {row['floor_s'] / row['median_s']:4.0%} of the floor" if row["floor_s"] else ""
    times = f"{row['median_s'] * 1e3:9.3f} ms  IQR {(row['iqr_s'] or 0) * 1e3:8.3f}"
    times += " (unsteady)" * is_unsteady(row["median_s"], row["iqr_s"])
    return f"{row['group']:44} {row['provider']:30} {times} {speedup}  error {error}{memory}{share}"


class ResultFile:
    """The file of one run in a folder, written anew whenever there is more to tell, so that a killed run loses little.

    Groups that the newest earlier file of this machine holds and this run does not measure are kept, each row with its
    commit, and the seconds they took with them.
    """

    def __init__(self, folder: Path, commit: str) -> None:
        self.folder, self.commit, self._started = folder, commit, time.time()
        self._earlier: Content | None = None
        self.path: Path | None = None

    def write(self, rows: list[Content]) -> None:
        """Writes all rows of the run so far."""
        info, now = machine(), datetime.now(timezone.utc)
        stem = "-".join((info["gpu"] or info["processor"]).split())
        if self.path is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._earlier = newest(self.folder, stem)
            self.path = self.folder / f"{stem}_{now.date()}_{self.commit}.json"
        rows = [{**row, "commit": self.commit} for row in rows]
        kept = self._kept({row["group"] for row in rows})
        seconds = round(time.time() - self._started) + (self._earlier["seconds"] if self._earlier and kept else 0)
        result = {
            "machine": info,
            "commit": self.commit,
            "date": str(now.date()),
            "finished": now.isoformat(timespec="seconds"),
            "seconds": seconds,
            "results": rows + kept,
        }
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(aside, self.path)  # whoever reads it, or kills this process, finds a whole file

    def _kept(self, measured: set[str]) -> list[Content]:
        earlier = self._earlier or {"commit": "", "results": []}
        return [{"commit": earlier["commit"], **row} for row in earlier["results"] if row["group"] not in measured]


def newest(folder: Path, stem: str = "") -> Content | None:
    """Returns the result in a folder that was finished last, of a machine where its name is given; None if there is none."""
    found = []
    for path in folder.glob(f"{stem}_*.json" if stem else "*.json"):
        try:
            content = json.loads(path.read_text())
            if {"finished", "seconds", "commit", "results"} <= content.keys():
                found.append(content)
        except (ValueError, AttributeError) as error:
            warnings.warn(f"{path}: not a result file ({error}), so none of its rows is kept", stacklevel=2)
    return max(found, key=lambda content: content["finished"], default=None)
