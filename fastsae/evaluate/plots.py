"""Line charts and histograms as inline SVG: no dependency, no scripts, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44
_MAX_POINTS = 400
_LEGEND_ROW = 16

Point = tuple[float, float]


def line_chart(
    series: dict[str, Sequence[Point]], *, x_label: str, y_label: str, log: bool = False, top: float | None = None
) -> str:
    """An SVG line chart; y starts at zero unless `log`.

    Args:
        series: Name to (x, y) points, x ascending. Points that are not finite (or not positive, with `log`) are left
            out; long series are averaged down to a few hundred points.
        x_label: With its unit.
        y_label: With its unit.
        log: Logarithmic y.
        top: Upper end of a linear y axis; the line leaves the frame above it. None for the largest value.
    """
    drawn = {name: _thin([p for p in points if _drawable(p, log)]) for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return '<p class="note">No values to draw.</p>'
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    x_ticks = linear_ticks(0, max(xs) or 1)
    x_axis = Axis(0, max(xs) or 1, LEFT, WIDTH - RIGHT)
    if log:
        y_ticks, low, high = log_ticks(min(ys), max(ys))
    else:
        y_ticks = linear_ticks(0, (top if top is not None else max(ys)) or 1)
        low, high = 0.0, max(y_ticks[-1], (top if top is not None else max(ys)) or 1)
    y_axis = Axis(low, high, HEIGHT - BOTTOM, TOP, log)
    parts = [frame(x_axis, x_ticks, y_axis, y_ticks, x_label, y_label)]
    for i, (name, points) in enumerate(drawn.items()):
        path = "L".join(f"{x_axis(x):.1f} {y_axis(y):.1f}" for x, y in points)
        parts.append(f'<path class="line s{i}" d="M{path}" clip-path="url(#frame)"/>')
        if len(points) == 1:
            parts.append(
                f'<circle class="dot s{i}" cx="{x_axis(points[0][0]):.1f}" cy="{y_axis(points[0][1]):.1f}" r="3"/>'
            )
        if len(drawn) > 1:
            y = TOP + 10 + _LEGEND_ROW * i
            parts.append(f'<path class="line s{i}" d="M{WIDTH - 112} {y - 4}h16"/>')
            parts.append(f'<text x="{WIDTH - 90}" y="{y}">{escape(name)}</text>')
    return svg(parts, f"{y_label} against {x_label}")


def histogram(edges: Sequence[float], counts: Sequence[int], *, x_label: str, y_label: str) -> str:
    """An SVG histogram of `counts` between `edges` (one more), y from zero."""
    if not any(counts):
        return '<p class="note">No values to draw.</p>'
    y_ticks = linear_ticks(0, max(counts))
    x_axis = Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    y_axis = Axis(0, max(y_ticks[-1], max(counts)), HEIGHT - BOTTOM, TOP)
    parts = [frame(x_axis, linear_ticks(edges[0], edges[-1]), y_axis, y_ticks, x_label, y_label)]
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count:
            x, y = x_axis(left) + 0.5, y_axis(count)
            title = f"{left:.2f} to {right:.2f}: {count:,}"
            parts.append(
                f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{max(0.5, x_axis(right) - x - 0.5):.1f}" '
                f'height="{HEIGHT - BOTTOM - y:.1f}"><title>{title}</title></rect>'
            )
    return svg(parts, f"{y_label} against {x_label}")


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_text(value: float) -> str:
    """A tick's number, short enough for the left of a chart: 0.05, 20, 1,500, 200k, 2M, 1e30, 1e-6."""
    size = abs(value)
    if size >= 1e9:
        return f"{value:g}".replace("e+0", "e").replace("e+", "e").replace("-", "−")
    if size >= 1e5:
        return (f"{value / 1e6:g}M" if size >= 1e6 else f"{value / 1e3:g}k").replace("-", "−")
    if size and size < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    text = f"{value:,.4f}".rstrip("0").rstrip(".")
    return text.replace("-", "−")


class Axis:
    """Maps the values from `low` to `high` to the pixels from `start` to `end`."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        self.log = log
        self.low, self.high = (math.log10(low), math.log10(high)) if log else (low, high)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        share = (value - self.low) / ((self.high - self.low) or 1)
        return self.start + share * (self.end - self.start)


def _drawable(point: Point, log: bool) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1]) and (point[1] > 0 or not log)


def _thin(points: list[Point]) -> list[Point]:
    size = -(-len(points) // _MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else [[p] for p in points]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def log_ticks(low: float, high: float) -> tuple[list[float], float, float]:
    """Ticks and the two ends of a logarithmic axis that holds `low` and `high`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if len(powers) > 7:
        every = -(-len(powers) // 7)
        return [10.0**p for p in powers if p % every == 0], 10.0 ** powers[0], 10.0 ** powers[-1]
    ticks = [m * 10.0**p for p in powers for m in ((1, 2, 5) if len(powers) < 5 else (1,))]
    below, above = [t for t in ticks if t <= low * 1.0001], [t for t in ticks if t >= high * 0.9999]
    start, end = (below or [low])[-1], (above or [high])[0]
    end = end if end > start else start * 10
    return [t for t in ticks if start <= t <= end], start, end


def frame(x_axis: Axis, x_ticks: list[float], y_axis: Axis, y_ticks: list[float], x_label: str, y_label: str) -> str:
    """Both axes with their ticks and labels, and a grid line at each tick of y."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in y_ticks:
        y = y_axis(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text class="end" x="{LEFT - 7}" y="{y + 4:.1f}">{tick_text(value)}</text>')
    for value in x_ticks:
        x = x_axis(value)
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text class="mid" x="{x:.1f}" y="{bottom + 17}">{tick_text(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    middle = (TOP + bottom) / 2
    parts.append(f'<text class="mid label" x="{(LEFT + right) / 2}" y="{HEIGHT - 8}">{escape(x_label)}</text>')
    parts.append(f'<text class="mid label" transform="translate(13 {middle}) rotate(-90)">{escape(y_label)}</text>')
    return "".join(parts)


def svg(parts: list[str], title: str) -> str:
    """A chart of `WIDTH` x `HEIGHT`."""
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def frame_clip() -> str:
    """The clip path that all charts of a page share; place it once."""
    height = HEIGHT - BOTTOM - TOP
    return (
        '<svg width="0" height="0" class="hidden" aria-hidden="true"><clipPath id="frame">'
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{height}"/></clipPath></svg>'
    )
