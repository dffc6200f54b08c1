"""Collects a row for each provider, prints them after a run, and writes them where `--results DIR` says.

The first benchmark of a run measures all groups: every round has each of them, in another order each time, so that no group
always follows the same one. Groups whose times are unsteady after the last round are measured again. On a CPU only small shapes
are measured, in less than three minutes; `--full`, or the names of files or tests, add the others. With `--minutes M` nothing
begins after M minutes. The file is written anew after every round of a group, so that a run that ends early keeps what it has.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import Case, Group, report
from benchmarks.result import Machine, ReportError, ResultFile, Row, commit_of
from benchmarks.shapes import DEVICE, SMALL

RUN = pytest.StashKey["Run"]()
FILE = pytest.StashKey[ResultFile]()
NO_TIME = "no time left"
# an even number has each setting of the allocator as often; the largest is reached where there is time
FEWEST_ROUNDS, MOST_ROUNDS = 4, 6
# the seconds after which no round begins but the fewest; the epoch, whole runs and what is measured again come after them
ROUNDS_S = {"full": 1200.0, "small": 90.0}
MOST_EXTRA_ROUNDS = 4  # a group whose times are unsteady is measured again so often at most


class Run:
    """The groups of a run, and their rows."""

    def __init__(
        self,
        rounds_s: float,  # after so many seconds no round begins but the fewest
        last_s: float,  # after so many nothing begins; groups that have not begun by then are skipped and named
        say: Callable[[str], None],  # tells the user what is measured
        save: Callable[[list[Row]], None],  # takes all rows so far, after each round of a group
    ) -> None:
        self.rounds_s, self.last_s, self._say, self._save = rounds_s, last_s, say, save
        self._started = time.monotonic()
        self.rows: list[Row] = []
        self.groups: dict[str, Group] = {}
        self.late: list[str] = []
        self.to_measure: list[Case] = []

    def report(self, benchmark: Any, case: Case, provider: str) -> None:
        """Reports the time of a case's provider; the first report measures all groups."""
        cases, self.to_measure = self.to_measure, []
        if cases:
            self._measure_all(cases)
        if case.group not in self.groups:
            self.late += [case.group] if case.group not in self.late else []
            pytest.skip(NO_TIME)
        report(benchmark, self.groups[case.group], provider)

    def save(self) -> None:
        self._save(self.rows)

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _measure_all(self, cases: list[Case]) -> None:
        for n in range(MOST_ROUNDS):
            started = time.monotonic()
            for at, case in enumerate(random.Random(n).sample(cases, len(cases)) if n else cases):
                self._measure_round(
                    case, f"round {n + 1} of {FEWEST_ROUNDS} to {MOST_ROUNDS}, {len(cases) - at} groups left"
                )
            # all further rounds or none, for an odd number would have one setting more often
            further_s = (time.monotonic() - started) * (MOST_ROUNDS - n - 1)
            if n + 1 >= FEWEST_ROUNDS and self._elapsed() + further_s > self.rounds_s:
                break
        for _ in range(MOST_EXTRA_ROUNDS):
            for case in cases:
                unsteady = self.groups[case.group].unsteady() if case.group in self.groups else []
                if unsteady and self._elapsed() < self.rounds_s:
                    self._measure_round(case, f"again, because of {', '.join(unsteady[1:] or unsteady)}", unsteady)
        gc.unfreeze()

    def _measure_round(self, case: Case, why: str, providers: list[str] | None = None) -> None:
        if self._elapsed() >= self.last_s:
            return
        self._say(f"{why}: {case.group}")
        if case.group not in self.groups:
            self.groups[case.group] = Group(case)
            self.rows += [outcome.row for outcome in self.groups[case.group].outcomes.values()]
        self.groups[case.group].measure(providers)
        self.save()
        gc.freeze()  # or else each round spends a second on a search through all that was imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="also write <machine>_<date>_<commit>.json to this folder")
    parser.addoption(
        "--full", action="store_true", help="all shapes: about half an hour (default: small ones, 3 minutes)"
    )
    parser.addoption("--minutes", type=float, help=f"skip the groups that have not begun by then: {NO_TIME!r}")
    parser.addoption("--commit", help="what is measured, for the file (default: of the git checkout, else `unknown`)")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Keeps to one process, whatever the options say: two that measure at a time would measure each other."""
    if hasattr(config.option, "numprocesses"):  # pytest-xdist is installed
        config.option.numprocesses, config.option.dist, config.option.tx = 0, "no", []


def pytest_configure(config: pytest.Config) -> None:
    folder, minutes = config.getoption("--results"), config.getoption("--minutes")
    if folder is not None and not config.getoption("--benchmark-disable"):
        try:
            commit, is_whole = config.getoption("--commit") or commit_of(), config.getoption("--full")
            config.stash[FILE] = ResultFile(folder, commit, is_whole and not _is_chosen(config))
        except ReportError as error:
            raise pytest.UsageError(str(error)) from None
    save = config.stash[FILE].write if FILE in config.stash else lambda rows: None
    last_s = math.inf if minutes is None else 60 * minutes
    config.stash[RUN] = Run(ROUNDS_S["small" if _is_small(config) else "full"], last_s, partial(_say, config), save)


def _is_chosen(config: pytest.Config) -> bool:
    """Whether options, files or tests say what to run."""
    has_files = any(Path(part.partition("::")[0]).suffix for part in config.args)
    return has_files or bool(config.getoption("keyword"))


def _is_small(config: pytest.Config) -> bool:
    """Whether large shapes are left out: on a CPU, unless something says what to run."""
    return DEVICE == "cpu" and not (_is_chosen(config) or config.getoption("--full"))


def _case(item: pytest.Item) -> Case | None:
    callspec = getattr(item, "callspec", None)
    case = callspec and callspec.params.get("case")
    return case if isinstance(case, Case) else None


def _say(config: pytest.Config, text: str) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _is_small(config):
        large = [item for item in items if (case := _case(item)) and case.shape_name not in SMALL]
        config.hook.pytest_deselected(items=large)
        items[:] = [item for item in items if item not in large]


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("--collect-only"):
        return
    cases = [_case(item) for item in session.items if "timed" in getattr(item, "fixturenames", ())]
    groups = {case.group: case for case in cases if case is not None}.values()
    # the headline comes first: where time runs out, it is not what is missing
    session.config.stash[RUN].to_measure = sorted(groups, key=lambda case: case.operation != "whole step")


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Run:
    """This run, for benchmarks that add rows of their own."""
    return request.config.stash[RUN]


@pytest.fixture
def timed(benchmark: Any, run: Run) -> Callable[[Case, str], None]:
    """Reports the time of a case's provider; fails where its numbers are wrong."""
    return partial(run.report, benchmark)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash[RUN]
    if run.late:
        terminalreporter.section(f"{NO_TIME} for {len(run.late)} groups")
        terminalreporter.write_line("\n".join(run.late))
    if not run.rows or config.getoption("--benchmark-disable"):
        return
    terminalreporter.section("ratio to the baseline of each group (above 1: faster)")
    terminalreporter.write_line("\n".join([*(row.line() for row in run.rows), str(Machine.here())]))
    if FILE in config.stash:
        terminalreporter.write_line(f"written to {config.stash[FILE].result.path}")
