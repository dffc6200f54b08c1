"""benchmarks/README.md from results: a table for each operation, and where dense wins."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal

from benchmarks import agreement
from benchmarks.result import Result, Row, baseline_of, compiled_of, faster_by, fastest

NONE, ALL = "-", "all"
NO_GPU = "GPU: not measured."
LONGEST_REASON = 160
RUN = "pytest benchmarks/ --full --results benchmarks/results && python -m benchmarks.report"
INSTALL = 'pip install -e ".[bench,plots]"'

TOP = f"""# Benchmarks

Written by `python -m benchmarks.report` from the newest file of each machine in [results](results): change nothing here by
hand. `python -m benchmarks.report --check` fails where a table or a plot is not what the results give.

## Run them again

On a CPU (with the versions of `constraints.txt`, those of the machine lines below):

```sh
{INSTALL} -c constraints.txt && {RUN}
```

On a machine with a GPU, with the torch build of its driver installed; the shapes are then a GPU's:

```sh
{INSTALL} && {RUN}
```

## How to read the tables

- **match**: a provider's numbers are compared with fp64 before its time is taken. `ok`: the error is within its limit. `RED`:
  it is not, and there is no time. `{NONE}`: nothing to compare, or a baseline that is only a part of the work.
- **median ± IQR**: the median of the calls of all sessions, and the distance between their quartiles. A whole run passes three to
  six times over all groups and gives each of them one session in each pass, so that its sessions are minutes apart; in each of
  them its providers are made anew and take turns, in random order. So the IQR includes how the machine drifts, and another run
  lies within it: a machine's last table counts how often, where one commit was measured twice. Providers whose calls take a
  quarter of a second or more take part in every second session. A GPU's caches are emptied before each call. A row is
  **unsteady** where its IQR exceeds half of its median, though it was measured up to three more times: no ratio, no line of
  "Where dense wins" and no comparison of two runs rests on it.
- **allocator**: on a CPU, a provider to which page faults cost time is timed under two settings of the C library's allocator.
  `default`: glibc gives large tensors back to the system when they are freed, and the next call faults their pages in again.
  `tuned`: it keeps them (`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1`; 2 MB pages or a preloaded allocator do no better). The
  median and all ratios are those of the better setting, which the column names, for ours and for every baseline; the next column
  has the median under the other one.
- **vs**: how many times as fast as that provider; below 1x it is slower. Ratios to the table's baseline are medians of the
  turns' ratios, others are ratios of medians.
- **peak**: memory of the process beyond what a call starts with, each tensor counted while it is alive.
- **GB/s**: the bytes that the operation has to read and write at least, over the median; the machine line has a copy's rate.
- **of the floor**: the least time that the products and the bytes of the operation take at this machine's own rates (of a
  large matrix product, of a copy), as a share of the median: 100 % cannot be beaten without doing less.
- **cut**: a shape with fewer tokens than a model's own step would have, so that a CPU gets through it.
"""

Cell = Callable[[Row, list[Row]], str]


@dataclass(frozen=True)
class Column:
    """A column of a table; left out where no row fills it, if it may be."""

    title: str
    cell: Cell
    is_optional: bool = True
    is_number: bool = True


def digits(value: float, count: int = 3) -> str:
    """The number with so many significant digits, never in scientific notation: 5,850, 64.0, 0.357."""
    return f"{Decimal(f'{value:.{count - 1}e}'):,f}"


def plain(value: float) -> str:
    """A size: 16,384, 1,048,576, 12.5."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,g}"


def times_as_fast(ratio: float | None) -> str:
    """18x, 4.1x, 0.91x; 118x keeps its third digit."""
    return NONE if ratio is None else f"{digits(ratio, 3 if ratio >= 100 else 2)}x"


def milliseconds(row: Row) -> str:
    return NONE if row.median_s is None else f"{digits(row.median_s * 1e3)} ms"


def match(row: Row) -> str:
    """Whether the provider's numbers are right, or why it has no time."""
    if row.status == "ok":
        return NONE if row.error is None else "ok"
    reason = " ".join((row.reason or "no reason given").split())
    short = reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 1] + "…"
    return f"{'RED' if row.status == 'red' else 'skipped'}: {short}"


def table(titles: list[str], rows: Iterable[list[str]], numbers: Iterable[int] = ()) -> str:
    """A Markdown table; the columns in `numbers` are aligned to the right."""
    right = set(numbers)
    rule = ["--:" if i in right else "---" for i in range(len(titles))]
    lines = [titles, rule, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def sizes(row: Row) -> str:
    """The shape in words."""
    return f"{row.n_tokens:,} tokens, d_in {row.d_in:,}, d_sae {row.d_sae:,}, L0 {plain(row.l0)}"


def shape_label(row: Row, clashes: set[str]) -> str:
    """The shape's name; with its sizes where the name has several."""
    name = row.shape + (" (cut)" if row.is_cut else "")
    return f"{name}: {sizes(row)}" if row.shape in clashes else name


def shapes(result: Result) -> dict[str, set[tuple[float, ...]]]:
    """Every size that goes by a name; scaling has its own axis."""
    found: dict[str, set[tuple[float, ...]]] = {}
    for row in result.rows:
        if not row.operation.startswith("scaling"):
            found.setdefault(row.shape, set()).add((row.n_tokens, row.d_in, row.d_sae, row.l0))
    return found


def machine_line(result: Result) -> str:
    """Hardware, versions, rates, commit, date and duration."""
    m = result.machine
    rates = [f"copies {digits(m.copy_gb_per_s)} GB/s"] if m.copy_gb_per_s else []
    products = [f"{digits(rate)} TFLOP/s in {dtype}" for dtype, rate in (m.gemm_tflop_per_s or {}).items() if rate]
    rates += [f"products {' and '.join(products)}"] if products else []
    rates += clocks(result)
    versions = [f"Python {m.python}", f"torch {m.torch}"]
    versions += [f"{name} {version}" for name, version in {"Triton": m.triton, "CUDA": m.cuda}.items() if version]
    run = f"{result.commits}, {result.date}, {digits(result.seconds)} s in all"
    return "; ".join([", ".join([m.name, *rates]), ", ".join(versions), run]) + "."


def clocks(result: Result) -> list[str]:
    """What the clock showed after the groups of the run, or at its end."""
    found = [row.clock_mhz for row in result.rows if row.clock_mhz] or [result.machine.clock_mhz or 0]
    low, high = round(min(found)), round(max(found))
    return [f"{low:,} MHz" if low == high else f"{low:,} to {high:,} MHz"] if high else []


def benchmarks_readme(results: list[Result]) -> str:
    """All of benchmarks/README.md."""
    gpus, cpus = ([r for r in results if (r.machine.gpu is not None) == has_gpu] for has_gpu in (True, False))
    parts = [TOP, *map(machine_section, cpus)]
    parts += map(machine_section, gpus) if gpus else [f"## GPU\n\n{NO_GPU}\n"]
    return "\n".join(parts)


def machine_section(result: Result) -> str:
    """Everything that one machine measured."""
    heading = f"## {'GPU' if result.machine.gpu else 'CPU'}: {result.machine.name}\n"
    source = f"{machine_line(result)} From [{result.path.name}](results/{result.path.name}).\n"
    operations = [operation_section(result, operation) for operation in result.operations()]
    repeat = [repeat_section(result, result.repeated)] if result.repeated else []
    return "\n".join([heading, source, shapes_section(result), *operations, where_dense_wins(result), *repeat])


def shapes_section(result: Result) -> str:
    """What the names of shapes stand for."""
    rows = {
        (row.shape, row.n_tokens, row.d_in, row.d_sae, row.l0): row
        for row in result.rows
        if not row.operation.startswith("scaling")
    }
    if not rows:
        return ""
    cells = [
        [
            row.shape + (" (cut)" if row.is_cut else ""),
            *map(plain, (row.n_tokens, row.d_in, row.d_sae, row.l0)),
            digits(row.n_tokens * row.d_sae * 4 / 2**20),
        ]
        for row in rows.values()
    ]
    titles = ["shape", "tokens", "d_in", "d_sae", "L0", "one dense fp32 tensor, tokens x d_sae, MiB"]
    return table(titles, cells, range(1, 6))


def operation_section(result: Result, operation: str) -> str:
    """The tables of one operation, one for each baseline, and its plot."""
    groups, clashes = result.groups(), {name for name, found in shapes(result).items() if len(found) > 1}
    by_baseline: dict[str | None, list[Row]] = {}
    for row in result.rows_of(operation):
        by_baseline.setdefault(_baseline_name(row, groups[operation, row.group]), []).append(row)
    is_scaling = operation.startswith("scaling")
    parts = [f"### {operation[0].upper()}{operation[1:]}\n"]
    if is_scaling:
        parts.append(f"{constant_sizes(result.rows_of(operation))}.\n")
    for baseline, rows in by_baseline.items():
        columns = _columns(baseline, operation.removeprefix("scaling with ") if is_scaling else None, clashes)
        parts.append(_filled(columns, rows, groups))
    if has_plot(result, operation):
        name = plot_name(result, operation)
        parts.append(f"![{operation}: medians by provider](plots/{name})\n")
    return "\n".join(parts)


def constant_sizes(rows: list[Row]) -> str:
    """The sizes that all rows share."""
    names = {"tokens": "n_tokens", "d_in": "d_in", "d_sae": "d_sae", "L0": "l0"}
    values = {name: {getattr(row, attribute) for row in rows} for name, attribute in names.items()}
    same = {name: found.pop() for name, found in values.items() if len(found) == 1}
    return ", ".join(
        f"{plain(value)} tokens" if name == "tokens" else f"{name} {plain(value)}" for name, value in same.items()
    )


def plot_name(result: Result, operation: str) -> str:
    """File name of the plot of an operation."""
    return f"{result.machine.slug}_{re.sub('[^a-zA-Z0-9_]+', '-', operation)}.svg"


def has_plot(result: Result, operation: str) -> bool:
    """Whether there is anything to draw: the trainer's overhead is one number."""
    return operation != "trainer overhead" and any(row.median_s is not None for row in result.rows_of(operation))


def _baseline_name(row: Row, group: list[Row]) -> str | None:
    """Of the row, or of its group where the row, often the baseline itself, names none."""
    return row.baseline or next((other.baseline for other in group if other.baseline), None)


def _columns(baseline: str | None, x_title: str | None, clashes: set[str]) -> list[Column]:
    def first(row: Row, group: list[Row]) -> str:
        return shape_label(row, clashes) if x_title is None or row.x is None else plain(row.x)

    return [
        Column(x_title or "shape", first, is_optional=False, is_number=x_title is not None),
        Column("dtype", lambda row, group: row.dtype or NONE, is_number=False),
        Column("provider", lambda row, group: row.provider, is_optional=False, is_number=False),
        Column("median ± IQR, ms", lambda row, group: _median(row), is_optional=False),
        Column("allocator", lambda row, group: row.allocator or NONE, is_number=False),
        Column("under the other, ms", lambda row, group: _other_median(row)),
        Column("overhead", lambda row, group: NONE if row.overhead is None else f"{row.overhead * 100:+.1f} %"),
        Column(f"vs {baseline}", lambda row, group: times_as_fast(faster_by(row, baseline_of(row, group)))),
        Column(
            "vs dense compiled, same dtype", lambda row, group: times_as_fast(faster_by(row, compiled_of(row, group)))
        ),
        Column("peak, MiB", lambda row, group: NONE if row.peak_mib is None else digits(row.peak_mib)),
        Column("GB/s", lambda row, group: _rate(row)),
        Column("of the floor", lambda row, group: _share_of_floor(row)),
        Column("error", lambda row, group: _error(row.error), is_optional=False),
        Column("match", lambda row, group: match(row), is_optional=False, is_number=False),
    ]


def _filled(columns: list[Column], rows: list[Row], groups: dict[tuple[str, str], list[Row]]) -> str:
    cells = [[column.cell(row, groups[row.operation, row.group]) for row in rows] for column in columns]
    kept = [i for i, column in enumerate(columns) if not column.is_optional or set(cells[i]) != {NONE}]
    numbers = [place for place, i in enumerate(kept) if columns[i].is_number]
    lines = [[cells[i][line] for i in kept] for line in range(len(rows))]
    return table([columns[i].title for i in kept], lines, numbers)


def _median(row: Row) -> str:
    if row.median_s is None:
        return NONE
    spread = "" if row.iqr_s is None else f" ± {digits(row.iqr_s * 1e3)}"
    return digits(row.median_s * 1e3) + spread + (" (unsteady)" if row.is_unsteady else "")


def _other_median(row: Row) -> str:
    return NONE if row.other_median_s is None else digits(row.other_median_s * 1e3)


def _error(error: float | None) -> str:
    return NONE if error is None else f"{error:.2e}" if math.isfinite(error) else str(error)


def _rate(row: Row) -> str:
    return NONE if not row.least_bytes or row.median_s is None else digits(row.least_bytes / row.median_s / 1e9)


def _share_of_floor(row: Row) -> str:
    if row.floor_s is None or row.median_s is None:
        return NONE
    return f"{digits(100 * row.floor_s / row.median_s)} %"


def where_dense_wins(result: Result) -> str:
    """Every group and dtype in which dense PyTorch or another library has a lower median than the best fused provider.

    Rows that are unsteady are left out, and counted.
    """
    from fastsae_kernels.activity import MAX_DENSITY

    parts = ["### Where dense wins\n"]
    lost = lost_cases(result)
    if lost:
        titles = ["group", "dtype", "L0 / d_sae", "faster", "ms", "best fused", "ms", "fused vs it"]
        parts += ["Against the fastest fused provider in the same dtype:\n", table(titles, lost, (2, 4, 6, 7))]
    else:
        parts.append("Nowhere: in every group the fastest fused provider leads those of its dtype.\n")
    if unsteady := sum(row.is_unsteady for row in result.rows):
        parts.append(f"Left out, as everywhere: {unsteady} unsteady row{'' if unsteady == 1 else 's'}.\n")
    parts.append(
        f"The ops of a step take the sparse path while the share of active features, L0 / d_sae, is at most"
        f" {MAX_DENSITY['cpu']:g} on a CPU and {MAX_DENSITY['cuda']:g} on a GPU (`fastsae_kernels.dispatch.MAX_DENSITY`);"
        f" beyond it they take the dense path in tiles by themselves (`dense in tiles` is that path, asked for).\n"
    )
    return "\n".join(parts)


def lost_cases(result: Result) -> list[list[str]]:
    """The lines of that table."""
    return [line for group in result.groups().values() for line in _lost(group)]


def repeat_section(result: Result, before: Result) -> str:
    """How many medians and ratios of two runs of one commit agree, and those that do not."""
    found = agreement.medians(result), agreement.ratios(result)
    lines = [
        [operation, *(cell for pairs in found for cell in _agreement(pairs, operation))]
        for operation in [*result.operations(), ALL]
    ]
    columns = (" agree", " apart, mid", ", IQR, mid")
    titles = ["operation", *(figure + column for figure in ("medians", "ratios") for column in columns)]
    text = (
        f"The same code was measured before ([{before.path.name}](results/{before.path.name}), {digits(before.seconds)} s). Two"
        f" medians, or two ratios to a group's baseline, agree where they are no further apart than the larger of their IQRs (of"
        f" three calls, which slow providers have, that is the whole range). `mid`: of half of them, at most.\n"
    )
    parts = ["### Two runs\n", text, table(titles, [line for line in lines if set(line[1:]) != {NONE}], range(1, 7))]
    apart = [
        _apart_line(pair, kind)
        for pairs, kind in zip(found, ("median", "ratio"), strict=True)
        for pair in pairs
        if not pair.agrees
    ]
    if apart:
        titles = ["group", "provider", "figure", "this run", "the one before", "larger IQR"]
        parts += ["Those that do not agree:\n", table(titles, apart, range(3, 6))]
    return "\n".join(parts)


def _apart_line(pair: agreement.Pair, kind: str) -> list[str]:
    row, is_median = pair.row, kind == "median"
    figures = (pair.now, pair.before, pair.iqr)
    cells = [f"{digits(1e3 * value)} ms" if is_median else f"{digits(value)}x" for value in figures]
    return [group_label(row), row.provider, kind, *cells]


def _agreement(pairs: list[agreement.Pair], operation: str) -> list[str]:
    chosen = [pair for pair in pairs if operation in (pair.row.operation, ALL)]
    if not chosen:
        return [NONE] * 3
    return [agreement.count(chosen), *(f"{digits(100 * share, 2)} %" for share in agreement.middle(chosen))]


def _lost(group: list[Row]) -> list[list[str]]:
    """A line for each dtype and rival; our dense path, asked for, is a rival of its own: dispatch should have taken it."""
    lines = []
    for dtype in dict.fromkeys(row.dtype for row in group if row.kind == "fused"):
        same = [row for row in group if row.dtype == dtype]
        fused = fastest([row for row in same if row.kind == "fused"])
        for kinds in (("dense", "peer"), ("tiles",)):
            rival = fastest([row for row in same if row.kind in kinds])
            if fused is None and any(row.is_unsteady for row in same if row.kind == "fused"):
                continue
            if rival is not None and (fused is None or _seconds(fused) > _seconds(rival)):
                lines.append(_lost_line(same, rival, fused))
    return lines


def group_label(row: Row) -> str:
    """The group with its operation."""
    return row.group if row.group.startswith(row.operation) else f"{row.operation}: {row.group}"


def _lost_line(rows: list[Row], rival: Row, fused: Row | None) -> list[str]:
    label = group_label(rival)
    theirs = [digits(rival.density, 2), rival.provider, digits(_seconds(rival) * 1e3)]
    if fused is None:
        return [label, rival.dtype or NONE, *theirs, _why_none(rows), NONE, NONE]
    ours = [fused.provider, digits(_seconds(fused) * 1e3), times_as_fast(_seconds(rival) / _seconds(fused))]
    return [label, rival.dtype or NONE, *theirs, *ours]


def _seconds(row: Row) -> float:
    assert row.median_s is not None
    return row.median_s


def _why_none(rows: list[Row]) -> str:
    """Why no fused provider has a time."""
    return "; ".join(f"{row.provider} ({row.status})" for row in rows if row.kind == "fused")
