"""Detection: can a judge that has seen some windows of a feature tell in which others it fires?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastsae.evaluate.dialogues import FloatArray
from fastsae.interpret.disguise import disguised, unmarked
from fastsae.interpret.judges.protocol import Detection, Evidence, Judge
from fastsae.interpret.scores.draws import ExampleSource, FeatureDraw, dialogues
from fastsae.interpret.scores.summaries import mean
from fastsae.interpret.windows import Window

_LEARNT, _JUDGED = 10, 10  # windows of each kind, at most
_FEWEST = 5
_SILENT = 20  # learnt from
_PURPOSE = 2


def score(store: ExampleSource, judge: Judge, features: Sequence[int], seed: int) -> tuple[dict[str, Any], list[Any]]:
    """Shows a judge windows of a feature, then asks of others, of other dialogues, in which ones it fires.

        balanced accuracy = (right among firing / firing + right among silent / silent) / 2        fires: judged above 0.5
        AUROC = share of pairs of a firing and a silent window in which the firing one is judged higher, ties counting half

    Up to ten firing windows are judged, drawn from those at all activations, and as many silent ones. The judge learns from up
    to ten others, five of them with the largest activations. What is judged bears no activations, so that its text alone
    tells. An answer that cannot be read is wrong: it stands below all others for a firing window, above them for a silent one.
    Chance is 0.5 for both. Features with fewer than five windows to learn from or to judge are left out and counted.

    Source: detection as in EleutherAI's delphi, but no dialogue lends windows both to learn from and to judge.

    Args:
        store: The example store.
        judge: Who detects.
        features: The features.
        seed: Determines the windows.
    """
    tasks = {}
    for place, feature in enumerate(features):
        task = draw_windows(FeatureDraw(store, feature, place, seed, _PURPOSE))
        if task is not None:
            tasks[feature] = task
    answers = judge.detect([task for task, _ in tasks.values()])
    results = {
        feature: _result(answer, n_firing)
        for (feature, (_, n_firing)), answer in zip(tasks.items(), answers, strict=True)
    }
    summary = {
        "balanced_accuracy": mean([result["balanced_accuracy"] for result in results.values()], seed),
        "auroc": mean([result["auroc"] for result in results.values()], seed),
        "chance": 0.5,
        "of": len(results),
        "failed": sum(result["failed"] for result in results.values()),
        "judged": sum(result["firing"] + result["silent"] for result in results.values()),
        "left_out": len(features) - len(results),
    }
    return summary, [results.get(feature) for feature in features]


def draw_windows(draw: FeatureDraw) -> tuple[Detection, int] | None:
    """Draws what is learnt from and what is judged, and how many of the latter fire, which come first; None for too few."""
    examples = draw.examples
    sampled = list(examples.sampled)
    n_dialogues = len(dialogues([*examples.top, *sampled]))
    n_judged = min(_JUDGED, n_dialogues // 2, len(sampled))
    judged = [sampled[i] for i in sorted(draw.random.choice(len(sampled), n_judged, replace=False))]
    learnt = _learnt(examples.top, sampled, dialogues(judged))
    if min(len(judged), len(learnt)) < _FEWEST:
        return None
    silent = draw.silent(n_judged, dialogues(learnt))
    scale = draw.silent(_SILENT, dialogues([*judged, *silent, *learnt]))
    if min(len(silent), len(scale)) < _FEWEST:
        return None
    dressed = tuple(disguised(window, learnt[i % len(learnt)]) for i, window in enumerate(scale))
    windows = tuple(unmarked(window) for window in [*judged, *silent])
    return Detection(Evidence(tuple(learnt), dressed), windows), len(judged)


def _learnt(top: Sequence[Window], sampled: Sequence[Window], taken: set[int]) -> list[Window]:
    """Five of the top windows, then sampled ones spread over all activations, one of each dialogue that is not taken."""
    free_top = [window for window in top if window.dialogue not in taken]
    strongest = free_top[: _LEARNT // 2]
    used = taken | dialogues(strongest)
    rest = [window for window in sampled if window.dialogue not in used]
    used |= dialogues(rest)
    rest += [window for window in free_top if window.dialogue not in used]
    n = min(len(rest), _LEARNT - len(strongest))
    return strongest + [rest[i] for i in np.linspace(0, len(rest) - 1, n).round().astype(int)]


def _result(answer: Sequence[float | None], n_firing: int) -> dict[str, Any]:
    firing = np.array([-1.0 if score is None else score for score in answer[:n_firing]])
    silent = np.array([2.0 if score is None else score for score in answer[n_firing:]])
    right_firing, right_silent = int((firing > 0.5).sum()), int((silent <= 0.5).sum())
    return {
        "balanced_accuracy": (right_firing / len(firing) + right_silent / len(silent)) / 2,
        "auroc": auroc(firing, silent),
        "right_firing": right_firing,
        "firing": len(firing),
        "right_silent": right_silent,
        "silent": len(silent),
        "failed": sum(score is None for score in answer),
    }


def auroc(positive: FloatArray, negative: FloatArray) -> float:
    """The share of pairs in which the positive is higher, ties counting half."""
    above = np.sign(positive[:, None] - negative[None, :])
    return float((above.mean() + 1) / 2)
