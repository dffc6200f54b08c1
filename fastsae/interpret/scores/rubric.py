"""FAST's rubric: the share of features whose strongest contexts show one clear pattern."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastsae.interpret.disguise import disguised
from fastsae.interpret.judges.protocol import Evidence, Judge, Rating
from fastsae.interpret.scores.draws import CONTEXTS, ExampleSource, FeatureDraw, dialogues
from fastsae.interpret.scores.summaries import share

HIGH = 4
_SILENT = 40  # windows for the judge's scale
_FEWEST_SILENT = 10
_PURPOSE = 1


def score(store: ExampleSource, judge: Judge, features: Sequence[int], seed: int) -> tuple[dict[str, Any], list[Any]]:
    """Rates the five windows with the largest activations of each feature, from 1 to 5, and names it.

        value = features rated 4 or 5 / features rated        interval: Wilson's

    5: one clear pattern, and none of the windows deviates from it. 4: a clear pattern, from which one or two windows deviate.
    3: a pattern that is clear on the whole, but quite a few windows do not fit. 2: a broad theme without structure. 1: nothing.

    An answer that cannot be read counts as not high. No theory tells what chance would give, so it is measured: for each feature
    the judge also rates five silent windows that bear the activations of the firing ones.

    Source: arXiv:2506.07691, section 5 and appendix E, where GPT-4o rates.

    Args:
        store: The example store.
        judge: Who rates.
        features: At least `CONTEXTS` windows of each, see `draw_features`.
        seed: Determines the silent windows.
    """
    tasks, controls, scored = [], [], []
    for place, feature in enumerate(features):
        draw = FeatureDraw(store, feature, place, seed, _PURPOSE)
        firing = draw.examples.top[:CONTEXTS]
        silent = draw.silent(CONTEXTS + _SILENT, dialogues(firing))
        if len(firing) < CONTEXTS or len(silent) < CONTEXTS + _FEWEST_SILENT:
            continue
        dressed = [disguised(window, firing[i % CONTEXTS]) for i, window in enumerate(silent)]
        tasks.append(Evidence(firing, tuple(dressed[CONTEXTS:])))
        controls.append(Evidence(tuple(dressed[:CONTEXTS]), tuple(dressed[CONTEXTS:]), wants_name=False))
        scored.append(feature)
    ratings = judge.rate([*tasks, *controls])
    of_features, of_controls = ratings[: len(tasks)], ratings[len(tasks) :]
    found = dict(zip(scored, of_features, strict=True))
    summary = {
        **share(_high(of_features), len(of_features)),
        "chance": share(_high(of_controls), len(of_controls)),
        "scores": {str(score): sum(rating.score == score for rating in of_features) for score in range(1, 6)},
        "failed": sum(rating.score is None for rating in of_features),
        "left_out": len(features) - len(scored),
    }
    return summary, [_as_json(found.get(feature)) for feature in features]


def _high(ratings: Sequence[Rating]) -> int:
    return sum(rating.score is not None and rating.score >= HIGH for rating in ratings)


def _as_json(rating: Rating | None) -> dict[str, Any] | None:
    return None if rating is None else {"score": rating.score, "name": rating.name}
