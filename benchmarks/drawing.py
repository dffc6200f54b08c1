"""Plots of results as SVG: what is drawn is data first, whose digest tells whether a file is stale without drawing it again."""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.result import Kind, Result, Row, baseline_of, faster_by, max_density
from benchmarks.tables import constant_sizes, digits, has_plot, plain, times_as_fast

FORMAT = 1  # raise it where `draw` draws the same data in another way: every plot is stale then
MARK = "benchmarks.report: SHA-256 of the data drawn:"

# Okabe and Ito's colours that stand out from a white page and from a dark one (at least 3 to 1), told apart by colour-blind
# readers too; the grey of text is as far from white as from black
TEXT = "#7a7a7a"
COLORS: dict[Kind, str] = {"fused": "#0072b2", "dense": "#d55e00", "peer": "#cc79a7", "tiles": "#009e73", "other": TEXT}
MARKERS = "osD^vPX*"
WIDTH = 8  # inches


@dataclass(frozen=True)
class Bar:
    """One provider in a panel; without a time it says why."""

    label: str
    kind: Kind
    ms: float | None
    text: str


@dataclass(frozen=True)
class Line:
    """One provider in a scaling plot, `points` of (x, ms)."""

    label: str
    kind: Kind
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """All that a plot shows: panels of bars by group, or lines over `x_label`."""

    title: str
    subtitle: str
    panels: dict[str, list[Bar]]
    lines: list[Line]
    x_label: str = ""
    crossing: float | None = None

    def digest(self) -> str:
        """SHA-256 of what is drawn."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def plots(results: list[Result]) -> dict[str, Plot]:
    """Every plot of the results by file name."""
    return {
        result.file_name_of(operation): (_lines if "scaling" in operation else _bars)(result, operation)
        for result in results
        for operation in result.operations()
        if has_plot(result, operation)
    }


def digest_of(svg: str) -> str | None:
    """The digest that the plot carries; None where this module did not draw it."""
    found = re.search(rf"<!-- {re.escape(MARK)} (\w+) -->", svg)
    return found[1] if found else None


def _subtitle(result: Result) -> str:
    return f"{result.machine.name}\n{result.machine.versions}; {result.commits}, {result.date}"


def _bars(result: Result, operation: str) -> Plot:
    panels: dict[str, list[Bar]] = {}
    for name, group in result.groups().items():
        if group[0].operation == operation:
            panels[name] = [_bar(row, group) for row in group]
    baselines = dict.fromkeys(row.baseline for row in result.rows_of(operation))
    title = f"{operation}, median; x: how many times as fast as {' or '.join(baselines)}"
    return Plot(title, _subtitle(result), panels, [])


def _bar(row: Row, group: list[Row]) -> Bar:
    if row.median_s is None:
        return Bar(row.provider, row.kind, None, "RED, no time" if row.status == "red" else "skipped")
    baseline = baseline_of(row, group)
    ratio = f", {times_as_fast(faster_by(row, baseline))}" if baseline not in (None, row) else ""
    return Bar(row.provider, row.kind, row.ms, f"{digits(row.ms)} ms{ratio}")


def _lines(result: Result, operation: str) -> Plot:
    rows = [row for row in result.rows_of(operation) if row.median_s is not None and row.x is not None]
    points: dict[str, list[Row]] = {}
    for row in rows:
        points.setdefault(row.provider, []).append(row)
    lines = [
        Line(provider, found[0].kind, sorted((row.x or 0, row.ms) for row in found))
        for provider, found in points.items()
    ]
    title = f"{operation}: median; {constant_sizes(rows)}"
    return Plot(title, _subtitle(result), {}, lines, operation.removeprefix("scaling with "), _crossing(result, rows))


def _crossing(result: Result, rows: list[Row]) -> float | None:
    """Where dispatch changes paths, if the axis reaches it: an L0, or a d_sae."""
    share, last = max_density(result.machine), max(rows, key=lambda row: row.x or 0, default=None)
    if last is None:
        return None
    at = share * last.d_sae if last.operation == "scaling with L0" else last.l0 / share
    xs = [row.x or 0 for row in rows]
    return at if min(xs) <= at <= max(xs) else None


def draw(plot: Plot) -> str:
    """The plot as SVG, with its digest in a comment; the same text from the same data and the same matplotlib."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[str, Any] = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), TEXT)
    style |= dict.fromkeys(("xtick.color", "ytick.color", "axes.titlecolor", "legend.labelcolor"), TEXT)
    style |= {"axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "font.size": 9}
    style |= {"svg.hashsalt": "fastsae", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context():
        mpl.rcdefaults()  # not what the user's matplotlibrc says
        mpl.rcParams.update(style)
        figure = Figure(layout="constrained")
        FigureCanvasSVG(figure)
        if plot.lines:
            _draw_lines(figure, plot)
        else:
            _draw_bars(figure, plot)
        figure.suptitle(f"{plot.title}\n{plot.subtitle}", fontsize=9)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    lines = (line.rstrip() for line in file.getvalue().splitlines())
    return "\n".join(lines).replace("<svg", f"<!-- {MARK} {plot.digest()} -->\n<svg", 1) + "\n"


def _draw_bars(figure: Any, plot: Plot) -> None:
    columns = min(2, len(plot.panels))
    names = [list(plot.panels)[i : i + columns] for i in range(0, len(plot.panels), columns)]
    heights = [0.6 + 0.27 * max(len(plot.panels[name]) for name in line) for line in names]
    figure.set_size_inches(WIDTH if columns == 1 else 1.6 * WIDTH, 0.8 + sum(heights))
    axes = figure.subplots(len(names), columns, squeeze=False, height_ratios=heights)
    for axis, name in zip(axes.flat, plot.panels, strict=False):
        bars = plot.panels[name]
        lengths = [bar.ms or 0.0 for bar in bars]
        drawn = axis.barh(range(len(bars)), lengths, color=[COLORS[bar.kind] for bar in bars])
        axis.bar_label(drawn, [bar.text for bar in bars], padding=4)
        axis.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axis.set_title(name, fontsize=9)
        axis.set(xlabel="ms", xlim=(0, (max(lengths) or 1) * 1.4))
        axis.xaxis.set_major_formatter(lambda x, _: plain(x))
        axis.invert_yaxis()
    for axis in list(axes.flat)[len(plot.panels) :]:
        axis.remove()


def _draw_lines(figure: Any, plot: Plot) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    figure.set_size_inches(WIDTH, 4.5)
    axis = figure.subplots()
    for line, marker in zip(plot.lines, MARKERS * len(plot.lines), strict=False):
        style = "-" if line.kind == "fused" else "--"
        axis.plot(*zip(*line.points, strict=True), style, marker=marker, color=COLORS[line.kind], label=line.label)
    if plot.crossing is not None:
        label = f"dense path in tiles from {plot.x_label} {plot.crossing:,.0f} on"
        if plot.x_label != "L0":
            label = f"sparse path from {plot.x_label} {plot.crossing:,.0f} on"
        axis.axvline(plot.crossing, color=TEXT, linestyle=":", label=label)
    axis.set(xscale="log", yscale="log", xlabel=plot.x_label, ylabel="ms")
    axis.set_xticks(sorted({x for line in plot.lines for x, _ in line.points}), minor=False)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(lambda x, _: plain(x))
        scale.set_minor_locator(NullLocator())
    axis.tick_params(axis="x", labelsize=7.5)
    axis.legend(frameon=False, fontsize=8)
