"""Draws the newest result file of each machine: `python -m benchmarks.plot` (needs the `plots` extra)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

mpl.rcParams["svg.hashsalt"] = "fastsae"  # the same file from the same numbers

HERE = Path(__file__).parent


def draw(result: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """One panel a group: a bar for each provider, milliseconds from zero, the ratio to the group's baseline beside it."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(7 * columns, 0.6 + 1.7 * lines), squeeze=False, layout="constrained"
    )
    for axis, group in zip(axes.flat, groups, strict=False):
        bars_of = [row for row in rows if row["group"] == group]
        times = [row["median_s"] * 1e3 for row in bars_of]
        colors = ["#0f766e" if "fused" in row["provider"] else "#94a3b8" for row in bars_of]
        bars = axis.barh([row["provider"] for row in bars_of], times, color=colors)
        ratios = ["" if row["speedup"] is None else f", {row['speedup']:.2f}x" for row in bars_of]
        axis.bar_label(bars, [f" {t:.4g} ms{ratio}" for t, ratio in zip(times, ratios, strict=True)], fontsize=8)
        axis.set_title(group, fontsize=9)
        axis.set(xlabel="median, ms", xlim=(0, max(times) * 1.4))
        axis.tick_params(labelsize=8)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(groups) :]:
        axis.remove()
    info = result["machine"]
    machine = f"{info['gpu'] or info['processor']}, {info['threads']} threads, torch {info['torch']}"
    figure.suptitle(
        f"{machine}, commit {result['commit']}; ratios: how many times as fast as the first bar", fontsize=9
    )
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_scaling(result: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each quantity that grows: a line for each provider, both axes logarithmic."""
    kinds = list(dict.fromkeys(row["group"].split(",")[0] for row in rows))
    figure, axes = plt.subplots(1, len(kinds), figsize=(6 * len(kinds), 4), squeeze=False, layout="constrained")
    for axis, kind in zip(axes.flat, kinds, strict=True):
        of_kind = [row for row in rows if row["group"].startswith(kind)]
        for provider in dict.fromkeys(row["provider"] for row in of_kind):
            line = sorted((row["x"], row["median_s"] * 1e3) for row in of_kind if row["provider"] == provider)
            color = "#0f766e" if "fused" in provider else "#94a3b8"
            axis.plot(*zip(*line, strict=True), marker="o", color=color, label=provider)
        axis.set(xscale="log", yscale="log", xlabel=kind.removeprefix("scaling with "), ylabel="forward + backward, ms")
        if kind.endswith("L0"):
            axis.axvline(0.1 * 16384, color="#64748b", linestyle=":", label="from here on in dense tiles")
        axis.legend(fontsize=8)
    info = result["machine"]
    shape = "512 tokens, d_in 768; L0 64 (left), d_sae 16,384 (right)"
    machine = f"{info['gpu'] or info['processor']}, {info['threads']} threads, torch {info['torch']}"
    figure.suptitle(f"{shape}; {machine}, commit {result['commit']}", fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    (HERE / "plots").mkdir(exist_ok=True)
    for path in sorted((HERE / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        machine = path.stem.rsplit("_", 2)[0]
        for kind, name in {"forward+backward": "forward-backward", "whole step": "step", "encode": "encode"}.items():
            rows = [row for row in result["results"] if row["group"].startswith(kind)]
            if rows:
                draw(result, rows, HERE / "plots" / f"{machine}_{name}.svg")
        rows = [row for row in result["results"] if row["group"].startswith("scaling")]
        if rows:
            draw_scaling(result, rows, HERE / "plots" / f"{machine}_scaling.svg")


if __name__ == "__main__":
    main()
