"""Texts that a steered model writes, and at each token how far it is from the unsteered model reading the same text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsae.data.activations import n_embeddings, position_limit
from fastsae.errors import UsageError, shown
from fastsae.steering.doses import Controller, Fixed
from fastsae.steering.twins import Rows, Step, Twins

if TYPE_CHECKING:
    from fastsae.steering.steering import Steering

_BROKEN = "\ufffd"  # what a tokenizer writes for the bytes of half a character


@dataclass
class Rollout:
    """What one row wrote; the lists have an entry for each new token.

    Attributes:
        token_ids: The new tokens. Of a row that ended by itself the last one is the token that ends it.
        text: Their text, special tokens included, without the token that ends the row.
        pieces: Each token's part of the text; a character of several tokens stands with the last of them.
        ended: Whether the row ended by itself, and not at `max_new_tokens`.
        kl: KL(steered || unsteered) of the distribution that the token comes from, in nats.
        surprise: -log p(token) of the unsteered model, in nats.
        strengths: The scale in the pass that gave this distribution.
        acts: The activation of the first edit's feature before the edit, at the last token of that pass; 0 without steering.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    pieces: list[str] = field(default_factory=list)
    ended: bool = False
    kl: list[float] = field(default_factory=list)
    surprise: list[float] = field(default_factory=list)
    strengths: list[float] = field(default_factory=list)
    acts: list[float] = field(default_factory=list)


@torch.no_grad()
def roll_out(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    steering: Steering | None,
    controller: Controller | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_token: Callable[[int, str], None] | None = None,
) -> list[Rollout]:
    """Continue all prompts together, and measure each next token's distribution against the unsteered model's.

    kl = sum_v p(v) (log p(v) - log q(v)), p steered and q unsteered, both after the same tokens, of which q's past has seen no
    edit. The unsteered model has a key-value cache of its own, and runs from the first strength other than 0 on: before that
    both are the same, and kl is exactly 0. A model that returns no DynamicCache passes over the whole row for each token.

    Args:
        model: A causal language model of transformers, in eval mode.
        tokenizer: Decodes the tokens. Its end token ends a row, and so do those of the model's `generation_config`.
        prompts: The token ids of each row.
        steering: What `steer` gave for this model; None leaves the model as it is.
        controller: Chooses the strength of each pass; None is `Fixed()`.
        max_new_tokens: A row that has not ended by then is cut.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature).
        seed: Determines the draws of this call.
        on_token: Called with a row's number and a piece of its text, as soon as that has whole characters.

    Raises:
        UsageError: An argument is wrong, or a prompt and its continuation exceed the model's context.
        NotFiniteError: The model computed NaN.
    """
    _check(max_new_tokens, temperature, seed)
    prompts = _token_ids(prompts, n_embeddings(model))
    _check_room(model, prompts, max_new_tokens)
    if not prompts:
        return []
    strengths = (controller or Fixed()).begin(len(prompts))
    writer = _Writer(tokenizer, len(prompts), end_tokens(model, tokenizer), on_token)
    generator = torch.Generator().manual_seed(seed)
    twins = Twins(Rows(model, prompts), steering)
    with _scale_kept(steering):
        while True:
            step = twins.step(strengths, writer.live)
            tokens = _choose(step.steered, temperature, generator)
            writer.write(tokens, step)
            if not writer.live.any() or twins.rows.n_new + 1 == max_new_tokens:
                return writer.finish()
            strengths.advance(step.acts)
            twins.rows.append(tokens)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a text: those of the model's `generation_config`, and the tokenizer's."""
    config = getattr(model, "generation_config", None)
    ends: set[int] = set()
    for found in (getattr(config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if found is not None:
            ends |= set(found if isinstance(found, (list, tuple)) else [found])
    return frozenset(ends)


class _Writer:
    """Writes down what each row does, and streams its text.

    Attributes:
        live: Whether each row [B] has not ended yet.
    """

    def __init__(
        self, tokenizer: Any, n_rows: int, ends: frozenset[int], on_token: Callable[[int, str], None] | None
    ) -> None:
        self.live = torch.ones(n_rows, dtype=torch.bool)
        self._rollouts = [Rollout() for _ in range(n_rows)]
        self._texts = [_Text(tokenizer) for _ in range(n_rows)]
        self._ends = ends
        self._on_token = on_token

    def write(self, tokens: Tensor, step: Step) -> None:
        """Add a token to each live row, of which some may end by it."""
        surprise = -step.unsteered.gather(1, tokens.to(step.unsteered.device)[:, None])[:, 0]
        columns = zip(*(one.tolist() for one in (tokens, step.kl, surprise, step.scale, step.acts)), strict=True)
        for row, (token, *values) in enumerate(columns):
            if not self.live[row]:
                continue
            rollout = self._rollouts[row]
            lists = (rollout.kl, rollout.surprise, rollout.strengths, rollout.acts)
            for entries, value in zip(lists, values, strict=True):
                entries.append(value)
            rollout.token_ids.append(token)
            rollout.ended = token in self._ends
            self.live[row] = not rollout.ended
            rollout.pieces.append("")
            self._say(row, self._texts[row].end() if rollout.ended else self._texts[row].add(token))

    def finish(self) -> list[Rollout]:
        """Return all rows, with what is left of their texts."""
        for row, rollout in enumerate(self._rollouts):
            self._say(row, self._texts[row].end())
            rollout.text = "".join(rollout.pieces)
        return self._rollouts

    def _say(self, row: int, piece: str) -> None:
        self._rollouts[row].pieces[-1] += piece
        if piece and self._on_token is not None:
            self._on_token(row, piece)


class _Text:
    """The text of tokens that come one by one, in pieces of whole characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._said: list[int] = []  # the tokens of the last piece: what a token looks like may depend on the one before
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        self._waiting.append(token)
        piece = self._decode()
        if not piece or piece.endswith(_BROKEN):
            return ""
        self._said, self._waiting = self._waiting, []
        return piece

    def end(self) -> str:
        """Whatever has not been said yet."""
        piece = self._decode() if self._waiting else ""
        self._waiting = []
        return piece

    def _decode(self) -> str:
        before, both = (
            str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            for ids in (self._said, self._said + self._waiting)
        )
        return both[len(before) :]


@contextmanager
def _scale_kept(steering: Steering | None) -> Iterator[None]:
    """Gives the steering its scale back at the end."""
    if steering is None:
        yield
        return
    before = steering.scale
    try:
        yield
    finally:
        steering.scale = before


def _choose(log_probs: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A token [B] for each row, on the CPU."""
    if temperature == 0:
        return log_probs.argmax(-1).cpu()
    scaled = (log_probs - log_probs.amax(-1, keepdim=True)).double() / temperature  # which may be tiny
    return torch.multinomial(scaled.softmax(-1).cpu(), 1, generator=generator)[:, 0]


def _check(max_new_tokens: int, temperature: float, seed: int) -> None:
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            raise UsageError(f"{name}: expected a whole number of at least {least} and below 2^63, got {shown(value)}")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 <= temperature < math.inf:
        raise UsageError(f"temperature: expected 0 or a positive number, got {shown(temperature)}")


def _check_room(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if model.training:
        raise UsageError("model: expected one in eval mode, in which no dropout acts: call model.eval()")
    limit = position_limit(model)
    longest = max((len(prompt) for prompt in prompts), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise UsageError(
            f"max_new_tokens: expected at most {max(limit - longest, 0):,}, as the longest prompt has {longest:,} tokens "
            f"and the model takes {limit:,}, got {max_new_tokens:,}"
        )


def _token_ids(prompts: Sequence[Sequence[int]], n_ids: int) -> list[list[int]]:
    found: list[list[int]] = []
    for prompt in prompts:
        ids = prompt.tolist() if isinstance(prompt, Tensor) else prompt
        if not isinstance(ids, (list, tuple)) or not ids:
            raise UsageError(
                f"prompts: expected a list of token ids for each, got {shown(ids) if ids else 'an empty one'}"
            )
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, Integral) or not 0 <= int(token) < n_ids:
                raise UsageError(f"prompts: expected token ids from 0 to {n_ids - 1:,}, got {shown(token)}")
        found.append([int(token) for token in ids])
    return found
