"""Plots of results as SVG. Each names the result that it shows, so that a stale one is known without drawing it again."""

from __future__ import annotations

import io
import re
from typing import Any

from benchmarks.result import Kind, Result, Row
from benchmarks.tables import digits, has_plot, max_density, plain, ratio_to, sizes

# Okabe and Ito's colours that stand out from a white page and from a dark one (at least 3 to 1), told apart by colour-blind
# readers too; the grey of text is as far from white as from black
TEXT = "#7a7a7a"
COLORS: dict[Kind, str] = {"fused": "#0072b2", "dense": "#d55e00", "peer": "#cc79a7", "tiles": "#009e73", "other": TEXT}
MARKERS = "osD^vPX*"
WIDTH = 8  # inches
MARK = "drawn by benchmarks.report from"


def plotted(results: list[Result]) -> dict[str, tuple[Result, str]]:
    """Returns what each plot shows, by file name."""
    return {
        result.plot_of(operation): (result, operation)
        for result in results
        for operation in result.operations()
        if has_plot(result, operation)
    }


def mark_of(result: Result) -> str:
    """Returns what a plot says of its data; `-- ` would end an SVG's comment."""
    return f"{MARK} {result.path.name}, finished {result.finished}".replace("--", "- -")


def mark_in(svg: str) -> str | None:
    """Returns what a plot says of its data; None where this module did not draw it."""
    found = re.search(rf"<!-- ({MARK} .*) -->", svg)
    return found[1] if found else None


def draw(result: Result, operation: str) -> str:
    """Returns the plot as SVG; the same text from the same data and the same matplotlib."""
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
        title = (_lines if "scaling" in operation else _bars)(figure, result, operation)
        source = f"{result.machine.name}\n{result.machine.versions}; {result.commits}, {result.date}"
        figure.suptitle(f"{title}\n{source}", fontsize=9)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    lines = (line.rstrip() for line in file.getvalue().splitlines())
    return "\n".join(lines).replace("<svg", f"<!-- {mark_of(result)} -->\n<svg", 1) + "\n"


def _bars(figure: Any, result: Result, operation: str) -> str:
    """Draws a panel for each group; returns the title."""
    panels = {name: group for name, group in result.groups.items() if group[0].operation == operation}
    columns = min(2, len(panels))
    names = [list(panels)[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [0.6 + 0.27 * max(len(panels[name]) for name in line) for line in names]
    figure.set_size_inches(WIDTH if columns == 1 else 1.6 * WIDTH, 0.8 + sum(heights))
    axes = figure.subplots(len(names), columns, squeeze=False, height_ratios=heights)
    for axis, (name, group) in zip(axes.flat, panels.items(), strict=False):
        lengths = [row.ms for row in group]
        drawn = axis.barh(range(len(group)), lengths, color=[COLORS[row.kind] for row in group])
        axis.bar_label(drawn, [_label(row, group) for row in group], padding=4)
        axis.set_yticks(range(len(group)), [row.provider for row in group])
        axis.set_title(name, fontsize=9)
        axis.set(xlabel="ms", xlim=(0, (max(lengths) or 1) * 1.4))
        axis.xaxis.set_major_formatter(lambda x, _: plain(x))
        axis.invert_yaxis()
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    baselines = dict.fromkeys(row.baseline for row in result.rows_of(operation))
    return f"{operation}, median; x: how many times as fast as {' or '.join(baselines)}"


def _label(row: Row, group: list[Row]) -> str:
    if row.median_s is None:
        return "RED, no time" if row.status == "red" else "skipped"
    ratio = "" if row.provider == row.baseline else f", {ratio_to(row.baseline, row, group)}"
    return f"{digits(row.ms)} ms{ratio}"


def _lines(figure: Any, result: Result, operation: str) -> str:
    """Draws a line for each provider; returns the title."""
    from matplotlib.ticker import LogLocator, NullLocator

    rows = sorted((row for row in result.rows_of(operation) if row.median_s is not None), key=lambda row: row.x or 0)
    x_label, xs = operation.removeprefix("scaling with "), sorted({row.x or 0 for row in rows})
    figure.set_size_inches(WIDTH, 4.5)
    axis = figure.subplots()
    for name, marker in zip(dict.fromkeys(row.provider for row in rows), MARKERS, strict=False):
        line = [row for row in rows if row.provider == name]
        style = {"color": COLORS[line[0].kind], "linestyle": "-" if line[0].kind == "fused" else "--"}
        axis.plot([row.x for row in line], [row.ms for row in line], marker=marker, label=name, **style)
    share = max_density(result)
    crossing = share * rows[-1].d_sae if x_label == "L0" else rows[-1].l0 / share
    if xs[0] <= crossing <= xs[-1]:
        path = "dense path in tiles" if x_label == "L0" else "sparse path"
        label = f"{path} from {x_label} {crossing:,.0f} on"
        axis.axvline(crossing, color=TEXT, linestyle=":", label=label)
    axis.set(xscale="log", yscale="log", xlabel=x_label, ylabel="ms")
    axis.set_xticks(xs, minor=False)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(lambda x, _: plain(x))
        scale.set_minor_locator(NullLocator())
    axis.tick_params(axis="x", labelsize=7.5)
    axis.legend(frameon=False, fontsize=8)
    return f"{operation}: median; {sizes(rows)}"
