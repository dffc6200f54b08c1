"""Collects a row for each provider, prints them after a run, and writes them where `--results DIR` says.

Groups are measured in two sittings: all of them once before the first is reported, and again where each is reported. With
`--quick` or `--minutes` there is the second alone, and with `--minutes M` no group begins after M minutes. The file is written
anew after every benchmark: a run that has to end tells all that it has reported until then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import Case, GroupTimer, report
from benchmarks.shapes import QUICK
from benchmarks.writer import ResultFile, commit_of, line, machine

ROWS = pytest.StashKey[list[dict[str, Any]]]()
RUN = pytest.StashKey["Run"]()
FILE = pytest.StashKey[ResultFile]()
NO_TIME = "no time left"
IMPORTANT = ("gemma-2-2b 65k", "llama-3.1-8b x32", "1M features")  # come first where time is limited


class Run:
    """The groups of a run: which have begun, which cannot be measured, and when the last one may begin."""

    def __init__(
        self, quick: bool, minutes: float | None, rows: list[dict[str, Any]], say: Callable[[str], None]
    ) -> None:
        self.rows, self.timer, self._say = rows, GroupTimer(quick), say
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.late: list[str] = []
        self.to_begin: list[Case] = []  # in a sitting of their own, before the first is reported
        self._begun: set[str] = set()
        self._broken: dict[str, str] = {}

    def report(self, benchmark: Any, case: Case, provider: str) -> None:
        """Reports the time of a case's provider; measures its group at the first call."""
        self._begin_all()
        if case.group not in self._begun and self.deadline is not None and time.monotonic() >= self.deadline:
            self.late += [case.group] if case.group not in self.late else []
            pytest.skip(NO_TIME)
        self._begun.add(case.group)
        if case.group not in self._broken:
            try:
                return report(benchmark, self.timer, self.rows, case, provider)
            except Exception as error:  # measuring the group again for its other providers would end the same way
                self._broken[case.group] = f"{type(error).__name__}: {error}".splitlines()[0]
                self._add_broken(case, provider)
                raise
        self._add_broken(case, provider)
        return pytest.fail(f"{case.group}: {self._broken[case.group]}")

    def _begin_all(self) -> None:
        while self.to_begin:
            case = self.to_begin.pop(0)
            self._say(f"first sitting, {len(self.to_begin)} to follow: {case.group}")
            try:
                self.timer.begin(case)
            except Exception as error:
                self._broken[case.group] = f"{type(error).__name__}: {error}".splitlines()[0]

    def _add_broken(self, case: Case, provider: str) -> None:
        if (case.group, provider) not in {(row["group"], row["provider"]) for row in self.rows}:
            self.rows.append(case.row(provider) | {"status": "red", "reason": self._broken[case.group]})


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="also write <machine>_<date>_<commit>.json to this folder")
    parser.addoption("--quick", action="store_true", help="small shapes and three rounds alone: less than 3 minutes")
    parser.addoption("--minutes", type=float, help=f"skip the groups that have not begun by then: {NO_TIME!r}")
    parser.addoption("--commit", help="what is measured, for the file (default: of the git checkout, else `unknown`)")


def pytest_configure(config: pytest.Config) -> None:
    rows = config.stash[ROWS] = []
    config.stash[RUN] = Run(config.getoption("--quick"), config.getoption("--minutes"), rows, partial(_say, config))
    folder = config.getoption("--results")
    if folder is not None and not config.getoption("--benchmark-disable"):
        config.stash[FILE] = ResultFile(folder, config.getoption("--commit") or commit_of())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--minutes") is not None:
        items.sort(key=_unimportance)
    if not config.getoption("--quick"):
        return
    large = [item for item in items if (case := _case(item)) and case.shape_name not in QUICK]
    config.hook.pytest_deselected(items=large)
    items[:] = [item for item in items if item not in large]


def _case(item: pytest.Item) -> Case | None:
    callspec = getattr(item, "callspec", None)
    case = callspec and callspec.params.get("case")
    return case if isinstance(case, Case) else None


def _unimportance(item: pytest.Item) -> int:
    case = _case(item)
    return IMPORTANT.index(case.shape_name) if case and case.shape_name in IMPORTANT else len(IMPORTANT)


def _say(config: pytest.Config, text: str) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(text)


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    if any(config.getoption(name) for name in ("--quick", "--minutes", "--benchmark-disable", "--collect-only")):
        return
    cases = [_case(item) for item in session.items if "timed" in getattr(item, "fixturenames", ())]
    config.stash[RUN].to_begin = list({case.group: case for case in cases if case is not None}.values())


@pytest.fixture
def timed_rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The rows of this run, to be added to."""
    return request.config.stash[ROWS]


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Case, str], None]:
    """Reports the time of a case's provider; fails where its numbers are wrong."""
    return lambda case, provider: request.config.stash[RUN].report(benchmark, case, provider)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if FILE in item.config.stash:
        item.config.stash[FILE].write(item.config.stash[ROWS])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows, late = config.stash[ROWS], config.stash[RUN].late
    if late:
        terminalreporter.section(f"{NO_TIME} for {len(late)} groups")
        for group in late:
            terminalreporter.write_line(group)
    if not rows or config.getoption("--benchmark-disable"):
        return
    terminalreporter.section("ratio to the first of each group (medians; above 1: faster)")
    for row in rows:
        terminalreporter.write_line(line(row))
    terminalreporter.write_line(", ".join(f"{key} {value}" for key, value in machine().items()))
    if FILE in config.stash:
        config.stash[FILE].write(rows)
        terminalreporter.write_line(f"written to {config.stash[FILE].path}")
