"""Collects a row for each provider, prints them after a run, and writes them where `--results DIR` says.

A whole run visits all its groups in every round, in another order each time, so that no group always follows the same one. Groups
whose times are unsteady after the last round are measured again. On a CPU only the groups that a reader needs most are measured,
and the run ends within ten minutes; `--full`, or the names of files or tests, add the others. With `--quick` or `--minutes` a
group has all its rounds at the time when it is reported, and with `--minutes M` no group begins after M minutes. The file is
written anew after every round of a group, so that a run that has to end early keeps what it has measured.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import ROUNDS_PER_SLOW_ONE, Case, Group, report
from benchmarks.shapes import DEVICE, FULL_ONLY, QUICK
from benchmarks.writer import ResultFile, commit_of, line, machine

RUN = pytest.StashKey["Run"]()
FILE = pytest.StashKey[ResultFile]()
LEFT_OUT = pytest.StashKey[int]()
NO_TIME = "no time left"
AT_ONCE, QUICK_ROUNDS = (3, 9), (3, 3)  # the fewest and the most rounds of a group that has them one after the other
AT_ONCE_S = 1.0  # no more than the fewest begin after so many seconds
MOST_EXTRA_ROUNDS = 3  # a group whose times are unsteady is measured again so often at most


@dataclass(frozen=True)
class Limits:
    """How many rounds a whole run has, and until when.

    Args:
        rounds: The smallest number of rounds, and the largest, which is reached where there is time.
        rounds_s: The seconds in which the rounds should end.
        last_s: The seconds after which no group begins; those that have not begun by then are skipped and named.
    """

    rounds: tuple[int, int]
    rounds_s: float
    last_s: float = math.inf


DEFAULT, FULL = Limits((3, 6), 360.0, 480.0), Limits((3, 6), 1000.0)


class Run:
    """The groups of a run, their rows, and when the last of them may begin."""

    def __init__(
        self,
        limits: Limits,
        say: Callable[[str], None] = lambda text: None,
        save: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
        at_once: tuple[int, int] = AT_ONCE,
    ) -> None:
        self.limits, self._say, self._save, self._at_once = limits, say, save, at_once
        self._started = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.groups: dict[str, Group] = {}
        self.late: list[str] = []
        self.to_visit: list[Case] = []  # the cases that have their rounds together, before the first is reported

    @property
    def is_late(self) -> bool:
        return time.monotonic() - self._started >= self.limits.last_s

    def report(self, benchmark: Any, case: Case, provider: str) -> None:
        """Reports the time of a case's provider; the first report measures all groups that are to visit, or else its own."""
        self._visit_all()
        if case.group not in self.groups:
            if self.is_late:
                self.late += [case.group] if case.group not in self.late else []
                pytest.skip(NO_TIME)
            self._measure_at_once(case)
        report(benchmark, self.groups[case.group], provider)

    def save(self) -> None:
        self._save(self.rows)

    def _measure_at_once(self, case: Case) -> None:
        started, (fewest, most) = time.monotonic(), self._at_once
        for n in range(most):
            if n >= fewest and time.monotonic() - started >= AT_ONCE_S:
                break
            self._measure(case)

    def _visit_all(self) -> None:
        cases, self.to_visit = self.to_visit, []
        (fewest, most), seconds = self.limits.rounds if cases else (0, 0), []
        for n in range(most):
            started = time.monotonic()
            for at, case in enumerate(cases):
                self._visit(case, f"round {n + 1} of {fewest} to {most}, {len(cases) - at} groups left")
            now = time.monotonic()
            seconds.append(now - started)
            # the next round has the providers of the round before the last one, and takes as long as that did
            if n + 1 >= fewest and now + seconds[-ROUNDS_PER_SLOW_ONE] - self._started > self.limits.rounds_s:
                break
            random.Random(n).shuffle(cases)
        for _ in range(MOST_EXTRA_ROUNDS):
            for case in cases:
                if case.group in self.groups and (unsteady := self.groups[case.group].unsteady()):
                    self._visit(case, f"again, because of {', '.join(unsteady[1:] or unsteady)}", unsteady)
        gc.unfreeze()

    def _visit(self, case: Case, why: str, providers: list[str] | None = None) -> None:
        if self.is_late:
            return
        self._say(f"{why}: {case.group}")
        self._measure(case, providers)
        gc.freeze()  # or else each round spends a second on a search through all that was imported

    def _measure(self, case: Case, providers: list[str] | None = None) -> None:
        if case.group not in self.groups:
            self.groups[case.group] = Group(case)
            self.rows += [outcome.row for outcome in self.groups[case.group].outcomes.values()]
        self.groups[case.group].measure(providers)
        self.save()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="also write <machine>_<date>_<commit>.json to this folder")
    parser.addoption("--full", action="store_true", help="all groups: about 25 minutes (default: the most telling, 10)")
    parser.addoption("--quick", action="store_true", help="small shapes and three rounds alone: less than 3 minutes")
    parser.addoption("--minutes", type=float, help=f"skip the groups that have not begun by then: {NO_TIME!r}")
    parser.addoption("--commit", help="what is measured, for the file (default: of the git checkout, else `unknown`)")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Keeps to one process, whatever the options say: two that measure at a time would measure each other."""
    if hasattr(config.option, "numprocesses"):  # pytest-xdist is installed
        config.option.numprocesses, config.option.dist, config.option.tx = 0, "no", []


def pytest_configure(config: pytest.Config) -> None:
    folder, minutes, is_quick = (config.getoption(name) for name in ("--results", "--minutes", "--quick"))
    if folder is not None and not config.getoption("--benchmark-disable"):
        config.stash[FILE] = ResultFile(folder, config.getoption("--commit") or commit_of())
    limits = DEFAULT if _is_reduced(config) else FULL
    if minutes is not None:
        limits = Limits((0, 0), 0.0, 60 * minutes)
    save = config.stash[FILE].write if FILE in config.stash else lambda rows: None
    config.stash[RUN] = Run(limits, partial(_say, config), save, QUICK_ROUNDS if is_quick else AT_ONCE)


def _is_reduced(config: pytest.Config) -> bool:
    """Whether groups are left out: on a CPU, unless options, files or tests say what to run."""
    is_chosen = config.getoption("keyword") or any(Path(part.partition("::")[0]).suffix for part in config.args)
    return DEVICE == "cpu" and not (is_chosen or config.getoption("--full") or config.getoption("--quick"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        left_out = [item for item in items if (case := _case(item)) and case.shape_name not in QUICK]
    elif _is_reduced(config):
        left_out = [item for item in items if (case := _case(item)) and case.shape_name in FULL_ONLY[case.operation]]
        config.stash[LEFT_OUT] = len({case.group for item in left_out if (case := _case(item))})
    else:
        return
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _case(item: pytest.Item) -> Case | None:
    callspec = getattr(item, "callspec", None)
    case = callspec and callspec.params.get("case")
    return case if isinstance(case, Case) else None


def _say(config: pytest.Config, text: str) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(text)


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    if any(config.getoption(name) for name in ("--quick", "--minutes", "--benchmark-disable", "--collect-only")):
        return
    cases = [_case(item) for item in session.items if "timed" in getattr(item, "fixturenames", ())]
    groups = {case.group: case for case in cases if case is not None}.values()
    # the headline comes first: where time runs out, it is not what is missing
    config.stash[RUN].to_visit = sorted(groups, key=lambda case: case.operation != "whole step")


@pytest.fixture
def timed_rows(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """The rows of this run, to be added to."""
    run = request.config.stash[RUN]
    yield run.rows
    run.save()


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Case, str], None]:
    """Reports the time of a case's provider; fails where its numbers are wrong."""
    return partial(request.config.stash[RUN].report, benchmark)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run, left_out = config.stash[RUN], config.stash.get(LEFT_OUT, 0)
    if left_out:
        terminalreporter.write_line(f"{left_out} groups are left out; `--full` measures them too")
    if run.late:
        terminalreporter.section(f"{NO_TIME} for {len(run.late)} groups")
        for group in run.late:
            terminalreporter.write_line(group)
    if not run.rows or config.getoption("--benchmark-disable"):
        return
    terminalreporter.section("ratio to the baseline of each group (above 1: faster)")
    for row in run.rows:
        terminalreporter.write_line(line(row))
    terminalreporter.write_line(", ".join(f"{key} {value}" for key, value in machine().items()))
    if FILE in config.stash:
        terminalreporter.write_line(f"written to {config.stash[FILE].path}")
