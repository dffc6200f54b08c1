"""A small model and SAE to steer, and the slow computation that roll-outs are checked against."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae import Edit, FusedJumpReLUSAE
from fastsae.data.activations import decoder_layers
from fastsae.data.language_model import load_model
from fastsae.steering.doses import Strengths
from fastsae.steering.rollout import Rollout

PROMPTS = [[5, 9, 200, 31], [17, 4], [301, 302, 303, 304, 305, 306, 307]]
FEATURE, AMOUNT = 3, 4.0
PUSH = [Edit(FEATURE, "add", AMOUNT)]


def load_lively(folder: Path) -> tuple[Any, Any]:
    """The model with larger weights, so that its distributions are no flat ones, and without tokens that end a text."""
    model, tokenizer = load_model(str(folder))
    enliven(model)
    tokenizer.eos_token = None
    return model, tokenizer


def enliven(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def make_sae() -> FusedJumpReLUSAE:
    torch.manual_seed(2)
    return FusedJumpReLUSAE(16, 32, init_threshold=0.01)


class Steps:
    """A controller that takes given strengths in turn, the same in all rows."""

    def __init__(self, *strengths: float) -> None:
        self.strengths = strengths

    def begin(self, n_rows: int) -> Strengths:
        strengths = iter(self.strengths)

        class Given(Strengths):
            def advance(self, acts: Tensor) -> None:
                self.scale = torch.full([n_rows], next(strengths))

        return Given(torch.full([n_rows], next(strengths)))


class Slow:
    """The same in double: a pass over the whole row for each token, with the strength that each column has had."""

    def __init__(self, model: Any, sae: FusedJumpReLUSAE) -> None:
        self.model, self.sae = copy.deepcopy(model).double(), copy.deepcopy(sae).double()
        decoder_layers(self.model)[0].register_forward_hook(self.push)
        self.strengths = torch.zeros(0)
        self.acts = 0.0

    def push(self, _module: Any, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        self.acts = float(self.sae.encode(hidden)[0, -1, FEATURE])
        pushed = hidden + AMOUNT * self.strengths[:, None] * self.sae.W_dec[FEATURE]
        return (pushed, *output[1:]) if isinstance(output, tuple) else pushed

    def log_probs(self, ids: list[int], strengths: list[float]) -> Tensor:
        self.strengths = torch.tensor(strengths).double()
        found: Tensor = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
        return found

    @torch.no_grad()
    def check(self, prompt: list[int], rollout: Rollout, is_edited: Callable[[int], bool] = lambda _: True) -> None:
        """Compare each token of a greedy roll-out of an edit PUSH, of the columns that are edited."""
        close = {"rel": 1e-3, "abs": 1e-5}
        for step, token in enumerate(rollout.token_ids):
            ids = prompt + rollout.token_ids[:step]
            strengths = [rollout.strengths[0]] * (len(prompt) - 1) + rollout.strengths[: step + 1]
            unsteered = self.log_probs(ids, [0.0] * len(ids))
            steered = self.log_probs(ids, [s if is_edited(i) else 0.0 for i, s in enumerate(strengths)])
            assert token == steered.argmax()
            assert rollout.kl[step] == pytest.approx((steered.exp() * (steered - unsteered)).sum().item(), **close)
            assert rollout.surprise[step] == pytest.approx(-unsteered[token].item(), **close)
            assert rollout.acts[step] == pytest.approx(self.acts, **close)
