"""Times the providers of one operation in turn, each only after its numbers were compared with fp64.

Machines drift by a tenth in a minute, which is more than some of the differences that count. So all providers of a group are
timed round by round, in another order each time, when the first test of the group runs; each test then reports its own
samples through pytest-benchmark's timer.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.floor import Work
from benchmarks.memory import MIB, memory_bytes, peak_mib
from benchmarks.shapes import Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUDGET_S = 5.0  # of a group's rounds
ROUNDS = (3, 9)
QUICK_ROUNDS = (3, 3)
BLOCK_S = 0.01  # of work between two looks at the clock
FLUSHED_BYTES = 2**28  # more than any cache of a GPU

MEMORY_SHARE = 0.5  # for what all providers of a group keep; passes take more
Call = Callable[[], object]


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
            "error": None, "error_limit": None, "median_s": None, "iqr_s": None, "rounds": 0, "speedup": None,
            "peak_mib": None, "dense_tensor_mib": s.n_tokens * s.d_sae * (2 if dtype == "bf16" else 4) / MIB,
            "floor_s": None, "x": self.x,
        }  # fmt: skip


@dataclass
class Outcome:
    """A provider's row and the seconds of each of its rounds."""

    row: dict[str, Any]
    samples: list[float]


class GroupTimer:
    """Measures groups once and remembers them."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self._outcomes: dict[str, dict[str, Outcome]] = {}

    def outcome(self, case: Case, provider: str) -> Outcome:
        """The provider's outcome; measures the whole group at the first call."""
        if case.group not in self._outcomes:
            self._outcomes[case.group] = self._measure(case)
        return self._outcomes[case.group][provider]

    def _measure(self, case: Case) -> dict[str, Outcome]:
        torch._dynamo.reset()  # or what was compiled for another shape would be compiled again, for shapes of all kinds
        outcomes = {name: Outcome(case.row(name), []) for name in case.providers}
        names = list(case.providers)
        # what is too large to stand beside others is timed alone
        for together in [names] if case.fits_in_memory() else [[name] for name in names]:
            calls = {name: call for name in together if (call := _gated(case.providers[name], outcomes[name].row))}
            self._time(calls, {name: outcomes[name].samples for name in calls})
        for outcome in outcomes.values():
            if outcome.samples:
                _fill_in(outcome, outcomes[names[0]].samples, case.work)
        return outcomes

    def _time(self, calls: dict[str, Call], samples: dict[str, list[float]]) -> None:
        repeats = {name: _repeats(call) for name, call in calls.items()}
        fewest, most = QUICK_ROUNDS if self.quick else ROUNDS
        order, started, rounds = random.Random(0), time.perf_counter(), 0
        while calls and (rounds < fewest or (rounds < most and time.perf_counter() - started < BUDGET_S)):
            for name in order.sample(list(calls), len(calls)):
                samples[name].append(_seconds(calls[name], repeats[name]))
            rounds += 1


def _gated(provider: Provider, row: dict[str, Any]) -> Call | None:
    """The call, once its numbers are right and its memory is known; None, and a reason in the row, where there is none."""
    reason = provider.skip() if provider.skip else None
    if reason:
        row.update(status="skipped", reason=reason)
        return None
    try:
        if provider.check is not None:
            row["error"], row["error_limit"] = provider.check()
        if row["error"] is not None and not row["error"] <= row["error_limit"]:
            reason = f"error {row['error']:.2g} against fp64, over the limit of {row['error_limit']:.2g}"
            row.update(status="red", reason=reason)
            return None
        call = provider.make()
        row["peak_mib"] = peak_mib(call)
    except torch.OutOfMemoryError as error:
        row.update(status="skipped", reason=f"out of memory: {str(error).splitlines()[0]}")
        return None
    except Exception as error:
        if "compiled" not in row["provider"] or "compiler" not in str(error).lower():
            raise
        row.update(status="skipped", reason=f"torch.compile needs a C++ compiler: {str(error).splitlines()[0]}")
        return None
    return call


def _repeats(call: Call) -> int:
    """How many calls make a block that is long against the clock and a launch."""
    return max(1, min(200, int(BLOCK_S / max(_seconds(call, 1), 1e-7))))


def _seconds(call: Call, repeats: int) -> float:
    """Seconds of one call, on the device's own clock where that is a GPU, whose caches are emptied first."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=DEVICE).zero_()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(repeats):
        call()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / 1e3 / repeats


def _fill_in(outcome: Outcome, baseline: list[float], work: Work | None) -> None:
    row, samples = outcome.row, outcome.samples
    quartiles = statistics.quantiles(samples, n=4)
    row.update(median_s=statistics.median(samples), iqr_s=quartiles[2] - quartiles[0], rounds=len(samples))
    if len(baseline) == len(samples):  # of one round both
        row["speedup"] = statistics.median(b / s for b, s in zip(baseline, samples, strict=True))
    elif baseline:
        row["speedup"] = statistics.median(baseline) / statistics.median(samples)
    if work is not None:
        row["floor_s"] = work.floor_s()


def cases_and_providers(cases: list[Case]) -> Any:
    """Parametrises a benchmark by case and provider."""
    pairs = [pytest.param(case, name, id=f"{case.group}-{name}") for case in cases for name in case.providers]
    return pytest.mark.parametrize(("case", "provider"), pairs)


def replay(benchmark: Any, outcome: Outcome) -> None:
    """Reports the samples of a provider as the benchmark's own rounds."""
    clock = iter([t for sample in outcome.samples for t in (0.0, sample)])
    benchmark._timer = partial(next, clock)
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
