"""The README's numbers: the table between its markers, and the figures that stand in its sentences."""

from __future__ import annotations

import re

from benchmarks.allocator import DEFAULT
from benchmarks.result import Result, Row, faster_by, fastest, max_density
from benchmarks.shapes import HEADLINE
from benchmarks.tables import (
    NONE,
    digits,
    lost_cases,
    match,
    milliseconds,
    plot_name,
    sizes,
    table,
    times_as_fast,
)

# the shapes that may stand in the README, the first that a machine has measured
SHAPES = (HEADLINE, "gemma-2-2b 16k")
STEP, PASSES = "whole step", "forward+backward"
DENSE = {
    "dense eager fp32": "dense PyTorch, eager",
    "dense compiled fp32": "dense PyTorch, `torch.compile`",
    "dense compiled bf16": "dense PyTorch in bf16, `torch.compile`",
}
# the shapes with little to save, of many active features and of few tokens: there each dtype is compared with its own
HARD = {"half-active": f"{HEADLINE}, half active", "few-tokens": "qwen2.5-7b x8"}


def readme_block(results: list[Result], folder: str) -> str:
    """What stands between the README's markers; `folder` is the benchmarks' folder as the README links to it."""
    headline = _headline(results)
    if headline is None:
        return f"No result file has a whole step at {' or '.join(SHAPES)}: not measured.\n"
    result, shape = headline
    steps = _rows(result, STEP, shape)
    plot = f"![{STEP}: medians by provider]({folder}/plots/{plot_name(result, STEP)})"
    cut = f", a cut of {shape}" if steps[0].is_cut else ""
    caption = (
        f"A step of {sizes(steps[0])}{cut} on {result.machine.name}; torch {result.machine.torch}; {result.commits},"
        f" {result.date} ([result]({folder}/results/{result.path.name}))."
    )
    return f"{_table(steps)}\n{plot}\n\n{caption}\n"


def figures(results: list[Result]) -> dict[str, str | None]:
    """The numbers that sentences of the README can hold, by name; None where the results do not tell.

    `step` and `pass` are our median in fp32, `step/PROVIDER` how many times as fast as a provider that is, `step/peak` the MiB
    that it takes; `half-active/PROVIDER` and `few-tokens/PROVIDER` are ratios of a pass to a provider in the same dtype.
    """
    headline = _headline(results)
    if headline is None:
        return {}
    result, shape = headline
    steps, passes = (_rows(result, operation, shape) for operation in (STEP, PASSES))
    found: dict[str, str | None] = {
        "machine": result.machine.name,
        "max-density": f"{100 * max_density(result.machine):g} %",
        "cases-that-dense-wins": str(len(lost_cases(result))),
    }
    for name, rows in {"step": steps, "pass": passes}.items():
        ours = _best(rows)
        found[name] = milliseconds(ours) if ours else None
        found[f"{name}/peak"] = f"{digits(ours.peak_mib)} MiB" if ours and ours.peak_mib else None
        found |= {f"{name}/{slug(row)}": _times(ours, row) for row in rows if row.kind != "fused"}
    for name, shape in HARD.items():
        rows = _rows(result, PASSES, shape)
        for row in rows:
            if row.kind != "fused":
                found[f"{name}/{slug(row)}"] = _times(fastest([r for r in _fused(rows) if r.dtype == row.dtype]), row)
    return found


def slug(row: Row) -> str:
    """The provider's name without its version, as a part of a figure's: `dense-eager-fp32`, `eai-sparsify-Adam`."""
    return re.sub(r"[^A-Za-z0-9]+", "-", re.sub(r" v?\d+(\.\w+)+", "", row.provider))


def _times(ours: Row | None, row: Row) -> str | None:
    ratio = faster_by(ours, row) if ours else None
    return None if ratio is None else times_as_fast(ratio)


def _headline(results: list[Result]) -> tuple[Result, str] | None:
    """The machine and the shape to show: results come with those that have a GPU first."""
    for result in results:
        for shape in SHAPES:
            if _fused(_rows(result, STEP, shape)):
                return result, shape
    return None


def _rows(result: Result, operation: str, shape: str) -> list[Row]:
    return [row for row in result.rows_of(operation) if row.shape == shape]


def _fused(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.kind == "fused"]


def _best(rows: list[Row]) -> Row | None:
    """The plain fused provider in fp32; the fastest where that has no time, or another name."""
    ours = [row for row in _fused(rows) if row.dtype == "fp32"]
    return fastest([row for row in ours if row.provider in ("fused", "fused fp32")]) or fastest(ours)


def _table(steps: list[Row]) -> str:
    ours = _best(steps)
    rows = {f"**fastsae**, `{ours.provider}`": ours} if ours else {}
    rows |= {f"`{row.provider}`": row for row in _fused(steps) if row.dtype == "fp32" and row.status != "ok"}
    rows |= {DENSE[row.provider]: row for row in steps if row.provider in DENSE}
    rows |= {row.provider: row for row in steps if row.kind == "peer"}
    lines = [[name, _median(row), *_compared(ours, row), _untuned(row)] for name, row in rows.items()]
    titles = ["", "a training step", "fastsae vs it", "peak MiB", "with glibc's default allocator"]
    shown = len(titles) - (1 if all(line[-1] == NONE for line in lines) else 0)
    return table(titles[:shown], [line[:shown] for line in lines], range(1, shown))


def _median(row: Row) -> str:
    """The time, or why there is none."""
    if row.median_s is None:
        return match(row)
    return milliseconds(row) + (" (unsteady)" if row.is_unsteady else "")


def _compared(ours: Row | None, row: Row) -> tuple[str, str]:
    ratio = None if row is ours or ours is None else faster_by(ours, row)
    return times_as_fast(ratio), NONE if row.peak_mib is None else digits(row.peak_mib)


def _untuned(row: Row) -> str:
    """The median under the allocator's default setting, where it was timed under both."""
    seconds = row.median_s if row.allocator == DEFAULT else row.other_median_s
    return NONE if row.allocator is None or seconds is None else f"{digits(seconds * 1e3)} ms"
