"""What a steering run is called and explained as, on the page and in the terminal, and the order in which it is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from fastsae.evaluate.metrics import number
from fastsae.steering.result import Result, Run, Stable

Key = Literal["mean_kl", "p95_kl", "perplexity", "repeated_3grams", "other_script", "n_tokens"]
UNSTEERED, PROMPTED = "unsteered", "prompted"
NOT_STEERED = (UNSTEERED, PROMPTED)
"""The arms that add nothing to the residual stream."""


UNDEFINED = "n/a"


class Measure(NamedTuple):
    """One measure of a text: names, unit, the factor to what is shown, its decimals, and what it says in one sentence."""

    key: Key
    name: str
    short: str
    unit: str
    factor: float
    decimals: int
    meaning: str


MEASURES = (
    Measure(
        "mean_kl",
        "mean KL",
        "mean KL",
        "nats per token",
        1.0,
        3,
        "How far the predictions of the next token are from those of the unsteered model on the same text, on average; "
        "0 is the unsteered model itself.",
    ),
    Measure(
        "p95_kl",
        "p95 KL",
        "p95 KL",
        "nats",
        1.0,
        3,
        "One token in twenty is farther from the unsteered model than this; alpha auto looks for the alpha at which it is 1.",
    ),
    Measure(
        "perplexity",
        "perplexity",
        "perplexity",
        "",
        1.0,
        2,
        "How many tokens the unsteered model hesitates between, on average, when it reads the text; 1 is a text without "
        "surprise, and a repetition comes close to it.",
    ),
    Measure(
        "repeated_3grams",
        "repeated 3-grams",
        "repeats",
        "%",
        100.0,
        1,
        "The share of runs of three tokens that occur more than once in a text; a text that goes round in circles reaches 100 %.",
    ),
    Measure(
        "other_script",
        "other script",
        "other script",
        "%",
        100.0,
        1,
        "The share of letters in a script that the prompt does not use, as where a text turns from English to Chinese.",
    ),
    Measure(
        "n_tokens", "length", "length", "tokens", 1.0, 1, "How many tokens were written, on average over the texts."
    ),
)
DOSES = {
    "fixed": "the same strength at every token",
    "decay": "a strength that falls over the length of the text",
    "kl_cap": "a strength that is lowered at each token where it would cost more KL than its budget",
    "set_point": "a strength that follows the feature's own activation towards a target",
}
"""What each dose does with the strength."""

POSITIONS = {
    "all": "all tokens",
    "prompt": "the tokens of the prompt",
    "generated": "the tokens that the model writes",
    "special": "the special tokens",
    "assistant": "the tokens of the assistant",
}
MODES = {
    "add": "{} times the feature's decoder row is added to the residual stream",
    "clamp": "the feature's activation is set to {}",
    "min_clamp": "the feature's activation is raised to {} where it is lower",
    "scale": "the feature's activation is multiplied by alpha",
    "ablate": "the feature's activation is set to 0",
    "orthogonal": "the part of the residual stream along the feature's direction is multiplied by alpha",
}
"""What each mode does at each step, with alpha in its unit in the braces."""
ARMS = {
    "random direction": "the same push along a random direction of the same norm, for what any push of that size does",
    PROMPTED: "the unsteered model, which was asked in words instead",
}
"""What the arms are that stand beside the feature."""
_LARGEST = 1e6  # from here on numbers are powers of ten
_UNITS = {"max": "times the feature's maximum", "norm": "times the norm of the residual stream"}


class TextRow(NamedTuple):
    """Texts that are shown beside each other: the indices in `runs` of those of one alpha."""

    title: str
    runs: list[int]


def plain(value: float) -> str:
    """A number of the grid as it was typed, with a true minus sign."""
    return f"{value:g}".replace("-", "−")


def alpha_words(result: Result) -> str:
    """Alpha and its unit, such as `alpha times the feature's maximum`."""
    return " ".join(filter(None, ("alpha", _UNITS.get(result["unit"]))))


def mode_sentence(result: Result) -> str:
    """What the push is, in one sentence."""
    said = MODES.get(result["mode"], result["mode"]).format(alpha_words(result))
    return f"{said[:1].upper()}{said[1:]}."


def dose_words(dose: str) -> str:
    """A dose as a word of prose."""
    return {"kl_cap": "KL cap", "set_point": "set point"}.get(dose, dose.replace("_", " "))


def group_name(run: Run | Stable) -> str:
    """Arm and dose, such as `feature 13794, fixed`."""
    return run["arm"] if run["arm"] in NOT_STEERED else f"{run['arm']}, {dose_words(run['dose'])}"


def run_name(run: Run) -> str:
    """Arm, dose and alpha, such as `feature 13794, fixed, alpha 15`."""
    return run["arm"] if run["arm"] in NOT_STEERED else f"{group_name(run)}, alpha {plain(run['alpha'])}"


def shown(value: float | None, measure: Measure, unit: bool = True) -> str:
    """A measure for reading, a percentage with its sign where `unit` is wanted; "n/a" where it is undefined."""
    if value is None or not math.isfinite(value):
        return UNDEFINED
    scaled = measure.factor * float(value)
    if measure.key == "n_tokens" and scaled.is_integer():
        return f"{scaled:,.0f}"
    text = number(scaled) if abs(scaled) < _LARGEST else f"{scaled:.1e}"
    return f"{text}\u00a0%" if unit and measure.unit == "%" else text


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each arm and dose by ascending alpha, those first that are not steered."""
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run["arm"] not in NOT_STEERED, run["arm"] != UNSTEERED)):
        found.setdefault(group_name(run), []).append(run)
    return {name: sorted(of_name, key=lambda run: run["alpha"]) for name, of_name in found.items()}


def unsteered_of(result: Result) -> Run | None:
    """The run without steering."""
    return next((run for run in result["runs"] if run["arm"] == UNSTEERED), None)


def text_rows(result: Result) -> list[TextRow]:
    """Which texts stand beside each other: those that are not steered, then those of each alpha.

    A run at alpha 0 that has written the unsteered texts again is left out.
    """
    runs, unsteered = result["runs"], unsteered_of(result)
    known = unsteered and [text["text"] for text in unsteered["texts"]]
    first = [i for arm in NOT_STEERED for i, run in enumerate(runs) if run["arm"] == arm]
    by_alpha: dict[float, list[int]] = {}
    for i, run in enumerate(runs):
        is_again = run["alpha"] == 0 and [text["text"] for text in run["texts"]] == known
        if run["arm"] not in NOT_STEERED and not is_again:
            by_alpha.setdefault(run["alpha"], []).append(i)
    rows = [TextRow("Not steered", first)] if first else []
    return rows + [TextRow(f"alpha {plain(alpha)}", by_alpha[alpha]) for alpha in sorted(by_alpha)]


def stable_ends(row: Stable) -> tuple[float, float] | None:
    """The lowest and the highest alpha at which texts hold; an end that is missing is 0. None where no dose holds."""
    low, high = row["lowest"], row["highest"]
    if low is None and high is None:
        return None
    return (min(0.0, high or 0.0) if low is None else low), (max(0.0, low or 0.0) if high is None else high)


def is_stable(result: Result, run: Run) -> bool:
    """Whether a run's alpha lies in the stable range of its arm and dose."""
    for row in result["stable"]:
        ends = stable_ends(row)
        if ends and (row["arm"], row["dose"]) == (run["arm"], run["dose"]):
            return ends[0] <= run["alpha"] <= ends[1]
    return False


def stable_sentence(row: Stable) -> str:
    """The stable range of one arm and dose in one sentence."""
    ends = stable_ends(row)
    if ends is None:
        said = "the texts hold at no dose of the grid"
    elif ends[0] == ends[1]:
        said = f"the texts hold at alpha {plain(ends[0])} alone"
    else:
        said = f"the texts hold from alpha {plain(ends[0])} to {plain(ends[1])}"
    reason = row["reason"].strip().rstrip(".")
    return f"{group_name(row)}: {said}{f' ({reason})' if reason else ''}."
