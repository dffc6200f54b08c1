"""A whole run visits each group in several rounds, minutes apart, and tells at any time what it knows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import conftest
from benchmarks.conftest import AT_ONCE, DEFAULT, FULL, MOST_EXTRA_ROUNDS, Limits, Run
from benchmarks.harness import Case, Group, Provider
from benchmarks.shapes import DEVICE, FULL_ONLY, Shape
from benchmarks.writer import ROOT

ROUNDS, ROUNDS_S = FULL.rounds, FULL.rounds_s
CASES = [
    Case("encode", name, Shape(n_tokens=4, d_in=4, d_sae=8, l0=2), {"it": Provider(lambda: lambda: None)})
    for name in ("a", "b", "c", "d")
]


class Bench:
    """A run whose groups take so many seconds a round, the first time longer."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, seconds: float, first_seconds: float | None = None, limits: Limits = FULL
    ) -> None:
        self.now, self.visited, self.saved, self.said = 0.0, [], [], []  # type: ignore[var-annotated]
        self._seconds, self._first_seconds = seconds, seconds if first_seconds is None else first_seconds
        self.unsteady: dict[str, int] = {}  # in how many rounds after the last a group's times are too far apart
        bench = self

        class Fake(Group):
            def measure(self, providers: Any = None) -> None:
                bench.measure(self, providers)

        monkeypatch.setattr(conftest.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(conftest, "Group", Fake)
        self.run = Run(limits, self.said.append, lambda rows: self.saved.append(len(self.visited)))
        self.run.to_visit = list(CASES)

    def measure(self, group: Group, providers: list[str] | None) -> None:
        name = group.case.shape_name
        self.now += self._seconds if group.n_rounds else self._first_seconds
        group.n_rounds += 1
        self.unsteady[name] = self.unsteady.get(name, 0) - (providers is not None)
        outcome = group.outcomes["it"]
        outcome.by_setting["default"] = {group.n_rounds: [1.0, 100.0] if self.unsteady[name] > 0 else [1.0]}
        outcome.fill_in(outcome, None)
        self.visited.append(name)

    def report(self, case: Case) -> None:
        self.run.report(SimpleNamespace(_timer=None, pedantic=lambda call, rounds: None), case, "it")


def test_each_round_visits_each_group_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, 1.0, 10.0)
    for case in CASES:
        bench.report(case)
    rounds = [bench.visited[at : at + len(CASES)] for at in range(0, len(bench.visited), len(CASES))]
    assert len(rounds) == ROUNDS[1]
    assert rounds[0] == ["a", "b", "c", "d"]  # groups share what they are compared with
    assert all(sorted(order) == rounds[0] for order in rounds)
    assert len(set(map(tuple, rounds))) > 2
    assert len(bench.said) == len(bench.visited)
    assert bench.saved == list(range(1, len(CASES) * ROUNDS[1] + 1))
    assert [row["shape"] for row in bench.run.rows] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    [(ROUNDS_S / 4 / 4, 4), (ROUNDS_S / 4 / 3, 3), (ROUNDS_S, ROUNDS[0])],
    ids=["as many as fit", "no more than fit", "as many as it takes"],
)
def test_no_round_begins_that_would_end_late(monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int) -> None:
    bench = Bench(monkeypatch, seconds)
    bench.report(CASES[0])
    assert len(bench.visited) == rounds * len(CASES)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.01, AT_ONCE[1]), (0.3, 4), (9.0, AT_ONCE[0])])
def test_another_group_has_its_rounds_at_once(monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int) -> None:
    bench = Bench(monkeypatch, seconds)
    bench.run.to_visit = []
    for _ in range(2):
        bench.report(CASES[2])
    assert bench.visited == ["c"] * rounds


def test_no_group_begins_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, 1.0, 50.0, Limits((0, 0), 0.0, 60.0))
    bench.run.to_visit = []
    for case in CASES[:2]:
        bench.report(case)
    with pytest.raises(pytest.skip.Exception, match="no time left"):
        bench.report(CASES[2])
    bench.report(CASES[0])  # has its times
    assert (bench.visited, bench.run.late) == (["a"] * 3 + ["b"] * 3, ["encode, c"])


def test_what_is_unsteady_is_measured_again_until_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose IQR exceeds half of its median."""
    bench = Bench(monkeypatch, 1.0)
    bench.unsteady = {"b": 2, "d": 99}
    bench.report(CASES[0])
    again = bench.visited[len(CASES) * ROUNDS[1] :]
    assert (again.count("b"), again.count("d"), len(again)) == (2, MOST_EXTRA_ROUNDS, 2 + MOST_EXTRA_ROUNDS)
    assert bench.said[-1] == "again, because of it: encode, d"


def test_nothing_begins_where_a_run_should_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a first round, whose other groups are then named, nor again."""
    bench = Bench(monkeypatch, 1.0, DEFAULT.last_s / 2, DEFAULT)
    bench.unsteady = {"a": 99}
    bench.report(CASES[0])
    assert bench.visited == ["a", "b"]
    with pytest.raises(pytest.skip.Exception, match="no time left"):
        bench.report(CASES[2])
    assert bench.run.late == ["encode, c"]


def test_a_run_without_options_ends_in_ten_minutes() -> None:
    """Where the longest round, of the dense steps at the headline's shape, takes two."""
    assert DEFAULT.rounds_s <= DEFAULT.last_s <= 600 - 120


BENCHMARKS = """
import os
from benchmarks.harness import Case, Provider, cases_and_providers
from benchmarks.shapes import Shape

NAMES = {"encode": ("demo", "64 tokens"), "decode": ("demo",), "scaling with L0": ("32", "128")}
CASES = [
    Case(operation, name, Shape(4, 8, 16, 2), {"it": Provider(lambda: lambda: None)})
    for operation, names in NAMES.items()
    for name in names
]

@cases_and_providers(CASES)
def test_tiny(timed, case, provider):
    assert "PYTEST_XDIST_WORKER" not in os.environ
    timed(case, provider)
"""


def measured(*arguments: str | Path) -> tuple[int, str]:
    """Exit status and what was printed; seconds are those of torch's import."""
    command = [sys.executable, "-m", "pytest", "--benchmark-disable", "-rs", *map(str, arguments)]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU measures all groups")
def test_the_most_telling_groups_are_the_default_and_all_are_at_hand(bench_file: Callable[[str], Path]) -> None:
    tiny = bench_file(BENCHMARKS)
    status, printed = measured(tiny.parent)
    assert status == 0
    assert "3 passed, 2 deselected" in printed
    assert "2 groups are left out; `--full` measures them too" in printed
    assert "5 passed" in measured(tiny.parent, "--full")[1]
    assert "1 passed" in measured(tiny, "-k", "128")[1]


def test_benchmarks_run_in_one_process(bench_file: Callable[[str], Path]) -> None:
    """Though the options ask for several, as the tests do: they would measure each other."""
    pytest.importorskip("xdist")
    status, printed = measured(bench_file(BENCHMARKS), "-n", "2")
    assert status == 0, printed


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU measures all groups")
def test_every_group_that_is_left_out_exists() -> None:
    """A name that is no shape's any more would leave out nothing, and say nothing."""
    modules = [import_module(f"benchmarks.{path.stem}") for path in (ROOT / "benchmarks").glob("test_*.py")]
    found = {
        (param.values[0].operation, param.values[0].shape_name)
        for module in modules
        for function in vars(module).values()
        for mark in getattr(function, "pytestmark", [])
        if mark.name == "parametrize"
        for param in mark.args[1]
    }
    assert {(operation, name) for operation, names in FULL_ONLY.items() for name in names} <= found
