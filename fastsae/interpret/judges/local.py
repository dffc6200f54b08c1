"""The judge that is a local language model: it answers by the log-probabilities of a few words, and writes only names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastsae.evaluate.dialogues import FloatArray
from fastsae.interpret.judges.causal_model import CausalModel
from fastsae.interpret.judges.protocol import Detection, Evidence, Rating
from fastsae.interpret.text import WindowTexts
from fastsae.interpret.windows import Window

_SHOWN = 6  # firing windows in a prompt of detection; those that are left set the threshold
_FEWEST_LEFT = 3
_NAME_TOKENS = 12

_RATE = """\
In these texts the words between << and >> are marked:
{pieces}
How clear is the pattern of the marked words?
5: clear pattern, no exceptions
4: clear pattern, one or two exceptions
3: some pattern, quite a few exceptions
2: only a broad theme
1: no pattern
Answer with one number."""

_NAME = """\
In these texts the words between << and >> are marked:
{pieces}
What do the marked words have in common? Answer with a few words."""

_DETECT = """\
In these texts the words between << and >> share a pattern:
{pieces}
Does the following text have words of the same pattern, yes or no?
{text}"""

_INTRUDE = """\
In all but one of these texts the words between << and >> share a pattern:
{pieces}
Which text does not belong to the others? Answer with its letter."""


class LocalJudge:
    """Asks a causal language model with short prompts.

    - It rates by the most likely digit of 1 to 5, and writes a name.
    - It detects by the log-odds of "Yes" over "No", with the windows that it learns from in the prompt. Small models lean to one
      of both whatever they read: the threshold is half-way between the mean log-odds of windows that it learns from but that are
      not in the prompt, and that of silent ones.
    - It finds the intruder by its letter. How much the model leans to a letter is told by texts that are empty, and taken off.

    Args:
        name: As the user gave it.
        model: The language model.
        tokenizer: The one whose ids the windows hold, which need not be the judge's own.
    """

    def __init__(self, name: str, model: CausalModel, tokenizer: Any) -> None:
        self.name = name
        self._model = model
        self._texts = WindowTexts(tokenizer)

    def rate(self, tasks: Sequence[Evidence]) -> list[Rating]:
        pieces = [_listed([self._texts.marked(window) for window in task.firing]) for task in tasks]
        prompts = [[_RATE.format(pieces=of_one)] for of_one in pieces]
        shares = self._model.choose(prompts, "Score:", "12345", "rating features")
        named = [i for i, task in enumerate(tasks) if task.wants_name]
        naming = [_NAME.format(pieces=pieces[i]) for i in named]
        names = dict(
            zip(named, self._model.write(naming, "The marked words are", _NAME_TOKENS, "naming features"), strict=True)
        )
        return [Rating(int(of_one[0].argmax()) + 1, names.get(i) or None) for i, of_one in enumerate(shares)]

    def detect(self, tasks: Sequence[Detection]) -> list[list[float | None]]:
        groups = [self._detections(task) for task in tasks]
        answers = self._model.choose(groups, "Answer:", ("Yes", "No"), "detecting features")
        return [_calibrated(task, of_one[:, 0] - of_one[:, 1]) for task, of_one in zip(tasks, answers, strict=True)]

    def find_intruder(self, tasks: Sequence[Sequence[Window]]) -> list[int | None]:
        found: list[int | None] = [None] * len(tasks)
        for n in {len(task) for task in tasks}:
            letters = "ABCDEFGHIJ"[:n]
            places = [i for i, task in enumerate(tasks) if len(task) == n]
            listed = [["<<...>>"] * n, *([self._texts.marked(window) for window in tasks[i]] for i in places)]
            prompts = [[_INTRUDE.format(pieces=_listed(pieces, letters))] for pieces in listed]
            lean, *shares = self._model.choose(prompts, "Answer:", letters, "finding intruders")
            for i, of_one in zip(places, shares, strict=True):
                found[i] = int((of_one[0] - lean[0]).argmax())
        return found

    def facts(self) -> dict[str, Any]:
        return dict(self._model.counts)

    def _detections(self, task: Detection) -> list[str]:
        """A prompt for each window in question, then for each window that sets the threshold."""
        shown, left = _parted(task)
        pieces = _listed([self._texts.marked(window) for window in shown])
        asked = [*task.windows, *left, *task.evidence.silent[: len(left)]]
        return [_DETECT.format(pieces=pieces, text=_one_line(self._texts.plain(window))) for window in asked]


def _parted(task: Detection) -> tuple[Sequence[Window], Sequence[Window]]:
    """The windows of the prompt, and those that set the threshold, every second or third of all."""
    firing = task.evidence.firing
    n_left = max(_FEWEST_LEFT, len(firing) - _SHOWN)
    left = set(np.linspace(0, len(firing) - 1, min(n_left, len(firing) - 1)).round().astype(int).tolist())
    parted = [[window for i, window in enumerate(firing) if (i in left) is taken] for taken in (False, True)]
    return parted[0], parted[1]


def _calibrated(task: Detection, log_odds: FloatArray) -> list[float | None]:
    n = len(task.windows)
    n_left = len(_parted(task)[1])
    fires, silent = log_odds[n : n + n_left], log_odds[n + n_left :]
    above = np.clip(log_odds[:n] - (fires.mean() + silent.mean()) / 2, -30, 30)
    return [float(score) for score in 1 / (1 + np.exp(-above))]


def _listed(pieces: Sequence[str], marks: str = "") -> str:
    labels = [f"{mark}. " for mark in marks] or ["- "] * len(pieces)
    return "\n".join(label + _one_line(piece) for label, piece in zip(labels, pieces, strict=True))


def _one_line(text: str) -> str:
    return " ".join(text.split())
