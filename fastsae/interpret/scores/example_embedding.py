"""Example embedding: are windows in which a feature fires alike? No explanation and no language model is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastsae.evaluate.dialogues import FloatArray
from fastsae.interpret.disguise import disguised
from fastsae.interpret.embedder import Embedder
from fastsae.interpret.scores.draws import ExampleSource, FeatureDraw, dialogues
from fastsae.interpret.scores.summaries import mean

TRIALS = 20
_SET = 10  # windows that a query is compared with, at most
_FEWEST = 5
_SILENT = 40
_PURPOSE = 4


def score(
    store: ExampleSource, embedder: Embedder, features: Sequence[int], seed: int
) -> tuple[dict[str, Any], list[Any]]:
    """Compares a firing and a silent window with a set of firing and a set of silent ones, 20 times per feature.

        delta(q) = mean similarity of q to the firing set - mean similarity of q to the silent set
        value = trials with delta(firing query) > delta(silent query) / trials, ties counting half, then the mean over features

    Chance is 0.5. The firing set holds up to ten neighbours of the firing query by activation, the silent set ten windows. All
    windows are of different dialogues; silent ones bear the activations of firing ones.

    Source: example embedding as in EleutherAI's delphi, which returns the deltas.

    Args:
        store: The example store.
        embedder: Makes the vectors.
        features: The features.
        seed: Determines the windows.
    """
    results = {}
    for place, feature in enumerate(features):
        draw = FeatureDraw(store, feature, place, seed, _PURPOSE)
        sampled = draw.examples.sampled
        silent = draw.silent(_SILENT, dialogues(sampled))
        if min(len(sampled), len(silent)) > _FEWEST:
            dressed = [disguised(window, sampled[i % len(sampled)]) for i, window in enumerate(silent)]
            hits = _hits(embedder.embed(sampled), embedder.embed(dressed), draw.random)
            results[feature] = {"value": hits / TRIALS, "hits": hits, "trials": TRIALS}
    summary = {
        **mean([result["value"] for result in results.values()], seed),
        "chance": 0.5,
        "of": len(results),
        "failed": 0,
        "trials": TRIALS * len(results),
        "left_out": len(features) - len(results),
    }
    return summary, [results.get(feature) for feature in features]


def _hits(firing: FloatArray, silent: FloatArray, random: np.random.Generator) -> float:
    hits = 0.0
    for _ in range(TRIALS):
        query, *silent_set = random.permutation(len(silent))[: _SET + 1]
        at = int(random.integers(len(firing)))
        nearest = np.argsort(np.abs(np.arange(len(firing)) - at), kind="stable")[1 : _SET + 1]
        towards = firing[nearest].mean(0) - silent[silent_set].mean(0)
        hits += (np.sign((firing[at] - silent[query]) @ towards) + 1) / 2
    return hits
