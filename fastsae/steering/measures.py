"""What a text is worth without a judge, and how far one can push before it breaks."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fastsae.steering.result import Measures

if TYPE_CHECKING:
    from fastsae.steering.rollout import Rollout

MOST_REPEATED = 0.2
"""This share of repeated 3-grams is allowed to every text,"""
MORE_REPEATED = 0.1
"""and so is this much above the unsteered text's."""
MORE_OTHER_SCRIPT = 0.1
"""The share of letters in another script may lie this much above the unsteered text's."""
PERPLEXITY_RATIO = 3.0
"""The perplexity may be this many times the unsteered text's."""

_PERCENT = 95
_N = 3
_FAMILIES = {
    "HIRAGANA": "KANA",
    "KATAKANA": "KANA",
    "KATAKANA-HIRAGANA": "KANA",  # the mark that makes a vowel long
    "IDEOGRAPHIC": "CJK",  # the mark that repeats a character
    "BOPOMOFO": "CJK",
}


class StableRange(NamedTuple):
    """The strengths at which texts hold.

    Attributes:
        lowest: The lowest alpha at which they do; None if there is none in the grid.
        highest: The highest one.
        breaks: The alphas between the two at which they do not.
        reason: By which measure texts break in between, and first beyond each end, in words.
    """

    lowest: float | None
    highest: float | None
    breaks: tuple[float, ...]
    reason: str


def measure(rollout: Rollout, prompt_text: str) -> Measures:
    """Measure one text.

    mean_kl, p95_kl    of KL(steered || unsteered) over its tokens, in nats
    perplexity         exp(mean of -log p(token) under the unsteered model)
    repeated_3grams    share of its token 3-grams that occur more than once
    other_script       share of its letters in a script that the prompt does not use
    n_tokens           number of tokens, with the one that ends the text

    Args:
        rollout: The text.
        prompt_text: What the user wrote, without the words of a template.
    """
    surprise = _mean(rollout.surprise)
    return {
        "mean_kl": _mean(rollout.kl),
        "p95_kl": percentile(rollout.kl),
        "perplexity": None if surprise is None else _exp(surprise),
        "repeated_3grams": repeated_ngrams(rollout.token_ids),
        "other_script": other_script(rollout.text, prompt_text),
        "n_tokens": len(rollout.token_ids),
    }


def measure_all(rollouts: Sequence[Rollout], prompt_texts: Sequence[str]) -> Measures:
    """Return the means over texts of what `measure` gives, with p95_kl over the tokens of all of them.

    Texts that have nothing to measure do not count.
    """
    each = [measure(rollout, text) for rollout, text in zip(rollouts, prompt_texts, strict=True)]
    return {
        "mean_kl": _mean(one["mean_kl"] for one in each),
        "p95_kl": percentile([kl for rollout in rollouts for kl in rollout.kl]),
        "perplexity": _mean(one["perplexity"] for one in each),
        "repeated_3grams": _mean(one["repeated_3grams"] for one in each),
        "other_script": _mean(one["other_script"] for one in each),
        "n_tokens": _mean(one["n_tokens"] for one in each) or 0.0,
    }


def percentile(values: Sequence[float], percent: float = _PERCENT) -> float | None:
    """Return the smallest of the values that at least `percent` % of them do not exceed; None if there are none."""
    if not values:
        return None
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def repeated_ngrams(tokens: Sequence[int], n: int = _N) -> float | None:
    """Return the share of the n-grams of tokens, counted where they stand, that occur more than once; None if there are none."""
    grams = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    if not grams:
        return None
    return sum(count for count in grams.values() if count > 1) / grams.total()


def other_script(text: str, prompt: str) -> float | None:
    """Return the share of the letters of `text` in a script that no letter of the prompt has.

    A script is what the Unicode name of a letter begins with. A prompt with kana allows Chinese characters too, as Japanese is
    written in both. Digits, punctuation and marks do not count, nor do modifier letters, which all scripts share.

    Args:
        text: What was written.
        prompt: A prompt of several scripts allows each of them.

    Returns:
        None where the text or the prompt has no letter.
    """
    allowed = set(_scripts(prompt))
    if "KANA" in allowed:
        allowed.add("CJK")
    counts = Counter(_scripts(text))
    if not allowed or not counts:
        return None
    return sum(count for script, count in counts.items() if script not in allowed) / counts.total()


def stable_range(grid: Sequence[tuple[float, Measures]], unsteered: Measures) -> StableRange:
    """Return between which alphas of a grid texts hold: beyond the range they hold nowhere, and in it they mostly do.

    Texts hold if their

    - repeated 3-grams are at most max(`MOST_REPEATED`, unsteered + `MORE_REPEATED`),
    - share of another script is at most unsteered + `MORE_OTHER_SCRIPT`,
    - perplexity under the unsteered model is at most `PERPLEXITY_RATIO` times that of the unsteered texts.

    The KL is no part of the rule: it says how far the model was pushed, and not whether that did harm. What could not be
    measured breaks nothing. The range does not end at the first alpha that breaks: a few texts repeat themselves by chance, so
    that one alpha may break below others that hold.

    Args:
        grid: Each alpha with the means over its texts, in any order.
        unsteered: The means over the same prompts' unsteered texts.
    """
    ordered = sorted(grid, key=lambda entry: entry[0])
    why = {alpha: _broken(measures, unsteered) for alpha, measures in ordered}
    held = [alpha for alpha, broken in why.items() if not broken]
    lowest, highest = min(held, default=None), max(held, default=None)
    if lowest is None or highest is None:
        nearest = min(why, key=abs, default=None)
        return StableRange(None, None, (), "" if nearest is None else f"at {nearest:.4g}, {why[nearest]}")
    inside = tuple(alpha for alpha, broken in why.items() if broken and lowest < alpha < highest)
    below = max((alpha for alpha in why if alpha < lowest), default=None)
    above = min((alpha for alpha in why if alpha > highest), default=None)
    told = [alpha for alpha in (below, *inside, above) if alpha is not None]
    reason = "; ".join(f"at {alpha:.4g}, {why[alpha]}" for alpha in told) or "no alpha of the grid breaks them"
    return StableRange(lowest, highest, inside, reason)


def _broken(measures: Measures, unsteered: Measures) -> str:
    """The first rule that a text breaks, in words."""
    repeated = max(MOST_REPEATED, (unsteered["repeated_3grams"] or 0) + MORE_REPEATED)
    script = (unsteered["other_script"] or 0) + MORE_OTHER_SCRIPT
    perplexity = PERPLEXITY_RATIO * (unsteered["perplexity"] or math.inf)
    if (found := measures["repeated_3grams"]) is not None and found > repeated:
        return f"{100 * found:.3g} % of the 3-grams are repeated, above the limit of {100 * repeated:.3g} %"
    if (found := measures["other_script"]) is not None and found > script:
        return f"{100 * found:.3g} % of the letters are of another script, above the limit of {100 * script:.3g} %"
    if (found := measures["perplexity"]) is not None and found > perplexity:
        return f"the perplexity is {found:.3g}, above the limit of {perplexity:.3g}"
    return ""


def _scripts(text: str) -> Iterable[str]:
    for letter in unicodedata.normalize(
        "NFKC", text
    ):  # fullwidth, halfwidth and mathematical letters are their plain ones
        if letter.isalpha():
            name = unicodedata.name(letter, "").partition(" ")[0]
            if name not in ("", "MODIFIER"):
                yield _FAMILIES.get(name, name)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _exp(exponent: float) -> float:
    try:
        return math.exp(exponent)
    except OverflowError:
        return math.inf
