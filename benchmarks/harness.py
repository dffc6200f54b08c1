"""Times the providers of one operation in turn, each only after its numbers were compared with fp64.

Machines drift by a tenth in a minute, which is more than some of the differences that count. So the providers of a group take
turns, in another order each time, when the first test of the group runs; each test then reports its own samples through
pytest-benchmark's timer. In a training run a step follows its like, so the first call of a turn, which finds caches and heap
as another provider left them, counts only where calls are long. In a whole run each group has two sittings, minutes apart, so
that the spread that it reports has the machine's drift in it.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import clock
from benchmarks.floor import Work
from benchmarks.memory import MIB, Peak, memory_bytes
from benchmarks.shapes import DEVICE, Shape

BUDGET_S = 1.0  # of a group's turns
TURNS = (3, 9)  # at least and at most
SITTINGS = ((1, 4), (2, 5))  # likewise, where a group is measured twice
QUICK_TURNS = (3, 3)
TURN_S = 0.1  # of a provider's calls in a turn
CALLS = (2, 50)  # of a turn, at least and at most
# compile, tune, make what is kept; on a GPU ours is dense until it has counted
WARM_CALLS = {"cpu": 1, "cuda": 3}[DEVICE]
LONG_S = 1.0  # beside this, what a cold cache costs is nothing
STALL_S = 2.0  # that the first call of all can take on top, where memory has to be found for it
FLUSHED_BYTES = 2**28  # more than any cache of a GPU

MEMORY_SHARE = 0.5  # for what all providers of a group keep; passes take more
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
        check: Error of what that call does against fp64, and how large it may be; None where nothing is computed.
        dtype: Of its products; that of the case where empty.
        skip: Says why it cannot run here; None or empty where it can.
    """

    make: Callable[[], Call]
    check: Callable[[], tuple[float, float]] | None = None
    dtype: str = ""
    skip: Callable[[], str | None] | None = None


@dataclass(frozen=True)
class Case:
    """An operation at a shape; its providers, the first of which the ratios refer to."""

    operation: str
    shape_name: str
    shape: Shape
    providers: dict[str, Provider] = field(hash=False, compare=False)
    dtype: str = ""
    work: Work | None = None
    x: float | None = None  # of a series

    @property
    def group(self) -> str:
        """What the tables are grouped by."""
        return ", ".join(part for part in (self.operation, self.shape_name, self.dtype) if part)

    def fits_in_memory(self) -> bool:
        """Whether all providers can be alive at a time, each with weights, gradients and Adam's moments."""
        s = self.shape
        return 2 * s.d_in * s.d_sae * 16 * len(self.providers) < MEMORY_SHARE * memory_bytes()

    def row(self, provider: str) -> dict[str, Any]:
        """What a result file says of a provider before it is timed."""
        s, dtype = self.shape, self.providers[provider].dtype or self.dtype
        return {
            "operation": self.operation, "group": self.group, "shape": self.shape_name, "is_cut": s.is_cut,
            "n_tokens": s.n_tokens, "d_in": s.d_in, "d_sae": s.d_sae, "l0": s.l0, "dtype": dtype,
            "provider": provider, "baseline": next(iter(self.providers)), "status": "ok", "reason": None,
            "error": None, "error_limit": None, "median_s": None, "iqr_s": None, "turns": 0, "rounds": 0, "speedup": None,
            "speedup_iqr": None, "peak_mib": None, "dense_tensor_mib": s.n_tokens * s.d_sae * (2 if dtype == "bf16" else 4) / MIB,
            "least_bytes": self.work.n_bytes if self.work else None, "floor_s": None, "clock_mhz": None, "x": self.x,
        }  # fmt: skip


@dataclass
class Outcome:
    """A provider's row and the seconds of each counted call of each of its turns."""

    row: dict[str, Any]
    turns: list[list[float]]
    fastest: float = math.inf  # seconds of a call, counted or not

    @property
    def samples(self) -> list[float]:
        return [seconds for turn in self.turns for seconds in turn]


class GroupTimer:
    """Measures groups and remembers them."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self._outcomes: dict[str, dict[str, Outcome]] = {}
        self._finished: set[str] = set()

    def begin(self, case: Case) -> None:
        """The first sitting of a group; `outcome` has the second one."""
        self._sit(case, SITTINGS[0])

    def outcome(self, case: Case, provider: str) -> Outcome:
        """The provider's outcome; measures the whole group at the first call."""
        if case.group not in self._finished:
            self._finished.add(case.group)
            has_begun = case.group in self._outcomes
            self._sit(case, SITTINGS[1] if has_begun else QUICK_TURNS if self.quick else TURNS)
            outcomes = list(self._outcomes[case.group].values())
            for outcome in outcomes:
                if outcome.turns:
                    _fill_in(outcome, outcomes[0].turns, case.work)
        return self._outcomes[case.group][provider]

    def _sit(self, case: Case, turns: tuple[int, int]) -> None:
        torch._dynamo.reset()  # or what was compiled for another shape would be compiled again, for shapes of all kinds
        new = {name: Outcome(case.row(name), []) for name in case.providers}
        outcomes = self._outcomes.setdefault(case.group, new)
        names = [name for name in case.providers if outcomes[name].row["status"] == "ok"]
        # what is too large to stand beside others is timed alone
        for together in [names] if case.fits_in_memory() else [[name] for name in names]:
            _take_turns({name: case.providers[name] for name in together}, outcomes, turns)
            gc.collect()  # what they kept


def _take_turns(providers: dict[str, Provider], outcomes: dict[str, Outcome], turns: tuple[int, int]) -> None:
    made = {name: _made(provider, outcomes[name]) for name, provider in providers.items()}
    calls = {name: call for name, call in made.items() if call is not None}
    if DEVICE == "cuda":
        _flushed()  # is nobody's peak
    gc.collect()
    (fewest, most), order, started, n_turns = turns, random.Random(0), time.perf_counter(), 0
    while calls and (n_turns < fewest or (n_turns < most and time.perf_counter() - started < BUDGET_S)):
        for name in order.sample(list(calls), len(calls)):
            outcome = outcomes[name]
            if n_turns != 1:  # the first has what stays, such as an optimiser's moments
                _take_turn(calls[name], outcome)
                continue
            with Peak() as peak:
                _take_turn(calls[name], outcome)
            outcome.row["peak_mib"] = peak.mib
        n_turns += 1
    for name in calls:
        outcomes[name].row["clock_mhz"] = clock.mhz()


def _made(provider: Provider, outcome: Outcome) -> Call | None:
    """The call, once its numbers are right and it has run; None, and a reason in the row, where there is none."""
    row, is_known = outcome.row, bool(outcome.turns)
    reason = provider.skip() if provider.skip else None
    if reason:
        row.update(status="skipped", reason=reason)
        return None
    try:
        if provider.check is not None and not is_known:
            row["error"], row["error_limit"] = provider.check()
        if row["error"] is not None and not row["error"] <= row["error_limit"]:
            reason = f"error {row['error']:.2g} against fp64, over the limit of {row['error_limit']:.2g}"
            row.update(status="red", reason=reason)
            return None
        call = provider.make()
        # on a CPU, of what has run in a check or a first sitting, only what is compiled takes longer at first
        has_run = is_known or provider.check is not None
        for _ in range(0 if has_run and DEVICE == "cpu" and "compiled" not in row["provider"] else WARM_CALLS):
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
    except torch.OutOfMemoryError as error:
        row.update(status="skipped", reason=f"out of memory: {str(error).splitlines()[0]}")
        return None
    except Exception as error:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        if "compiled" in row["provider"] and "compiler" in str(error).lower():
            row.update(status="skipped", reason=f"torch.compile needs a C++ compiler: {message}")
        else:  # the others shall have their times
            traceback.print_exc()
            row.update(status="red", reason=message)
        return None
    return call


def _take_turn(call: Call, outcome: Outcome) -> None:
    """Adds the seconds of each call that counts."""
    (first,) = _seconds(call, 1)
    is_long = min(first, outcome.fastest) >= (LONG_S if outcome.turns else LONG_S + STALL_S)
    fewest, most = CALLS if first < LONG_S else (1, 1)
    turn = [first] if is_long else _seconds(call, max(fewest, min(most, round(TURN_S / first))))
    outcome.turns.append(turn)
    outcome.fastest = min(outcome.fastest, first, *turn)


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


def _fill_in(outcome: Outcome, baseline: list[list[float]], work: Work | None) -> None:
    row, turns, samples = outcome.row, outcome.turns, outcome.samples
    quartiles = statistics.quantiles(samples, n=4)
    row.update(median_s=statistics.median(samples), iqr_s=quartiles[2] - quartiles[0])
    row.update(turns=len(turns), rounds=len(samples))
    medians, of_baseline = ([statistics.median(turn) for turn in found] for found in (turns, baseline))
    if len(of_baseline) == len(medians):  # of one turn both
        ratios = [b / s for b, s in zip(of_baseline, medians, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        row.update(speedup=statistics.median(ratios), speedup_iqr=quartiles[2] - quartiles[0])
    elif of_baseline:
        row["speedup"] = statistics.median(of_baseline) / statistics.median(medians)
    if work is not None:
        row["floor_s"] = work.floor_s()


def cases_and_providers(cases: list[Case]) -> Any:
    """Parametrises a benchmark by case and provider."""
    pairs = [pytest.param(case, name, id=f"{case.group}-{name}") for case in cases for name in case.providers]
    return pytest.mark.parametrize(("case", "provider"), pairs)


def replay(benchmark: Any, outcome: Outcome) -> None:
    """Reports the samples of a provider as the benchmark's own rounds."""
    ticks = iter([t for sample in outcome.samples for t in (0.0, sample)])
    benchmark._timer = partial(next, ticks)
    benchmark.pedantic(lambda: None, rounds=len(outcome.samples))


def report(benchmark: Any, timer: GroupTimer, rows: list[dict[str, Any]], case: Case, provider: str) -> None:
    """The body of every benchmark: fails where the provider is wrong, skips where it cannot run, else reports its time."""
    outcome = timer.outcome(case, provider)
    rows.append(outcome.row)
    benchmark.group = case.group
    if outcome.row["status"] == "red":
        pytest.fail(f"{case.group}: {provider}: {outcome.row['reason']}")
    if outcome.row["status"] == "skipped":
        pytest.skip(f"{provider}: {outcome.row['reason']}")
    replay(benchmark, outcome)
