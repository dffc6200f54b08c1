"""What a page shows of features, and its packed form: the text of a token once, windows as indices, numbers rounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastsae.evaluate.token_kinds import KINDS
from fastsae.interpret.logits import FeatureLogits, Neighbour, feature_logits, nearest_features
from fastsae.interpret.windows import FeatureExamples, Window

if TYPE_CHECKING:
    from torch import Tensor

N_INTERVALS = 5


@dataclass(frozen=True)
class Explanation:
    """What a feature is said to mean, and who says it, such as `hf:Qwen/Qwen2.5-7B-Instruct`."""

    text: str
    method: str


@dataclass(frozen=True)
class Score:
    """One score of a feature or of its explanation.

    Attributes:
        name: Such as `detection`; features that have a score of one name can be sorted by it.
        value: From `least` to `most`; None where it could not be measured.
        chance: What a judge without knowledge reaches; None where that is unknown.
        low: Lower end of the value's interval, None where there is none.
        high: Upper end.
        least: The worst value that is possible.
        most: The best.
    """

    name: str
    value: float | None
    chance: float | None = None
    low: float | None = None
    high: float | None = None
    least: float = 0.0
    most: float = 1.0


@dataclass(frozen=True)
class PageFeature:
    """One feature of a page; what is not known of it is left out there.

    Attributes:
        examples: Where it fires.
        logits: What it writes to the logits.
        nearest: The features with the most similar decoder rows, most similar first.
        explanation: What it is said to mean.
        scores: In the order in which they are shown; the first stands in the list of features.
    """

    examples: FeatureExamples
    logits: FeatureLogits | None = None
    nearest: Sequence[Neighbour] = ()
    explanation: Explanation | None = None
    scores: Sequence[Score] = ()


def describe(examples: Sequence[FeatureExamples], W_dec: Tensor, model: Any) -> list[PageFeature]:
    """Features with what is known of them before anybody judges them: logits and neighbours are computed here.

    Args:
        examples: Where each feature fires.
        W_dec: `[d_sae, d_in]`, the SAE's.
        model: A causal language model of transformers, whose residual stream the SAE writes to.

    Raises:
        ValueError: The SAE has another width than the model.
    """
    ids = [one.feature for one in examples]
    found = feature_logits(model, W_dec[ids])
    logits: Sequence[FeatureLogits | None] = [None] * len(ids) if found is None else found
    return [PageFeature(*parts) for parts in zip(examples, logits, nearest_features(W_dec, ids), strict=True)]


@dataclass(frozen=True)
class Interval:
    """Activations from `low` to `high`, their share of all tokens on which the feature fires, and windows among them."""

    low: float
    high: float
    share: float
    windows: tuple[Window, ...]


def intervals(examples: FeatureExamples, n: int = N_INTERVALS) -> list[Interval]:
    """The randomly sampled windows in `n` intervals of equal width from 0 to the maximum, the highest first.

    The share of an interval is read off the histogram; a bin on a border counts on both sides, as if activations were spread
    evenly over it (evenly over their logarithms where the bin does not begin at 0).
    """
    if not examples.maximum > 0:
        return []
    borders = [examples.maximum * i / n for i in range(n + 1)]
    below = [_count_below(examples, border) for border in borders[1:-1]]
    counts = [0.0, *below, float(sum(examples.histogram))]
    found = []
    for i in reversed(range(n)):
        inside = [w for w in examples.sampled if min(int(w.value / examples.maximum * n), n - 1) == i]
        share = (counts[i + 1] - counts[i]) / (counts[-1] or 1.0)
        found.append(Interval(borders[i], borders[i + 1], share, tuple(inside)))
    return found


def _count_below(examples: FeatureExamples, border: float) -> float:
    count = 0.0
    for low, high, inside in zip(examples.edges[:-1], examples.edges[1:], examples.histogram, strict=True):
        if high <= border:
            count += inside
        elif low < border:
            even = (border - low) / (high - low)
            count += inside * (math.log(border / low) / math.log(high / low) if low > 0 else even)
    return count


class TokenTable:
    """The texts of tokens, each once, and the place of a token among them."""

    def __init__(self, token_text: Callable[[int], str]) -> None:
        self.texts: list[str] = []
        self._token_text = token_text
        self._places: dict[int, int] = {}

    def place(self, token: int) -> int:
        """Index in `texts` of a token's text."""
        if token not in self._places:
            self._places[token] = len(self.texts)
            self.texts.append(self._token_text(token))
        return self._places[token]

    def text(self, token: int) -> str:
        """A token's text."""
        return self.texts[self.place(token)]


def pack_features(features: Sequence[PageFeature], token_text: Callable[[int], str]) -> dict[str, Any]:
    """The features as objects of JSON.

    Args:
        features: In the order of the page.
        token_text: Text of a token id, such as `lambda token: tokenizer.decode([token])`.

    Returns:
        `tokens`, the table of texts; `kinds`, the words for whose a token is; `features`, see `_pack_feature`.
    """
    table = TokenTable(token_text)
    packed = [_pack_feature(feature, table) for feature in features]
    return {"tokens": table.texts, "kinds": KINDS, "features": packed}


def _pack_feature(feature: PageFeature, table: TokenTable) -> dict[str, Any]:
    """One feature: `top` and the last entry of each of `intervals` are indices into `windows`, see `_pack_window`."""
    examples, logits, explanation = feature.examples, feature.logits, feature.explanation
    places = {window: i for i, window in enumerate(dict.fromkeys(examples.top + examples.sampled))}
    packed: dict[str, Any] = {
        "id": examples.feature,
        "count": examples.count,
        "density": rounded(examples.density),
        "max": rounded(examples.maximum),
        "special": rounded(examples.mean_special),
        "edges": [rounded(x) for x in examples.edges],
        "histogram": examples.histogram,
        "explanation": explanation and [explanation.text, explanation.method],
        "scores": [
            [s.name, *(rounded(x) for x in (s.value, s.chance, s.low, s.high, s.least, s.most))] for s in feature.scores
        ],
        "nearest": [[other, rounded(cosine)] for other, cosine in feature.nearest],
        "windows": [_pack_window(window, table) for window in places],
        "top": [places[window] for window in examples.top],
        "intervals": [
            [rounded(i.low), rounded(i.high), rounded(i.share), [places[window] for window in i.windows]]
            for i in intervals(examples)
        ],
    }
    if logits is not None:
        packed["logits"] = {
            "positive": [[table.place(token), rounded(value)] for token, value in logits.positive],
            "negative": [[table.place(token), rounded(value)] for token, value in logits.negative],
            "edges": [rounded(x) for x in logits.edges],
            "histogram": logits.histogram,
        }
    return packed


def _pack_window(window: Window, table: TokenTable) -> list[Any]:
    """Dialogue, start, peak, places of the tokens, a digit for the kind of each, and activations."""
    return [
        window.dialogue,
        window.start,
        window.peak,
        [table.place(token) for token in window.tokens],
        "".join(str(KINDS.index(kind)) for kind in window.kinds),
        [rounded(x) for x in window.activations],
    ]


def rounded(value: float | None) -> float | None:
    """Three significant digits; None for what is no number, which JSON does not know."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.3g}") or 0  # 0 takes less room than 0.0
