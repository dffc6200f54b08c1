"""What steering costs a generation: the same greedy text with and without an edit, pair by pair.

python -m benchmarks.steering_cost my-sae [FEATURE] [PAIRS]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

from fastsae import Edit, steer
from fastsae.commands.saved import saved_sae
from fastsae.data.language_model import load_model
from fastsae.data.tokens import render
from fastsae.train.pipeline import model_location

_TOKENS = 128
_PROMPT = "How does a sparse autoencoder explain what a language model computes?"


def main(path: str, feature: int = 0, pairs: int = 15) -> None:
    """Prints the median and the quartiles of the paired ratios, for one edit at all positions."""
    sae, config = saved_sae(path, {})
    model, tokenizer = load_model(model_location(config.model), config.model_dtype)
    ids = torch.tensor([render(tokenizer, [{"role": "user", "content": _PROMPT}], add_generation_prompt=True)])
    options = {"max_new_tokens": _TOKENS, "min_new_tokens": _TOKENS, "do_sample": False, "pad_token_id": 0}

    def seconds() -> float:  # CPU time, which other programs on the machine change little
        started = time.process_time()
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return time.process_time() - started

    seconds()
    ratios = []
    for pair in range(pairs):
        plain = seconds() if pair % 2 else None
        with steer(model, sae, [Edit(feature, "add", 1e-3)], layer=config.layer, hook=config.hook):
            steered = seconds()
        plain = seconds() if plain is None else plain
        ratios.append(steered / plain)
    low, median, high = np.percentile(ratios, (25, 50, 75))
    print(f"{Path(path).name}: steered / plain {median:.3f} [{low:.3f}, {high:.3f}], {pairs} pairs of {_TOKENS} tokens")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]))
