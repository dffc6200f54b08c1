"""Keeps L0 on its target while an SAE trains, and says so where it did not get there."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softshrink

from fastsae.sae import FusedJumpReLUSAE, FusedReLUSAE
from fastsae.train.config import TrainConfig
from fastsae.train.schedules import learning_rate

GAIN = 0.1  # share of an error's logarithm that one step takes back: ten steps lead to the target, and not beyond it
LARGEST_ERROR = 3.0  # a batch in which nothing fires says no more than that L0 is far too low
START = {"jumprelu": 0.5, "relu": 1.0}  # weight of the penalty before it adapts, with normalised activations
LARGEST_FACTOR = 100.0  # the weight changes by this factor at most, so that it finds back
# An error up to which the penalty alone corrects L0: the penalty chooses between features, the shift of all gates does not
SLACK = 0.05
TOLERANCE = 0.1  # share of the target by which L0 may miss it before a run says so
BATCH_TOPK_TOLERANCE = 0.05
ENOUGH_STEPS = 200  # steps in which L0 reaches any target that it can reach


class L0Control:
    """Moves what decides about L0 after every step, by the logarithm of what L0 has missed.

        error  = log(L0 of the batch / target of this step), at most 3 either way
        weight of the penalty  *= exp(GAIN * error)
        what a feature needs to fire  += GAIN * unit * (what |error| exceeds SLACK * learning rate / its peak)

    Adam moves a threshold or a bias by its learning rate at most, whatever the penalty's weight, so that a short run would
    end before its L0 arrives; the shift of all gates makes up for that. The target of a step goes from the L0 of the start
    to `target_l0` in the steps in which the penalty's weight rises, each by the same factor.

    Args:
        sae: The SAE in training.
        config: The run; `config.controls_l0` must hold.

    Attributes:
        unit: Typical size of a pre-activation; 1 where activations are normalised.
        log_factor: Scalar, the logarithm of the factor by which the penalty's weight differs from that of the start.
        start: Features per token at the start.
    """

    def __init__(self, sae: FusedJumpReLUSAE | FusedReLUSAE, config: TrainConfig) -> None:
        self.sae, self.config, self.unit = sae, config, 1.0
        self.log_factor = torch.zeros((), device=sae.device)
        self.start = sae.d_sae / 2  # with a bias of 0 half of the features fire
        if config.init_l0 is not None and config.init_l0 < sae.d_sae:
            self.start = config.init_l0

    @property
    def coefficient(self) -> Tensor:
        """Scalar, the weight of the penalty; the squared error it stands beside grows with the square of `unit`."""
        power = 1 if self.config.architecture == "relu" else 2  # an L1 penalty grows with `unit` itself
        return START[self.config.architecture] * self.unit**power * self.log_factor.exp()

    def target(self, step: int) -> float:
        """Features per token that step `step` aims at: geometric from the start's to `target_l0`."""
        config = self.config
        share = min(1.0, (step + 1) / max(1, round(config.sparsity_warm_up * config.steps)))
        return math.exp((1 - share) * math.log(self.start) + share * math.log(config.target_l0))

    @torch.no_grad()
    def update(self, step: int, l0: Tensor) -> None:
        """Takes back part of the error of step `step`, whose batch had `l0` features per token; nothing waits for a GPU."""
        error = (l0 / self.target(step)).log().clamp(-LARGEST_ERROR, LARGEST_ERROR)
        most = math.log(LARGEST_FACTOR)
        self.log_factor = (self.log_factor + GAIN * error).clamp(-most, most)
        # as the learning rate falls to 0, so does the effect of the penalty, and the shift takes over
        slack = SLACK * learning_rate(step, self.config) / self.config.lr
        self.sae.shift_gates_(GAIN * self.unit * softshrink(error, slack))

    def state_dict(self) -> dict[str, Any]:
        return {"unit": self.unit, "start": float(self.start), "log_factor": self.log_factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unit, self.start = state["unit"], state["start"]
        self.log_factor = state["log_factor"].to(self.sae.device)


def l0_metrics(config: TrainConfig, l0: float | None, last_l0: float | None) -> dict[str, Any]:
    """What `metrics.json` says of the target of L0, with a sentence in `warnings` where it was missed.

    Args:
        config: The run.
        l0: L0 on the held-out dialogues.
        last_l0: L0 of the last training steps.
    """
    target = config.expected_l0
    if target is None or l0 is None:
        return {"warnings": []}
    missed = l0 / target - 1
    tolerance = BATCH_TOPK_TOLERANCE if config.architecture == "batchtopk" else TOLERANCE
    metrics = {"target_l0": target, "l0_missed_percent": 100 * missed}
    if abs(missed) <= tolerance:
        return {**metrics, "warnings": []}
    sentence = (
        f"L0 is {l0:.1f}, {100 * abs(missed):.0f} % {'above' if missed > 0 else 'below'} the target of {target:g}."
    )
    return {**metrics, "warnings": [f"{sentence} {_what_to_do(config, target, last_l0, tolerance)}"]}


def _what_to_do(config: TrainConfig, target: float, last_l0: float | None, tolerance: float) -> str:
    if config.steps < ENOUGH_STEPS:
        return (
            f"The run had {config.steps} steps; L0 arrives within {ENOUGH_STEPS}: train on {ENOUGH_STEPS * config.batch_size:,} "
            "tokens or more, or lower --batch-size."
        )
    if last_l0 is not None and abs(last_l0 / target - 1) <= tolerance:
        return (
            f"The last training steps had an L0 of {last_l0:.1f}, so the held-out dialogues differ from those trained on: "
            "more --eval-dialogues show whether that is chance."
        )
    return "More tokens will not change that: choose another --target-l0 or --k, or more features with --d-sae."
