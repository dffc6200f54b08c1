"""What was measured of one provider: the seconds of its calls in each round, and its row of the result file."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from benchmarks import allocator
from benchmarks.floor import Work

SLOW_S = 0.25  # a provider whose fastest call takes longer is slow: it takes part in every second round
LONG_S = 1.0  # where calls take longer, a cold cache costs next to nothing, so every call counts
STALL_S = 2.0  # the very first call can take so much longer, because memory has to be found for it
CLEARLY = 1.1  # a slow provider is not measured again under a setting that was worse by this factor
MAX_SPREAD = 0.5  # where the IQR is a larger share of the median, the median says little
TIMES = ("median_s", "iqr_s", "allocator", "other_median_s", "speedup", "speedup_iqr")


@dataclass
class Outcome:
    """A provider's row, and the seconds of each counted call by the allocator's setting and the number of the round."""

    row: dict[str, Any]
    by_setting: dict[str, dict[int, list[float]]] = field(default_factory=lambda: {allocator.DEFAULT: {}})
    fastest: float = math.inf  # the seconds of the fastest call, whether it was counted or not
    n_calls: int = (
        0  # every round has as many calls, or else rounds in the machine's fast minutes would outweigh the others
    )

    @property
    def settings(self) -> list[str]:
        """The settings under which the provider is measured, the better one first."""
        return sorted(self.by_setting, key=self.median)

    @property
    def rounds(self) -> dict[int, list[float]]:
        """The calls of each round under the better setting."""
        return self.by_setting[self.settings[0]]

    @property
    def calls(self) -> list[float]:
        return [seconds for calls in self.rounds.values() for seconds in calls]

    @property
    def is_slow(self) -> bool:
        return SLOW_S <= self.fastest < math.inf

    @property
    def is_long(self) -> bool:
        """Whether calls take so long that each of them counts; before the first round, the one call made may have stalled."""
        return LONG_S + (0 if self.rounds else STALL_S) <= self.fastest < math.inf

    @property
    def is_unsteady(self) -> bool:
        return is_unsteady(self.row["median_s"], self.row["iqr_s"])

    def median(self, setting: str) -> float:
        """Returns the median of the seconds under a setting; infinity where there are none."""
        found = [seconds for calls in self.by_setting[setting].values() for seconds in calls]
        return statistics.median(found) if found else math.inf

    def is_due(self, setting: str) -> bool:
        """Returns whether the provider is timed under a setting; a slow one is not where that was clearly worse."""
        if setting not in self.by_setting:
            return False
        has_lost = CLEARLY * self.median(self.settings[0]) < self.median(setting) < math.inf
        return not (self.is_slow and has_lost)

    def take(self, setting: str, number: int, seconds: list[float]) -> None:
        """Adds the seconds of counted calls of the round with that number."""
        self.by_setting[setting].setdefault(number, []).extend(seconds)
        self.fastest = min(self.fastest, *seconds)

    def reject(self, status: str, reason: str) -> None:
        """Marks the row as red or skipped: it has no time."""
        self.row.update(dict.fromkeys(TIMES), status=status, reason=reason)

    def fill_in(self, baseline: Outcome, work: Work | None) -> None:
        """Writes into the row what the calls say so far; the ratio in it is that to `baseline`."""
        if self.row["status"] != "ok" or not self.rounds:
            return
        rounds, calls, (setting, *others) = self.rounds, self.calls, self.settings
        self.row.update(median_s=statistics.median(calls), iqr_s=iqr(calls), rounds=len(rounds), calls=len(calls))
        if others:
            self.row.update(allocator=setting, other_median_s=self.median(others[0]))
        ratios = [
            statistics.median(baseline.rounds[n]) / statistics.median(seconds)
            for n, seconds in rounds.items()
            if n in baseline.rounds
        ]
        if ratios:
            self.row.update(speedup=statistics.median(ratios), speedup_iqr=iqr(ratios))
        elif baseline.rounds:
            self.row["speedup"] = statistics.median(baseline.calls) / self.row["median_s"]
        if work is not None:
            self.row.update(floor_s=work.floor_s())
            if work.gathered_bytes:
                self.row.update(gather_floor_s=work.floor_s(with_gathers=True))


def iqr(values: list[float]) -> float | None:
    """Returns the distance between the quartiles; None for fewer than two values."""
    if len(values) < 2:
        return None
    quartiles = statistics.quantiles(values, n=4)
    return quartiles[2] - quartiles[0]


def is_unsteady(median: float | None, spread: float | None) -> bool:
    """Returns whether the calls of a row differ too much for one number; no claim rests on such a row."""
    return median is not None and spread is not None and spread > MAX_SPREAD * median
