"""A run measures each group in several rounds, minutes apart, and tells at any time what it knows."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import conftest, result
from benchmarks.conftest import FEWEST_ROUNDS, MOST_EXTRA_ROUNDS, MOST_ROUNDS, Run
from benchmarks.harness import Case, Group, Provider
from benchmarks.result import ROOT, Machine, ResultFile, commit_of
from benchmarks.shapes import DEVICE, SMALL, Shape

CASES = [
    Case("encode", name, Shape(n_tokens=4, d_in=4, d_sae=8, l0=2), {"it": Provider(lambda: lambda: None)})
    for name in ("a", "b", "c", "d")
]


class Bench:
    """A run whose groups take so many seconds a round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float, last_s: float = math.inf) -> None:
        self.now, self.measured, self.saved, self.said = 0.0, [], [], []  # type: ignore[var-annotated]
        self.unsteady: dict[str, int] = {}  # in how many rounds after the last a group's times are too far apart
        bench = self

        class Fake(Group):
            def measure(self, providers: Any = None) -> None:
                name, outcome = self.case.shape_name, self.outcomes["it"]
                bench.now += seconds
                bench.measured.append(name)
                bench.unsteady[name] = bench.unsteady.get(name, 0) - (providers is not None)
                outcome.rounds = {0: [1.0, 1.0, 100.0] if bench.unsteady[name] > 0 else [1.0, 1.0]}
                outcome.fill_in(outcome)

        monkeypatch.setattr(conftest.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(conftest, "Group", Fake)
        self.run = Run(1000.0, last_s, self.said.append, lambda rows: self.saved.append(len(self.measured)))
        self.run.to_measure = list(CASES)

    def report(self, case: Case = CASES[0]) -> None:
        self.run.report(SimpleNamespace(_timer=None, pedantic=lambda call, rounds: None), case, "it")


def test_each_round_measures_each_group_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, 1.0)
    for case in CASES:
        bench.report(case)
    rounds = [bench.measured[at : at + len(CASES)] for at in range(0, len(bench.measured), len(CASES))]
    assert len(rounds) == MOST_ROUNDS
    assert rounds[0] == ["a", "b", "c", "d"]  # groups share what they are compared with
    assert all(sorted(order) == rounds[0] for order in rounds)
    assert len(set(map(tuple, rounds))) > 2
    assert len(bench.said) == len(bench.measured)
    assert bench.saved == list(range(1, len(CASES) * MOST_ROUNDS + 1))
    assert [row.shape for row in bench.run.rows] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("share", "rounds"), [(0.99 / 6, MOST_ROUNDS), (1.01 / 6, FEWEST_ROUNDS), (1.0, FEWEST_ROUNDS)]
)
def test_more_rounds_begin_where_all_of_them_have_time(
    monkeypatch: pytest.MonkeyPatch, share: float, rounds: int
) -> None:
    """An odd number would have one setting of the allocator more often."""
    bench = Bench(monkeypatch, share * 1000.0 / len(CASES))
    bench.report()
    assert len(bench.measured) == rounds * len(CASES)
    assert FEWEST_ROUNDS % 2 == MOST_ROUNDS % 2 == 0


def test_nothing_begins_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a first round, whose other groups are then named, nor again."""
    bench = Bench(monkeypatch, 50.0, last_s=60.0)
    bench.unsteady = {"a": 99}
    for case in CASES[:2]:
        bench.report(case)
    with pytest.raises(pytest.skip.Exception, match="no time left"):
        bench.report(CASES[2])
    assert (bench.measured, bench.run.late) == (["a", "b"], ["encode, c"])


def test_what_is_unsteady_is_measured_again_until_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose IQR exceeds half of its median."""
    bench = Bench(monkeypatch, 1.0)
    bench.unsteady = {"b": 2, "d": 99}
    bench.report()
    again = bench.measured[len(CASES) * MOST_ROUNDS :]
    assert (again.count("b"), again.count("d"), len(again)) == (2, MOST_EXTRA_ROUNDS, 2 + MOST_EXTRA_ROUNDS)
    assert bench.said[-1] == "again, because of it: encode, d"


def run(path: Path, *options: str | Path) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit status, what was printed, and the rows of the file; seconds are those of torch's import."""
    folder = path.parent if path.suffix else path
    results = folder.parent / "results"
    command = [sys.executable, "-m", "pytest", path, "-rs", "--results", results, "--commit", "abc1234", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    files = list(results.glob("*"))
    assert len(files) <= 1, "something beside the result file was left behind"
    rows: list[dict[str, Any]] = json.loads(files[0].read_text())["results"] if files else []
    assert all(file.stem.endswith("_abc1234") for file in files)
    return done.returncode, done.stdout + done.stderr, rows


def test_a_group_that_raises_is_red_and_a_crash_loses_nothing_that_was_measured(
    bench_file: Path,
) -> None:
    status, _, rows = run(bench_file, "-k", "demo or broken or crash or last")
    assert status == 9
    assert [(row["shape"], row["provider"], row["status"]) for row in rows] == [
        ("demo", "dense", "ok"),
        ("demo", "fused", "ok"),
        ("broken", "dense", "red"),
        ("broken", "fused", "ok"),
    ]
    assert rows[0]["median_s"] > 0
    assert "out of resources" in rows[2]["reason"]
    assert "\n" not in rows[2]["reason"]
    read = result.read(*(bench_file.parents[1] / "results").glob("*.json"))
    assert (read.commit, len(read.rows)) == ("abc1234", 4)


def test_groups_that_no_time_is_left_for_are_skipped_and_named(bench_file: Path) -> None:
    status, printed, rows = run(bench_file, "-k", "slow or demo or last", "--minutes", "9")
    assert status == 0
    assert [row["shape"] for row in rows] == ["demo", "demo", "slow"]
    assert "no time left for 1 groups" in printed


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU measures all shapes")
def test_small_shapes_are_the_default_and_all_are_at_hand(bench_file: Path) -> None:
    """In one process, though the options ask for several, as the tests do: they would measure each other."""
    folder = bench_file.parent
    several = ("-n", "2") if import_module("importlib.util").find_spec("xdist") else ()
    assert "2 passed, 5 deselected" in run(folder, *several)[1]
    assert "7 tests collected" in run(folder, "--full", "--collect-only", "-q")[1]


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU measures all shapes")
def test_every_small_shape_exists() -> None:
    """A name that is no shape's any more would leave out more than was meant, and say nothing."""
    modules = [import_module(f"benchmarks.{path.stem}") for path in (ROOT / "benchmarks").glob("test_*.py")]
    marks = [mark for module in modules for test in vars(module).values() for mark in getattr(test, "pytestmark", [])]
    found = {param.values[0].shape_name for mark in marks if mark.name == "parametrize" for param in mark.args[1]}
    assert set(SMALL) <= found


# ---- the result file


def test_groups_that_are_not_measured_again_are_kept(
    tmp_path: Path, make_row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: cls("EPYC", 2, "3.11", "2.13", gpu="H0")))
    ResultFile(tmp_path, "one").write([make_row("encode", "fused", 1.0), make_row("decode", "fused", 1.0)])
    second = ResultFile(tmp_path, "two")
    second.write([make_row("decode", "fused", 2.0)])
    found = [(row.operation, row.commit, row.ms) for row in result.read(second.result.path).rows]
    assert found == [("decode", "two", 2.0), ("encode", "one", 1.0)]
    whole = ResultFile(tmp_path, "whole", is_whole=True)
    whole.write([make_row("decode", "fused", 3.0)])
    assert [row.operation for row in result.read(whole.result.path).rows] == ["decode"]
    second.result.path.write_text('{"finished": "2')
    with pytest.raises(result.ReportError, match="not a result file"):
        ResultFile(tmp_path, "three")


def test_the_commit_is_that_of_the_checkout_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy inside of another repository, a folder that is none, and a machine without git."""
    assert commit_of(tmp_path) == "unknown"
    (tmp_path / ".git").mkdir()
    assert commit_of(tmp_path) == "unknown"
    monkeypatch.setenv("PATH", "")
    assert commit_of(tmp_path) == "unknown"


def test_processors_of_one_name_are_told_apart() -> None:
    cpuinfo = "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping\t: 1\n"
    assert result.processor(cpuinfo * 2) == "AMD EPYC family 25 model 17"
    assert result.processor("model name\t: Neoverse-V2\n") == "Neoverse-V2"
    assert result.processor("") == (platform.processor() or platform.machine())
