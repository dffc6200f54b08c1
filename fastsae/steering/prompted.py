"""Texts of a model that was asked in words, measured as steered ones are: beside the same model that was not asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastsae.steering.rollout import Rollout
from fastsae.steering.twins import divergence


@torch.no_grad()
def prompted_rollouts(
    model: Any, asked: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], rollouts: Sequence[Rollout]
) -> list[Rollout]:
    """The texts with KL and surprise as seen from the prompts without the instruction.

        kl = KL(p(. | asked, x_<t) || p(. | prompt, x_<t)),    surprise = -log p(x_t | prompt, x_<t)

    Args:
        model: A causal language model of transformers.
        asked: The token ids of each prompt with the instruction.
        prompts: Those without it.
        rollouts: What the model wrote to `asked`.
    """
    found = []
    for with_words, without, one in zip(asked, prompts, rollouts, strict=True):
        if not one.token_ids:
            found.append(one)
            continue
        own, plain = (_log_probs(model, prompt, one.token_ids) for prompt in (with_words, without))
        surprise = -plain.gather(1, torch.tensor(one.token_ids, device=plain.device)[:, None])[:, 0]
        found.append(replace(one, kl=divergence(own, plain).tolist(), surprise=surprise.tolist()))
    return found


def _log_probs(model: Any, prompt: Sequence[int], text: Sequence[int]) -> Tensor:
    """`[n, vocabulary]` log probabilities of each token of a text behind a prompt."""
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[*prompt, *text]], device=device)
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, return_dict=True).logits
    return logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
