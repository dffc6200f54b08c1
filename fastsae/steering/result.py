"""The layout of `steer.json`, in one place."""

from __future__ import annotations

from typing import Any, TypedDict


class ChosenFeature(TypedDict):
    """One steered feature, and why it was taken."""

    feature: int
    chosen_by: str  # such as "--feature" or "strongest at <|im_start|>"
    score: float | None  # by which it was chosen; None where it was named
    maximum: float | None  # its largest activation seen, of which unit "max" takes alpha times as much


class Tried(TypedDict):
    """One strength that the search for alpha has tried."""

    alpha: float
    p95_kl: float


class Auto(TypedDict):
    """What `--alpha auto` has found: the strength at which the 95th percentile of the tokens' KL is 1 nat."""

    alpha: float
    p95_kl: float
    tried: list[Tried]


class Measures(TypedDict):
    """What a text, or the texts of a run, are worth without a judge; None where it is undefined, as for a text of no tokens."""

    mean_kl: float | None  # nats per token, steered from unsteered, both on the steered text
    p95_kl: float | None
    perplexity: float | None  # under the unsteered model
    repeated_3grams: float | None  # share
    other_script: float | None  # share of the letters
    n_tokens: float


class Text(Measures):
    """What the model has written to one prompt; lists have an entry for each new token."""

    prompt: int  # index in `prompts`
    text: str
    pieces: list[str]
    kl: list[float]  # nats; empty where it is undefined
    strengths: list[float]  # the scale of the edits at that step: 1 for a fixed dose, alpha for the others
    acts: list[float]  # the first feature's activation before the edit
    ended: bool  # by itself, not by `max_new_tokens`


class Run(Measures):
    """One arm at one dose; measures are means over its texts, and `p95_kl` is over all their tokens.

    `alpha` is the number of the dose: of "decay" what it starts from, of "kl_cap" the budget in nats, of "set_point" the target.
    """

    arm: str  # "feature 13794", "random direction", "prompted", "unsteered"
    dose: str  # "fixed", "decay", "kl_cap", "set_point"
    alpha: float
    texts: list[Text]


class Stable(TypedDict):
    """Between which doses of one arm texts hold; both ends are None where they hold at none."""

    arm: str
    dose: str
    lowest: float | None
    highest: float | None
    breaks: list[float]  # doses between the two at which they do not
    reason: str  # what ends the range, or that nothing does


class Result(TypedDict):
    """`steer.json`."""

    model: str
    sae: str
    layer: int
    hook: str
    architecture: str
    positions: str
    mode: str
    unit: str
    max_new_tokens: int
    temperature: float
    seed: int
    features: list[ChosenFeature]
    prompts: list[str]
    instruction: str | None  # what was added to them for the prompted texts
    auto: Auto | None
    runs: list[Run]
    stable: list[Stable]
    seconds: float
    versions: dict[str, Any]
