"""Reads the benchmarks' result files, and compares the rows of a group."""

from __future__ import annotations

import json
import math
import re
from dataclasses import MISSING, dataclass, field, fields, replace
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any, Literal

from benchmarks.outcome import is_unsteady

OPERATIONS = (
    "whole step",
    "forward+backward",
    "backward",
    "inference",
    "encode",
    "top-k",
    "batch top-k",
    "decode",
    "epoch",
    "trainer overhead",
    "scaling with d_sae",
    "scaling with L0",
)
PYTORCH = ("dense", "F.linear", "embedding_bag")  # how the names of its providers begin
PEERS = ("sae-lens", "eai-sparsify", "dictionary-learning")
STATUSES = ("ok", "red", "skipped")
RERUN = "run the benchmarks again, or delete the file"
SIZES = ("n_tokens", "d_in", "d_sae", "l0")
OPTIONAL_NUMBERS = (
    "median_s", "iqr_s", "other_median_s", "speedup", "speedup_iqr",
    "peak_mib", "least_bytes", "floor_s", "clock_mhz", "x", "overhead",
)  # fmt: skip
ERRORS = ("error", "error_limit")  # may be NaN or infinite: then the row is red

Kind = Literal["fused", "dense", "peer", "tiles", "other"]


class ReportError(Exception):
    """What the user has to put right, in one line."""


@dataclass(frozen=True)
class Row:
    """One provider's time and error in a group; the fields are those of the file."""

    operation: str
    shape: str
    n_tokens: int
    d_in: int
    d_sae: int
    l0: float
    dtype: str
    group: str
    provider: str
    status: str
    is_cut: bool = False
    baseline: str | None = None
    error: float | None = None
    error_limit: float | None = None
    reason: str | None = None
    median_s: float | None = None
    iqr_s: float | None = None
    allocator: str | None = None  # the setting under which it was faster, where it was timed under both
    other_median_s: float | None = None  # under the other setting
    speedup: float | None = None  # over the baseline: median of the turns' ratios
    speedup_iqr: float | None = None
    peak_mib: float | None = None
    least_bytes: float | None = None  # read or written by all who do it
    floor_s: float | None = None
    clock_mhz: float | None = None  # after the group
    x: float | None = None
    overhead: float | None = None
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
    def density(self) -> float:
        """Share of features that are active."""
        return self.l0 / self.d_sae


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
    gemm_tflop_per_s: dict[str, float] | None = None
    clock_mhz: float | None = None

    @property
    def name(self) -> str:
        """Of the GPU where there is one; else of the processor, with what its times depend on."""
        if self.gpu:
            return self.gpu
        units = [self.capability] if self.capability else []
        units += ["bf16 units"] if self.bf16_units else []
        return f"{self.processor} ({', '.join([*units, f'{self.threads} threads'])})"

    @property
    def slug(self) -> str:
        """The name as a part of file names."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.name).strip("-")


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
    repeated: Result | None = field(default=None, repr=False)  # the run before, where it was of the same commit

    @property
    def commits(self) -> str:
        """What the rows were measured at, the newest first."""
        found = list(dict.fromkeys([self.commit, *(row.commit or self.commit for row in self.rows)]))
        return f"commit{'s' if len(found) > 1 else ''} {', '.join(found)}"

    def rows_of(self, operation: str) -> list[Row]:
        return [row for row in self.rows if row.operation == operation]

    def operations(self) -> list[str]:
        """Those that were run, in the order of the tables; what is not known there comes last."""
        found = dict.fromkeys(row.operation for row in self.rows)
        return [*(known for known in OPERATIONS if known in found), *(new for new in found if new not in OPERATIONS)]

    def groups(self) -> dict[tuple[str, str], list[Row]]:
        """Rows that are compared with one another."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row.operation, row.group), []).append(row)
        return found


def faster_by(row: Row, other: Row | None) -> float | None:
    """How many times as fast as the other: the rounds' ratio where it was measured, else that of the medians.

    None where one of them has no time, or an unsteady one.
    """
    if other is None or row.median_s is None or other.median_s is None or row.is_unsteady or other.is_unsteady:
        return None
    if row.speedup is not None and row.baseline == other.provider:
        return row.speedup
    return other.median_s / row.median_s


def baseline_of(row: Row, group: list[Row]) -> Row | None:
    """What the file's ratios refer to."""
    return next((other for other in group if other.provider == row.baseline), None)


def compiled_of(row: Row, group: list[Row]) -> Row | None:
    """The `torch.compile`d dense provider with products of the row's dtype."""
    compiled = [other for other in group if other.provider.startswith("dense compiled")]
    return next((other for other in compiled if other.dtype == row.dtype), None)


def fastest(rows: list[Row]) -> Row | None:
    """The row with the least median; None where none has a time that is steady."""
    timed = [row for row in rows if row.median_s is not None and not row.is_unsteady]
    return min(timed, key=lambda row: row.median_s or 0.0, default=None)


def max_density(machine: Machine) -> float:
    """Share of active features up to which the ops of a step take the sparse path."""
    from fastsae_kernels.activity import MAX_DENSITY

    return MAX_DENSITY["cuda" if machine.gpu else "cpu"]


def newest_of_each_machine(folder: Path) -> list[Result]:
    """The last run on each machine: those with a GPU first, then by name.

    Raises:
        ReportError: There is no result, or a file that cannot be read as one.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ReportError(f"{folder}: no result files; `pytest benchmarks/ --results {folder}` writes one")
    runs: dict[str, list[Result]] = {}
    for result in sorted(map(read, paths), key=lambda result: (result.date, result.finished)):
        runs.setdefault(result.machine.name, []).append(result)
    newest = [_with_repeat(*reversed(found)) for found in runs.values()]
    return sorted(newest, key=lambda result: (result.machine.gpu is None, result.machine.name))


def _with_repeat(last: Result, before: Result | None = None, *earlier: Result) -> Result:
    return replace(last, repeated=before) if before and before.commits == last.commits else last


def read(path: Path) -> Result:
    """Reads one file.

    Raises:
        ReportError: It is no JSON, lacks a key, or has a value that cannot be; the message names file and key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path}: not JSON ({error}); {RERUN}") from None
    try:
        return _result(path, content)
    except ReportError as error:
        raise ReportError(f"{path}: {error}; {RERUN}") from None


def _result(path: Path, content: Any) -> Result:
    _require(content, ["machine", "commit", "date", "finished", "seconds", "results"], "the file")
    _number(content["seconds"], "'seconds'")
    if not isinstance(content["results"], list):
        raise ReportError("'results' is not a list of rows")
    return Result(
        path,
        _known(Machine, content["machine"], "'machine'"),
        str(content["commit"]),
        _iso(date, content["date"], "'date'").isoformat(),
        _utc(_iso(datetime, content["finished"], "'finished'")),
        content["seconds"],
        _rows(content["results"]),
    )


def _rows(found: list[Any]) -> list[Row]:
    rows: dict[tuple[object, ...], Row] = {}
    for number, values in enumerate(found):
        row = _row(values, f"results[{number}]")
        key = (row.operation, row.group, row.provider, row.dtype)
        if key in rows:
            raise ReportError(f"results[{number}] is the second row of {row.provider!r} in group {row.group!r}")
        rows[key] = row
    return list(rows.values())


def _row(values: Any, where: str) -> Row:
    row: Row = _known(Row, values, where)
    for name in SIZES:
        _number(values[name], f"{name!r} of {where}", above=-1 if name == "l0" else 0)
    for name in (*OPTIONAL_NUMBERS, *ERRORS):
        if values.get(name) is not None:
            _number(values[name], f"{name!r} of {where}", above=-math.inf, may_be_infinite=name in ERRORS)
    for name in ("operation", "group", "provider", "shape"):
        if not isinstance(values[name], str) or not values[name]:
            raise ReportError(f"{name!r} of {where} is {values[name]!r}, not a name")
    if row.status not in STATUSES:
        raise ReportError(f"'status' of {where} is {row.status!r}, not one of {', '.join(STATUSES)}")
    if row.status == "ok":
        if not row.median_s or row.median_s < 0:
            raise ReportError(f"'median_s' of {where} is {row.median_s!r}, though its status is ok")
        if row.error is not None and row.error_limit is not None and not row.error <= row.error_limit:
            raise ReportError(f"'status' of {where} is ok, though its error {row.error} is over {row.error_limit}")
        return row
    times = ("median_s", "iqr_s", "allocator", "other_median_s", "speedup", "speedup_iqr", "overhead")
    timeless = dict.fromkeys(times)  # wrong numbers have none
    return Row(**{**row.__dict__, **timeless})


def _known(kind: type, values: Any, where: str) -> Any:
    """An instance from the keys that it knows."""
    _require(values, [f.name for f in fields(kind) if f.default is MISSING], where)
    return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})


def _require(values: Any, names: list[str], where: str) -> None:
    if not isinstance(values, dict):
        raise ReportError(f"{where} is not an object with keys")
    missing = [name for name in names if name not in values]
    if missing:
        raise ReportError(f"{where} lacks the key {missing[0]!r}")


def _number(value: Any, where: str, above: float = -1, may_be_infinite: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (may_be_infinite or (math.isfinite(value) and value > above)):
        raise ReportError(f"{where} is {value!r}, not a number{' above 0' if above == 0 else ''}")


def _iso(kind: Any, value: Any, where: str) -> Any:
    try:
        return kind.fromisoformat(re.sub("Z$", "+00:00", value))
    except (TypeError, ValueError):
        raise ReportError(f"{where} is {value!r}, not an ISO {kind.__name__}") from None


def _utc(time: datetime) -> datetime:
    return time.replace(tzinfo=timezone.utc) if time.tzinfo is None else time
