"""Made-up features for tests of pages: plausible dialogues, and texts that a careless page would run or be broken by."""

from __future__ import annotations

import math
import random
from functools import cache

from fastsae.interpret.logits import FeatureLogits, Neighbour
from fastsae.interpret.page_data import Explanation, PageFeature, Score
from fastsae.interpret.windows import WINDOW, FeatureExamples, Window

_WORDS = """the a of and to in is that it for was on with as you this be are have not can will your how what why please could
would write python code function list return model answer question sure here step first second number sum table city river
history science energy water light music poem story recipe cup sugar flour butter oven minutes degrees travel train ticket
hotel money bank interest rate health sleep doctor exercise plant garden summer winter email letter dear sincerely thanks"""
HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 2">',
    "\u2028",
    "\u2029",
    "\u202egnp.exe",
    " שלום",
    " مرحبا",
    "👩‍👩‍👧",
    "\u200b",
    "\u200d",
    "",
    "\x00\x1b",
    "\ud800",
    "]]>-->",
    "&lt;b&gt;",
    "x" * 400,
    "\n\n",
    "\t",
    " ",
]
TOKENS = ["<|im_start|>", "<|im_end|>", "user", "assistant", "system", "\n", ".", ",", "?", *HOSTILE]
TOKENS += [f" {word}" for word in _WORDS.split()]
START, END, USER, ASSISTANT, SYSTEM, BREAK = range(6)
FIRST_HOSTILE = 9
FIRST_WORD = FIRST_HOSTILE + len(HOSTILE)
PLAIN = 7
"""Index of a feature by which tests know that there is an explanation of plain words."""
_EXPLANATIONS = [
    "the start of an assistant's turn",
    "words about baking, above all quantities of sugar and flour",
    "questions that ask for a reason",
    "",
    "code in Python: names of functions and of what they return, in answers that explain a program step by step to somebody "
    "who has just begun to learn the language and asks for each line what it does and why it is there at all",
    '<img src=x onerror="window.hacked = 3"> and </script><script>window.hacked = 4</script>',
    "polite closings of letters",
    "zebra crossings",
    "supercalifragilistic" * 12,
    "كلمات عن الماء والنهر",
]


def token_text(token: int) -> str:
    return TOKENS[token]


@cache
def dialogue(index: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Tokens and kinds of one made-up dialogue; some tokens are hostile."""
    draw = random.Random(index)
    tokens, kinds = [START, SYSTEM, BREAK], ["special_position_0", "template", "system"]
    for turn in range(4):
        role, kind = ((USER, "user"), (ASSISTANT, "assistant"))[turn % 2]
        n = draw.randint(6, 40)
        said = [draw.randrange(FIRST_WORD, len(TOKENS)) for _ in range(n)]
        if draw.random() < 0.3:
            said[draw.randrange(n)] = draw.randrange(FIRST_HOSTILE, FIRST_WORD)
        tokens += [START, role, BREAK, *said, 6, END, BREAK]
        kinds += ["special", "special", "template", *[kind] * (n + 1), "special", "template"]
    return tuple(tokens), tuple(kinds)


def window(index: int, value: float, draw: random.Random) -> Window:
    """A window of dialogue `index` with a peak of `value`."""
    tokens, kinds = dialogue(index)
    peak = draw.randrange(1, len(tokens))
    start = max(0, min(peak - WINDOW // 2, len(tokens) - WINDOW))
    stop = min(len(tokens), start + WINDOW)
    acts = [value * draw.random() ** 2 if draw.random() < 0.2 and i else 0.0 for i in range(start, stop)]
    acts[peak - start] = value
    return Window(index, start, tokens[start:stop], kinds[start:stop], tuple(acts), peak - start)


def examples(feature: int, n_top: int = 20, n_sampled: int = 40, n_bins: int = 30) -> FeatureExamples:
    """A feature whose activations are log-normal."""
    draw = random.Random(feature)
    maximum = draw.uniform(2, 40)
    values = sorted((maximum * min(1, math.exp(draw.gauss(-1.6, 0.7))) for _ in range(n_sampled)), reverse=True)
    edges = tuple(maximum * 10 ** (3 * (i / n_bins - 1)) for i in range(n_bins + 1))
    histogram = [int(4000 * math.exp(-(((i - n_bins * 0.75) / (n_bins * 0.12)) ** 2))) for i in range(n_bins)]
    top = [window(1000 * feature + i, maximum * 0.97**i, draw) for i in range(n_top)]
    sampled = [window(1000 * feature + 500 + i, value, draw) for i, value in enumerate(values)]
    count = sum(histogram)
    return FeatureExamples(feature, count, count / 400_000, maximum, draw.random() ** 4 * maximum, edges, tuple(histogram),
                           tuple(top), tuple(sampled))  # fmt: skip


def logits(feature: int, k: int = 10) -> FeatureLogits:
    draw = random.Random(feature)
    ids = draw.sample(range(FIRST_HOSTILE, len(TOKENS)), 2 * k)
    positive = tuple(zip(ids[:k], sorted((draw.uniform(0.5, 3) for _ in range(k)), reverse=True), strict=True))
    negative = tuple(zip(ids[k:], sorted(draw.uniform(-2.5, -0.4) for _ in range(k)), strict=True))
    edges = tuple(-2.5 + 5.5 * i / 40 for i in range(41))
    histogram = tuple(int(4000 * math.exp(-(((e + 0.07) / 0.6) ** 2))) for e in edges[:-1])
    return FeatureLogits(positive, negative, edges, histogram)


def page_features(n: int, step: int = 7) -> list[PageFeature]:
    """`n` features with the numbers 0, `step`, 2 `step`, ...; the last but one is dead, the last has nothing but examples."""
    made = []
    for i in range(n):
        draw, feature = random.Random(i), i * step
        detection = draw.uniform(0.4, 0.98)
        scores = [
            Score("detection", detection, 0.5, max(0.0, detection - 0.08), min(1.0, detection + 0.06)),
            Score("rubric of FAST", float(draw.randint(1, 5)), None, least=1, most=5),
        ]
        text = _EXPLANATIONS[i % len(_EXPLANATIONS)]
        nearest = [Neighbour(step * draw.randrange(n) + (j == 4), 0.9 - 0.1 * j) for j in range(5)]
        explanation = Explanation(text, "hf:example/Judge-7B")
        made.append(PageFeature(examples(feature), logits(feature), nearest, explanation, scores))
    made[-1] = PageFeature(examples((n - 1) * step))
    dead = FeatureExamples((n - 2) * step, 0, 0.0, 0.0, 0.0, (0.0, 1.0), (0,), (), ())
    made[-2] = PageFeature(dead, scores=[Score("detection", None, 0.5)])
    return made
