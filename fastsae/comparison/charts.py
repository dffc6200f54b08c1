"""The charts of `compare.html`: intervals on a common axis as HTML, scatter and leakage as inline SVG, and their style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from fastsae.evaluate import marks, plots
from fastsae.evaluate.style import CSS as REPORT_CSS

CSS = (
    REPORT_CSS
    + marks.CSS
    + """
body { max-width: 80rem; }
h3 { margin-top: 1.4rem; }
th, td { padding-right: 0.9rem; }
.track-chart { margin: 0.6rem 0 1.6rem; max-width: 74rem; }
.track-row { display: grid; grid-template-columns: 12rem minmax(0, 1fr) 24rem; gap: 0 1rem; align-items: center;
  padding: 0.12rem 0; font-size: 0.88rem; }
.lane-chart .track-row { grid-template-columns: 12rem minmax(0, 1fr); }
.track-row.first { border-top: 1px solid var(--rule); margin-top: 0.3rem; padding-top: 0.4rem; }
.track-row .said { font-variant-numeric: tabular-nums; }
.track-row .said small { display: block; color: var(--soft); } .track-row strong { display: block; }
.track { position: relative; height: 1.25rem; }
.track.lanes { height: auto; }
.lane { position: relative; height: 0.62rem; }
.track i { position: absolute; display: block; }
.track i.zero { top: -0.2rem; bottom: -0.2rem; width: 1px; background: var(--soft); }
.track i.range { top: calc(50% - 1px); height: 2px; min-width: 2px; background: currentColor; }
.track svg.mark { position: absolute; top: 50%; width: 0.7rem; height: 0.7rem; margin: -0.35rem 0 0 -0.35rem; }
.ticks { position: relative; height: 1.3rem; border-top: 1px solid var(--soft); color: var(--soft); font-size: 0.78rem; }
.ticks span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.lower { color: var(--s0); } .higher { color: var(--s1); } .not-shown { color: var(--soft); }
svg .area { fill: var(--s0); opacity: 0.16; } svg .target { stroke: var(--soft); stroke-dasharray: 4 3; }
td small, th small { display: block; font-weight: 400; font-size: 0.82em; color: var(--soft); white-space: nowrap; }
td.sentence { min-width: 15rem; } td.arm { white-space: nowrap; }
td { vertical-align: top; } th.number { white-space: normal; }
@media (max-width: 44rem) { body { padding: 1.5rem 1rem 3rem; }
  .track-row { grid-template-columns: minmax(0, 1fr); padding: 0.3rem 0; }
  .track-row.axis > :empty { display: none; } .lane-chart .track-row { grid-template-columns: minmax(0, 1fr); } }
"""
)


class Row(NamedTuple):
    """One interval of a chart, in the colour of an arm; texts are HTML."""

    label: str
    low: float | None
    middle: float
    high: float | None
    said: str
    arm: int
    starts_group: bool


def intervals(rows: Sequence[Row], axis_label: str) -> str:
    """Intervals below each other on one linear axis that holds 0."""
    ends = [x for row in rows for x in (row.low, row.middle, row.high) if x is not None]
    axis = _axis([*ends, 0.0])
    zero = f'<i class="zero" style="left:{axis(0.0):.2f}%"></i>'
    body = []
    for row in rows:
        first = " first" if row.starts_group else ""
        body.append(
            f'<div class="track-row{first}"><div>{row.label}</div><div class="track {marks.colour(row.arm)}">{zero}'
            f"{_range(axis, row.low, row.high)}{marks.mark(row.arm, style=f'left:{axis(row.middle):.2f}%')}</div>"
            f'<div class="said">{row.said}</div></div>'
        )
    return f'<div class="track-chart">{"".join(body)}{_tick_row(axis, axis_label)}</div>'


def lanes(
    groups: Sequence[tuple[str, Sequence[tuple[int, str, float | None, float, float | None]]]], label: str
) -> str:
    """Groups of arms below each other on one linear axis, a lane for each arm, with its interval.

    Args:
        groups: Name of the group as HTML, and of each arm its index, title, low end, value and high end.
        label: Label of the axis.
    """
    axis = _axis([x for _, arms in groups for _, _, *ends in arms for x in ends if x is not None])
    body = []
    for name, arms in groups:
        drawn = "".join(
            f'<div class="lane {marks.colour(arm)}">{_range(axis, low, high)}'
            f"{marks.mark(arm, title, f'left:{axis(value):.2f}%')}</div>"
            for arm, title, low, value, high in arms
        )
        body.append(f'<div class="track-row first"><div>{name}</div><div class="track lanes">{drawn}</div></div>')
    return f'<div class="track-chart lane-chart">{"".join(body)}{_tick_row(axis, label)}</div>'


def scatter(points: Sequence[tuple[int, str, float, float]], target: float | None, x_label: str, y_label: str) -> str:
    """An SVG scatter of (index of the arm, title, x, y), with a dashed line at the target x; y is logarithmic.

    Args:
        points: Finite, y positive.
        target: None draws no line.
        x_label: With its unit.
        y_label: With its unit.
    """
    if not points:
        return '<p class="note">No values to draw.</p>'
    xs = [x for _, _, x, _ in points] + ([] if target is None else [target])
    margin = max(0.08 * (max(xs) - min(xs)), 0.02 * max(xs)) or 1.0
    left, right = max(0.0, min(xs) - margin), max(xs) + margin
    y_ticks, low, high = plots.log_ticks(*(f(y for *_, y in points) for f in (min, max)))
    x_axis = plots.Axis(left, right, plots.LEFT, plots.WIDTH - plots.RIGHT)
    y_axis = plots.Axis(low, high, plots.HEIGHT - plots.BOTTOM, plots.TOP, log=True)
    parts = [plots.frame(x_axis, plots.linear_ticks(left, right), y_axis, y_ticks, x_label, y_label)]
    if target is not None:
        parts.append(f'<path class="target" d="M{x_axis(target):.1f} {plots.TOP}V{plots.HEIGHT - plots.BOTTOM}"/>')
    for arm, title, x, y in points:
        parts.append(
            f'<path class="{marks.colour(arm)}" d="{marks.shape(arm)}" '
            f'transform="translate({x_axis(x):.1f} {y_axis(y):.1f})"><title>{escape(title)}</title></path>'
        )
    return plots.svg(parts, f"{y_label} against {x_label}")


def band(points: Sequence[tuple[float, float, float, float]], x_label: str, y_label: str) -> str:
    """An SVG curve of (x, low, middle, high), with the area between low and high; both axes are logarithmic.

    Args:
        points: All positive, x ascending.
        x_label: With its unit.
        y_label: With its unit.
    """
    if not points:
        return '<p class="note">No values to draw.</p>'
    x_ticks, first, last = plots.log_ticks(points[0][0], points[-1][0])
    y_ticks, low, high = plots.log_ticks(min(p[1] for p in points), max(p[3] for p in points))
    x_axis = plots.Axis(first, last, plots.LEFT, plots.WIDTH - plots.RIGHT, log=True)
    y_axis = plots.Axis(low, high, plots.HEIGHT - plots.BOTTOM, plots.TOP, log=True)

    def path(column: int, order: int = 1) -> str:
        return "L".join(f"{x_axis(p[0]):.1f} {y_axis(p[column]):.1f}" for p in points[::order])

    parts = [
        plots.frame(x_axis, x_ticks, y_axis, y_ticks, x_label, y_label),
        f'<path class="area" d="M{path(1)}L{path(3, -1)}z"/><path class="line s0" d="M{path(2)}"/>',
    ]
    return plots.svg(parts, f"{y_label} against {x_label}")


def _axis(values: Sequence[float]) -> plots.Axis:
    """From values to percent of a track's width, with a margin on both sides."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
    return plots.Axis(low - margin, high + margin, 0.0, 100.0)


def _range(axis: plots.Axis, low: float | None, high: float | None) -> str:
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f'<i class="range" style="left:{axis(low):.2f}%;width:{axis(high) - axis(low):.2f}%"></i>'


def _tick_row(axis: plots.Axis, label: str) -> str:
    ticks = plots.linear_ticks(axis.low, axis.high)
    spans = "".join(f'<span style="left:{axis(x):.2f}%">{plots.tick_text(x)}</span>' for x in ticks)
    return (
        f'<div class="track-row axis"><div></div><div><div class="ticks">{spans}</div></div></div>'
        f'<p class="note">{escape(label)}</p>'
    )
