"""Measures the providers of one operation in rounds, each provider only after its numbers were compared with fp64.

A machine's speed drifts: by a tenth in a minute, by more in a quarter of an hour, and one call differs from the next by up to a
third, depending on where its arrays happen to lie. Some of the differences that count are smaller than that. So a group is
measured in several rounds. A round makes every provider anew and times a few calls of each, in an order that changes from round
to round; every round of a run has all its groups, so that the rounds of a group are minutes apart. The spread in a row is that of
all rounds, and a ratio compares two providers in the same round. Rounds have one setting of `benchmarks.allocator` in turn: a
provider to which page faults cost time has the better one in its row.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import allocator, peak
from benchmarks.floor import Work
from benchmarks.peak import memory_bytes
from benchmarks.result import Row
from benchmarks.shapes import DEVICE, Shape

CALLS_S = 0.1  # a provider's calls in a round take about so long together
MOST_CALLS = 50  # a round has no more calls of a provider than this
LONG_S = 1.0  # where calls take longer, a cold cache costs next to nothing, so a round's first call counts
MOST_REPEATS = 4  # calls are repeated so often at most while page faults show that their memory is still being found
WARM_CALLS = {"cpu": 1, "cuda": 3}[DEVICE]  # they compile and tune; ours is dense until it has counted
FLUSHED_BYTES = 2**28  # no cache of a GPU holds more
MOST_GRAPHS = 256  # a compiled function has one for each shape; those of an earlier round are not compiled again
MEMORY_SHARE = 0.5  # the share of the memory that all providers of a group may keep; their calls take more
Call = Callable[[], object]


@dataclass(frozen=True)
class Provider:
    """One way to do an operation."""

    make: Callable[[], Call]  # returns the call to be timed
    # returns the error of what that call does against fp64, and how large it may be; None where nothing is computed
    check: Callable[[], tuple[float, float]] | None = None
    dtype: str = ""  # the dtype of its products; empty where the case names it
    skip: Callable[[], str | None] | None = None  # returns why it cannot run here; None or empty where it can


@dataclass(frozen=True)
class Case:
    """An operation at a shape, and its providers by name, the first of which is the baseline of the ratios."""

    operation: str
    shape_name: str
    shape: Shape
    providers: dict[str, Provider]
    dtype: str = ""  # the dtype of all providers; empty where each provider has its own
    work: Callable[[str], Work] | None = None  # returns what the operation cannot do without, given a provider's dtype
    x: float | None = None  # the place in a series
    subject: str = ""  # what is compared, where an operation has several groups at a shape
    goal: float | None = None  # how many times as fast as the baseline ours should be

    @property
    def group(self) -> str:
        """What the tables are grouped by."""
        return ", ".join(part for part in (self.operation, self.subject, self.shape_name, self.dtype) if part)

    def fits_in_memory(self) -> bool:
        """Returns whether all providers can be alive at a time, each with weights, gradients and Adam's moments."""
        s = self.shape
        return 2 * s.d_in * s.d_sae * 16 * len(self.providers) < MEMORY_SHARE * memory_bytes()

    def row(self, provider: str) -> Row:
        """Returns what a result file says of a provider before it is timed."""
        dtype, baseline = self.providers[provider].dtype or self.dtype, next(iter(self.providers))
        row = Row(
            self.operation, self.group, self.shape_name, **asdict(self.shape), dtype=dtype, provider=provider, baseline=baseline,
            subject=self.subject, goal=self.goal, x=self.x,
        )  # fmt: skip
        if self.work is not None:
            work = self.work(dtype)
            row.floor_s = work.floor_s()
            row.gather_floor_s = work.floor_s(with_gathers=True) if work.gathered_bytes else None
        return row


@dataclass
class Outcome:
    """A provider's row, and the seconds of each counted call by the number of the round."""

    row: Row
    rounds: dict[int, list[float]] = field(default_factory=dict)
    has_faults: bool = False  # whether the allocator's setting makes a difference
    n_calls: int = 0  # the same in every round, or rounds in the machine's fast minutes would outweigh the others

    def by_setting(self) -> dict[str, dict[int, list[float]]]:
        """Returns the rounds under each setting, the better one first; one setting where they make no difference."""
        found: dict[str, dict[int, list[float]]] = {}
        for n, seconds in self.rounds.items():
            found.setdefault(allocator.setting_of(n) if self.has_faults else "", {})[n] = seconds
        return dict(sorted(found.items(), key=lambda item: median(item[1])))

    def reject(self, status: str, reason: str) -> None:
        """Marks the row as red or skipped: it has no time."""
        self.row.status, self.row.reason, self.rounds = status, reason, {}
        self.row.median_s = self.row.iqr_s = self.row.other_median_s = self.row.speedup = self.row.allocator = None

    def fill_in(self, baseline: Outcome) -> None:
        """Writes into the row what the calls say so far."""
        if not self.rounds:
            return
        row, (setting, rounds), *others = self.row, *self.by_setting().items()
        calls = [seconds for found in rounds.values() for seconds in found]
        row.median_s, row.iqr_s, row.rounds, row.calls = median(rounds), iqr(calls), len(rounds), len(calls)
        if others:
            row.allocator, row.other_median_s = setting, median(others[0][1])
        row.speedup = None  # the baseline may have failed since
        if baseline.rounds:
            their_rounds = next(iter(baseline.by_setting().values()))
            ratios = [median({n: their_rounds[n]}) / median({n: rounds[n]}) for n in rounds if n in their_rounds]
            row.speedup = statistics.median(ratios) if ratios else median(their_rounds) / row.median_s


def median(rounds: dict[int, list[float]]) -> float:
    """Returns the median of all calls."""
    return statistics.median(seconds for calls in rounds.values() for seconds in calls)


def iqr(values: list[float]) -> float | None:
    """Returns the distance between the quartiles; None for fewer than two values."""
    if len(values) < 2:
        return None
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return quartiles[2] - quartiles[0]


class Group:
    """The outcomes of a case's providers so far."""

    def __init__(self, case: Case) -> None:
        self.case, self.n_rounds = case, 0
        self.outcomes = {name: Outcome(case.row(name)) for name in case.providers}

    def unsteady(self) -> list[str]:
        """Returns the baseline and the providers whose times differ too much for one number; nothing if there are none."""
        found = [name for name, outcome in self.outcomes.items() if outcome.row.is_unsteady]
        return list(dict.fromkeys([next(iter(self.outcomes)), *found])) if found else []

    def measure(self, providers: Collection[str] | None = None) -> None:
        """Measures one round.

        Args:
            providers: The names of those that take part; by default all.
        """
        number, self.n_rounds = self.n_rounds, self.n_rounds + 1
        names = [name for name in self.outcomes if providers is None or name in providers]
        with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
            # what is too large to stand beside others is timed alone
            for together in [names] if self.case.fits_in_memory() else [[name] for name in names]:
                self._measure(together, number)
                gc.collect()  # what they kept
        baseline = next(iter(self.outcomes.values()))
        for outcome in self.outcomes.values():
            outcome.fill_in(baseline)

    def _measure(self, names: list[str], number: int) -> None:
        calls: dict[str, Call] = {}
        for name in names:
            with self._guarded(name):
                if self._may_run(name, number):
                    calls[name] = self.case.providers[name].make()
        if DEVICE == "cuda":
            _flushed()  # is nobody's peak
        gc.collect()
        with allocator.use(allocator.setting_of(number)):
            for name in random.Random(number).sample(list(calls), len(calls)):
                with self._guarded(name):
                    _time(calls[name], self.outcomes[name], number)

    def _may_run(self, name: str, number: int) -> bool:
        """Whether nothing stands against it; before its first round its numbers are compared."""
        provider, outcome = self.case.providers[name], self.outcomes[name]
        row = outcome.row
        if number == 0 and row.status == "ok":
            if provider.skip and (reason := provider.skip()):
                outcome.reject("skipped", reason)
            elif provider.check is not None:
                row.error, row.error_limit = provider.check()
                if not row.error <= row.error_limit:  # NaN is wrong, too
                    reason = f"error {row.error:.2g} against fp64, over the limit of {row.error_limit:.2g}"
                    outcome.reject("red", reason)
        return row.status == "ok"

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """An error leaves the provider without a time, and the others have theirs."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.outcomes[name].reject("skipped", f"out of memory: {str(error).splitlines()[0]}")
        except Exception as error:
            first_line = f"{type(error).__name__}: {error}".splitlines()[0]
            if "compiled" in name and "compiler" in str(error).lower():
                self.outcomes[name].reject("skipped", f"torch.compile needs a C++ compiler: {first_line}")
            else:
                traceback.print_exc()
                self.outcomes[name].reject("red", first_line)


def _time(call: Call, outcome: Outcome, number: int) -> None:
    """Adds the seconds of each call that counts in the round.

    In a training run a step follows another one like it, so a round's first call, which finds caches and heap as another
    provider left them, counts only where calls are long. Under a setting that keeps memory, calls count once it was found.
    """
    is_first, is_tuned = number == 0, allocator.setting_of(number) == allocator.TUNED
    if is_first:  # what stays, such as an optimiser's moments, is no part of the peak
        for _ in range(WARM_CALLS):
            call()
        with peak.measured() as found:
            _seconds(call, 1)
        outcome.row.peak_mib = found.mib
    elif DEVICE == "cuda":
        _seconds(call, WARM_CALLS)
    faults, seconds = math.inf, _seconds(call, 1)
    outcome.n_calls = outcome.n_calls or max(1, min(MOST_CALLS, round(CALLS_S / seconds[0])))
    if is_tuned or seconds[0] < LONG_S:
        for _ in range(MOST_REPEATS if is_tuned else 1):
            if not allocator.matters(faults, seconds[-1]):
                break
            before = allocator.page_faults()
            seconds = _seconds(call, outcome.n_calls)
            faults = (allocator.page_faults() - before) / len(seconds)
    if is_first:
        outcome.has_faults = allocator.setting_of(1) != allocator.DEFAULT and allocator.matters(faults, seconds[-1])
    outcome.rounds[number] = seconds


def _seconds(call: Call, count: int) -> list[float]:
    """Seconds of each of so many calls, on the device's own clock where that is a GPU, whose caches are emptied first."""
    if DEVICE == "cpu":
        return [_host_seconds(call) for _ in range(count)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        _flushed().zero_()  # the host gets ahead of the device meanwhile: launches are not timed, unless they are the bottleneck
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _host_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@cache
def _flushed() -> Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=DEVICE)


def cases_and_providers(cases: list[Case]) -> Any:
    """Parametrises a benchmark by case and provider."""
    pairs = [pytest.param(case, name, id=f"{case.group}-{name}") for case in cases for name in case.providers]
    return pytest.mark.parametrize(("case", "provider"), pairs)


def benchmark_of(cases: list[Case]) -> Any:
    """Returns a test that reports the time of each provider of each case."""

    @cases_and_providers(cases)
    def test(timed: Callable[[Case, str], None], case: Case, provider: str) -> None:
        timed(case, provider)

    return test


def replay(benchmark: Any, calls: list[float]) -> None:
    """Hands the seconds of a provider's calls to pytest-benchmark, for its tables, its storage and its comparisons."""
    ticks = iter([t for seconds in calls for t in (0.0, seconds)])
    benchmark._timer = partial(next, ticks)
    benchmark.pedantic(lambda: None, rounds=len(calls))


def report(benchmark: Any, group: Group, provider: str) -> None:
    """Ends every benchmark: it fails where the provider is wrong, skips where it cannot run, else reports its time."""
    outcome = group.outcomes[provider]
    benchmark.group = group.case.group
    if outcome.row.status == "red":
        pytest.fail(f"{benchmark.group}: {provider}: {outcome.row.reason}")
    if outcome.row.status == "skipped":
        pytest.skip(f"{provider}: {outcome.row.reason}")
    replay(benchmark, [seconds for calls in next(iter(outcome.by_setting().values())).values() for seconds in calls])
