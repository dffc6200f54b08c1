"""Intruder: can a judge tell the one window in which a feature is silent from those in which it fires, unexplained?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastsae.interpret.disguise import disguised
from fastsae.interpret.judges.protocol import Judge
from fastsae.interpret.scores.draws import ExampleSource, FeatureDraw, dialogues
from fastsae.interpret.scores.summaries import mean
from fastsae.interpret.windows import Window

SHOWN = 5
TRIALS = 5
_PURPOSE = 3


def score(store: ExampleSource, judge: Judge, features: Sequence[int], seed: int) -> tuple[dict[str, Any], list[Any]]:
    """Shows four firing windows and a silent one in a random order, five times per feature.

        value = trials in which the judge names the silent one / trials, then the mean over features        chance: 1 / 5

    The firing windows of a trial are neighbours by activation, so that a weak one is not taken for the intruder; the silent one
    bears the activations of another firing window, so that it is not told by having none. All are of different dialogues. An
    answer that cannot be read is wrong. Features with fewer than five sampled windows are left out and counted.

    Source: intruder scoring as in EleutherAI's delphi.

    Args:
        store: The example store.
        judge: Who names the intruder.
        features: The features.
        seed: Determines the windows and their order.
    """
    trials = {}
    for place, feature in enumerate(features):
        drawn = _trials(FeatureDraw(store, feature, place, seed, _PURPOSE))
        if drawn:
            trials[feature] = drawn
    answers = iter(judge.find_intruder([windows for drawn in trials.values() for windows, _ in drawn]))
    results = {}
    for feature, drawn in trials.items():
        given = [(next(answers), at) for _, at in drawn]
        right = sum(answer == at for answer, at in given)
        failed = sum(answer is None for answer, _ in given)
        results[feature] = {"value": right / len(drawn), "right": right, "trials": len(drawn), "failed": failed}
    summary = {
        **mean([result["value"] for result in results.values()], seed),
        "chance": 1 / SHOWN,
        "of": len(results),
        "failed": sum(result["failed"] for result in results.values()),
        "trials": sum(result["trials"] for result in results.values()),
        "left_out": len(features) - len(results),
    }
    return summary, [results.get(feature) for feature in features]


def _trials(draw: FeatureDraw) -> list[tuple[list[Window], int]]:
    """The windows of each trial, and where the intruder stands among them."""
    sampled = draw.examples.sampled
    if len(sampled) < SHOWN:
        return []
    silent = draw.silent(TRIALS, dialogues(sampled))
    trials = []
    for intruder in silent:
        start = int(draw.random.integers(len(sampled) - SHOWN + 1))
        *windows, lender = draw.random.permutation(SHOWN) + start
        at = int(draw.random.integers(SHOWN))
        shown = [sampled[i] for i in windows]
        shown.insert(at, disguised(intruder, sampled[lender]))
        trials.append((shown, at))
    return trials
