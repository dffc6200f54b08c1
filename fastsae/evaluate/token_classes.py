"""Which tokens of a dialogue are whose: the classes by which a comparison of SAEs tells its figures apart."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastsae.data.special_tokens import SpecialTokens

CLASSES = ("all", "special", "user", "assistant", "template", "sinks", "position_0")
_TEMPLATE, _USER, _ASSISTANT = range(3)


class TokenClasses:
    """Sorts the tokens of whole dialogues into `CLASSES`.

        all         every token that is no attention sink
        special     the special tokens and role names that the chat template writes around turns
        user        what the user says, and `assistant` what the assistant says
        template    every other token: system prompts, and line breaks between turns
        sinks       attention sinks, which no other class but `position_0` holds
        position_0  the first token of each dialogue, a sink in any case

    Who speaks is told by the role's name before the text, or by a special token with which this role's turns alone begin.
    Where a template writes neither, what both say is in `template`; so are spaces and punctuation marks between a name and
    the first word.

    Args:
        tokenizer: The model's.
        special_tokens: From `fastsae.data.special_tokens.find_special_tokens`.
    """

    def __init__(self, tokenizer: Any, special_tokens: SpecialTokens) -> None:
        self._special = special_tokens
        self._has_word = cache(lambda token: any(map(str.isalnum, tokenizer.decode([token]))))

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, sinks: Tensor) -> Tensor:
        """Returns `[len(CLASSES), n]` bool for the n real tokens, row by row.

        Args:
            input_ids: `[B, T]` whole dialogues from their first token on, padded on the right.
            attention_mask: `[B, T]`, 0 on padding.
            sinks: `[n]`, True for attention sinks.
        """
        real = attention_mask.bool()
        classes = self._special.classes(input_ids)
        special = (classes < len(self._special.names))[real]
        rows = zip(input_ids.tolist(), classes.tolist(), real.sum(1).tolist(), strict=True)
        said = [who for ids, kinds, length in rows for who in self._speakers(ids[:length], kinds)]
        speaker = torch.tensor(said, dtype=torch.int64)
        first = (torch.arange(input_ids.shape[1]) == 0).expand(input_ids.shape)[real]
        plain = ~special & ~sinks
        turns = [plain & (speaker == who) for who in (_USER, _ASSISTANT, _TEMPLATE)]
        return torch.stack([~sinks, special & ~sinks, *turns, sinks, first])

    def _speakers(self, ids: list[int], kinds: list[int]) -> list[int]:
        """Who says each token of a dialogue, where it is no special one."""
        n_ids, n_names, leads = len(self._special.ids), len(self._special.names), self._special.leads
        speaker, begin, found = _TEMPLATE, None, list[int]()  # `begin`: where the speaker's first word stands
        for i, (token, kind) in enumerate(zip(ids, kinds, strict=False)):
            role = kind - n_ids if n_ids <= kind < n_names else leads.get(token)  # 0 for the user, 1 for the assistant
            if role is not None:
                speaker, begin = (_ASSISTANT if role else _USER), None
            elif token in leads and begin is not None:  # what stands between name and text belongs to the header
                found[begin:] = [_TEMPLATE] * (i - begin)
                begin = None
            elif kind < n_ids and begin is not None:
                speaker, begin = _TEMPLATE, None
            elif kind == n_names and begin is None and speaker != _TEMPLATE and self._has_word(token):
                begin = i
            found.append(_TEMPLATE if begin is None else speaker)
        return found
