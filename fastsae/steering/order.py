"""Which runs and texts of a steering result belong together, on the page and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fastsae.steering.result import Result, Run, Text
from fastsae.steering.words import NOT_STEERED, UNSTEERED, group_name, plain, stable_ends


class TextRow(NamedTuple):
    """Texts that are shown beside each other: the indices in `runs` of those whose they are."""

    title: str
    runs: list[int]


class Alike(NamedTuple):
    """A fixed dose, and the dynamic ones whose mean KL it is nearest to."""

    fixed: Run
    dynamic: list[Run]


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each arm and dose by ascending alpha, those first that are not steered."""
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run["arm"] not in NOT_STEERED, run["arm"] != UNSTEERED)):
        found.setdefault(group_name(run), []).append(run)
    return {name: sorted(of_name, key=lambda run: run["alpha"]) for name, of_name in found.items()}


def unsteered_of(result: Result) -> Run | None:
    """The run without steering."""
    return next((run for run in result["runs"] if run["arm"] == UNSTEERED), None)


def is_stable(result: Result, run: Run) -> bool:
    """Whether a run's texts hold, by the stable range of its arm and dose."""
    for row in result["stable"]:
        ends = stable_ends(row)
        if ends and (row["arm"], row["dose"]) == (run["arm"], run["dose"]):
            return ends[0] <= run["alpha"] <= ends[1] and run["alpha"] not in row["breaks"]
    return False


def alike(result: Result) -> list[Alike]:
    """For each dynamic dose the fixed one of its arm with the nearest mean KL, by its logarithm; doses of one such together."""
    runs = [run for run in result["runs"] if run["arm"] not in NOT_STEERED and run["mean_kl"]]
    found = [Alike(run, []) for run in runs if run["dose"] == "fixed"]
    for run in runs:
        of_arm = [one for one in found if one.fixed["arm"] == run["arm"]]
        if run["dose"] != "fixed" and of_arm:
            min(of_arm, key=lambda one: ratio(one.fixed, run)).dynamic.append(run)
    return [one for one in found if one.dynamic]


def ratio(a: Run, b: Run) -> float:
    """How many times the larger of two mean KLs is the smaller one; infinite where one is none."""
    one, other = a["mean_kl"], b["mean_kl"]
    return max(one / other, other / one) if one and other else math.inf


def text_rows(result: Result) -> list[TextRow]:
    """Which texts stand beside each other: those not steered, those of each alpha, then doses at like KL.

    A run at alpha 0 that has written the unsteered texts again is left out. The number of a dynamic dose is no alpha.
    """
    runs, unsteered = result["runs"], unsteered_of(result)
    known = unsteered and [text["text"] for text in unsteered["texts"]]
    first = [i for arm in NOT_STEERED for i, run in enumerate(runs) if run["arm"] == arm]
    by_alpha: dict[float, list[int]] = {}
    for i, run in enumerate(runs):
        is_again = run["alpha"] == 0 and [text["text"] for text in run["texts"]] == known
        if run["arm"] not in NOT_STEERED and run["dose"] == "fixed" and not is_again:
            by_alpha.setdefault(run["alpha"], []).append(i)
    rows = [TextRow("Not steered", first)] if first else []
    rows += [TextRow(f"alpha {plain(alpha)}", by_alpha[alpha]) for alpha in sorted(by_alpha)]
    rows += [
        TextRow(
            f"Doses at the KL of alpha {plain(one.fixed['alpha'])}",
            [runs.index(run) for run in (one.fixed, *one.dynamic)],
        )
        for one in alike(result)
    ]
    shown = {i for row in rows for i in row.runs}
    others = [i for i, run in enumerate(runs) if run["dose"] != "fixed" and i not in shown]
    return rows + ([TextRow("Other doses", others)] if others else [])


def alphas(run: Run, text: Text) -> list[float]:
    """Alpha at each token of a text: the edits of a fixed dose hold it themselves, those of others have it as their scale."""
    is_fixed = run["dose"] == "fixed" and run["arm"] not in NOT_STEERED
    return [run["alpha"]] * len(text["strengths"]) if is_fixed else text["strengths"]
