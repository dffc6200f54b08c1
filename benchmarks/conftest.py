"""Collects a row for each provider, prints them after a run, and writes them where `--results DIR` says.

A whole run passes over its groups several times before it reports the first one. Each pass gives each group one session, in
which its providers take turns. From the second pass on the order is another one each time, so that no group always follows the
same one. Groups whose times are unsteady after the last pass are measured again. On a CPU only the groups that a reader needs
most are measured, and the run ends within ten minutes; `--full`, or the names of files or tests, add the others. With `--quick`
or `--minutes` each group has one longer session, at the time when it is reported, and with `--minutes M` no group begins after M
minutes. The file is written anew after every session, so that a run that has to end early keeps what it has measured.
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

from benchmarks.harness import SESSIONS_PER_SLOW_ONE, Case, GroupTimer, report
from benchmarks.shapes import DEVICE, FULL_ONLY, QUICK
from benchmarks.writer import ResultFile, commit_of, line, machine

ROWS = pytest.StashKey[list[dict[str, Any]]]()
RUN = pytest.StashKey["Run"]()
FILE = pytest.StashKey[ResultFile]()
LEFT_OUT = pytest.StashKey[int]()
NO_TIME = "no time left"
IMPORTANT = ("gemma-2-2b 65k", "llama-3.1-8b x32", "1M features")  # these shapes come first where time is limited
MOST_EXTRA_SESSIONS = 3  # a group whose times are unsteady is measured again so often at most


@dataclass(frozen=True)
class Limits:
    """How often a run passes over its groups, and until when.

    Args:
        passes: The smallest number of passes, and the largest, which is made where there is time.
        passes_s: The seconds in which the passes should end.
        last_s: The seconds after which no group begins; those that have not begun by then are skipped and named.
    """

    passes: tuple[int, int]
    passes_s: float
    last_s: float = math.inf


DEFAULT, FULL = Limits((3, 6), 360.0, 480.0), Limits((3, 6), 1000.0)


class Run:
    """The groups of a run: its passes over them, and when the last group may begin."""

    def __init__(self, timer: GroupTimer, limits: Limits, say: Callable[[str], None], save: Callable[[], None]) -> None:
        self.timer, self.limits, self._say, self._save = timer, limits, say, save
        self._started = time.monotonic()
        self.late: list[str] = []
        self.to_pass: list[Case] = []  # these groups have a session in each pass

    @property
    def is_late(self) -> bool:
        return time.monotonic() - self._started >= self.limits.last_s

    def report(self, benchmark: Any, case: Case, provider: str) -> None:
        """Reports the time of a case's provider; the first call measures all groups of the passes, or else the case's own."""
        self._pass()
        if not self.timer.has_begun(case):
            if self.is_late:
                self.late += [case.group] if case.group not in self.late else []
                pytest.skip(NO_TIME)
            self.timer.outcome(case, provider)
            self._save()
        report(benchmark, self.timer, case, provider)

    def _pass(self) -> None:
        cases, self.to_pass = self.to_pass, []
        (fewest, most), seconds = self.limits.passes if cases else (0, 0), []
        for n in range(most):
            started = time.monotonic()
            for at, case in enumerate(cases):
                self._run_session(case, f"pass {n + 1} of {fewest} to {most}, {len(cases) - at} groups left")
            now = time.monotonic()
            seconds.append(now - started)
            # the next pass has the providers of the pass before the last one, and takes as long as that did
            if n + 1 >= fewest and now + seconds[-SESSIONS_PER_SLOW_ONE] - self._started > self.limits.passes_s:
                break
            random.Random(n).shuffle(cases)
        for _ in range(MOST_EXTRA_SESSIONS):
            for case in cases:
                if unsteady := self.timer.unsteady(case):
                    self._run_session(case, f"again, because of {', '.join(unsteady[1:] or unsteady)}", unsteady)
        gc.unfreeze()

    def _run_session(self, case: Case, why: str, providers: list[str] | None = None) -> None:
        if self.is_late:
            return
        self._say(f"{why}: {case.group}")
        self.timer.run_session(case, providers=providers)
        self._save()
        gc.freeze()  # or else each session spends a second on a search through all that was imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="also write <machine>_<date>_<commit>.json to this folder")
    parser.addoption("--full", action="store_true", help="all groups: about 25 minutes (default: the most telling, 10)")
    parser.addoption("--quick", action="store_true", help="small shapes and three turns alone: less than 3 minutes")
    parser.addoption("--minutes", type=float, help=f"skip the groups that have not begun by then: {NO_TIME!r}")
    parser.addoption("--commit", help="what is measured, for the file (default: of the git checkout, else `unknown`)")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Keeps to one process, whatever the options say: two that measure at a time would measure each other."""
    if hasattr(config.option, "numprocesses"):  # pytest-xdist is installed
        config.option.numprocesses, config.option.dist, config.option.tx = 0, "no", []


def pytest_configure(config: pytest.Config) -> None:
    rows = config.stash[ROWS] = []
    folder = config.getoption("--results")
    if folder is not None and not config.getoption("--benchmark-disable"):
        config.stash[FILE] = ResultFile(folder, config.getoption("--commit") or commit_of())
    timer = GroupTimer(config.getoption("--quick"), rows)
    config.stash[RUN] = Run(timer, _limits(config), partial(_say, config), partial(_save, config))


def _limits(config: pytest.Config) -> Limits:
    if (minutes := config.getoption("--minutes")) is not None:
        return Limits((0, 0), 0.0, 60 * minutes)
    return DEFAULT if _is_reduced(config) else FULL


def _is_reduced(config: pytest.Config) -> bool:
    """Whether groups are left out: on a CPU, unless options, files or tests say what to run."""
    is_chosen = config.getoption("keyword") or any(Path(part.partition("::")[0]).suffix for part in config.args)
    return DEVICE == "cpu" and not (is_chosen or config.getoption("--full") or config.getoption("--quick"))


def _save(config: pytest.Config) -> None:
    if FILE in config.stash:
        config.stash[FILE].write(config.stash[ROWS])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--minutes") is not None:
        items.sort(key=_unimportance)
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
    groups = {case.group: case for case in cases if case is not None}.values()
    # the headline comes first: where time runs out, it is not what is missing
    config.stash[RUN].to_pass = sorted(groups, key=lambda case: case.operation != "whole step")


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
    if config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{config.stash[LEFT_OUT]} groups are left out; `--full` measures them too")
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
