"""Which windows a score shows: drawn by seed, and those learnt from never of a dialogue that is asked about."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np

from fastsae.interpret.windows import FeatureExamples, Window

CONTEXTS = 5
"""Windows that FAST's rubric reads."""


class ExampleSource(Protocol):
    """What scores read of an example store."""

    def alive(self, min_windows: int) -> list[int]:
        """The features with at least so many top windows, ascending."""
        ...

    def examples(self, feature: int) -> FeatureExamples:
        """What is known of a feature."""
        ...

    def silent(self, feature: int, n: int, *, seed: int, exclude: Collection[int]) -> list[Window]:
        """Up to `n` windows in which a feature is silent, in none of the dialogues `exclude`."""
        ...


def draw_features(store: ExampleSource, n: int, seed: int) -> list[int]:
    """Draws features at random of those with `CONTEXTS` windows in which they fire; ascending, all where there are fewer.

    Args:
        store: The example store.
        n: How many are drawn.
        seed: Determines them.
    """
    alive = store.alive(CONTEXTS)
    if len(alive) <= n:
        return alive
    return sorted(np.random.default_rng(seed).choice(alive, n, replace=False).tolist())


class FeatureDraw:
    """Draws the windows of one feature.

    The draws depend on the seed and on the feature's place among those that are scored, not on its index: the n-th feature of
    each of two SAEs of one pool is shown beside the same silent windows, except where it fires.

    Args:
        store: The example store.
        feature: The feature.
        place: Its place among those that are scored.
        seed: Of the whole run.
        purpose: A number of the score, so that no two of them draw the same.
    """

    def __init__(self, store: ExampleSource, feature: int, place: int, seed: int, purpose: int) -> None:
        self._store, self._feature = store, feature
        self._sequence = np.random.SeedSequence((seed, place, purpose))
        self.random = np.random.default_rng(self._sequence)
        self.examples = store.examples(feature)

    def silent(self, n: int, exclude: Collection[int] = ()) -> list[Window]:
        """Up to `n` windows in which the feature is silent, all of different dialogues; another call draws others.

        Windows of one dialogue would be alike, and those in which a feature fires are of different ones.
        """
        (child,) = self._sequence.spawn(1)
        seed = int(child.generate_state(1)[0])
        drawn = self._store.silent(self._feature, 2 * n, seed=seed, exclude=exclude)
        return list({window.dialogue: window for window in reversed(drawn)}.values())[::-1][:n]


def dialogues(windows: Sequence[Window]) -> set[int]:
    """The dialogues of which windows are taken."""
    return {window.dialogue for window in windows}
