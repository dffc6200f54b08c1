"""Times the providers of one operation in turn, each only after its numbers were compared with fp64.

A machine's speed drifts: by a tenth in a minute, by more in a quarter of an hour, and one call differs from the next by up to a
third, depending on where its arrays happen to lie. Some of the differences that count are smaller than that. So the providers of
a group take turns, in another order each time, and a whole run gives each group several sessions, minutes apart, each of which
makes its providers anew. The spread in a row is that of all sessions, and nearly every figure of another run lies within it.

In a training run a step follows another one like it, so the first call of a turn, which finds caches and heap as another provider
left them, counts only where calls are long. Slow providers have fewer calls and sessions. A provider to which page faults cost
time has each turn under both settings of `benchmarks.allocator`, and the better one counts.
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

from benchmarks import allocator, clock
from benchmarks.floor import Work
from benchmarks.memory import MIB, Peak, memory_bytes
from benchmarks.outcome import Outcome
from benchmarks.shapes import DEVICE, Shape

# the smallest number of turns in a session, and the largest, which is reached where the budget lasts
ONE_OF_SEVERAL, ONLY, QUICK = (1, 1), (3, 9), (3, 3)
BUDGET_S = 1.0
TURN_S = 0.1  # a provider's calls in a turn take about so long together
MOST_CALLS = 50  # a turn has no more calls than this
MOST_REPEATED_TURNS = (
    4  # a turn is repeated so often at most while page faults show that its memory is still being found
)
WARM_CALLS = {"cpu": 0, "cuda": 3}[DEVICE]  # they compile and tune; ours is dense until it has counted
SESSIONS_PER_SLOW_ONE = 2  # slow providers take part in every second session
FLUSHED_BYTES = 2**28  # no cache of a GPU holds more
MOST_GRAPHS = 256  # a compiled function has one for each shape; those of an earlier session are not compiled again

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
    work: Callable[[str], Work] | None = field(default=None, hash=False, compare=False)  # takes the dtype of a provider
    x: float | None = None  # of a series

    @property
    def group(self) -> str:
        """What the tables are grouped by."""
        return ", ".join(part for part in (self.operation, self.shape_name, self.dtype) if part)

    def fits_in_memory(self) -> bool:
        """Whether all providers can be alive at a time, each with weights, gradients and Adam's moments."""
        s = self.shape
        return 2 * s.d_in * s.d_sae * 16 * len(self.providers) < MEMORY_SHARE * memory_bytes()

    def dtype_of(self, provider: str) -> str:
        """The name of the dtype of a provider's products."""
        return self.providers[provider].dtype or self.dtype

    def work_of(self, provider: str) -> Work | None:
        """What the operation cannot do without in a provider's dtype; None where nothing is known of that."""
        return self.work(self.dtype_of(provider)) if self.work else None

    def row(self, provider: str) -> dict[str, Any]:
        """What a result file says of a provider before it is timed."""
        s, dtype, work = self.shape, self.dtype_of(provider), self.work_of(provider)
        return {
            "operation": self.operation, "group": self.group, "shape": self.shape_name, "is_cut": s.is_cut,
            "n_tokens": s.n_tokens, "d_in": s.d_in, "d_sae": s.d_sae, "l0": s.l0, "dtype": dtype,
            "provider": provider, "baseline": next(iter(self.providers)), "status": "ok", "reason": None,
            "error": None, "error_limit": None, "median_s": None, "iqr_s": None, "allocator": None, "other_median_s": None,
            "turns": 0, "rounds": 0, "speedup": None, "speedup_iqr": None,
            "peak_mib": None, "dense_tensor_mib": s.n_tokens * s.d_sae * (2 if dtype == "bf16" else 4) / MIB,
            "least_bytes": work.n_bytes if work else None, "floor_s": None, "clock_mhz": None, "x": self.x,
        }  # fmt: skip


@dataclass
class Group:
    """The outcomes of a group's providers so far."""

    outcomes: dict[str, Outcome]
    sessions: int = 0
    turns: int = 0


class GroupTimer:
    """Measures groups, one session at a time; the first session adds the rows of the group's providers to `rows`."""

    def __init__(self, quick: bool, rows: list[dict[str, Any]]) -> None:
        self.quick, self.rows = quick, rows
        self._groups: dict[str, Group] = {}

    def has_begun(self, case: Case) -> bool:
        return case.group in self._groups

    def outcome(self, case: Case, provider: str) -> Outcome:
        """Returns the provider's outcome; a group that has not begun is measured in a single session."""
        if not self.has_begun(case):
            self.run_session(case, QUICK if self.quick else ONLY)
        return self._groups[case.group].outcomes[provider]

    def unsteady(self, case: Case) -> list[str]:
        """Returns the baseline and the providers whose times differ too much for one number; nothing if there are none."""
        outcomes = self._groups[case.group].outcomes if self.has_begun(case) else {}
        found = [name for name, outcome in outcomes.items() if outcome.is_unsteady]
        return list(dict.fromkeys([next(iter(outcomes)), *found])) if found else []

    def run_session(
        self, case: Case, turns: tuple[int, int] = ONE_OF_SEVERAL, providers: Collection[str] | None = None
    ) -> None:
        """Runs one session of a group; an error while calls are timed leaves the whole group red.

        Args:
            case: The case of the group.
            turns: The smallest and the largest number of turns.
            providers: The providers that take part; by default all, but the slow ones only every second time.
        """
        if not self.has_begun(case):
            self._groups[case.group] = Group({name: Outcome(case.row(name)) for name in case.providers})
            self.rows += [outcome.row for outcome in self._groups[case.group].outcomes.values()]
        group = self._groups[case.group]
        try:
            with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
                _run_session(case, group, turns, providers)
        except Exception as error:  # measuring the group again would end the same way
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            for outcome in group.outcomes.values():
                outcome.row.update(status="red", reason=reason)
        baseline = next(iter(group.outcomes.values()))
        for name, outcome in group.outcomes.items():
            if outcome.row["status"] != "ok":
                outcome.row.update(
                    dict.fromkeys(("median_s", "iqr_s", "allocator", "other_median_s", "speedup", "speedup_iqr"))
                )
            elif outcome.turns:
                outcome.fill_in(baseline, case.work_of(name))


def _run_session(case: Case, group: Group, turns: tuple[int, int], providers: Collection[str] | None) -> None:
    if providers is None:
        is_for_all = group.sessions % SESSIONS_PER_SLOW_ONE == 0
        providers = [name for name, outcome in group.outcomes.items() if is_for_all or not outcome.is_slow]
    names = [name for name, outcome in group.outcomes.items() if name in providers and outcome.row["status"] == "ok"]
    # what is too large to stand beside others is timed alone
    for together in [names] if case.fits_in_memory() else [[name] for name in names]:
        _take_turns({name: case.providers[name] for name in together}, group, turns)
        gc.collect()  # what they kept
    group.sessions += 1
    taken = [turns for outcome in group.outcomes.values() for turns in outcome.by_setting.values()]
    group.turns = max((n + 1 for turns in taken for n in turns), default=0)


def _take_turns(providers: dict[str, Provider], group: Group, turns: tuple[int, int]) -> None:
    made = {name: _made(provider, group.outcomes[name], group.turns) for name, provider in providers.items()}
    calls = {name: call for name, call in made.items() if call is not None}
    if DEVICE == "cuda":
        _flushed()  # is nobody's peak
    gc.collect()
    (fewest, most), order = turns, random.Random(group.turns)
    started, n_turns = time.perf_counter(), 0
    while calls and (n_turns < fewest or (n_turns < most and time.perf_counter() - started < BUDGET_S)):
        for setting in allocator.settings():
            _take_turns_under(setting, calls, group, group.turns + n_turns, order)
        n_turns += 1
    for name in calls:
        group.outcomes[name].row["clock_mhz"] = clock.mhz()


def _take_turns_under(setting: str, calls: dict[str, Call], group: Group, turn: int, order: random.Random) -> None:
    """A turn of each provider that is due under the setting, in random order."""
    due = {name: group.outcomes[name] for name in calls if group.outcomes[name].is_due(setting)}
    with allocator.use(setting):
        for name in order.sample(list(due), len(due)):
            if turn == 0 and setting == allocator.DEFAULT:
                _take_very_first_turn(calls[name], due[name])
            else:
                _take_turn(calls[name], due[name], turn, setting)


def _take_very_first_turn(call: Call, outcome: Outcome) -> None:
    """Tells the peak too, since earlier calls have made what stays, such as an optimiser's moments, and what pages cost."""
    with Peak() as peak:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    outcome.row["peak_mib"] = peak.mib
    faults = _take_turn(call, outcome, 0)
    if allocator.TUNED in allocator.settings() and allocator.matters(faults, outcome.fastest):
        outcome.by_setting[allocator.TUNED] = {}


def _made(provider: Provider, outcome: Outcome, turn: int) -> Call | None:
    """The call, once its numbers are right and it has run; None, and a reason in the row, where there is none."""
    row, is_first = outcome.row, not outcome.turns
    reason = provider.skip() if provider.skip else None
    if reason:
        row.update(status="skipped", reason=reason)
        return None
    try:
        if provider.check is not None and is_first:
            row["error"], row["error_limit"] = provider.check()
        if row["error"] is not None and not row["error"] <= row["error_limit"]:
            reason = f"error {row['error']:.2g} against fp64, over the limit of {row['error_limit']:.2g}"
            row.update(status="red", reason=reason)
            return None
        call = provider.make()
        for _ in range(max(WARM_CALLS, int(is_first and "compiled" in row["provider"]))):
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        if is_first or not outcome.is_slow:  # for a slow one, the first call of its turn finds the session's memory
            _take_first_call(call, outcome, turn)
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


def _take_first_call(call: Call, outcome: Outcome, turn: int) -> None:
    """Makes the first call of a session, which counts where calls are long."""
    (first,) = _seconds(call, 1)
    outcome.fastest = min(outcome.fastest, first)
    if outcome.is_long and outcome.is_due(allocator.DEFAULT):
        outcome.take(allocator.DEFAULT, turn, [first])


def _take_turn(call: Call, outcome: Outcome, turn: int, setting: str = allocator.DEFAULT) -> float:
    """Adds the seconds of each call that counts; returns the page faults of one."""
    (first,), faults = _seconds_and_faults(call, 1)
    outcome.fastest, counted = min(outcome.fastest, first), [first]
    outcome.n_calls = outcome.n_calls or max(1, min(MOST_CALLS, round(TURN_S / first)))
    if not outcome.is_long:
        counted, faults = _seconds_and_faults(call, outcome.n_calls)
    for _ in range(MOST_REPEATED_TURNS if setting == allocator.TUNED else 0):
        if not allocator.matters(faults, counted[-1]):
            break  # all the memory that it keeps has been found
        counted, faults = _seconds_and_faults(call, outcome.n_calls)
    outcome.take(setting, turn, counted)
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


def replay(benchmark: Any, samples: list[float]) -> None:
    """Reports the seconds of a provider's calls as the benchmark's own rounds."""
    ticks = iter([t for sample in samples for t in (0.0, sample)])
    benchmark._timer = partial(next, ticks)
    benchmark.pedantic(lambda: None, rounds=len(samples))


def report(benchmark: Any, timer: GroupTimer, case: Case, provider: str) -> None:
    """The body of every benchmark: fails where the provider is wrong, skips where it cannot run, else reports its time."""
    outcome = timer.outcome(case, provider)
    benchmark.group = case.group
    if outcome.row["status"] == "red":
        pytest.fail(f"{case.group}: {provider}: {outcome.row['reason']}")
    if outcome.row["status"] == "skipped":
        pytest.skip(f"{provider}: {outcome.row['reason']}")
    replay(benchmark, outcome.samples)
