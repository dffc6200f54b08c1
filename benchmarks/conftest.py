"""Collects a row for each provider, prints them after a run, and writes them where `--results DIR` says.

A whole run makes passes over all groups, with a sitting of each, before the first is reported; from the second on in another
order each time, so that no group always comes after the same. With `--quick` or `--minutes` each group has one longer sitting,
where it is reported, and with `--minutes M` no group begins after M minutes. The file is written anew after every sitting: a run
that has to end tells all that it has measured until then.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import SLOW_EVERY, Case, GroupTimer, report
from benchmarks.shapes import QUICK
from benchmarks.writer import ResultFile, commit_of, line, machine

ROWS = pytest.StashKey[list[dict[str, Any]]]()
RUN = pytest.StashKey["Run"]()
FILE = pytest.StashKey[ResultFile]()
NO_TIME = "no time left"
IMPORTANT = ("gemma-2-2b 65k", "llama-3.1-8b x32", "1M features")  # come first where time is limited
PASSES = (3, 6)  # at least, and at most where there is time
PASSES_S = 780.0  # in which they should end; `fastsae train` comes after them


class Run:
    """The groups of a run: its passes over them, and when the last group may begin."""

    def __init__(
        self, timer: GroupTimer, minutes: float | None, say: Callable[[str], None], save: Callable[[], None]
    ) -> None:
        self.timer, self._say, self._save = timer, say, save
        self._started = time.monotonic()
        self.deadline = None if minutes is None else self._started + 60 * minutes
        self.late: list[str] = []
        self.to_pass: list[Case] = []  # with a sitting in each pass

    def report(self, benchmark: Any, case: Case, provider: str) -> None:
        """Reports the time of a case's provider; measures its group, or all that are to be passed over, at the first call."""
        self._pass()
        if not self.timer.has_begun(case):
            if self.deadline is not None and time.monotonic() >= self.deadline:
                self.late += [case.group] if case.group not in self.late else []
                pytest.skip(NO_TIME)
            self.timer.outcome(case, provider)
            self._save()
        report(benchmark, self.timer, case, provider)

    def _pass(self) -> None:
        cases, self.to_pass = self.to_pass, []
        (fewest, most), seconds = PASSES if cases else (0, 0), []
        for n in range(most):
            started = time.monotonic()
            for at, case in enumerate(cases):
                self._say(f"pass {n + 1} of {fewest} to {most}, {len(cases) - at} groups left: {case.group}")
                self.timer.sit(case)
                self._save()
                gc.freeze()  # what has been imported: to look through it again takes a second of each sitting
            now = time.monotonic()
            seconds.append(now - started)
            # the next pass takes as long as that which had the same providers
            if n + 1 >= fewest and now + seconds[-SLOW_EVERY] - self._started > PASSES_S:
                break
            random.Random(n).shuffle(cases)
        gc.unfreeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="also write <machine>_<date>_<commit>.json to this folder")
    parser.addoption("--quick", action="store_true", help="small shapes and three turns alone: less than 3 minutes")
    parser.addoption("--minutes", type=float, help=f"skip the groups that have not begun by then: {NO_TIME!r}")
    parser.addoption("--commit", help="what is measured, for the file (default: of the git checkout, else `unknown`)")


def pytest_configure(config: pytest.Config) -> None:
    rows = config.stash[ROWS] = []
    folder = config.getoption("--results")
    if folder is not None and not config.getoption("--benchmark-disable"):
        config.stash[FILE] = ResultFile(folder, config.getoption("--commit") or commit_of())
    timer = GroupTimer(config.getoption("--quick"), rows)
    config.stash[RUN] = Run(timer, config.getoption("--minutes"), partial(_say, config), partial(_save, config))


def _save(config: pytest.Config) -> None:
    if FILE in config.stash:
        config.stash[FILE].write(config.stash[ROWS])


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
    config.stash[RUN].to_pass = list({case.group: case for case in cases if case is not None}.values())


@pytest.fixture
def timed_rows(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """The rows of this run, to be added to."""
    yield request.config.stash[ROWS]
    _save(request.config)


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Case, str], None]:
    """Reports the time of a case's provider; fails where its numbers are wrong."""
    return lambda case, provider: request.config.stash[RUN].report(benchmark, case, provider)


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
        terminalreporter.write_line(f"written to {config.stash[FILE].path}")
