"""What `fastsae compare` prints: the plan and its price before it starts, and what was found at the end."""

from __future__ import annotations

from fastsae.comparison.arms import ARMS, REFERENCE, Plan
from fastsae.comparison.costs import Costs
from fastsae.comparison.result import Result
from fastsae.evaluate.statistics import HIGHER, LOWER

COLUMNS = (
    ("all", "l0", "L0", ".1f"),
    ("all", "fvu", "FVU", ".4f"),
    ("special", "fvu", "of special", ".4f"),
    ("all", "delta_loss_percent", "delta loss", "+.2f"),
)
"""Class, metric, title and format of the figures that are printed."""


def print_plan(plan: Plan, costs: Costs) -> None:
    """The streams of activations with their SAEs, tokens and times."""
    streams = plan.streams()
    n_saes = sum(map(len, streams.values()))
    config = next(iter(streams["fast"].values()))
    print(
        f"{n_saes} SAEs, each on {config.tokens:,} tokens, measured on {config.eval_dialogues:,} held-out dialogues:\n"
    )
    total = 0.0
    for name, saes in streams.items():
        own = [arm for arm in plan.arms if any(sae.rpartition("-seed-")[0] == arm for sae in saes)]
        seconds = costs.seconds(saes)
        total += seconds
        n = f"{len(saes)} SAE{'s' if len(saes) > 1 else ''}"
        print(f"  {_time(seconds):>9}  {n:>7} on the stream {name}:")
        for arm in own:
            print(f"{'':15}{arm:16}{ARMS[arm].meaning}")
    size = f"{costs.n_bytes / 1e9:.1f} GB or more beside the language model"
    print(f"\nin all about {_time(total)}, loading and the gradients at the end apart, and {size};")
    print("the times are those of a first batch and of a first step, and later steps are often faster\n")


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_result(result: Result) -> None:
    """A line for each arm, then how the headline figures differ, and how much else does."""
    width = max(len(arm["name"]) for arm in result["arms"])
    print(f"\n{'':{width}}" + "".join(f"{title:>12}" for *_, title, _ in COLUMNS))
    for arm in result["arms"]:
        found = [result["values"][token_class][metric].get(arm["name"]) for token_class, metric, *_ in COLUMNS]
        cells = ["-" if value is None else format(value["value"], COLUMNS[i][-1]) for i, value in enumerate(found)]
        print(f"{arm['name']:{width}}" + "".join(f"{cell:>12}" for cell in cells))
    print(f"\ndifferences from {REFERENCE}, with 95 % intervals over held-out dialogues:")
    for token_class, metric, title, form in COLUMNS[1:]:
        for row in result["differences"]:
            if (row["class"], row["metric"]) == (token_class, metric):
                low, high = (
                    format(limit, "+" + form.lstrip("+")) if limit is not None else "?"
                    for limit in (row["low"], row["high"])
                )
                said = ": ".join(filter(None, (row["verdict"], row["reason"])))
                print(f"  {row['arm']:{width}}  {title:12}{low:>9} to {high:>9}  {said}")
    tested = [row for row in result["differences"] if row["verdict"] is not None]
    shown = sum(row["verdict"] in (LOWER, HIGHER) for row in tested)
    print(f"\n{shown} of {len(tested)} differences that were tested are shown; the page has all of them")
    for warning in result["warnings"]:
        print(f"warning: {warning}")
