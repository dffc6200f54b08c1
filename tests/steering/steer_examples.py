"""A made-up result of `fastsae steer`: plausible doses, and texts that a careless page or terminal would obey or be broken by."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 2">',
    "\u202egnp.exe",
    " שלום",
    " مرحبا",
    "你好,世界",
    "\u3000日本語",
    "👩‍👩‍👧",
    "",
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31m",
    "\r",
    "\ud800",
    "\u2028",
    "]]>-->",
    "&lt;b&gt;",
    "x" * 400,
    "\n\n",
    "\t",
]
_WORDS = "the sea is wide and the light of a lamp falls on the table where nobody has read the letter yet , so we wait".split()
PROMPTS = [
    "Write a poem about the sea.",
    'How do I </script><img src=x onerror="window.hacked = 3"> bake bread?\nIn three steps, please, and explain each of them.',
    "ما هي عاصمة فرنسا؟",
]
ALPHAS = [0.0, 15.0, 25.0, 50.0, 100.0, 200.0]
FEATURE = "feature 13794"
FIXED_LIKE_CAPPED = 50.0
"""The fixed alpha whose mean KL is nearest to that of the capped dose."""


def mean_of(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def text(prompt: int, level: float, draw: random.Random, n: int = 40, hostile: bool = False) -> dict[str, Any]:
    """One text whose KL is about `level` at each token."""
    pieces = [" " + draw.choice(_WORDS) for _ in range(n)]
    if hostile:
        for i, sign in enumerate(HOSTILE):
            pieces[min(2 * i, n - 1)] = sign
    if n and n < 40:
        pieces[-1] = ""  # the token that ends a text
    kl = [level * math.exp(draw.gauss(-0.3, 0.8)) for _ in range(n)]
    return {
        "prompt": prompt,
        "text": "".join(pieces),
        "pieces": pieces,
        "kl": kl,
        "strengths": [1.0] * n,
        "acts": [draw.random() * 3 for _ in range(n)],
        "mean_kl": sum(kl) / n if n else None,
        "p95_kl": sorted(kl)[int(0.95 * n)] if n else None,
        "perplexity": 3 * math.exp(level) if n else None,
        "repeated_3grams": min(0.95, 0.02 + level / 8) if n else None,
        "other_script": min(0.9, level / 20) if n else None,
        "n_tokens": float(n),
        "ended": n < 40,
    }


def run(arm: str, dose: str, alpha: float, level: float, seed: int, hostile: bool = False) -> dict[str, Any]:
    """One run of a text for each prompt; the last of an over-steered one is empty."""
    draw = random.Random(seed)
    texts = [
        text(i, level, draw, n=0 if level > 7 and i == 2 else 40 - 9 * i, hostile=hostile) for i in range(len(PROMPTS))
    ]
    keys = ("mean_kl", "p95_kl", "perplexity", "repeated_3grams", "other_script", "n_tokens")
    return {"arm": arm, "dose": dose, "alpha": alpha, "texts": texts} | {
        k: mean_of([t[k] for t in texts]) for k in keys
    }


def result() -> dict[str, Any]:
    """As in `steer.json`."""
    runs = [run("unsteered", "fixed", 0.0, 0.0, 0), run("prompted", "fixed", 0.0, 0.3, 1)]
    for text_ in runs[1]["texts"]:
        text_ |= {"kl": [], "strengths": [], "acts": [], "mean_kl": None, "p95_kl": None}
    runs[1] |= {"mean_kl": None, "p95_kl": None}
    for i, alpha in enumerate(ALPHAS):
        runs.append(run(FEATURE, "fixed", alpha, (alpha / 60) ** 1.7, 10 + i if alpha else 0, hostile=alpha == 25))
        runs.append(run("random direction", "fixed", alpha, (alpha / 110) ** 1.7, 30 + i if alpha else 0))
    for i, (dose, value) in enumerate((("decay", 100.0), ("kl_cap", 0.5), ("set_point", 12.0))):
        found = run(FEATURE, dose, value, (FIXED_LIKE_CAPPED / 60) ** 1.7, 60 + i)
        for text_ in found["texts"]:
            text_["strengths"] = [100 * 0.97**t for t in range(len(text_["pieces"]))]
        runs.append(found)
    next(one for one in runs if (one["arm"], one["alpha"]) == (FEATURE, 200.0))["perplexity"] = 1e30
    return {
        "model": "SmolLM2-135M-<b>Instruct</b>",
        "sae": "runs/fast/</script><script>window.hacked = 4</script>",
        "layer": 15,
        "hook": "model.layers.15",
        "architecture": "jumprelu",
        "positions": "all",
        "mode": "add",
        "unit": "absolute",
        "max_new_tokens": 40,
        "temperature": 0.0,
        "seed": 0,
        "features": [
            {
                "feature": 13794,
                "chosen_by": "strongest at <|im_start|>",
                "score": 39.87,
                "maximum": 51.2,
            },
            {"feature": 7, "chosen_by": "--feature", "score": None, "maximum": None},
        ],
        "prompts": PROMPTS,
        "instruction": "Use words such as <sea> in your answer.",
        "auto": {
            "alpha": 37.5,
            "p95_kl": 1.02,
            "tried": [{"alpha": 10.0, "p95_kl": 0.08}, {"alpha": 37.5, "p95_kl": 1.02}],
        },
        "runs": runs,
        "stable": [
            {
                "arm": FEATURE,
                "dose": "fixed",
                "lowest": None,
                "highest": 50.0,
                "breaks": [],
                "reason": "at 100 repeats pass 20 %",
            },
            {
                "arm": "random direction",
                "dose": "fixed",
                "lowest": 0.0,
                "highest": 100.0,
                "breaks": [],
                "reason": "at 200 repeats pass 20 %",
            },
            {
                "arm": FEATURE,
                "dose": "decay",
                "lowest": None,
                "highest": None,
                "breaks": [],
                "reason": "repeats pass 20 %",
            },
        ],
        "seconds": 81.3,
        "versions": {"fastsae": "0.1", "torch": "2.11"},
    }


def changed(**changes: Any) -> dict[str, Any]:
    """The result with other values of some keys."""
    return copy.deepcopy(result()) | changes
