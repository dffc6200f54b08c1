"""What a steering run is called and explained as, on the page and in the terminal, and the order in which it is shown."""

from __future__ import annotations

import math
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
    "decay": "a strength that starts from a number and falls over the length of the text",
    "kl_cap": "at each token the largest strength whose KL keeps within the budget",
    "set_point": "a strength that brings the feature's own activation to the target",
}
"""What each dose does with the strength."""
_VALUES = {"decay": "from", "kl_cap": "budget", "set_point": "target"}

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
    PROMPTED: "the unsteered model, asked in words instead",
}
"""What the arms are that stand beside the feature."""
HOLDS = (
    "Texts hold where repeats, letters of another script and perplexity stay below limits that the unsteered texts set; the KL "
    "is no part of that."
)
"""What the stable range is, see `fastsae.steering.measures.stable_range`."""
_LARGEST = 1e6  # from here on numbers are powers of ten
_UNITS = {"max": "times the feature's maximum", "norm": "times the norm of the residual stream"}


def plain(value: float) -> str:
    """A dose in four digits, or in more where it is large, with a true minus sign."""
    return (f"{value:.4g}" if abs(value) < 1e4 else f"{value:g}").replace("-", "−")


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
    """Arm and dose with its number, such as `feature 13794, alpha 15` or `feature 13794, KL cap, budget 0.5 nats`."""
    if run["arm"] in NOT_STEERED:
        return run["arm"]
    name = run["arm"] if run["dose"] == "fixed" else group_name(run)
    unit = " nats" if run["dose"] == "kl_cap" else ""
    return f"{name}, {dose_value(run)}{unit}"


def dose_value(run: Run) -> str:
    """The number of a dose with what it is, such as `alpha 15` or `budget 0.5`."""
    return f"{_VALUES.get(run['dose'], 'alpha')} {plain(run['alpha'])}"


def shown(value: float | None, measure: Measure, unit: bool = True) -> str:
    """A measure for reading, a percentage with its sign where `unit` is wanted; "n/a" where it is undefined."""
    if value is None or not math.isfinite(value):
        return UNDEFINED
    scaled = measure.factor * float(value)
    if measure.key == "n_tokens" and scaled.is_integer():
        return f"{scaled:,.0f}"
    text = number(scaled) if abs(scaled) < _LARGEST else f"{scaled:.1e}"
    return f"{text}\u00a0%" if unit and measure.unit == "%" else text


def stable_ends(row: Stable) -> tuple[float, float] | None:
    """The lowest and the highest alpha at which texts hold; an end that is missing is 0. None where no dose holds."""
    low, high = row["lowest"], row["highest"]
    if low is None and high is None:
        return None
    return (min(0.0, high or 0.0) if low is None else low), (max(0.0, low or 0.0) if high is None else high)


def stable_sentence(row: Stable) -> str:
    """The stable range of one arm and dose in one sentence."""
    ends = stable_ends(row)
    if ends is None:
        said = "the texts hold at no dose of the grid"
    elif ends[0] == ends[1]:
        said = f"the texts hold at alpha {plain(ends[0])} alone"
    else:
        said = f"the texts hold from alpha {plain(ends[0])} to {plain(ends[1])}"
    if row["breaks"]:
        said += f", but not at {', '.join(map(plain, row['breaks']))}"
    reason = row["reason"].strip().rstrip(".")
    return f"{group_name(row)}: {said}{f' ({reason})' if reason else ''}."
