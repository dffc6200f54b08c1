"""What a steering run is told: the SAE with its model, and what is done with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastsae.data.activations import ResidualStream
from fastsae.errors import UsageError
from fastsae.sae import SparseAutoencoder
from fastsae.steering.edits import Mode, Unit
from fastsae.steering.select import Chosen

DYNAMIC = ("decay", "kl_cap", "set_point")


@dataclass(frozen=True)
class Subject:
    """What is steered.

    Attributes:
        name: What the SAE is called.
        model_name: What the language model is called.
        sae: The SAE.
        residual: The language model, and where the SAE reads it.
        tokenizer: The model's.
        maxima: The largest activation that was seen of each chosen feature, where one was.
    """

    name: str
    model_name: str
    sae: SparseAutoencoder
    residual: ResidualStream
    tokenizer: Any
    maxima: Mapping[int, float]


@dataclass(frozen=True)
class Plan:
    """What is done.

    Attributes:
        chosen: The features, which are pushed together.
        prompts: What the user says.
        alphas: The doses; None looks for the strength whose KL is 1 nat at the 95th percentile, and takes multiples of it.
        mode: What the edits do, see `Edit`.
        unit: What alpha is a multiple of.
        positions: Which tokens are edited.
        dynamic: Doses that change while the text is written, from `DYNAMIC`; only with the mode "add".
        instruction: What the user adds for the prompted texts; None leaves them out.
        max_new_tokens: How long a text gets at most.
        temperature: 0 takes the likeliest token.
        seed: Determines draws, and the random direction.
    """

    chosen: tuple[Chosen, ...]
    prompts: tuple[str, ...]
    alphas: tuple[float, ...] | None = None
    mode: Mode = "add"
    unit: Unit = "absolute"
    positions: str = "all"
    dynamic: tuple[str, ...] = DYNAMIC
    instruction: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0


def check(plan: Plan) -> None:
    """Raises UsageError where parts of a plan contradict each other."""
    if not plan.prompts or not all(prompt.strip() for prompt in plan.prompts):
        raise UsageError("prompt: expected at least one that says something, got none")
    for alpha in plan.alphas or ():
        if not math.isfinite(alpha):
            raise UsageError(f"alpha: expected finite numbers, got {alpha}")
    if plan.alphas is not None and len(set(plan.alphas)) < len(plan.alphas):
        raise UsageError(f"alpha: expected each dose once, got {', '.join(f'{alpha:g}' for alpha in plan.alphas)}")
    if unknown := [name for name in plan.dynamic if name not in DYNAMIC]:
        raise UsageError(f"dynamic: expected some of {', '.join(DYNAMIC)}, got {unknown[0]!r}")
    if plan.mode != "add" and plan.alphas is None:
        raise UsageError(
            f"alpha: expected numbers for the mode {plan.mode}, as auto looks for a strength to add, got auto"
        )
    if plan.mode != "add" and plan.dynamic:
        raise UsageError(
            f"dynamic: expected none for the mode {plan.mode}, as they change a strength to add, got {plan.dynamic[0]}"
        )
    if plan.unit != "absolute" and "set_point" in plan.dynamic:
        raise UsageError("dynamic: expected set_point with the unit absolute alone, in which activations are, got it with "
                         f"{plan.unit}")  # fmt: skip
