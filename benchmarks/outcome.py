"""What was measured of one provider: the seconds of its calls under each allocator setting, and its row of the result file."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from benchmarks import allocator
from benchmarks.floor import Work

SLOW_S = 0.25  # a provider whose fastest call takes longer is slow: it takes part in every second session
LONG_S = 1.0  # where calls take longer, a cold cache costs next to nothing, so every call counts
STALL_S = 2.0  # the very first call can take so much longer, because memory has to be found for it
CLEARLY = 1.1  # a slow provider is not measured again under a setting that was worse by this factor
MAX_SPREAD = 0.5  # where the IQR is a larger share of the median, the median says little


@dataclass
class Outcome:
    """A provider's row, and the seconds of each counted call of each of its turns, by the allocator's setting."""

    row: dict[str, Any]
    # the number of a turn is that of the group's, so that a ratio compares two providers in the same turn
    by_setting: dict[str, dict[int, list[float]]] = field(default_factory=lambda: {allocator.DEFAULT: {}})
    fastest: float = math.inf  # the seconds of the fastest call, whether it was counted or not
    # The calls in a turn. Every turn has as many, or else the turns in the machine's fast minutes would outweigh the others.
    n_calls: int = 0

    @property
    def settings(self) -> list[str]:
        """The settings under which the provider is measured, the better one first."""
        return sorted(self.by_setting, key=self.median)

    @property
    def turns(self) -> dict[int, list[float]]:
        """The turns under the better setting."""
        return self.by_setting[self.settings[0]]

    @property
    def samples(self) -> list[float]:
        return [seconds for turn in self.turns.values() for seconds in turn]

    @property
    def is_slow(self) -> bool:
        return SLOW_S <= self.fastest < math.inf

    @property
    def is_long(self) -> bool:
        """Whether calls take so long that each of them counts; before the first turn, the one call made may have stalled."""
        return LONG_S + (0 if self.turns else STALL_S) <= self.fastest < math.inf

    @property
    def is_unsteady(self) -> bool:
        return is_unsteady(self.row["median_s"], self.row["iqr_s"])

    def median(self, setting: str) -> float:
        """Returns the median of the seconds under a setting; infinity where there are none."""
        samples = [seconds for turn in self.by_setting[setting].values() for seconds in turn]
        return statistics.median(samples) if samples else math.inf

    def is_due(self, setting: str) -> bool:
        """Returns whether the provider takes turns under a setting; a slow one does not where that was clearly worse."""
        if setting not in self.by_setting:
            return False
        has_lost = CLEARLY * self.median(self.settings[0]) < self.median(setting) < math.inf
        return not (self.is_slow and has_lost)

    def take(self, setting: str, turn: int, seconds: list[float]) -> None:
        """Adds the seconds of the counted calls of a turn."""
        self.by_setting[setting].setdefault(turn, []).extend(seconds)
        self.fastest = min(self.fastest, *seconds)

    def fill_in(self, baseline: Outcome, work: Work | None) -> None:
        """Writes into the row what the calls say so far; the ratio in it is that to `baseline`."""
        turns, samples, (setting, *others) = self.turns, self.samples, self.settings
        self.row.update(median_s=statistics.median(samples), iqr_s=iqr(samples), turns=len(turns), rounds=len(samples))
        if others:
            self.row.update(allocator=setting, other_median_s=self.median(others[0]))
        ratios = [
            statistics.median(baseline.turns[n]) / statistics.median(seconds)
            for n, seconds in turns.items()
            if n in baseline.turns
        ]
        if ratios:
            self.row.update(speedup=statistics.median(ratios), speedup_iqr=iqr(ratios))
        elif baseline.turns:
            self.row["speedup"] = statistics.median(baseline.samples) / self.row["median_s"]
        if work is not None:
            self.row["floor_s"] = work.floor_s()


def iqr(values: list[float]) -> float | None:
    """Returns the distance between the quartiles; None for fewer than two values."""
    if len(values) < 2:
        return None
    quartiles = statistics.quantiles(values, n=4)
    return quartiles[2] - quartiles[0]


def is_unsteady(median: float | None, spread: float | None) -> bool:
    """Returns whether the calls of a row differ too much for one number; no claim rests on such a row."""
    return median is not None and spread is not None and spread > MAX_SPREAD * median
