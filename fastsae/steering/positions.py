"""Which tokens of a forward pass are edited: told by their absolute positions, whatever part of the text the pass holds.

A decode step with a cache holds one token, a pass without a cache the whole text, a chunk of a long prompt something in between.
`Positions` counts the columns that have gone by (padding included), so that a token has the same place in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsae.data.special_tokens import find_special_tokens
from fastsae.errors import UsageError, shown
from fastsae.evaluate.token_kinds import KINDS, TokenKinds

POSITIONS = ("all", "prompt", "generated", "special", "assistant")
_ASSISTANT = KINDS.index("assistant")


@dataclass(frozen=True)
class Region:
    """The part of a forward pass over B rows and T columns that is edited.

    Attributes:
        start: First column of this pass.
        stop: Where the columns end; nothing is edited where it is `start`.
        chosen: `[B, T]` bool, which tokens of these columns; None for all.
        last: `[B]`, the column of each row's last real token, -1 where this pass has none; None for the last column.
    """

    start: int
    stop: int
    chosen: Tensor | None = None
    last: Tensor | None = None


class Positions:
    """Follows the forward passes of a model and tells for each which of its tokens are edited.

    A pass with an empty cache begins a text, and its columns are the prompt, unless its tokens are those of the text before
    and one more: then it is a step of a generation without a cache. With a cache, several tokens directly behind the prompt
    belong to it, as chunks of a long one do, and a single one is generated. Inside of `generating` the prompt is known, and
    nothing is guessed.

    A token is special, or the assistant's, by what has been read when the pass that first reads it ends. Later tokens do not
    change that, so that a generation with a cache and one without edit the same tokens.

    One batch of texts is followed at a time. Passes for another one with a cache of its own belong into `Steering.paused`.

    Args:
        positions: One of `POSITIONS`, or a mask `[B, T]` bool by absolute position: column t is the t-th real token of a row,
            counted from 0; tokens beyond T are not edited.
        tokenizer: The model's, for `special` and `assistant`.

    Raises:
        UsageError: `positions` is none of these, or its tokens cannot be told without a tokenizer or by this one.
    """

    def __init__(self, positions: str | Tensor, tokenizer: Any = None) -> None:
        self._mask = positions if isinstance(positions, Tensor) else None
        self._kind = positions if isinstance(positions, str) else "mask"
        if self._mask is not None and (
            self._mask.dtype != torch.bool or self._mask.dim() != 2 or not self._mask.numel()
        ):
            raise UsageError(f"positions: expected a mask [B, T] of bool, got {shown(self._mask)}")
        if self._mask is None and (not isinstance(positions, str) or positions not in POSITIONS):
            raise UsageError(f"positions: expected one of {', '.join(POSITIONS)}, or a mask, got {shown(positions)}")
        self._by_words = self._kind in ("special", "assistant")
        if self._by_words:
            self._find_words(tokenizer)
        self._prompt: Tensor | None = None  # the ids that `generate` was given
        self._is_generating = False
        self._begin()

    def _find_words(self, tokenizer: Any) -> None:
        if tokenizer is None:
            raise UsageError(f"tokenizer: expected the model's for the positions {self._kind!r}, got none")
        special = find_special_tokens(tokenizer)
        speaks = bool(special.roles) or 1 in special.leads.values()
        if not (speaks if self._kind == "assistant" else special.names):
            missing = "that tells when the assistant speaks" if self._kind == "assistant" else "with special tokens"
            raise UsageError(f"positions: expected for {self._kind!r} a chat template {missing}, got one without")
        self._special, self._token_kinds = special, TokenKinds(tokenizer, special)

    def _begin(self) -> None:
        self.n_columns, self.prompt_columns = 0, 0
        self._ids: Tensor | None = None  # [B, n_columns], None where unknown
        self._real = torch.ones(0, 0, dtype=torch.bool)  # [B, n_columns], False on padding
        self._found: Tensor | None = None  # [B, n_columns] bool, the special tokens or those of the assistant

    def check_beams(self, n_beams: int) -> None:
        """Raise UsageError where a beam search would make one row of others, and the row's words matter."""
        if n_beams > 1 and self._by_words:
            raise UsageError(
                f"positions: expected all, prompt or generated with a beam search, whose rows change places, got {self._kind!r}"
            )

    @contextmanager
    def generating(self, prompt: Tensor | None, n_columns: int) -> Iterator[None]:
        """While this lasts, passes belong to one generation behind a prompt of `n_columns` columns.

        Args:
            prompt: `[B, n_columns]` ids; None where those in a cache are not given again, or embeddings are.
            n_columns: How many columns the prompt has, those in a cache among them.
        """
        if self._is_generating:  # a decoding method that generates with the model inside of its own steps
            yield
            return
        if prompt is not None:
            self._begin()  # a cache may hold another text than the last one
        self._prompt, self.prompt_columns, self._is_generating = prompt, n_columns, True
        try:
            yield
        finally:
            self._prompt, self._is_generating = None, False

    def advance(self, inputs: Tensor, n_cached: int, mask: Any) -> Region:
        """Take note of a forward pass, and return which of its tokens are edited.

        Args:
            inputs: `[B, T]` ids, or `[B, T, d_in]` embeddings.
            n_cached: How many columns are in the cache.
            mask: The model's attention mask, `[B, n_cached + T]` or as static caches have it; None where every token is real.

        Raises:
            UsageError: The positions cannot be told for this pass, or the mask of positions has another number of rows.
        """
        n_rows, T = inputs.shape[:2]
        if self._kind == "all" and T == 1:
            return Region(0, 1)
        real = self._real_columns(mask, (n_rows, T), n_cached)
        last = None if real is None or T == 1 else _last_real(real)
        if self._kind == "all":
            return Region(0, T, last=last)
        ids = None if inputs.is_floating_point() else inputs
        if real is None:
            real = torch.ones(n_rows, T, dtype=torch.bool, device=inputs.device)
        if self._by_words:  # where role names are looked for, a GPU would be waited for anyway
            ids, real = None if ids is None else ids.cpu(), real.cpu()
        self._remember(ids, real, n_cached, mask)
        if self._mask is not None:
            return Region(0, T, self._masked(self._mask, n_cached), last)
        if self._by_words:
            found = self._spoken(n_cached, has_ids=ids is not None)
            return Region(0, T if found.any() else 0, found, last)  # it lies on the CPU, so that looking costs nothing
        split = min(max(self.prompt_columns - n_cached, 0), T)
        return Region(0, split, last=last) if self._kind == "prompt" else Region(split, T, last=last)

    def _real_columns(self, mask: Any, shape: tuple[int, int], n_cached: int) -> Tensor | None:
        """`[B, T]` bool, which columns of the pass hold tokens; None for all."""
        T = shape[1]
        if isinstance(mask, dict):  # one for each kind of attention; the widest is that of the whole text
            masks = [one for one in mask.values() if isinstance(one, Tensor)]
            mask = max(masks, key=lambda one: one.shape[-1], default=None)
        if mask is None:
            return None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            end = min(mask.shape[1], n_cached + T)
            return mask[:, end - T : end].bool().expand(shape)
        if isinstance(mask, Tensor) and mask.dim() == 4:  # a static cache has it: a real token sees itself
            if mask.shape[-1] < n_cached + T:  # that of a sliding window, which has left the padding behind
                return None
            sees = mask[:, 0, :, n_cached : n_cached + T].diagonal(dim1=1, dim2=2)
            return (sees if sees.dtype == torch.bool else sees == 0).expand(shape)
        if self._mask is None and not self._by_words:
            return None  # padding makes no difference
        raise UsageError(
            f"attention_mask: expected 2 or 4 dimensions for the positions {self._kind!r}, whose tokens are counted without "
            f"padding, got {shown(mask)}"
        )

    def _remember(self, ids: Tensor | None, real: Tensor, n_cached: int, mask: Any) -> None:
        T = real.shape[1]
        if n_cached == 0:
            if not self._continues(ids, real):
                self._found = None
                self.prompt_columns = self.prompt_columns if self._is_generating else T
            self._ids, self._real = None if ids is None else ids.clone(), real  # the caller may write there
        else:
            if not self._is_generating and (n_cached > self.n_columns or n_cached <= self.prompt_columns):
                self.prompt_columns = n_cached + (T if T > 1 else 0)
            known, known_real = self._cached(real, n_cached, mask)
            self._ids = None if ids is None or known is None else torch.cat([known, ids], 1)
            self._real = torch.cat([known_real, real], 1)
        self.n_columns = n_cached + T

    def _continues(self, ids: Tensor | None, real: Tensor) -> bool:
        """Whether a pass without a cache has the tokens of the text so far, and one more."""
        before = self._ids
        if ids is None or before is None or ids.shape != (len(before), before.shape[1] + 1):
            return False
        return torch.equal(ids[:, :-1], before) and torch.equal(real[:, :-1], self._real)

    def _cached(self, real: Tensor, n_cached: int, mask: Any) -> tuple[Tensor | None, Tensor]:
        """Ids, where they are known, and which are real, of the columns in the cache, `[B, n_cached]` each."""
        n_rows = len(real)
        if n_cached <= self.n_columns and n_rows == len(self._real):
            self._found = None if self._found is None else self._found[:, :n_cached]
            return None if self._ids is None else self._ids[:, :n_cached], self._real[:, :n_cached]
        self._found = None
        before = torch.ones(n_rows, n_cached, dtype=torch.bool, device=real.device)
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= n_cached:
            before = mask[:, :n_cached].to(real.device, torch.bool).expand(n_rows, -1)
        ids = self._prompt
        if ids is None or ids.shape[1] < n_cached or n_rows % len(ids):
            return None, before
        return ids[:, :n_cached].to(real.device).repeat_interleave(n_rows // len(ids), 0), before

    def _masked(self, chosen: Tensor, n_cached: int) -> Tensor:
        """`[B, T]` bool, the tokens of the pass that a mask by absolute position chooses."""
        n_rows = len(self._real)
        if len(chosen) != n_rows:
            raise UsageError(
                f"positions: expected a mask of as many rows as the model is given, {n_rows}, got {shown(chosen)}"
            )
        place = self._real.long().cumsum(1)[:, n_cached:] - 1
        inside = self._real[:, n_cached:] & (place < chosen.shape[1])
        return inside & chosen.to(place.device).gather(1, place.clamp(0, chosen.shape[1] - 1))

    def _spoken(self, n_cached: int, *, has_ids: bool) -> Tensor:
        """`[B, T]` bool, the tokens of the pass that are special or the assistant's."""
        if self._ids is None:
            got = f"a cache of {n_cached} tokens that were not read in this block" if has_ids else "inputs_embeds"
            raise UsageError(f"positions: expected the ids of all tokens for {self._kind!r}, got {got}")
        found = self._words(self._ids, self._real)
        if self._found is not None:  # settled when they were first read
            found = torch.cat([self._found, found[:, self._found.shape[1] :]], 1)
        self._found = found
        return found[:, n_cached:]

    def _words(self, ids: Tensor, real: Tensor) -> Tensor:
        order = (~real).long().argsort(dim=1, stable=True)  # padding to the right
        ids, real = ids.gather(1, order), real.gather(1, order)
        if self._kind == "special":
            found = (self._special.classes(ids) < len(self._special.names)) & real
        else:
            kinds = self._token_kinds(ids, real, torch.zeros(int(real.sum()), dtype=torch.bool))
            found = torch.zeros_like(real).masked_scatter(real, kinds == _ASSISTANT)
        return torch.zeros_like(found).scatter(1, order, found)


def _last_real(real: Tensor) -> Tensor:
    columns = torch.arange(real.shape[1], device=real.device)
    return torch.where(real, columns, -1).amax(1)
