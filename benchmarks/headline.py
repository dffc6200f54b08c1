"""The README's block of numbers: one claim with its conditions, one table, one plot, the machine."""

from __future__ import annotations

from benchmarks import agreement
from benchmarks.result import Result, Row, faster_by, fastest, max_density
from benchmarks.shapes import HEADLINE
from benchmarks.tables import (
    NO_GPU,
    NONE,
    digits,
    lost_cases,
    machine_line,
    match,
    milliseconds,
    plot_name,
    sizes,
    table,
    times_as_fast,
)

# the shapes with little to save: of many active features, of few tokens
HARD = (f"{HEADLINE}, half active", "qwen2.5-7b x8")
# the shapes that may stand in the README, the first that a machine has measured
SHAPES = (HEADLINE, "gemma-2-2b 16k")
STEP, PASSES = "whole step", "forward+backward"
DENSE = {
    "dense eager fp32": "dense PyTorch, eager",
    "dense compiled fp32": "dense PyTorch, `torch.compile`",
    "dense compiled bf16": "dense PyTorch in bf16, `torch.compile`",
}


def readme_block(results: list[Result], folder: str) -> str:
    """What stands between the README's markers; `folder` is the benchmarks' folder as the README links to it."""
    headline = _headline(results)
    more = f"All operations and shapes, and where dense wins: [{folder}/README.md]({folder}/README.md)."
    if not any(result.machine.gpu for result in results):
        more += f" {NO_GPU}"
    if headline is None:
        return f"No result file has a whole step at {' or '.join(SHAPES)}: not measured.\n\n{more}\n"
    result, shape = headline
    steps, passes = (_rows(result, operation, shape) for operation in (STEP, PASSES))
    plot = f"![{STEP}: medians by provider]({folder}/plots/{plot_name(result, STEP)})"
    source = f"[result]({folder}/results/{result.path.name})"
    again = f" {_repeat(result)}" if result.repeated else ""
    machine = f"Measured on {machine_line(result)}{again} By `python -m benchmarks.report` from its {source}. {more}"
    parts = [f"{_claim(result, steps)}\n", _table(steps, passes), f"{plot}\n", f"{machine}\n", _limits(result, folder)]
    return "\n".join(parts)


def _headline(results: list[Result]) -> tuple[Result, str] | None:
    """The machine and the shape to show: results come with those that have a GPU first."""
    for result in results:
        for shape in SHAPES:
            if _ours(_rows(result, STEP, shape)):
                return result, shape
    return None


def _rows(result: Result, operation: str, shape: str) -> list[Row]:
    return [row for row in result.rows_of(operation) if row.shape == shape]


def _ours(rows: list[Row]) -> list[Row]:
    """The fused providers in fp32."""
    return [row for row in rows if row.kind == "fused" and row.dtype == "fp32"]


def _best(rows: list[Row]) -> Row | None:
    """The plain fused provider; the fastest where that has no time, or another name."""
    ours = _ours(rows)
    return fastest([row for row in ours if row.provider in ("fused", "fused fp32")]) or fastest(ours)


def _claim(result: Result, steps: list[Row]) -> str:
    ours, sample = _best(steps), _ours(steps)[0]
    cut = f"; a cut of {sample.shape}" if sample.is_cut else ""
    conditions = f"{sizes(sample)}, fp32{cut}; forward, loss, backward and Adam"
    if ours is None:
        return f"No claim: no fused provider of a training step ({conditions}) has a time on {result.machine.name}."
    names = {"eager dense PyTorch": "dense eager fp32", "the same under `torch.compile`": "dense compiled fp32"}
    faster = {name: faster_by(ours, _named(steps, provider)) for name, provider in names.items()}
    against = [f"**{times_as_fast(ratio)}** as fast as {name}" for name, ratio in faster.items() if ratio]
    claim = f"A training step ({conditions}) takes **{milliseconds(ours)}** on {result.machine.name}"
    checked = ", its numbers compared with fp64 before it is timed" if ours.error is not None else ""
    return f"{', '.join([claim, ' and '.join(against)]) if against else claim}{checked}."


def _repeat(result: Result) -> str:
    """Whether another run said the same."""
    medians, ratios = agreement.count(agreement.medians(result)), agreement.count(agreement.ratios(result))
    return f"Another run of the same code agrees, within the IQRs, in {medians} medians and {ratios} ratios."


def _limits(result: Result, folder: str) -> str:
    """When not to use this, with the figures of such shapes and how often dense PyTorch won."""
    measured = "; ".join(filter(None, (_limit(_rows(result, PASSES, shape)) for shape in HARD)))
    figures = f" Forward and backward there: {measured}." if measured else ""
    lost = len(lost_cases(result))
    share = f"{100 * max_density(result.machine):g} %"
    return (
        f"**When not to use this.** Where many features fire, products win: from {share} of `d_sae` on the ops"
        f" take the dense path by themselves, in tiles. With few tokens in a step there is less to save.{figures}"
        f" Dense PyTorch or a peer is the faster one in {lost or 'no'} case{'' if lost == 1 else 's'}"
        f" ([where dense wins]({folder}/README.md#where-dense-wins)). If your code needs every activation as a dense tensor"
        f" anyway, there is nothing to save.\n"
    )


def _limit(group: list[Row]) -> str:
    """How the fused pass stands against eager fp32 and compiled bf16; empty where neither was measured."""
    rivals, found = {"eager in fp32": "dense eager fp32", "`torch.compile` in bf16": "dense compiled bf16"}, []
    for name, provider in rivals.items():
        rival = _named(group, provider)
        ours = next((row for row in group if rival and row.kind == "fused" and row.dtype == rival.dtype), None)
        ratio = faster_by(ours, rival) if ours else None
        found += [f"{times_as_fast(ratio)} as fast as {name}"] if ratio else []
    return f"{sizes(group[0])}: {' and '.join(found)}" if found else ""


def _named(rows: list[Row], provider: str) -> Row | None:
    """By the start of its name: `dense compiled bf16 autocast` is one of bf16."""
    return next((row for row in rows if row.provider.startswith(provider)), None)


def _table(steps: list[Row], passes: list[Row]) -> str:
    ours = _best(steps), _best(passes)
    red = [row for row in (*_ours(steps), *_ours(passes)) if row.status != "ok"]
    name = f"**fastsae**, `{ours[0].provider}`" if ours[0] else "**fastsae**"
    lines = [_line(name, ours, (None, None))]
    lines += [[f"`{row.provider}`", *[NONE] * 5, match(row)] for row in red]
    for provider, name in DENSE.items():
        lines.append(_line(name, (_named(steps, provider), _named(passes, provider)), ours))
    for peer in dict.fromkeys(row.provider for row in (*steps, *passes) if row.kind == "peer"):
        lines.append(_line(peer, (_named(steps, peer), _named(passes, peer)), ours))
    titles = ["", "whole step", "fastsae vs it", "forward + backward", "fastsae vs it", "peak MiB of a step", "match"]
    return table(titles, [line for line in lines if set(line[1:]) != {NONE}], range(1, 6))


def _line(name: str, rows: tuple[Row | None, Row | None], ours: tuple[Row | None, Row | None]) -> list[str]:
    """A provider's whole step and passes, and how many times as fast as each of them the fused one is."""
    cells = [name]
    for row, fused in zip(rows, ours, strict=True):
        cells.append(NONE if row is None else milliseconds(row))
        cells.append(NONE if fused is None else times_as_fast(faster_by(fused, row)))
    peak = rows[0].peak_mib if rows[0] else None
    return [*cells, NONE if peak is None else digits(peak), _matches(rows)]


def _matches(rows: tuple[Row | None, Row | None]) -> str:
    """Of both operations at once where they agree, else of each that is wrong or was not run."""
    found = {row.operation: match(row) for row in rows if row is not None and match(row) != NONE}
    if len(set(found.values())) <= 1:
        return next(iter(found.values()), NONE)
    return "; ".join(f"{operation} {text}" for operation, text in found.items() if text != "ok")
