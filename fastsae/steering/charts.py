"""The charts of `steer.html` as inline SVG: series with marks, lines across, and the stable range behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from fastsae.evaluate import marks, plots

Point = tuple[float, float]
_BOTTOM = plots.HEIGHT - plots.BOTTOM
_HIGHEST_LEVEL = 2.0  # times the largest point: a line that lies higher would press all points to the floor
_NARROWEST = 3.0  # a stable range is at least so many pixels wide, so that one dose alone is seen


class Series(NamedTuple):
    """One line of a chart: the index of its mark, its name, points with x ascending, and whether each point has a mark."""

    mark: int
    name: str
    points: list[Point]
    is_marked: bool = True


class Level(NamedTuple):
    """A line across the chart, such as the value of the unsteered text; `style` is a class of `steer.css`."""

    name: str
    style: str
    value: float


def chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    levels: Sequence[Level] = (),
    stable: tuple[float, float] | None = None,
) -> str:
    """An SVG chart of lines over one x axis, which holds 0; y starts at 0 unless `log`.

    Args:
        series: Points that are not finite (or not positive, with `log`) are left out.
        x_label: With its unit.
        y_label: With its unit.
        log: Logarithmic y.
        levels: Lines across. One far above all points of a linear axis is left out.
        stable: The ends of the range of x that is shaded.
    """
    drawn = [one._replace(points=[p for p in one.points if _is_drawable(p, log)]) for one in series]
    drawn = [one for one in drawn if one.points]
    if not drawn:
        return '<p class="note">No values to draw.</p>'
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points]
    highest = math.inf if log or max(ys) <= 0 else _HIGHEST_LEVEL * max(ys)
    levels = [level for level in levels if _is_drawable((0.0, level.value), log) and level.value <= highest]
    ys += [level.value for level in levels]
    x_axis, x_ticks = _linear_axis(xs, plots.LEFT, plots.WIDTH - plots.RIGHT)
    if log:
        y_ticks, low, high = plots.log_ticks(min(ys), max(ys))
        y_axis = plots.Axis(low, high, _BOTTOM, plots.TOP, log=True)
    else:
        y_axis, y_ticks = _linear_axis(ys, _BOTTOM, plots.TOP)
    parts = [_range(x_axis, stable), plots.frame(x_axis, x_ticks, y_axis, y_ticks, x_label, y_label)]
    for level in levels:
        path = f"M{plots.LEFT} {y_axis(level.value):.1f}H{plots.WIDTH - plots.RIGHT}"
        parts.append(f'<path class="level {level.style}" d="{path}"><title>{escape(level.name)}</title></path>')
    parts += [_line(one, x_axis, y_axis) for one in drawn]
    return plots.svg(parts, f"{y_label} against {x_label}")


def _linear_axis(values: Sequence[float], start: float, end: float) -> tuple[plots.Axis, list[float]]:
    """An axis that holds 0 and the values, up to the next tick where there are only positive ones."""
    low, high = min(0.0, *values), max(0.0, *values)
    high = high if high > low else 1.0
    ticks = plots.linear_ticks(low, high)
    return plots.Axis(low, max(high, ticks[-1]), start, end), ticks


def _line(one: Series, x_axis: plots.Axis, y_axis: plots.Axis) -> str:
    """The line, and marks at all its points, or at the last one alone."""
    places = [(x_axis(x), y_axis(y)) for x, y in one.points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<path class="line {marks.colour(one.mark)}" d="M{path}"/>']
    first = 0 if one.is_marked else len(places) - 1
    for (x, y), (left, top) in list(zip(one.points, places, strict=True))[first:]:
        title = escape(f"{one.name}, {plots.tick_text(x)}: {plots.tick_text(y)}")
        parts.append(
            f'<path class="{marks.colour(one.mark)}" d="{marks.shape(one.mark)}" '
            f'transform="translate({left:.1f} {top:.1f})"><title>{title}</title></path>'
        )
    return "".join(parts)


def _range(axis: plots.Axis, ends: tuple[float, float] | None) -> str:
    if ends is None:
        return ""
    left, right = (min(max(axis(end), plots.LEFT), plots.WIDTH - plots.RIGHT) for end in ends)
    missing = max(0.0, _NARROWEST - (right - left))
    left -= missing / 2
    size = f'width="{right + missing / 2 - left:.1f}" height="{_BOTTOM - plots.TOP}"'
    return f'<rect class="stable" x="{left:.1f}" y="{plots.TOP}" {size}><title>the texts hold</title></rect>'


def _is_drawable(point: Point, log: bool) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1]) and (point[1] > 0 or not log)
