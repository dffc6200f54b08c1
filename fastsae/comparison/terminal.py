"""What `fastsae compare` prints: the plan and its price before it starts, and what was found at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastsae.comparison.arms import ARMS, Plan
from fastsae.comparison.costs import Costs


def print_plan(plan: Plan, costs: Costs) -> None:
    """The streams of activations with their SAEs, tokens and times."""
    streams = plan.streams()
    n_saes = sum(map(len, streams.values()))
    config = next(iter(streams["fast"].values()))
    print(f"{n_saes} SAEs, each on {config.tokens:,} tokens, measured on {config.eval_dialogues:,} held-out dialogues:\n")
    total = 0.0
    for name, saes in streams.items():
        own = [arm for arm in plan.arms if any(sae.rpartition("-seed-")[0] == arm for sae in saes)]
        seconds = costs.seconds(saes)
        total += seconds
        print(f"  {_time(seconds):>9}  {len(saes):>2} SAEs on the stream {name}:")
        for arm in own:
            print(f"{'':15}{arm:16}{ARMS[arm].meaning}")
    print(f"\nin all about {_time(total)} and at least {costs.n_bytes / 1e9:.1f} GB beside the language model; ")
    print("the times are those of a first batch and of a first step here, the later ones are often faster\n")


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_result(result: Mapping[str, Any]) -> None:
    """A line for each arm, then the differences that are shown."""
