"""Scores of features: how well a judge can tell what they stand for, beside what chance would give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastsae.data.progress import with_bar
from fastsae.errors import UsageError
from fastsae.interpret.embedder import Embedder
from fastsae.interpret.judges.protocol import Judge
from fastsae.interpret.scores import detection, example_embedding, intruder, rubric
from fastsae.interpret.scores.draws import ExampleSource, draw_features

__all__ = ["SCORES", "draw_features", "score_features"]

SCORES = ("rubric", "detection", "intruder", "example_embedding")


def score_features(
    store: ExampleSource,
    judge: Judge,
    tokenizer: Any,
    features: Sequence[int],
    seed: int,
    which: Sequence[str] = SCORES,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores features; what is returned is ready for JSON and a function of the store, the judge and the seed.

    Args:
        store: Holds windows of each feature, and silent ones.
        judge: Judges them, in all scores but `example_embedding`.
        tokenizer: The one whose ids the windows hold.
        features: Which ones, see `draw_features`.
        seed: Determines all windows that are drawn, and the order in which they are shown.
        which: Some of `SCORES`.
        progress: Show a progress bar.

    Raises:
        UsageError: There is no such score.
        FastsaeError: The judge cannot work; what it says names the remedy.
    """
    if unknown := [name for name in which if name not in SCORES]:
        raise UsageError(f"scores: expected some of {', '.join(SCORES)}, got {unknown[0]!r}")
    summaries: dict[str, Any] = {}
    rows: list[dict[str, Any]] = [{"feature": feature} for feature in features]
    for name in with_bar(which, "scores", "score", total=len(which), progress=progress):
        if name == "example_embedding":
            summaries[name], of_features = example_embedding.score(store, Embedder(tokenizer), features, seed)
        else:
            score = {"rubric": rubric.score, "detection": detection.score, "intruder": intruder.score}[name]
            summaries[name], of_features = score(store, judge, features, seed)
        for row, result in zip(rows, of_features, strict=True):
            row[name] = result
    return {
        "seed": seed,
        "judge": {"name": judge.name, **judge.facts()},
        "scores": summaries,
        "features": rows,
    }
