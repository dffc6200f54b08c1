"""A whole run sits down to each group several times, minutes apart, and tells at any time what it knows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import (
    conftest,
    harness,
    test_decode,
    test_encode,
    test_epoch,
    test_inference,
    test_optimizer,
    test_scaling,
    test_topk_step,
    test_train_step,
)
from benchmarks.conftest import DEFAULT, FULL, MOST_EXTRA_SESSIONS, Limits, Run
from benchmarks.harness import Case, GroupTimer, Provider
from benchmarks.shapes import DEVICE, FULL_ONLY, Shape
from benchmarks.writer import ROOT

PASSES, PASSES_S = FULL.passes, FULL.passes_s
CASES = [
    Case("encode", name, Shape(n_tokens=4, d_in=4, d_sae=8, l0=2), {"it": Provider(lambda: lambda: None)})
    for name in ("a", "b", "c", "d")
]


class Bench:
    """A run whose groups take so many seconds a session, the first ones longer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float, first_seconds: float = 0.0) -> None:
        self.now, self.sat, self.saved, self.said = 0.0, [], [], []  # type: ignore[var-annotated]
        self._seconds, self._first_seconds = seconds, first_seconds
        monkeypatch.setattr(conftest.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(harness, "_run_session", self._run_session)
        self.unsteady: dict[str, int] = {}  # for how many sessions after the passes a group's times are too far apart
        self.run = Run(GroupTimer(False, []), FULL, self.said.append, lambda: self.saved.append(len(self.sat)))
        self.run.to_pass = list(CASES)

    def _run_session(self, case: Case, group: Any, turns: Any, providers: list[str] | None) -> None:
        self.now += self._first_seconds if group.sessions == 0 else self._seconds
        group.sessions += 1
        self.unsteady[case.shape_name] = self.unsteady.get(case.shape_name, 0) - (providers is not None)
        for outcome in group.outcomes.values():
            seconds = [1.0, 100.0] if self.unsteady[case.shape_name] > 0 else [1.0]
            outcome.by_setting["default"] = {group.sessions: seconds}
        self.sat.append(case.shape_name)

    def report(self, case: Case) -> None:
        self.run.report(SimpleNamespace(_timer=None, pedantic=lambda call, rounds: None), case, "it")


def test_each_pass_sits_down_to_each_group_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, 1.0, 10.0)
    for case in CASES:
        bench.report(case)
    passes = [bench.sat[at : at + len(CASES)] for at in range(0, len(bench.sat), len(CASES))]
    assert len(passes) == PASSES[1]
    assert passes[0] == ["a", "b", "c", "d"]  # groups share what they are compared with
    assert all(sorted(order) == passes[0] for order in passes)
    assert len(set(map(tuple, passes))) > 2
    assert len(bench.said) == len(bench.sat)


def test_what_is_known_is_saved_after_each_session(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, 1.0)
    bench.report(CASES[0])
    assert bench.saved == list(range(1, len(CASES) * PASSES[1] + 1))
    assert [row["shape"] for row in bench.run.timer.rows] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("seconds", "passes"),
    [(PASSES_S / 4 / 4, 4), (PASSES_S / 4 / 3, 3), (PASSES_S, PASSES[0])],
    ids=["as many as fit", "no more than fit", "as many as it takes"],
)
def test_no_pass_begins_that_would_end_late(monkeypatch: pytest.MonkeyPatch, seconds: float, passes: int) -> None:
    bench = Bench(monkeypatch, seconds, seconds)
    bench.report(CASES[0])
    assert len(bench.sat) == passes * len(CASES)


def test_a_group_outside_of_the_passes_is_measured_where_it_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, 1.0)
    bench.run.to_pass = []
    bench.report(CASES[2])
    bench.report(CASES[2])
    assert bench.sat == ["c"]
    assert bench.saved == [1]


def test_no_group_begins_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, 1.0, 50.0)
    bench.run.to_pass, bench.run.limits = [], Limits((0, 0), 0.0, 60.0)
    for case in CASES[:2]:
        bench.report(case)
    with pytest.raises(pytest.skip.Exception, match="no time left"):
        bench.report(CASES[2])
    bench.report(CASES[0])  # has its times
    assert (bench.sat, bench.run.late) == (["a", "b"], ["encode, c"])


def test_what_is_unsteady_is_measured_again_until_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, 1.0)
    bench.unsteady = {"b": 2, "d": 99}
    bench.report(CASES[0])
    again = bench.sat[len(CASES) * PASSES[1] :]
    assert (again.count("b"), again.count("d"), len(again)) == (2, MOST_EXTRA_SESSIONS, 2 + MOST_EXTRA_SESSIONS)
    assert bench.said[-1] == "again, because of it: encode, d"


def test_nothing_begins_where_a_run_should_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a first pass, whose other groups are then named, nor again."""
    bench = Bench(monkeypatch, 1.0, DEFAULT.last_s / 2)
    bench.run.limits, bench.unsteady = DEFAULT, {"a": 99}
    bench.report(CASES[0])
    assert bench.sat == ["a", "b"]
    with pytest.raises(pytest.skip.Exception, match="no time left"):
        bench.report(CASES[2])
    assert bench.run.late == ["encode, c"]


def test_a_run_without_options_ends_in_ten_minutes() -> None:
    """Where the longest session, of the dense steps at the headline's shape, takes two."""
    assert DEFAULT.passes_s <= DEFAULT.last_s <= 600 - 120


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


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder of benchmarks, with the options and fixtures of the real ones."""
    (tmp_path / "test_tiny.py").write_text(BENCHMARKS)
    (tmp_path / "conftest.py").write_text("from benchmarks.conftest import *\n")
    return tmp_path


def measured(*arguments: str | Path) -> tuple[int, str]:
    """Exit status and what was printed; seconds are those of torch's import."""
    command = [sys.executable, "-m", "pytest", "--benchmark-disable", "-rs", *map(str, arguments)]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU measures all groups")
def test_the_most_telling_groups_are_the_default_and_all_are_at_hand(tiny: Path) -> None:
    status, printed = measured(tiny)
    assert status == 0
    assert "3 passed, 2 deselected" in printed
    assert "2 groups are left out; `--full` measures them too" in printed
    assert "5 passed" in measured(tiny, "--full")[1]
    assert "1 passed" in measured(tiny / "test_tiny.py", "-k", "128")[1]


def test_benchmarks_run_in_one_process(tiny: Path) -> None:
    """Though the options ask for several, as the tests do: they would measure each other."""
    pytest.importorskip("xdist")
    status, printed = measured(tiny, "-n", "2")
    assert status == 0, printed


def test_every_group_that_is_left_out_exists() -> None:
    """A name that is no shape's any more would leave out nothing, and say nothing."""
    found = {
        (param.values[0].operation, param.values[0].shape_name)
        for module in (
            test_decode,
            test_encode,
            test_epoch,
            test_inference,
            test_optimizer,
            test_scaling,
            test_topk_step,
            test_train_step,
        )
        for function in vars(module).values()
        for mark in getattr(function, "pytestmark", [])
        if mark.name == "parametrize"
        for param in mark.args[1]
    }
    if DEVICE == "cpu":
        assert {(operation, name) for operation, names in FULL_ONLY.items() for name in names} <= found
