"""Reads the benchmarks' result files, and compares the rows of a group."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from benchmarks.outcome import is_unsteady

OPERATIONS = (  # in the order of the tables
    "whole step", "forward+backward", "backward", "inference", "encode", "top-k", "batch top-k", "decode", "epoch",
    "trainer overhead", "scaling with d_sae", "scaling with L0",
)  # fmt: skip
PYTORCH = ("dense", "F.linear", "embedding_bag")  # how the names of its providers begin
PEERS = ("sae-lens", "eai-sparsify", "dictionary-learning")
RERUN = "run the benchmarks again, or delete the file"
Kind = Literal["fused", "dense", "peer", "tiles", "other"]


class ReportError(Exception):
    """What the user has to put right, in one line."""


@dataclass(frozen=True)
class Row:
    """One provider's time and error in a group; the fields are those of the file that the tables use."""

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
    status: str
    is_cut: bool = False
    reason: str | None = None
    error: float | None = None
    error_limit: float | None = None
    median_s: float | None = None
    iqr_s: float | None = None
    allocator: str | None = None  # the setting under which it was faster, where it was timed under both
    other_median_s: float | None = None  # under the other setting
    speedup: float | None = None  # over the baseline: median of the rounds' ratios
    peak_mib: float | None = None
    floor_s: float | None = None
    gather_floor_s: float | None = None
    clock_mhz: float | None = None  # after the group
    x: float | None = None
    commit: str | None = None  # where it is not the file's: a partial run keeps the rows that it does not replace

    @property
    def kind(self) -> Kind:
        """Who did it: we; dense PyTorch; another library, by its version; our own dense path, asked for; or a part of it."""
        if self.provider.startswith("fused"):
            return "fused"
        if self.provider.startswith("dense in "):
            return "tiles"
        if self.provider.startswith(PYTORCH):
            return "dense"
        return "peer" if self.provider.startswith(PEERS) or re.search(r" v?\d+\.\d+", self.provider) else "other"

    @property
    def is_unsteady(self) -> bool:
        """Whether its calls are too far apart for its median to be claimed or compared."""
        return is_unsteady(self.median_s, self.iqr_s)

    @property
    def ms(self) -> float:
        """The median of a row that has one."""
        return (self.median_s or 0.0) * 1e3


@dataclass(frozen=True)
class Machine:
    """What the numbers were measured on; the fields are those of the file."""

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
    clock_mhz: float | None = None

    @property
    def name(self) -> str:
        """The GPU's name where there is one; else the processor's, with what its times depend on."""
        if self.gpu:
            return self.gpu
        units = [self.capability] if self.capability else []
        units += ["bf16 units"] if self.bf16_units else []
        return f"{self.processor} ({', '.join([*units, f'{self.threads} threads'])})"

    @property
    def versions(self) -> str:
        found = {"torch": self.torch, "Triton": self.triton, "CUDA": self.cuda}
        return ", ".join(f"{name} {version}" for name, version in found.items() if version)


@dataclass(frozen=True)
class Result:
    """One result file."""

    path: Path
    machine: Machine
    commit: str
    date: str
    finished: datetime
    seconds: float
    rows: list[Row] = field(repr=False)

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

    def groups(self) -> dict[str, list[Row]]:
        """Rows that are compared with one another."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return found

    def file_name_of(self, operation: str) -> str:
        """The name of an operation's plot."""
        machine = re.sub(r"[^A-Za-z0-9.]+", "-", self.machine.name).strip("-")
        return f"{machine}_{re.sub('[^a-zA-Z0-9_]+', '-', operation)}.svg"


def faster_by(row: Row | None, other: Row | None) -> float | None:
    """Returns how many times as fast as the other: the rounds' ratio where it was measured, else that of the medians.

    None where one of them has no time, or an unsteady one.
    """
    if row is None or other is None or fastest([row]) is None or fastest([other]) is None:
        return None
    if row.speedup is not None and row.baseline == other.provider:
        return row.speedup
    return other.ms / row.ms


def baseline_of(row: Row, group: list[Row]) -> Row | None:
    return next((other for other in group if other.provider == row.baseline), None)


def compiled_of(row: Row, group: list[Row]) -> Row | None:
    """Returns the `torch.compile`d dense provider with products of the row's dtype."""
    compiled = [other for other in group if other.provider.startswith("dense compiled")]
    return next((other for other in compiled if other.dtype == row.dtype), None)


def fastest(rows: list[Row]) -> Row | None:
    """Returns the row with the least median; None where none has a time that is steady."""
    timed = [row for row in rows if row.median_s is not None and not row.is_unsteady]
    return min(timed, key=lambda row: row.ms, default=None)


def lost(result: Result) -> list[tuple[Row, Row]]:
    """Returns, for each group and dtype, what has a lower median than the fastest of ours, and that.

    Our dense path, asked for, is compared by itself: dispatch should have taken it. Where none of ours is right, its first row
    stands for it; where one is unsteady and none is steady, nothing is claimed.
    """
    found = []
    for group in result.groups().values():
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


def max_density(machine: Machine) -> float:
    """Returns the share of active features up to which the ops of a step take the sparse path."""
    from fastsae_kernels.activity import MAX_DENSITY

    return MAX_DENSITY["cuda" if machine.gpu else "cpu"]


def newest_of_each_machine(folder: Path) -> list[Result]:
    """Reads the last run on each machine: those with a GPU first, then by name.

    Raises:
        ReportError: There is no result, or a file that cannot be read as one.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ReportError(f"{folder}: no result files; `pytest benchmarks/ --results {folder}` writes one")
    results = sorted(map(read, paths), key=lambda result: (result.date, result.finished))
    newest = {result.machine.name: result for result in results}
    return sorted(newest.values(), key=lambda result: (result.machine.gpu is None, result.machine.name))


def read(path: Path) -> Result:
    """Reads one file, as `benchmarks.writer` wrote it.

    Raises:
        ReportError: It is no JSON, or not of that form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [_known(Row, values) for values in content["results"]]
        finished = datetime.fromisoformat(content["finished"])
        about = {key: content[key] for key in ("commit", "date", "seconds")}
        return Result(path, _known(Machine, content["machine"]), finished=finished, rows=rows, **about)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ReportError(f"{path}: not a result file ({type(error).__name__}: {error}); {RERUN}") from None


def _known(kind: type, values: dict[str, Any]) -> Any:
    names = {f.name for f in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})
