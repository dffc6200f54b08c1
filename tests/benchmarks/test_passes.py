"""A whole run sits down to each group several times, minutes apart, and tells at any time what it knows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import conftest, harness
from benchmarks.conftest import PASSES, PASSES_S, Run
from benchmarks.harness import Case, GroupTimer, Provider
from benchmarks.shapes import Shape

CASES = [
    Case("encode", name, Shape(n_tokens=4, d_in=4, d_sae=8, l0=2), {"it": Provider(lambda: lambda: None)})
    for name in ("a", "b", "c", "d")
]


class Bench:
    """A run whose groups take so many seconds a sitting, the first ones longer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float, first_seconds: float = 0.0) -> None:
        self.now, self.sat, self.saved, self.said = 0.0, [], [], []  # type: ignore[var-annotated]
        self._seconds, self._first_seconds = seconds, first_seconds
        monkeypatch.setattr(conftest.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(harness, "_sit", self._sit)
        self.run = Run(GroupTimer(False, []), None, self.said.append, lambda: self.saved.append(len(self.sat)))
        self.run.to_pass = list(CASES)

    def _sit(self, case: Case, group: Any, turns: Any) -> None:
        self.now += self._first_seconds if group.sittings == 0 else self._seconds
        group.sittings += 1
        for outcome in group.outcomes.values():
            outcome.turns[group.sittings] = [1.0]
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


def test_what_is_known_is_saved_after_each_sitting(monkeypatch: pytest.MonkeyPatch) -> None:
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
    bench.run.to_pass, bench.run.deadline = [], 60.0
    for case in CASES[:2]:
        bench.report(case)
    with pytest.raises(pytest.skip.Exception, match="no time left"):
        bench.report(CASES[2])
    bench.report(CASES[0])  # has its times
    assert (bench.sat, bench.run.late) == (["a", "b"], ["encode, c"])
