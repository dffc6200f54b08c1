"""How the learning rate and the sparsity weight move over a run; pure functions of the step."""

from __future__ import annotations

import math

from fastsae.train.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step `step` (from 0): linear up, cosine down to `lr_end * lr`, linear to 0.

    rate = lr * (step + 1) / W                                        step < W = warm_up * steps
           lr * (lr_end + (1 - lr_end) * (1 + cos(pi * t)) / 2)       t from 0 to 1 in between
           lr * lr_end * (steps - step) / D                           last D = decay * steps
    """
    warm_up, decay = round(config.warm_up * config.steps), round(config.decay * config.steps)
    if step < warm_up:
        return config.lr * (step + 1) / warm_up
    if step >= config.steps - decay:
        return config.lr * config.lr_end * (config.steps - step) / decay
    t = (step - warm_up) / max(1, config.steps - decay - warm_up)
    return config.lr * (config.lr_end + (1 - config.lr_end) * (1 + math.cos(math.pi * t)) / 2)


def sparsity_share(step: int, config: TrainConfig) -> float:
    """Share of the full sparsity weight at step `step`: linear from 0 over `sparsity_warm_up * steps`."""
    warm_up = round(config.sparsity_warm_up * config.steps)
    return min(1.0, (step + 1) / warm_up) if warm_up else 1.0
