"""The tables of both READMEs, and the figures that stand in their sentences."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from textwrap import shorten

from benchmarks.allocator import DEFAULT
from benchmarks.result import PEERS, RUNS, Result, Row, faster_by, fastest, lost
from benchmarks.runs import PARTS
from benchmarks.shapes import HEADLINE
from fastsae_kernels.activity import MAX_DENSITY

NONE = "-"
LONGEST_REASON = 160
# the shapes that may stand in the README, of which the first that a machine has measured does
HEADLINES = (HEADLINE, "gemma-2-2b 16k")
STEP = "whole step"
DENSE = {
    "dense eager fp32": "dense PyTorch, eager",
    "dense compiled fp32": "dense PyTorch, `torch.compile`",
    "dense compiled bf16": "dense PyTorch in bf16, `torch.compile`",
}
# passes with little to save, where each dtype is compared with its own
HALF_ACTIVE = {
    "half-active": f"{HEADLINE}, half active",
    "half-active-demo": "demo, half active",
    "half-active-64-tokens": "64 tokens, half active",
}
TRAIN = "fastsae train"  # a whole run; what follows is another job than its baseline's
ALONE, CACHE = "one of them alone", "fastsae cache"
ACCELERATED, WITH_OPTIMIZER = "accelerated", "accelerated, FusedSAEAdam"
README_COLUMNS = ("peer", "as it is, ms", "accelerated, ms", "times as fast", "peak as it is, MiB", "peak, MiB")
Cells = dict[str, str]  # a line of a table: each cell by its column's title


def digits(value: float | None, count: int = 3, unit: str = "") -> str:
    """Returns the number with so many significant digits, never in scientific notation: 5,850, 64.0, 0.357."""
    return NONE if value is None else f"{Decimal(f'{value:.{count - 1}e}'):,f}{unit}"


def plain(value: float) -> str:
    """Returns a size: 16,384, 1,048,576, 12.5."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,g}"


def times_as_fast(ratio: float | None) -> str:
    """Returns 18x, 4.1x, 0.91x; 118x keeps its third digit."""
    return digits(ratio, 3 if ratio and ratio >= 100 else 2, "x")


def why_no_time(row: Row) -> str:
    reason = shorten(row.reason or "", LONGEST_REASON, placeholder=" …")
    return f"{'RED' if row.status == 'red' else 'skipped'}: {reason}"


def time_of(row: Row | None, unit_s: float = 1e-3, unit: str = "", iqr: bool = False) -> str:
    """Returns the median, in units of so many seconds, marked where no claim rests on it; or why there is none."""
    if row is None or row.median_s is None:
        return NONE if row is None else why_no_time(row)
    spread = f" ± {digits(row.iqr_s / unit_s)}" if iqr and row.iqr_s is not None else ""
    return digits(row.median_s / unit_s, unit=unit) + spread + " (unsteady)" * row.is_unsteady


def table(lines: list[Cells], n_words: int = 1) -> str:
    """Returns a Markdown table, whose first `n_words` columns are aligned to the left and the others to the right."""
    titles = list(lines[0])
    rule = ["---" if i < n_words else "--:" for i in range(len(titles))]
    rows = [titles, rule, *([line[title] for title in titles] for line in lines)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"


def sizes(rows: list[Row]) -> str:
    """Returns the sizes that all rows share, in words."""
    names = {"{} tokens": "n_tokens", "d_in {}": "d_in", "d_sae {}": "d_sae", "L0 {}": "l0"}
    found = {words: {getattr(row, name) for row in rows} for words, name in names.items()}
    return ", ".join(words.format(plain(*values)) for words, values in found.items() if len(values) == 1)


def shape_name(row: Row) -> str:
    return row.shape + (" (cut)" if row.is_cut else "")


def by_default_s(row: Row) -> float | None:
    """Returns the median under the allocator's default setting, which is the only one where there are not two."""
    return row.median_s if row.allocator in (None, DEFAULT) else row.other_median_s


# ---- benchmarks/README.md


def all_tables(results: list[Result]) -> str:
    """Returns what stands between the markers of benchmarks/README.md."""
    ordered = sorted(results, key=lambda result: result.machine.gpu is not None)
    return "\n".join(map(machine_section, ordered))


def machine_section(result: Result) -> str:
    """Returns everything that one machine measured."""
    heading = f"## {'GPU' if result.machine.gpu else 'CPU'}: {result.machine.name}\n"
    source = f"{machine_line(result)} From [{result.path.name}](results/{result.path.name}).\n"
    operations = [section(result, operation) for operation in result.operations()]
    return "\n".join([heading, source, shapes_table(result), *operations, where_dense_wins(result)])


def machine_line(result: Result) -> str:
    """Returns hardware, rates, versions, commits, date and duration."""
    m, products = result.machine, result.machine.gemm_tflop_per_s
    rates = [f"copies {digits(m.copy_gb_per_s)} GB/s"] if m.copy_gb_per_s else []
    rates += [f"products {' and '.join(f'{digits(products[d])} TFLOP/s in {d}' for d in products)}"] if products else []
    run = f"{result.commits}, {result.date}, {digits(result.seconds)} s in all"
    return "; ".join([", ".join([m.name, *rates]), f"Python {m.python}, {m.versions}", run]) + "."


def shapes_table(result: Result) -> str:
    """Returns what the names of shapes stand for; a series has its own axis."""
    rows = {shape_name(row): row for row in result.rows if row.x is None}
    return table([
        {
            "shape": name,
            **{"tokens": plain(row.n_tokens), "d_in": plain(row.d_in), "d_sae": plain(row.d_sae), "L0": plain(row.l0)},
            "one dense fp32 tensor, tokens x d_sae, MiB": digits(row.n_tokens * row.d_sae * 4 / 2**20),
        }
        for name, row in rows.items()
    ])  # fmt: skip


def section(result: Result, operation: str) -> str:
    """Returns the tables of one operation, one for each baseline, and its plot."""
    rows, axis = result.rows_of(operation), operation.partition("scaling with ")[2]
    parts = [f"### {operation[0].upper()}{operation[1:]}\n", *([f"{sizes(rows)}.\n"] if axis else [])]
    if operation == PEERS:
        parts.append(table(peer_lines(result), 2))
    else:
        cells = run_cells if operation == RUNS else partial(provider_cells, axis or "shape")
        for baseline in dict.fromkeys(row.baseline for row in rows):
            parts.append(providers_table(result, [row for row in rows if row.baseline == baseline], cells))
    if operation == RUNS and (lines := list(further_saes(result))):
        parts.append("What a further SAE on the same stream costs, and what it computes for itself alone:\n")
        parts.append(table(lines))
    if has_plot(result, operation):
        parts.append(f"![{operation}: medians by provider](plots/{result.plot_of(operation)})\n")
    return "\n".join(parts)


def providers_table(result: Result, rows: list[Row], cells: Callable[[Row, list[Row]], Cells]) -> str:
    """Returns a line for each row; a column that no row fills is left out."""
    lines = [cells(row, result.groups[row.group]) for row in rows]
    filled = [title for title in lines[0] if any(line[title] != NONE for line in lines)]
    return table([{title: line[title] for title in filled} for line in lines], 3)


def provider_cells(first: str, row: Row, group: list[Row]) -> Cells:
    """Returns the cells of a provider, each by its title; that of the first column is given."""
    return {
        first: shape_name(row) if row.x is None else plain(row.x),
        "dtype": row.dtype or NONE,
        "provider": row.provider,
        "median ± IQR, ms": time_of(row, iqr=True),
        "with the other allocator setting": other_median(row),
        f"vs {row.baseline}": ratio_to(row.baseline, row, group),
        "vs dense compiled, same dtype": ratio_to(f"dense compiled {row.dtype}", row, group),
        "peak, MiB": digits(row.peak_mib),
        "of the floor": share_of(row.floor_s, row),
        "of the floor with gathers": share_of(row.gather_floor_s, row),
        "error / limit": digits((row.error or 0) / row.error_limit, 2) if row.error_limit else NONE,
    }


def run_cells(row: Row, group: list[Row]) -> Cells:
    """Returns the cells of whole runs, each by its title."""
    parts, total_s = row.parts_s, sum(row.parts_s.values())
    return {
        "SAEs": f"{row.subject}, {shape_name(row)}",
        "provider": row.provider,
        "tokens": plain(row.run_tokens) if row.run_tokens else NONE,
        "median ± IQR, s": time_of(row, 1.0, iqr=True),
        "tokens/s": digits((row.run_tokens or 0) / row.median_s) if row.median_s else NONE,
        f"vs {row.baseline}": NONE if row.provider in (ALONE, CACHE) else ratio_to(row.baseline, row, group),
        "goal": times_as_fast(row.goal) if row.provider == TRAIN else NONE,
        **{f"{part}, %": digits(100 * parts.get(part, 0.0) / total_s, 2) if parts else NONE for part in PARTS},
        "padding, %": digits(None if row.padding_share is None else 100 * row.padding_share, 2),
        "peak, MiB": digits(row.peak_mib),
    }


def further_saes(result: Result) -> Iterator[Cells]:
    """Yields a line for each group of whole runs with several SAEs."""
    for alone in (row for row in result.rows_of(RUNS) if row.provider == ALONE and row.is_sound):
        together = provider_of(result.groups[alone.group], TRAIN)
        if together is not None and together.is_sound:
            yield {
                "SAEs": f"{alone.subject}, {shape_name(alone)}",
                "tokens": plain(alone.run_tokens or 0),
                "one alone, s": digits(alone.ms / 1e3),
                "all, s": digits(together.ms / 1e3),
                "a further one, s": digits((together.ms - alone.ms) / 1e3 / (together.n_saes - 1)),
                "start and steps of the one alone, s": digits(alone.parts_s["SAE"]),
            }


def provider_of(group: list[Row], name: str) -> Row | None:
    return next((row for row in group if row.provider == name), None)


def ratio_to(name: str, row: Row, group: list[Row]) -> str:
    """Returns how many times as fast as the group's provider of that name the row is."""
    return times_as_fast(faster_by(row, provider_of(group, name)))


def other_median(row: Row) -> str:
    if row.other_median_s is None:
        return NONE
    return f"{digits(row.other_median_s * 1e3)} ({'tuned' if row.allocator == DEFAULT else 'default'})"


def share_of(floor_s: float | None, row: Row) -> str:
    return NONE if floor_s is None or row.median_s is None else digits(100 * floor_s / row.median_s, unit=" %")


def peer_lines(result: Result, shape: str | None = None) -> list[Cells]:
    """Returns a line for each peer's step, as it is and accelerated; of one shape, where that is given."""
    lines = []
    for before in (row for row in result.rows_of(PEERS, shape) if row.provider == row.baseline):
        group = result.groups[before.group]
        after, adam = (provider_of(group, name) for name in (ACCELERATED, WITH_OPTIMIZER))
        line = {
            "peer": before.subject,
            "shape": before.shape,
            "as it is, ms": time_of(before),
            "accelerated, ms": time_of(after),
            "times as fast": times_as_fast(faster_by(after, before)),
            "with glibc's default allocator": times_as_fast(faster_by_default(after, before)),
            "with FusedSAEAdam, ms": time_of(adam),
            "times as fast with it": times_as_fast(faster_by(adam, before)),
            "goal": times_as_fast(before.goal),
            "peak as it is, MiB": digits(before.peak_mib),
            "peak, MiB": digits(after and after.peak_mib),
            "peak with FusedSAEAdam, MiB": digits(adam and adam.peak_mib),
        }
        lines.append(line)
    return lines


def faster_by_default(row: Row | None, other: Row) -> float | None:
    """Returns how many times as fast as the other, both under the allocator's default setting."""
    if row is None or not (row.is_sound and other.is_sound):
        return None
    return (by_default_s(other) or 0.0) / (by_default_s(row) or math.inf)


def has_plot(result: Result, operation: str) -> bool:
    """Returns whether there is anything to draw: the trainer's overhead is one number."""
    return operation != "trainer overhead" and any(row.median_s is not None for row in result.rows_of(operation))


def where_dense_wins(result: Result) -> str:
    """Returns every group and dtype in which dense PyTorch or another library is faster than the fastest of ours."""
    lines = [
        {
            "group": theirs.group,
            "dtype": theirs.dtype,
            "faster": theirs.provider,
            "fastest of ours": ours.provider if ours.status == "ok" else f"{ours.provider} ({ours.status})",
            "L0 / d_sae": digits(theirs.l0 / theirs.d_sae, 2),
            "its ms": digits(theirs.ms),
            "our ms": NONE if ours.median_s is None else digits(ours.ms),
            "fastsae vs it": times_as_fast(theirs.ms / ours.ms if ours.median_s else None),
        }
        for theirs, ours in lost(result)
    ]
    return f"### Where dense wins\n\n{table(lines, 4) if lines else 'Nowhere.'}"


# ---- README.md


def headline(results: list[Result]) -> tuple[Result, str] | None:
    """Returns the machine and the shape to show: results come with those that have a GPU first."""
    for result in results:
        for shape in HEADLINES:
            if any(row.kind == "fused" for row in result.rows_of(STEP, shape)):
                return result, shape
    return None


def headline_table(results: list[Result], folder: str) -> str:
    """Returns what stands between the README's markers; `folder` is the benchmarks' folder as the README links to it."""
    if (found := headline(results)) is None:
        return f"No result file has a whole step at {' or '.join(HEADLINES)}: not measured.\n"
    result, shape = found
    steps = result.rows_of(STEP, shape)
    ours = ours_in(steps)
    rows = {f"**fastsae**, `{ours.provider}`": ours} if ours else {}
    rows |= {f"`{row.provider}`": row for row in steps if row.kind == "fused" and row.status != "ok"}
    rows |= {DENSE[row.provider]: row for row in steps if row.provider in DENSE}
    peers = [row for row in result.rows_of(PEERS, shape) if row.subject.endswith(" JumpReLU")]
    rows |= {row.provider: row for row in [*steps, *peers] if row.kind == "peer"}
    lines = [
        {
            "": name,
            "a training step": time_of(row, unit=" ms"),
            "fastsae vs it": NONE if row is ours else times_as_fast(faster_by(ours, row)),
            "peak MiB": digits(row.peak_mib),
            "with glibc's default allocator": (
                NONE if row.allocator is None else digits((by_default_s(row) or 0) * 1e3, unit=" ms")
            ),
        }
        for name, row in rows.items()
    ]
    plot = f"![{STEP}: medians by provider]({folder}/plots/{result.plot_of(STEP)})"
    cut = f", a cut of {shape}" if steps[0].is_cut else ""
    source = f"{result.commits}, {result.date} ([result]({folder}/results/{result.path.name}))"
    caption = f"A step of {sizes(steps[:1])}{cut} on {result.machine.name}; torch {result.machine.torch}; {source}."
    compared = [{title: line[title] for title in README_COLUMNS} for line in peer_lines(result, shape)]
    accelerated = f"{table(compared)}\n" if compared else ""
    return f"{table(lines)}\n{accelerated}{plot}\n\n{caption}\n"


def ours_in(rows: list[Row]) -> Row | None:
    """Returns the plain fused provider in fp32; the fastest where that has no time, or another name."""
    ours = [row for row in rows if row.kind == "fused" and row.dtype == "fp32"]
    return fastest([row for row in ours if row.provider == "fused fp32"]) or fastest(ours)


def figures(results: list[Result]) -> dict[str, str]:
    """Returns the numbers that sentences can hold, by name; `-` where the results do not tell.

    `step` is our median in fp32, `step/PROVIDER` how many times as fast as a provider that is; `half-active.../PROVIDER` is the
    ratio of a pass to a provider in the same dtype. `accelerate/PEER` is how many times as fast a peer's step becomes, and
    `accelerate/PEER/FusedSAEAdam` with that optimiser, `accelerate-512-tokens/...` the same at a small shape; `accelerate/least`
    is the least of them. `run/SAES/SHAPE` is how many times as fast as SAELens a whole run of `fastsae train` is, and
    `run/SAES/SHAPE/PROVIDER` the seconds of a provider's.
    """
    if (shown := headline(results)) is None:
        return {}
    result, shape = shown
    steps = result.rows_of(STEP, shape)
    ours = ours_in(steps)
    found = {
        "max-density": f"{100 * max_density(result):g} %",
        "cases-that-dense-wins": str(len(lost(result))),
        "unsteady-rows": str(sum(row.is_unsteady for row in result.rows)),
        "step": digits(ours and ours.ms, unit=" ms"),
    }
    found |= {f"step/{slug(row.provider)}": times_as_fast(faster_by(ours, row)) for row in steps if row.kind != "fused"}
    for name, half_active in HALF_ACTIVE.items():
        rows = result.rows_of("forward+backward", half_active)
        for row in (row for row in rows if row.kind != "fused"):
            same = fastest([other for other in rows if other.kind == "fused" and other.dtype == row.dtype])
            found[f"{name}/{slug(row.provider)}"] = times_as_fast(faster_by(same, row))
    for row in (row for row in result.rows_of(PEERS) if row.kind == "fused"):
        name = "accelerate" if row.shape == shape else f"accelerate-{slug(row.shape)}"
        adam = "/FusedSAEAdam" if row.provider == WITH_OPTIMIZER else ""
        found[f"{name}/{slug(row.subject)}{adam}"] = ratio_to(row.baseline, row, result.groups[row.group])
    for row in result.rows_of(RUNS):
        name = f"run/{slug(row.subject)}/{slug(row.shape)}"
        found[f"{name}/{slug(row.provider)}"] = digits(row.median_s, 2, " s") if row.is_sound else NONE
        if row.provider == TRAIN:
            found[name] = ratio_to(row.baseline, row, result.groups[row.group])
    for name in {name.partition("/")[0] for name in found if name.startswith("accelerate")}:
        ratios = [value for key, value in found.items() if key.startswith(f"{name}/") and value != NONE]
        found[f"{name}/least"] = min(ratios, key=lambda ratio: float(ratio[:-1]), default=NONE)
    return found


def max_density(result: Result) -> float:
    """Returns the share of active features up to which the ops of a step take the sparse path."""
    return MAX_DENSITY["cuda" if result.machine.gpu else "cpu"]


def slug(name: str) -> str:
    """Returns a name without its version, as a part of a figure's: `dense-eager-fp32`, `eai-sparsify-TopK`."""
    return re.sub(r"[^A-Za-z0-9]+", "-", re.sub(r" v?\d+(\.\w+)+", "", name))
