"""A run's result: one row for each provider of each group, written while it is measured and read for the tables."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from benchmarks import floor

OPERATIONS = (  # in the order of the tables
    "whole step", "forward+backward", "peers before and after", "whole run", "encode", "top-k", "batch top-k", "decode",
    "epoch", "trainer overhead", "scaling with d_sae", "scaling with L0",
)  # fmt: skip
PEERS, RUNS = "peers before and after", "whole run"
MAX_SPREAD = 0.5  # where the IQR is a larger share of the median, the median says little
ROOT, CPUINFO = Path(__file__).parents[1], Path("/proc/cpuinfo")
Kind = Literal["fused", "dense", "peer", "tiles", "other"]
OURS = ("fused", "accelerated", "fastsae train")  # how the names of providers begin
PYTORCH = ("dense", "F.linear", "embedding_bag")
PEER_PACKAGES = ("sae-lens", "eai-sparsify", "dictionary-learning")


class ReportError(Exception):
    """What the user has to put right, in one line."""


@dataclass
class Row:
    """One provider's time and error in a group."""

    operation: str
    group: str
    shape: str
    n_tokens: int
    d_in: int
    d_sae: int
    l0: float
    dtype: str
    provider: str
    baseline: str
    status: str = "ok"  # or "red", where its numbers are wrong, or "skipped"
    is_cut: bool = False
    subject: str = ""  # what is compared, where an operation has several groups at a shape
    goal: float | None = None  # how many times as fast as the baseline it should be
    x: float | None = None  # the place of a row in a series, such as its L0
    reason: str | None = None
    error: float | None = None
    error_limit: float | None = None
    median_s: float | None = None
    iqr_s: float | None = None
    allocator: str | None = None  # the setting under which it was faster, where it was timed under both
    other_median_s: float | None = None  # under the other setting
    rounds: int = 0
    calls: int = 0
    speedup: float | None = None  # over the baseline: median of the rounds' ratios
    peak_mib: float | None = None
    floor_s: float | None = None
    gather_floor_s: float | None = None
    n_saes: int = 1  # how many SAEs a whole run trains
    run_tokens: int | None = None  # that a whole run trains each of its SAEs on
    parts_s: dict[str, float] = field(default_factory=dict)  # the median seconds of each part of a whole run
    padding_share: float | None = None  # which share of the tokens that a whole run computed is padding
    commit: str | None = None  # where it is not the file's: a partial run keeps the rows that it does not replace

    @property
    def kind(self) -> Kind:
        """Who did it: we; dense PyTorch; another library, by its name; our own dense path, asked for; or a part of it."""
        if self.provider.startswith(OURS):
            return "fused"
        if self.provider.startswith("dense in "):
            return "tiles"
        if self.provider.startswith(PYTORCH):
            return "dense"
        return "peer" if self.provider.startswith(PEER_PACKAGES) else "other"

    @property
    def is_unsteady(self) -> bool:
        """Whether its calls are too far apart for its median to be claimed or compared."""
        return self.median_s is not None and self.iqr_s is not None and self.iqr_s > MAX_SPREAD * self.median_s

    @property
    def is_sound(self) -> bool:
        """Whether it has a time that may be claimed."""
        return self.median_s is not None and not self.is_unsteady

    @property
    def ms(self) -> float:
        """The median of a row that has one."""
        return (self.median_s or 0.0) * 1e3

    def line(self) -> str:
        """Returns time, ratio to the baseline (above 1: faster), error against fp64, and peak memory beyond the start."""
        name = f"{self.group:58} {self.provider:28}"
        if self.status != "ok" or self.median_s is None:
            return f"{name} {self.status}: {self.reason}"
        times = f"{self.ms:9.3f} ms  IQR {(self.iqr_s or 0) * 1e3:8.3f}" + " (unsteady)" * self.is_unsteady
        speedup = f"{self.speedup:6.2f}x" if self.speedup else "      -"
        error = "" if self.error is None else f"  error {self.error:.1e}"
        memory = "" if self.peak_mib is None else f"  peak {self.peak_mib:7.1f} MiB"
        share = f"  {self.floor_s / self.median_s:4.0%} of the floor" if self.floor_s else ""
        return f"{name} {times} {speedup}{error}{memory}{share}"


@dataclass(frozen=True)
class Machine:
    """What the numbers were measured on."""

    processor: str
    threads: int
    python: str
    torch: str
    gpu: str | None = None
    capability: str | None = None
    bf16_units: bool | None = None
    triton: str | None = None
    cuda: str | None = None
    copy_gb_per_s: float | None = None
    gemm_tflop_per_s: dict[str, float] = field(default_factory=dict)

    @classmethod
    def here(cls) -> Machine:
        """Returns this machine, whose rates are measured the first time."""
        has_gpu = torch.cuda.is_available()
        return cls(
            processor=processor(CPUINFO.read_text() if CPUINFO.exists() else ""),
            capability=torch.backends.cpu.get_cpu_capability(),
            bf16_units=getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)(),
            threads=torch.get_num_threads(),
            gpu=torch.cuda.get_device_name() if has_gpu else None,
            python=platform.python_version(),
            torch=torch.__version__,
            # some builds are installed under another name, so metadata would not find it
            triton=import_module("triton").__version__ if find_spec("triton") else None,
            cuda=torch.version.cuda,
            copy_gb_per_s=floor.copy_gb_per_s(),
            gemm_tflop_per_s={
                dtype: floor.product_tflop_per_s(dtype) for dtype in ("fp32", *(("tf32",) if has_gpu else ()), "bf16")
            },
        )

    @property
    def model(self) -> str:
        """The GPU's name where there is one, else the processor's."""
        return self.gpu or self.processor

    @property
    def name(self) -> str:
        """The GPU's name where there is one; else the processor's, with what its times depend on."""
        about = (self.capability, "bf16 units" if self.bf16_units else None, f"{self.threads} threads")
        return self.gpu or f"{self.processor} ({', '.join(filter(None, about))})"

    @property
    def versions(self) -> str:
        found = {"torch": self.torch, "Triton": self.triton, "CUDA": self.cuda}
        return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def processor(cpuinfo: str) -> str:
    """Returns its name, with what tells two generations apart that go by the same name in a virtual machine."""
    about = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", cpuinfo, re.MULTILINE))
    if "model name" not in about:
        return platform.processor() or platform.machine()
    numbers = [f"{name.removeprefix('cpu ')} {about[name]}" for name in ("cpu family", "model") if name in about]
    return " ".join([about["model name"].strip(), *numbers])


def commit_of(root: Path = ROOT) -> str:
    """Returns a checkout's short hash; `unknown` outside of one, also where the copy lies inside another repository."""
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    if not (root / ".git").exists():
        return "unknown"
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except OSError:  # no git on this machine
        return "unknown"


@dataclass
class Result:
    """One result file; `write` writes it anew, so that a killed run loses little."""

    path: Path
    machine: Machine
    commit: str
    date: str
    finished: str  # ISO 8601, UTC
    seconds: float
    rows: list[Row] = field(repr=False)

    def write(self) -> None:
        content = {key: value for key, value in asdict(self).items() if key not in ("path", "rows")}
        content["results"] = [asdict(row) for row in self.rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, self.path)  # whoever reads it, or kills this process, finds a whole file

    @property
    def commits(self) -> str:
        """What the rows were measured at, the newest first."""
        found = list(dict.fromkeys([self.commit, *(row.commit or self.commit for row in self.rows)]))
        return f"commit{'s' if len(found) > 1 else ''} {', '.join(found)}"

    def rows_of(self, operation: str, shape: str | None = None) -> list[Row]:
        return [row for row in self.rows if row.operation == operation and shape in (None, row.shape)]

    def operations(self) -> list[str]:
        """Those that were run, in the order of the tables; what is not known there comes last."""
        found = dict.fromkeys(row.operation for row in self.rows)
        return [*(known for known in OPERATIONS if known in found), *(new for new in found if new not in OPERATIONS)]

    @cached_property
    def groups(self) -> dict[str, list[Row]]:
        """Rows that are compared with one another."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return found

    def plot_of(self, operation: str) -> str:
        """The name of an operation's plot."""
        machine = re.sub(r"[^A-Za-z0-9.]+", "-", self.machine.name).strip("-")
        return f"{machine}_{re.sub('[^a-zA-Z0-9_]+', '-', operation)}.svg"


class ResultFile:
    """The result file of this run in a folder.

    Groups that the newest earlier file of this machine holds and this run does not measure are kept, each row with its
    commit, and the seconds they took with them; not so where the run is a whole one, for then they are no groups any more.
    """

    def __init__(self, folder: Path, commit: str, is_whole: bool = False) -> None:
        self.folder, self.commit, self._started = folder, commit, time.time()
        found = all_in(folder)  # at once: a file that cannot be read should not end a run of many minutes
        self._found = [] if is_whole else found

    @cached_property
    def result(self) -> Result:
        """What is written; the first use measures the machine's rates."""
        machine, date = Machine.here(), str(datetime.now(timezone.utc).date())
        path = self.folder / f"{'-'.join(machine.model.split())}_{date}_{self.commit}.json"
        return Result(path, machine, self.commit, date, "", 0.0, [])

    @cached_property
    def _earlier(self) -> Result | None:
        same = [result for result in self._found if result.machine.model == self.result.machine.model]
        return max(same, key=lambda result: result.finished, default=None)

    def write(self, rows: list[Row]) -> None:
        """Writes all rows of the run so far."""
        result, measured = self.result, {row.group for row in rows}
        for row in rows:
            row.commit = self.commit
        result.rows, result.seconds = list(rows), round(time.time() - self._started)
        result.finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
        if self._earlier and (kept := [row for row in self._earlier.rows if row.group not in measured]):
            result.rows += [replace(row, commit=row.commit or self._earlier.commit) for row in kept]
            result.seconds += self._earlier.seconds
        result.write()


def all_in(folder: Path) -> list[Result]:
    """Reads all result files in a folder.

    Raises:
        ReportError: A file cannot be read as one.
    """
    return [read(path) for path in sorted(folder.glob("*.json"))]


def newest_of_each_machine(folder: Path) -> list[Result]:
    """Reads the last run on each machine: those with a GPU first, then by name.

    Raises:
        ReportError: There is no result, or a file that cannot be read as one.
    """
    newest = {result.machine.name: result for result in sorted(all_in(folder), key=lambda r: (r.date, r.finished))}
    if not newest:
        raise ReportError(f"{folder}: no result files; `pytest benchmarks/ --results {folder}` writes one")
    return sorted(newest.values(), key=lambda result: (result.machine.gpu is None, result.machine.name))


def read(path: Path) -> Result:
    """Reads one file.

    Raises:
        ReportError: It is no JSON, or not of that form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**values) for values in content.pop("results")]
        return Result(path, Machine(**content.pop("machine")), rows=rows, **content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"not a result file ({type(error).__name__}: {error})"
        raise ReportError(f"{path}: {reason}; run the benchmarks again, or delete the file") from None


# ---- comparisons


def faster_by(row: Row | None, other: Row | None) -> float | None:
    """Returns how many times as fast as the other: the rounds' ratio where it was measured, else that of the medians.

    None where one of them has no time, or an unsteady one.
    """
    if row is None or other is None or not (row.is_sound and other.is_sound):
        return None
    if row.speedup is not None and row.group == other.group and row.baseline == other.provider:
        return row.speedup
    return other.ms / row.ms


def fastest(rows: list[Row]) -> Row | None:
    """Returns the row with the least median; None where none has a time that is steady."""
    return min((row for row in rows if row.is_sound), key=lambda row: row.ms, default=None)


def lost(result: Result) -> list[tuple[Row, Row]]:
    """Returns, for each group and dtype, what has a lower median than the fastest of ours, and that.

    Our dense path, asked for, is compared by itself: dispatch should have taken it. Where no provider of ours has right
    numbers, its first row stands for them; where one is unsteady and none is steady, nothing is claimed.
    """
    found = []
    for group in result.groups.values():
        for dtype in dict.fromkeys(row.dtype for row in group if row.kind == "fused"):
            same = [row for row in group if row.dtype == dtype]
            all_ours = [row for row in same if row.kind == "fused"]
            ours = fastest(all_ours)
            if ours is None and any(row.is_unsteady for row in all_ours):
                continue
            for kinds in (("dense", "peer"), ("tiles",)):
                theirs = fastest([row for row in same if row.kind in kinds])
                if theirs is not None and (ours is None or ours.ms > theirs.ms):
                    found.append((theirs, ours or all_ours[0]))
    return found
