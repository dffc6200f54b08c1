"""Draws the newest result file of each machine: `python -m benchmarks.plot` (needs the `plots` extra)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent


def draw(result: dict[str, Any], path: Path) -> None:
    """One panel a group: a bar for each provider, milliseconds from zero, the ratio to dense eager beside it."""
    groups = sorted({row["group"] for row in result["results"]})
    figure, axes = plt.subplots(len(groups), 1, figsize=(8, 0.6 + 2.2 * len(groups)), squeeze=False)
    for axis, group in zip(axes[:, 0], groups, strict=True):
        rows = [row for row in result["results"] if row["group"] == group]
        times = [row["median_s"] * 1e3 for row in rows]
        colors = ["#0f766e" if "fused" in row["provider"] else "#94a3b8" for row in rows]
        bars = axis.barh([row["provider"] for row in rows], times, color=colors)
        axis.bar_label(bars, [f" {t:.0f} ms, {row['speedup']:.1f}x" for t, row in zip(times, rows, strict=True)])
        axis.set(title=group, xlabel="median, ms", xlim=(0, max(times) * 1.3))
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    info = result["machine"]
    machine = f"{info['gpu'] or info['processor']}, {info['threads']} threads, torch {info['torch']}"
    figure.suptitle(f"{machine}, commit {result['commit']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    (HERE / "plots").mkdir(exist_ok=True)
    for path in sorted((HERE / "results").glob("*.json")):
        draw(json.loads(path.read_text(encoding="utf-8")), HERE / "plots" / f"{path.stem.rsplit('_', 2)[0]}.svg")


if __name__ == "__main__":
    main()
