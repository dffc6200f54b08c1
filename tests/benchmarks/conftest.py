"""A made-up result file, and a folder of benchmarks with a README around it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import BEGIN, END, main
from benchmarks.result import PEERS, Machine, Result, Row, newest_of_each_machine

EAGER = "dense eager fp32"
SHAPES = {"gpt2-small-16k": (4096, 768, 16384, 78.0), "small": (64, 512, 4096, 32.0)}
BENCHMARKS = """
import os, time
from benchmarks import floor
from benchmarks.harness import Case, Provider, benchmark_of
from benchmarks.shapes import Shape

assert "PYTEST_XDIST_WORKER" not in os.environ
floor.COPY_BYTES, floor.PRODUCT = 2**20, (64, 64, 64)

def nothing():
    return lambda: None

def crash():
    os._exit(9)  # as a driver does

def late():
    time.monotonic = lambda: float("inf")  # a day later
    return lambda: None

def no_memory():
    raise RuntimeError("out of resources: shared memory\\nHint: smaller tiles")

GROUPS = {
    "demo": {"dense": nothing, "fused": nothing},
    "broken": {"dense": no_memory, "fused": nothing},
    "slow": {"dense": late},
    "crash": {"dense": crash},
    "last": {"dense": nothing},
}
test_tiny = benchmark_of([
    Case("encode", name, Shape(4, 8, 16, 2), {provider: Provider(make) for provider, make in makes.items()})
    for name, makes in GROUPS.items()
])
"""
CPU = Machine("AMD EPYC", 2, "3.11.7", "2.13.0+cpu", capability="AVX512", bf16_units=True, copy_gb_per_s=31.25)


def row(operation: str, provider: str, ms: float | None = None, shape: str = "gpt2-small-16k", **values: Any) -> Row:
    """A row as the harness makes it; right numbers unless `values` say otherwise."""
    sizes = dict(zip(("n_tokens", "d_in", "d_sae", "l0"), SHAPES.get(shape, SHAPES["gpt2-small-16k"]), strict=True))
    about = {**sizes, "dtype": "bf16" if "bf16" in provider else "fp32", "baseline": EAGER, **values}
    group = about.pop("group", ", ".join(part for part in (operation, about.get("subject"), shape) if part))
    if ms is not None:
        about = {"median_s": ms / 1e3, "iqr_s": ms / 1e4, "error": 1.5e-7, "error_limit": 3e-7, **about}
    return Row(operation, group, shape, provider=provider, **about)


def rows() -> list[Row]:
    """What one CPU measured."""
    subject = {"subject": "sae-lens JumpReLU", "baseline": "sae-lens 6.54.12", "goal": 6.5}
    return [
        row("whole step", EAGER, 5849, speedup=1.0, peak_mib=1680),
        row("whole step", "dense compiled fp32", 3565.4, peak_mib=544),
        row("whole step", "dense compiled bf16", status="skipped", reason="torch.compile needs a C++ compiler"),
        row("whole step", "fused fp32", 310.25, speedup=18.75, peak_mib=111.4, floor_s=0.2, gather_floor_s=0.25),
        row("forward+backward", EAGER, 6475, speedup=1.0),
        row("forward+backward", "fused fp32", 357),
        row(
            "forward+backward",
            "fused bf16",
            status="red",
            reason="error 0.033 against fp64,\nover | the limit of 1e-06",
        ),
        row(PEERS, "sae-lens 6.54.12", 6200, peak_mib=1700, allocator="tuned", other_median_s=8.0, **subject),
        row(PEERS, "accelerated", 620, peak_mib=290, speedup=10.0, **subject),
        row("encode", "product alone", 0.58, "small", baseline="product alone", is_cut=True),
        row("encode", "dense, threshold", 0.5612, "small", baseline="product alone", is_cut=True),
        row("encode", "fused", 0.6, "small", baseline="product alone", is_cut=True),
        *(
            row("scaling with L0", provider, ms, group=f"scaling with L0, {l0}", l0=l0, x=l0)
            for l0, times in {512: (90, 30), 2048: (91, 80)}.items()
            for provider, ms in zip((EAGER, "fused fp32"), times, strict=True)
        ),
    ]


class Bench:
    """A folder of benchmarks and its README in a temporary place."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.readme, self._capsys = root / "benchmarks", root / "README.md", capsys
        self.rows = rows()
        for readme in (self.readme, self.folder / "README.md"):
            readme.parent.mkdir(parents=True, exist_ok=True)
            readme.write_text(f"# name\n\n{BEGIN}\nold\n{END}\n\nthe rest\n", encoding="utf-8")

    def add(self, name: str = "cpu.json", machine: Machine = CPU, **values: str) -> Path:
        """Writes the rows as a result file."""
        about = {"commit": "abc1234", "date": "2026-11-23", "finished": "2026-11-23T10:00:00+00:00", **values}
        path = self.folder / "results" / name
        Result(path, machine, seconds=412.3, rows=self.rows, **about).write()
        return path

    def result(self) -> Result:
        self.add()
        return newest_of_each_machine(self.folder / "results")[0]

    def report(self, *arguments: str) -> tuple[int, str]:
        """Exit status, and what was printed."""
        status = main(list(arguments), self.folder, self.readme)
        printed = self._capsys.readouterr()
        return status, printed.out + printed.err

    def files(self) -> dict[str, str]:
        """Every file but the results, by its path."""
        paths = [path for path in self.folder.parent.rglob("*") if path.is_file() and path.suffix != ".json"]
        return {path.relative_to(self.folder.parent).as_posix(): path.read_text(encoding="utf-8") for path in paths}


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, capsys)


@pytest.fixture
def make_row() -> Callable[..., Row]:
    return row


@pytest.fixture
def bench_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of benchmarks, with the options and fixtures of the real ones beside it; it refuses to run in a worker."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)  # those of the worker that runs the test
    path = tmp_path / "bench" / "test_tiny.py"
    path.parent.mkdir()
    path.write_text(BENCHMARKS)
    path.with_name("conftest.py").write_text("from benchmarks.conftest import *\n")
    return path
