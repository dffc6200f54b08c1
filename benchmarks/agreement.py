"""How far two runs of one commit on one machine are apart, against the spread that they report, where that is no wide one."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from benchmarks.result import Result, Row


class Pair(NamedTuple):
    """A figure of both runs, and the larger of their IQRs."""

    row: Row
    now: float
    before: float
    iqr: float

    @property
    def agrees(self) -> bool:
        return abs(self.now - self.before) <= self.iqr

    @property
    def apart(self) -> float:
        """As a share of the earlier one."""
        return abs(self.now / self.before - 1)


def medians(result: Result) -> list[Pair]:
    """Of all rows whose medians both runs have with an IQR."""
    return _pairs([(now, now.median_s, now.iqr_s, before.median_s, before.iqr_s) for now, before in _rows(result)])


def ratios(result: Result) -> list[Pair]:
    """Of all rows whose ratio to their group's baseline both runs have with an IQR."""
    rows = [(now, before) for now, before in _rows(result) if now.provider != now.baseline]
    return _pairs([(now, now.speedup, now.speedup_iqr, before.speedup, before.speedup_iqr) for now, before in rows])


def _pairs(figures: list[tuple[Row, float | None, float | None, float | None, float | None]]) -> list[Pair]:
    return [
        Pair(row, now, before, max(iqr, iqr_before))
        for row, now, iqr, before, iqr_before in figures
        if now is not None and iqr is not None and before is not None and iqr_before is not None
    ]


def _rows(result: Result) -> list[tuple[Row, Row]]:
    if result.repeated is None:
        return []
    earlier = {(row.operation, row.group, row.provider): row for row in result.repeated.rows}
    found = [(row, earlier.get((row.operation, row.group, row.provider))) for row in result.rows]
    return [(row, before) for row, before in found if before and not (row.is_unsteady or before.is_unsteady)]


def count(pairs: list[Pair]) -> str:
    """`9 of 10`, those that agree."""
    return f"{sum(pair.agrees for pair in pairs)} of {len(pairs)}"


def middle(pairs: list[Pair]) -> tuple[float, float]:
    """How far half of them are apart at most, and half of the IQRs that allow it, as shares of the earlier run's figures."""
    return statistics.median(pair.apart for pair in pairs), statistics.median(pair.iqr / pair.before for pair in pairs)
