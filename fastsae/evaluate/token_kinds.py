"""Which tokens of a dialogue are whose: the kinds by which a comparison of SAEs tells its figures apart."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastsae.data.special_tokens import SpecialTokens

KINDS = (
    "user",
    "assistant",
    "system",
    "template",
    "special",
    "position_0",
    "special_position_0",
    "late_sink",
    "special_late_sink",
)
"""A token is of one kind: what the user or the assistant says, a system prompt, or what the template writes, in special tokens
and role names or in others; the first of its dialogue; or another attention sink. The last two may be special tokens or not."""
_USER, _ASSISTANT, _SYSTEM, _TEMPLATE, _SPECIAL, _FIRST, _LATE_SINK = 0, 1, 2, 3, 4, 5, 7


class TokenKinds:
    """Sorts the tokens of whole dialogues into `KINDS`.

    Who speaks is told by the role's name before the text, or by a special token with which this role's turns alone begin.
    Where a template writes neither, what is said counts as written by the template; so do spaces and punctuation marks between
    a name and the first word.

    Args:
        tokenizer: The model's.
        special_tokens: From `fastsae.data.special_tokens.find_special_tokens`.
    """

    def __init__(self, tokenizer: Any, special_tokens: SpecialTokens) -> None:
        self._special = special_tokens
        self._has_word = cache(lambda token: any(map(str.isalnum, tokenizer.decode([token]))))

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, sinks: Tensor) -> Tensor:
        """Returns `[n]`, the index in `KINDS` of each of the n real tokens, row by row.

        Args:
            input_ids: `[B, T]` whole dialogues from their first token on, padded on the right.
            attention_mask: `[B, T]`, 0 on padding.
            sinks: `[n]`, True for attention sinks.
        """
        real = attention_mask.bool()
        classes = self._special.classes(input_ids)
        special = (classes < len(self._special.names))[real]
        classes = classes.masked_fill(self._special.names_system(input_ids), len(self._special.names) + 1)
        rows = zip(input_ids.tolist(), classes.tolist(), real.sum(1).tolist(), strict=True)
        said = [who for ids, kinds, length in rows for who in self._speakers(ids[:length], kinds)]
        first = (torch.arange(input_ids.shape[1]) == 0).expand(input_ids.shape)[real]
        kinds = torch.where(special, _SPECIAL, torch.tensor(said, dtype=torch.int64))
        kinds = torch.where(sinks, _LATE_SINK + special.long(), kinds)
        return torch.where(first, _FIRST + special.long(), kinds)

    def _speakers(self, ids: list[int], kinds: list[int]) -> list[int]:
        """Who says each token of a dialogue, where it is no special one."""
        n_ids, n_names, leads = len(self._special.ids), len(self._special.names), self._special.leads
        speaker, begin, found = _TEMPLATE, None, list[int]()  # `begin`: where the speaker's first word stands
        for i, (token, kind) in enumerate(zip(ids, kinds, strict=False)):
            role = kind - n_ids if n_ids <= kind < n_names else leads.get(token)  # 0 for the user, 1 for the assistant
            if kind > n_names:
                speaker, begin = _SYSTEM, None
            elif role is not None:
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
