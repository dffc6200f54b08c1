"""Words and table cells that the sections of `compare.html` share."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fastsae.comparison.result import Result, Value
from fastsae.evaluate.metrics import number


def value_of(result: Result, token_class: str, metric: str, arm: str) -> Value | None:
    """A metric of an arm, or None where it is undefined or the arm has no SAE."""
    return result["values"].get(token_class, {}).get(metric, {}).get(arm)


def value_cell(value: Value | None, factor: float = 1.0) -> str:
    """The mean over the seeds, below it its interval, and below that the value of each seed; all times `factor`."""
    if value is None:
        return '<td class="number">n/a</td>'
    low, high = (None if end is None else factor * end for end in (value["low"], value["high"]))
    return (
        f'<td class="number">{number(factor * value["value"])}<small>{bracket(low, high)}</small>'
        f"<small>{each_seed([factor * x for x in value['seeds']])}</small></td>"
    )


def bracket(low: float | None, high: float | None) -> str:
    """An interval."""
    return "no interval" if low is None or high is None else f"[{number(low)}, {number(high)}]"


def each_seed(values: Sequence[float]) -> str:
    """The value of each seed."""
    return " · ".join(number(value) for value in values) if len(values) > 1 else "one seed"


def arm_name(arm: str) -> str:
    """The name of an arm as code."""
    return f"<code>{escape(arm)}</code>"


def class_name(token_class: str) -> str:
    """The name of a class of tokens in words."""
    return escape(token_class.replace("position_0", "position 0").replace("_with_sinks", ", with sinks"))


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign."""
    return ("+" if value > 0 else "") + number(value, digits)
