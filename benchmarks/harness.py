"""Measures the providers of one operation in rounds, each provider only after its numbers were compared with fp64.

A machine's speed drifts: by a tenth in a minute, by more in a quarter of an hour, and one call differs from the next by up to a
third, depending on where its arrays happen to lie. Some of the differences that count are smaller than that. So a group is
measured in several rounds. A round makes every provider anew and times a few calls of each, in an order that changes from round
to round; a whole run visits all its groups in every round, so that the rounds of a group are minutes apart. The spread in a row
is that of all rounds, and a ratio compares two providers in the same round.

In a training run a step follows another one like it, so the first call in a round, which finds caches and heap as another
provider left them, counts only where calls are long. A slow provider takes part in every second round. A provider to which page
faults cost time is timed under both settings of `benchmarks.allocator`, and the better one counts.
"""

from __future__ import annotations

import gc
import random
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import allocator, peak
from benchmarks.floor import Work
from benchmarks.outcome import Outcome
from benchmarks.peak import memory_bytes
from benchmarks.shapes import DEVICE, Shape
from benchmarks.writer import clock_mhz

CALLS_S = 0.1  # a provider's calls in a round take about so long together
MOST_CALLS = 50  # a round has no more calls of a provider than this
MOST_REPEATS = 4  # calls are repeated so often at most while page faults show that their memory is still being found
WARM_CALLS = {"cpu": 0, "cuda": 3}[DEVICE]  # they compile and tune; ours is dense until it has counted
ROUNDS_PER_SLOW_ONE = 2  # slow providers take part in every second round
FLUSHED_BYTES = 2**28  # no cache of a GPU holds more
MOST_GRAPHS = 256  # a compiled function has one for each shape; those of an earlier round are not compiled again
MEMORY_SHARE = 0.5  # the share of the memory that all providers of a group may keep; their calls take more
Call = Callable[[], object]


@dataclass(frozen=True)
class Prepared:
    """A call that takes what `before` returns, which is made again each time, and is not timed."""

    before: Callable[[], Any]
    timed: Callable[[Any], object]

    def __call__(self) -> object:
        return self.timed(self.before())


@dataclass(frozen=True)
class Provider:
    """One way to do an operation.

    Args:
        make: Returns the call to be timed.
        check: Returns the error of what that call does against fp64, and how large it may be; None where nothing is computed.
        dtype: The name of the dtype of its products; empty where it is that of the case.
        skip: Returns why it cannot run here; None or empty where it can.
    """

    make: Callable[[], Call]
    check: Callable[[], tuple[float, float]] | None = None
    dtype: str = ""
    skip: Callable[[], str | None] | None = None


@dataclass(frozen=True)
class Case:
    """An operation at a shape; its providers, the first of which is the baseline of the ratios."""

    operation: str
    shape_name: str
    shape: Shape
    providers: dict[str, Provider] = field(hash=False, compare=False)
    dtype: str = ""
    work: Callable[[str], Work] | None = field(default=None, hash=False, compare=False)  # takes the dtype of a provider
    x: float | None = None  # of a series

    @property
    def group(self) -> str:
        """What the tables are grouped by."""
        return ", ".join(part for part in (self.operation, self.shape_name, self.dtype) if part)

    def fits_in_memory(self) -> bool:
        """Returns whether all providers can be alive at a time, each with weights, gradients and Adam's moments."""
        s = self.shape
        return 2 * s.d_in * s.d_sae * 16 * len(self.providers) < MEMORY_SHARE * memory_bytes()

    def work_of(self, provider: str) -> Work | None:
        """Returns what the operation cannot do without in a provider's own dtype; None where nothing is known of that."""
        return self.work(self.providers[provider].dtype or self.dtype) if self.work else None

    def row(self, provider: str) -> dict[str, Any]:
        """Returns what a result file says of a provider before it is timed."""
        s = self.shape
        return {
            "operation": self.operation, "group": self.group, "shape": self.shape_name, "is_cut": s.is_cut,
            "n_tokens": s.n_tokens, "d_in": s.d_in, "d_sae": s.d_sae, "l0": s.l0, "x": self.x,
            "dtype": self.providers[provider].dtype or self.dtype, "provider": provider,
            "baseline": next(iter(self.providers)), "status": "ok", "reason": None, "error": None, "error_limit": None,
            "median_s": None, "iqr_s": None, "allocator": None, "other_median_s": None, "rounds": 0, "calls": 0,
            "speedup": None, "speedup_iqr": None, "peak_mib": None, "floor_s": None, "gather_floor_s": None, "clock_mhz": None,
        }  # fmt: skip


class Group:
    """The outcomes of a case's providers so far."""

    def __init__(self, case: Case) -> None:
        self.case, self.n_rounds = case, 0
        self.outcomes = {name: Outcome(case.row(name)) for name in case.providers}

    def unsteady(self) -> list[str]:
        """Returns the baseline and the providers whose times differ too much for one number; nothing if there are none."""
        found = [name for name, outcome in self.outcomes.items() if outcome.is_unsteady]
        return list(dict.fromkeys([next(iter(self.outcomes)), *found])) if found else []

    def measure(self, providers: Collection[str] | None = None) -> None:
        """Measures one round; an error while calls are timed leaves the whole group red.

        Args:
            providers: The names of those that take part; by default all, but the slow ones only in every second round.
        """
        if providers is None:
            is_for_all = self.n_rounds % ROUNDS_PER_SLOW_ONE == 0
            providers = [name for name, outcome in self.outcomes.items() if is_for_all or not outcome.is_slow]
        names = [name for name, outcome in self.outcomes.items() if name in providers and outcome.row["status"] == "ok"]
        try:
            with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
                # what is too large to stand beside others is timed alone
                for together in [names] if self.case.fits_in_memory() else [[name] for name in names]:
                    self._measure(together)
                    gc.collect()  # what they kept
        except Exception as error:  # measuring the group again would end the same way
            traceback.print_exc()
            for outcome in self.outcomes.values():
                outcome.reject("red", _first_line(error))
        self.n_rounds += 1
        baseline = next(iter(self.outcomes.values()))
        for name, outcome in self.outcomes.items():
            outcome.fill_in(baseline, self.case.work_of(name))

    def _measure(self, names: list[str]) -> None:
        made = {name: self._made(name) for name in names}
        calls = {name: call for name, call in made.items() if call is not None}
        if DEVICE == "cuda":
            _flushed()  # is nobody's peak
        gc.collect()
        order = random.Random(self.n_rounds)
        for setting in allocator.settings():
            due = [name for name in calls if self.outcomes[name].is_due(setting)]
            with allocator.use(setting):
                for name in order.sample(due, len(due)):
                    if self.n_rounds == 0 and setting == allocator.DEFAULT:
                        _time_first_calls(calls[name], self.outcomes[name])
                    else:
                        _time_calls(calls[name], self.outcomes[name], self.n_rounds, setting)
        for name in calls:
            self.outcomes[name].row["clock_mhz"] = clock_mhz()

    def _made(self, name: str) -> Call | None:
        """The call, once its numbers are right and it has run; None, and a reason in the row, where there is none."""
        provider, outcome = self.case.providers[name], self.outcomes[name]
        row, is_first, is_compiled = outcome.row, not outcome.rounds, "compiled" in name
        if provider.skip and (reason := provider.skip()):
            outcome.reject("skipped", reason)
            return None
        try:
            if provider.check is not None and is_first:
                row["error"], row["error_limit"] = provider.check()
            if row["error"] is not None and not row["error"] <= row["error_limit"]:
                limit = f"over the limit of {row['error_limit']:.2g}"
                outcome.reject("red", f"error {row['error']:.2g} against fp64, {limit}")
                return None
            call = provider.make()
            for _ in range(max(WARM_CALLS, int(is_first and is_compiled))):
                call()
                if DEVICE == "cuda":
                    torch.cuda.synchronize()
            if is_first or not outcome.is_slow:  # for a slow one, the first timed call finds the round's memory
                _make_first_call(call, outcome, self.n_rounds)
        except torch.OutOfMemoryError as error:
            outcome.reject("skipped", f"out of memory: {str(error).splitlines()[0]}")
            return None
        except Exception as error:
            if is_compiled and "compiler" in str(error).lower():
                outcome.reject("skipped", f"torch.compile needs a C++ compiler: {_first_line(error)}")
            else:  # the others shall have their times
                traceback.print_exc()
                outcome.reject("red", _first_line(error))
            return None
        return call


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _make_first_call(call: Call, outcome: Outcome, number: int) -> None:
    """Makes the first call of a round, which counts where calls are long."""
    (first,) = _seconds(call, 1)
    outcome.fastest = min(outcome.fastest, first)
    if outcome.is_long and outcome.is_due(allocator.DEFAULT):
        outcome.take(allocator.DEFAULT, number, [first])


def _time_first_calls(call: Call, outcome: Outcome) -> None:
    """Tells the peak too, since earlier calls have made what stays, such as an optimiser's moments, and what pages cost."""
    with peak.measured() as found:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    outcome.row["peak_mib"] = found.mib
    faults = _time_calls(call, outcome, 0)
    if allocator.TUNED in allocator.settings() and allocator.matters(faults, outcome.fastest):
        outcome.by_setting[allocator.TUNED] = {}


def _time_calls(call: Call, outcome: Outcome, number: int, setting: str = allocator.DEFAULT) -> float:
    """Adds the seconds of each call that counts in the round; returns the page faults of one."""
    (first,), faults = _seconds_and_faults(call, 1)
    outcome.fastest, counted = min(outcome.fastest, first), [first]
    outcome.n_calls = outcome.n_calls or max(1, min(MOST_CALLS, round(CALLS_S / first)))
    if not outcome.is_long:
        counted, faults = _seconds_and_faults(call, outcome.n_calls)
    for _ in range(MOST_REPEATS if setting == allocator.TUNED else 0):
        if not allocator.matters(faults, counted[-1]):
            break  # all the memory that it keeps has been found
        counted, faults = _seconds_and_faults(call, outcome.n_calls)
    outcome.take(setting, number, counted)
    return faults


def _seconds_and_faults(call: Call, count: int) -> tuple[list[float], float]:
    """Seconds of each of so many calls, and the page faults of one."""
    before = allocator.page_faults()
    seconds = _seconds(call, count)
    return seconds, (allocator.page_faults() - before) / count


def _seconds(call: Call, count: int) -> list[float]:
    """Seconds of each of so many calls, on the device's own clock where that is a GPU, whose caches are emptied first."""
    if DEVICE == "cpu":
        return [_host_seconds(_ready(call)) for _ in range(count)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        ready = _ready(call)
        _flushed().zero_()  # the host gets ahead of the device meanwhile: launches are not timed, unless they are the bottleneck
        start.record()
        ready()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _ready(call: Call) -> Call:
    return partial(call.timed, call.before()) if isinstance(call, Prepared) else call


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


def replay(benchmark: Any, calls: list[float]) -> None:
    """Hands the seconds of a provider's calls to pytest-benchmark, for its tables, its storage and its comparisons."""
    ticks = iter([t for seconds in calls for t in (0.0, seconds)])
    benchmark._timer = partial(next, ticks)
    benchmark.pedantic(lambda: None, rounds=len(calls))


def report(benchmark: Any, group: Group, provider: str) -> None:
    """Ends every benchmark: it fails where the provider is wrong, skips where it cannot run, else reports its time."""
    outcome = group.outcomes[provider]
    benchmark.group = group.case.group
    if outcome.row["status"] == "red":
        pytest.fail(f"{benchmark.group}: {provider}: {outcome.row['reason']}")
    if outcome.row["status"] == "skipped":
        pytest.skip(f"{provider}: {outcome.row['reason']}")
    replay(benchmark, outcome.calls)
