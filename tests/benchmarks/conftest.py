"""A made-up result file, and a folder of benchmarks with a README around it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import BEGIN, END, main
from benchmarks.result import Result, newest_of_each_machine

Content = dict[str, Any]
HEADLINE = {"shape": "gpt2-small-16k", "n_tokens": 4096, "d_in": 768, "d_sae": 16384, "l0": 78}
SMALL = {"shape": "small", "n_tokens": 64, "d_in": 512, "d_sae": 4096, "l0": 32, "is_cut": True}
EAGER = "dense eager fp32"


def row(operation: str, provider: str, ms: float | None, **values: Any) -> Content:
    """A row as the harness writes it; right numbers unless `values` say otherwise."""
    shape = values.get("shape", "gpt2-small-16k")
    measured = {
        "status": "ok",
        "reason": None,
        "error": 1.5e-7,
        "error_limit": 3e-7,
        "median_s": None if ms is None else ms / 1e3,
        "iqr_s": None if ms is None else ms / 1e4,
        "rounds": 3,
        "calls": 15,
        "speedup": None,
        "peak_mib": None,
        "floor_s": None,
    }
    where = {"operation": operation, "group": f"{operation}, {shape}", "provider": provider, "baseline": EAGER}
    dtype = "bf16" if "bf16" in provider else "fp32"
    return {**HEADLINE, "is_cut": False, **where, "dtype": dtype, **measured, **values}


def skipped(operation: str, provider: str, reason: str, **values: Any) -> Content:
    return row(operation, provider, None, status="skipped", reason=reason, error=None, error_limit=None, **values)


def red(operation: str, provider: str, reason: str, **values: Any) -> Content:
    return row(operation, provider, None, status="red", reason=reason, error=3.25e-2, error_limit=1e-6, **values)


def scaling(l0: int, eager_ms: float, fused_ms: float) -> list[Content]:
    where = {"group": f"scaling with L0, {l0}", "l0": l0, "x": l0, "error": None, "error_limit": None}
    return [row("scaling with L0", EAGER, eager_ms, **where), row("scaling with L0", "fused fp32", fused_ms, **where)]


@pytest.fixture
def content() -> Content:
    """What one CPU measured."""
    rows = [
        row("whole step", EAGER, 5849, speedup=1.0, peak_mib=1680),
        row("whole step", "dense compiled fp32", 3565.4, peak_mib=544),
        skipped("whole step", "dense compiled bf16", "torch.compile needs a C++ compiler"),
        row("whole step", "fused fp32", 310.25, speedup=18.75, peak_mib=111.4, floor_s=0.2, gather_floor_s=0.25),
        row("whole step", "sae-lens 6.54.12", 6200, peak_mib=1700),
        row("forward+backward", EAGER, 6475, speedup=1.0),
        row("forward+backward", "dense compiled bf16", 1271),
        row("forward+backward", "fused fp32", 357),
        red("forward+backward", "eai-sparsify 1.3.3", "error 0.033 against fp64,\nover the limit | of 1e-06"),
        row("encode", "product alone", 0.58, baseline="product alone", error=None, **SMALL),
        row("encode", "dense, threshold", 0.5612, baseline="product alone", error=None, **SMALL),
        row("encode", "fused", 0.6, baseline="product alone", **SMALL),
        row("trainer overhead", "trainer", 22.5, baseline="25 steps alone", error=None),
        *scaling(512, 90, 30),
        *scaling(2048, 91, 80),
    ]
    machine = {
        "processor": "AMD EPYC",
        "capability": "AVX512",
        "bf16_units": True,
        "threads": 2,
        "gpu": None,
        "python": "3.11.7",
        "torch": "2.13.0+cpu",
        "triton": "3.9.0",
        "cuda": None,
        "copy_gb_per_s": 31.25,
        "gemm_tflop_per_s": {"fp32": 0.2, "bf16": 1.234},
        "a key of the future": 1,
    }
    finished = "2026-11-23T10:00:00+00:00"
    about = {"commit": "abc1234", "date": "2026-11-23", "finished": finished, "seconds": 412.3}
    return {"machine": machine, **about, "results": rows}


class Bench:
    """A folder of benchmarks and its README in a temporary place."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.readme, self._capsys = root / "benchmarks", root / "README.md", capsys
        (self.folder / "results").mkdir(parents=True)
        for readme in (self.readme, self.folder / "README.md"):
            readme.write_text(f"# name\n\n{BEGIN}\nold\n{END}\n\nthe rest\n", encoding="utf-8")

    def add(self, content: Content, name: str = "cpu.json") -> Path:
        path = self.folder / "results" / name
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    def report(self, *arguments: str) -> tuple[int, str]:
        """Exit status, and what was printed."""
        status = main(list(arguments), self.folder, self.readme)
        printed = self._capsys.readouterr()
        return status, printed.out + printed.err

    def results(self) -> list[Result]:
        return newest_of_each_machine(self.folder / "results")

    def written(self) -> dict[str, str]:
        """Every file, by its path."""
        paths = [path for path in self.folder.parent.rglob("*") if path.is_file() and path.suffix != ".json"]
        return {path.relative_to(self.folder.parent).as_posix(): path.read_text(encoding="utf-8") for path in paths}


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, capsys)


@pytest.fixture
def make_row() -> Callable[..., Content]:
    return row


@pytest.fixture
def bench_file(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a file of benchmarks, with the options and fixtures of the real ones beside it."""

    def make(code: str) -> Path:
        path = tmp_path / "bench" / "test_tiny.py"
        path.parent.mkdir()
        path.write_text(code)
        path.with_name("conftest.py").write_text("from benchmarks.conftest import *\n")
        return path

    return make
