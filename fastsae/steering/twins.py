"""A steered and an unsteered model over the same growing rows, each with its own key-value cache."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastsae.errors import FastsaeError, UsageError

if TYPE_CHECKING:
    from fastsae.steering.doses import Strengths
    from fastsae.steering.steering import Steering


class NotFiniteError(FastsaeError):
    """The model computed NaN."""


class Step(NamedTuple):
    """The next token's distribution.

    Attributes:
        steered: Log probabilities [B, vocabulary] of the steered model, in fp32; 0 in rows that have ended.
        unsteered: The same of the unsteered model.
        kl: KL(steered || unsteered) [B] in nats, on the CPU.
        scale: That of the pass [B], on the CPU.
        acts: The activation [B] of the first edit's feature before the edit, at the last token, on the CPU.
    """

    steered: Tensor
    unsteered: Tensor
    kl: Tensor
    scale: Tensor
    acts: Tensor


class Rows:
    """Rows of tokens, padded on the left, that grow by one token at a time.

    Attributes:
        n_new: How many tokens each row has got since the prompts.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        width = max(len(prompt) for prompt in prompts)
        self.n_new = 0
        self._model = model
        self._takes = inspect.signature(_innermost(model).forward).parameters.keys()
        self._input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
        self._mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            self._input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            self._mask[row, width - len(prompt) :] = 1

    def append(self, tokens: Tensor) -> None:
        self._input_ids = torch.cat([self._input_ids, tokens[:, None]], dim=1)
        self._mask = torch.cat([self._mask, torch.ones_like(tokens)[:, None]], dim=1)
        self.n_new += 1

    def forward(self, cache: Any) -> tuple[Tensor, Any]:
        """Return the logits [B, vocabulary] after the last token, and a cache of all tokens.

        Args:
            cache: One of all tokens but the last, which the model may change; None passes over the whole rows.
        """
        from transformers import DynamicCache

        first = 0 if cache is None else -1
        device = self._model.get_input_embeddings().weight.device
        options: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
        options["position_ids"] = (self._mask.cumsum(1) - 1).clamp(min=0)[:, first:].to(device)
        options = {name: value for name, value in options.items() if name in self._takes}
        if cache is not None:
            options["past_key_values"] = cache
        output = self._model(
            input_ids=self._input_ids[:, first:].to(device),
            attention_mask=self._mask.to(device),
            return_dict=True,
            **options,
        )
        kept = getattr(output, "past_key_values", None)
        if isinstance(kept, DynamicCache):
            return output.logits[:, -1], kept
        if not self._mask.all():
            raise UsageError(
                "prompts: expected prompts of one length, or one at a time, as a model of type "
                f"{self._model.config.model_type!r} keeps no DynamicCache of transformers and may not ignore padding, got "
                "several lengths"
            )
        return output.logits[:, -1], None


class Twins:
    """The two models: one and the same until the first strength other than 0.

    Attributes:
        rows: What both read.
    """

    def __init__(self, rows: Rows, steering: Steering | None) -> None:
        self.rows = rows
        self._steering = steering
        self._cache: Any = None
        self._unsteered_cache: Any = None
        self._apart = False
        self._scale = torch.zeros(0)  # of the last pass

    def step(self, strengths: Strengths, live: Tensor) -> Step:
        """Read the rows' new tokens with the strengths given, again while they want to.

        Raises:
            NotFiniteError: The model computed NaN in a live row.
            UsageError: Prompts or strengths are not what a model without a DynamicCache can take.
        """
        none = torch.zeros(len(live))
        if self._steering is None:
            logits, self._cache = self.rows.forward(self._cache)
            log_probs = _log_probs(logits, live)
            return Step(log_probs, log_probs, none, none, none)
        if self._apart or strengths.scale.any():
            return self._step_apart(self._steering, strengths, live)
        logits, self._cache = self._steered(self._steering, strengths.scale, self._cache)
        log_probs = _log_probs(logits, live)
        return Step(log_probs, log_probs, none, strengths.scale, _first_acts(self._steering, none))

    def _step_apart(self, steering: Steering, strengths: Strengths, live: Tensor) -> Step:
        if not self._apart:
            self._unsteered_cache, self._apart = copy.deepcopy(self._cache), True
        with steering.paused():
            logits, self._unsteered_cache = self.rows.forward(self._unsteered_cache)
        unsteered = _log_probs(logits, live)
        before = self._cache
        while True:
            scale = strengths.scale
            given = copy.deepcopy(before) if strengths.tries_again else before  # not every cache can be cropped
            logits, self._cache = self._steered(steering, scale, given)
            kl = divergence(logits.float().log_softmax(-1), unsteered).cpu()
            if strengths.accepts(kl, live):
                return Step(_log_probs(logits, live), unsteered, kl, scale, _first_acts(steering, scale))

    def _steered(self, steering: Steering, scale: Tensor, cache: Any) -> tuple[Tensor, Any]:
        if cache is None and self.rows.n_new and not scale.equal(self._scale):
            raise UsageError(
                "controller: expected one strength for all tokens, as this model keeps no DynamicCache of transformers, so that "
                "each pass edits all tokens anew, got a strength that changes"
            )
        steering.scale = self._scale = scale
        return self.rows.forward(cache)


def _innermost(model: Any) -> Any:
    """The model itself, without wrappers that hide what its forward pass takes: those of torch.compile and of PEFT."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def divergence(steered: Tensor, unsteered: Tensor) -> Tensor:
    """KL(steered || unsteered) = sum_v p(v) (log p(v) - log q(v)) in nats, of log probabilities [..., vocabulary]."""
    terms = steered.exp() * (steered - unsteered)
    return torch.where(steered == -math.inf, 0.0, terms).sum(-1).clamp(min=0)  # rounding may leave it just below 0


def _log_probs(logits: Tensor, live: Tensor) -> Tensor:
    found = logits.float().log_softmax(-1).masked_fill(~live.to(logits.device)[:, None], 0)
    if found.isnan().any():
        raise NotFiniteError(
            f"the model computed NaN in {str(logits.dtype).removeprefix('torch.')}: take lower strengths, or "
            "--model-dtype float32 or bfloat16, which hold larger values than float16"
        )
    return found


def _first_acts(steering: Steering, like: Tensor) -> Tensor:
    acts = steering.feature_acts
    return torch.zeros_like(like) if acts is None else acts[:, 0].float().cpu()
