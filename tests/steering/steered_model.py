"""A tiny chat model to steer, with prompts of different lengths: what the tests of passes and of generations share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastsae import Edit

D_IN, N_NEW = 16, 6
BIRDS = {"role": "user", "content": "Name three birds that live near the sea."}
PROMPTS = [
    [{"role": "user", "content": "What is a river?"}],
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello! How are you?"}, BIRDS],
]


PUSH = [Edit(3, "add", 5.0), Edit(9, "clamp", 7.0)]


def hooks_of(model: Any) -> Iterator[Any]:
    for module in model.modules():
        yield from (*module._forward_hooks.values(), *module._forward_pre_hooks.values())


def render(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


def padded(prompts: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), longest), 5), torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        columns = slice(longest - len(prompt), None) if side == "left" else slice(0, len(prompt))
        ids[row, columns], mask[row, columns] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=N_NEW,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def logits_of(generated: Any) -> Tensor:
    return torch.stack(generated.logits, 1)
