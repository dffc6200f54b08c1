"""Dialogues that a run cannot use, counted by reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_WORTH_A_WARNING = 0.01  # share of the dialogues


@dataclass
class Dropped:
    """How many of `seen` dialogues could not be used, by reason, with the row of the first one as an example.

    A row is the number of a dialogue in its dataset, counted from 0; blank lines of a file do not count.
    """

    seen: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    first_rows: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str, rows: Iterable[int]) -> None:
        """Counts rows, each of which must be new; the reason is a clause such as `the row cannot be read`."""
        for row in rows:
            self.counts[reason] = self.counts.get(reason, 0) + 1
            self.first_rows.setdefault(reason, int(row))

    def __add__(self, other: Dropped) -> Dropped:
        counts = {
            reason: self.counts.get(reason, 0) + other.counts.get(reason, 0) for reason in self.counts | other.counts
        }
        return Dropped(self.seen + other.seen, counts, other.first_rows | self.first_rows)

    @property
    def total(self) -> int:
        """Dropped dialogues, whatever the reason."""
        return sum(self.counts.values())

    @property
    def is_worth_a_warning(self) -> bool:
        """Whether more than 1 % of the dialogues were dropped."""
        return self.total > _WORTH_A_WARNING * self.seen

    def __str__(self) -> str:
        """For example `2 of 90 dialogues cannot be used: 2 because the line is damaged JSON (such as row 4)`."""
        reasons = [
            f"{n:,} because {reason} ({'such as ' if n > 1 else ''}row {self.first_rows[reason]})"
            for reason, n in sorted(self.counts.items(), key=lambda item: -item[1])
        ]
        return f"{self.total:,} of {self.seen:,} dialogues cannot be used: {', '.join(reasons)}"

    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` says of it."""
        return {
            "dialogues_dropped": self.total,
            "dropped_by_reason": dict(self.counts),
            "dropped_first_rows": dict(self.first_rows),
        }

    def state_dict(self) -> dict[str, Any]:
        """A few numbers, ready for JSON."""
        return {"seen": self.seen, "counts": dict(self.counts), "first_rows": dict(self.first_rows)}

    @classmethod
    def from_state(cls, state: Any) -> Dropped:
        """Undoes `state_dict`.

        Raises:
            ValueError: `state` is something else.
        """
        if not isinstance(state, dict) or set(state) != {"seen", "counts", "first_rows"}:
            raise ValueError(f"expected the counts of dropped dialogues, got {state!r}"[:300])
        counts, first_rows = state["counts"], state["first_rows"]
        numbers = [state["seen"]]
        for table in (counts, first_rows):
            if not isinstance(table, dict) or set(table) != set(counts):
                raise ValueError(f"expected one number for each reason, got {table!r}"[:300])
            numbers += table.values()
        if any(type(number) is not int or number < 0 for number in numbers) or sum(counts.values()) > state["seen"]:
            raise ValueError(f"expected whole numbers of dropped dialogues, got {state!r}"[:300])
        return cls(state["seen"], dict(counts), dict(first_rows))
