"""The judge behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastsae.interpret.judges.client import Client, Question
from fastsae.interpret.judges.parsing import read_number, read_words, read_yes_or_no
from fastsae.interpret.judges.protocol import Detection, Evidence, Rating
from fastsae.interpret.text import WindowTexts
from fastsae.interpret.windows import Window

_RATE = """\
A feature of a language model is most active in the {n} pieces of text below. Each line holds a token and how active the \
feature is on it, from 0 to 10.

{pieces}

Rate from 1 to 5 how clearly the feature stands for one thing:
5: there is a clear pattern, and no piece deviates from it
4: there is a clear pattern, but one or two pieces deviate from it
3: there is a pattern that is clear on the whole, but quite a few pieces do not fit
2: there is a broad theme, but no structure
1: there is no pattern
Also name what the feature stands for in a few words. Answer with JSON alone, such as {example}"""

_EXPLAIN = """\
A feature of a language model is active in the pieces of text below. Tokens on which it is strong stand between << and >>.

{pieces}

Explain in one short sentence when the feature is active: what is common to the marked tokens and what stands around them. \
Answer with JSON alone, such as {example}"""

_DETECT = """\
A feature of a language model is explained so: {explanation}

Tell for each of these {n} pieces of text, in their order, whether the feature is active in it (1) or not (0).

{pieces}

Answer with JSON alone, with {n} numbers, such as {example}"""

_INTRUDE = """\
In all but one of these {n} pieces of text the tokens between << and >> have something in common. Which piece does not belong?

{pieces}

Answer with the number of the piece, with JSON alone, such as {example}"""


class EndpointJudge:
    """Asks a language model by chat, with prompts in which pieces of text are JSON strings.

    It rates as the paper does: it reads each token with its activation, and gives a score and a name in one answer. It detects
    in two steps: it explains the feature from the windows that it learns from, then reads this explanation and all windows in
    question.

    Args:
        name: As the user gave it.
        client: Asks.
        tokenizer: The one whose ids the windows hold.
    """

    def __init__(self, name: str, client: Client, tokenizer: Any) -> None:
        self.name = name
        self._client = client
        self._texts = WindowTexts(tokenizer)

    def rate(self, tasks: Sequence[Evidence]) -> list[Rating]:
        example = {"name": "verbs of motion", "score": 3}
        schema = _schema(name={"type": "string"}, score={"type": "integer", "enum": [1, 2, 3, 4, 5]})
        questions = []
        for task in tasks:
            pieces = "\n\n".join(self._pairs(task.firing))
            prompt = _RATE.format(n=len(task.firing), pieces=pieces, example=json.dumps(example))
            questions.append(Question(prompt, example, schema, 200))
        answers = self._client.ask(questions, "rating features")
        return [Rating(read_number(answer, "score", 1, 5), read_words(answer, "name")) for answer in answers]

    def detect(self, tasks: Sequence[Detection]) -> list[list[float | None]]:
        explanations = self._explain(tasks)
        asked, questions = [], []
        for i, (task, explanation) in enumerate(zip(tasks, explanations, strict=True)):
            if explanation is not None:
                asked.append(i)
                questions.append(self._question(task.windows, explanation))
        answers = dict(zip(asked, self._client.ask(questions, "detecting features"), strict=True))
        return [list(read_yes_or_no(answers.get(i), "active", len(task.windows))) for i, task in enumerate(tasks)]

    def find_intruder(self, tasks: Sequence[Sequence[Window]]) -> list[int | None]:
        example = {"piece": 1}
        questions = []
        for task in tasks:
            pieces = _numbered([self._texts.marked(window) for window in task])
            prompt = _INTRUDE.format(n=len(task), pieces=pieces, example=json.dumps(example))
            schema = _schema(piece={"type": "integer", "enum": list(range(1, len(task) + 1))})
            questions.append(Question(prompt, example, schema, 50))
        answers = self._client.ask(questions, "finding intruders")
        numbers = [read_number(answer, "piece", 1, len(task)) for answer, task in zip(answers, tasks, strict=True)]
        return [None if number is None else number - 1 for number in numbers]

    def facts(self) -> dict[str, Any]:
        return self._client.facts()

    def _explain(self, tasks: Sequence[Detection]) -> list[str | None]:
        example = {"explanation": "verbs of motion in the past tense"}
        questions = []
        for task in tasks:
            pieces = _numbered([self._texts.marked(window) for window in task.evidence.firing])
            prompt = _EXPLAIN.format(pieces=pieces, example=json.dumps(example))
            questions.append(Question(prompt, example, _schema(explanation={"type": "string"}), 200))
        return [read_words(answer, "explanation") for answer in self._client.ask(questions, "explaining features")]

    def _question(self, windows: Sequence[Window], explanation: str) -> Question:
        n = len(windows)
        example = {"active": [i % 2 for i in range(n)]}
        bits = {"type": "array", "items": {"type": "integer", "enum": [0, 1]}, "minItems": n, "maxItems": n}
        pieces = _numbered([self._texts.plain(window) for window in windows])
        prompt = _DETECT.format(explanation=json.dumps(explanation), n=n, pieces=pieces, example=json.dumps(example))
        return Question(prompt, example, _schema(active=bits), 50 + 4 * n)

    def _pairs(self, windows: Sequence[Window]) -> list[str]:
        """For each window its tokens with their activations, of which the largest of all windows is 10."""
        largest = max(window.value for window in windows)
        return [
            "\n".join(
                f"{_quoted(piece)}\t{round(10 * value / largest)}"
                for piece, value in zip(self._texts.pieces(window), window.activations, strict=True)
            )
            for window in windows
        ]


def _schema(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _numbered(pieces: Sequence[str]) -> str:
    return "\n".join(f"{i}. {_quoted(piece)}" for i, piece in enumerate(pieces, start=1))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
