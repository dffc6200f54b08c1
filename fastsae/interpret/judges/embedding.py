"""The offline judge: whether texts are alike, by static word embeddings; it reads nothing and explains nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastsae.evaluate.dialogues import FloatArray
from fastsae.interpret.disguise import unmarked
from fastsae.interpret.embedder import Embedder, unit
from fastsae.interpret.judges.protocol import Detection, Evidence, Rating
from fastsae.interpret.text import WindowTexts
from fastsae.interpret.windows import Window

QUANTILE = 0.95
"""A window fits where it is more alike the others than this share of silent windows."""
SCORES = {5: 5, 4: 4, 3: 4, 2: 3, 1: 2, 0: 1}
"""FAST's score for so many of five windows that fit: 5 has none that deviates, 4 has one or two."""

_NAME_TOKENS = 3


class EmbeddingJudge:
    """Judges by the similarity of windows, see `fastsae.interpret.embedder`.

    - A window *fits* the others of its set where its similarity to their mean is above the 95th percentile of the similarities of
      silent windows to that mean. `SCORES` turns the number of five that fit into FAST's score.
    - Its name for a feature is no explanation: the tokens with the largest activations.
    - It detects by similarity to the mean of the windows that it learns from. Its threshold is half-way between the mean
      similarity of those windows, each left out of the mean in turn, and that of silent ones.
    - The intruder is the window that is least alike the mean of the others.

    Args:
        tokenizer: The one whose ids the windows hold.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.name = "embedding"
        self._embedder = Embedder(tokenizer)
        self._texts = WindowTexts(tokenizer)

    def rate(self, tasks: Sequence[Evidence]) -> list[Rating]:
        return [Rating(SCORES[self._fitting(task)], self._name(task.firing)) for task in tasks]

    def detect(self, tasks: Sequence[Detection]) -> list[list[float | None]]:
        return [self._detect(task) for task in tasks]

    def find_intruder(self, tasks: Sequence[Sequence[Window]]) -> list[int | None]:
        return [int(np.argmin(_to_the_others(self._embedder.embed(task)))) for task in tasks]

    def facts(self) -> dict[str, Any]:
        return {
            "embeddings": "wordllama l2_supercat_256",
            "fits_above_quantile_of_silent": QUANTILE,
            "scores_by_fitting_windows": {str(fitting): score for fitting, score in SCORES.items()},
            "names_are": "the tokens with the largest activations, which is no explanation",
        }

    def _fitting(self, task: Evidence) -> int:
        firing, silent = self._embedder.embed(task.firing), self._embedder.embed(task.silent)
        limits = np.quantile(silent @ _centres_of_others(firing).T, QUANTILE, axis=0)
        return int((_to_the_others(firing) > limits).sum())

    def _name(self, windows: Sequence[Window]) -> str:
        peaks = Counter(self._texts.pieces(window)[window.peak].strip() for window in windows)
        return ", ".join(word for word, _ in peaks.most_common(_NAME_TOKENS) if word)

    def _detect(self, task: Detection) -> list[float | None]:
        firing = self._embedder.embed(task.evidence.firing)
        centre = unit(firing.mean(0))
        plain = self._embedder.embed([unmarked(window) for window in task.evidence.firing])
        learnt = (plain * _centres_of_others(firing)).sum(1)
        silent = self._embedder.embed([unmarked(window) for window in task.evidence.silent]) @ centre
        spread = max(float(np.sqrt((learnt.var() + silent.var()) / 2)), 1e-6)
        distance = (self._embedder.embed(task.windows) @ centre - (learnt.mean() + silent.mean()) / 2) / spread
        return [float(score) for score in 1 / (1 + np.exp(-np.clip(distance, -30, 30)))]


def _centres_of_others(vectors: FloatArray) -> FloatArray:
    """For each vector the mean of all others, scaled to length 1."""
    return unit(vectors.sum(0) - vectors)


def _to_the_others(vectors: FloatArray) -> FloatArray:
    """The similarity of each vector to the mean of all others."""
    return (vectors * _centres_of_others(vectors)).sum(1)
