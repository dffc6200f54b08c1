"""FAST sequencing: every dialogue alone in its row of a batch, in the model's own chat template, never concatenated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae.data.chat import Dialogue
from fastsae.errors import FastsaeError, UsageError

# Dialogues tokenised and sorted by length together. With the demo's dialogues and batches of 8,192 tokens, padding adds
# 21 % to the tokens the model computes with a window of 256, 12 % with 512 and 6 % with 1024.
_WINDOW = 1024


@dataclass(frozen=True)
class TokenBatch:
    """Dialogues as token ids, one per row, padded on the right.

    Shapes: `input_ids` [B, T] int64, `attention_mask` [B, T] bool (False on padding), `dialogue_ids` [B] int64, the
    index of each row's dialogue in the dataset.
    """

    input_ids: Tensor
    attention_mask: Tensor
    dialogue_ids: Tensor


def render(tokenizer: Any, dialogue: Dialogue, max_length: int = 8192) -> list[int]:
    """Return the token ids of a whole dialogue in the tokenizer's chat template, cut off at `max_length`.

    No generation prompt is added. A template that writes a BOS token where the dialogue already starts with one
    gives one BOS.

    Raises:
        UsageError: The tokenizer has no chat template.
        FastsaeError: The template refuses the dialogue, for instance a system turn that the model does not know.
    """
    return _tokenize(tokenizer, [_template_text(tokenizer, dialogue)], max_length)[0]


class FastSequencer(Iterator[TokenBatch]):
    """Serve the chosen dialogues as padded batches, in an order that seed and position determine alone.

    Each epoch takes the dialogues in a new seeded order. A window of 1,024 of them is tokenised, sorted by length and
    cut into batches of at most `batch_tokens` tokens, padding included; a dialogue longer than that is a batch by
    itself. The window's batches come in a seeded order. `state_dict()` names the next batch in a few integers.

    `dropped` counts the dialogues of the current epoch, so far, that the template refused, that have fewer than two
    tokens, or a token that the model has no embedding for.

    Args:
        dialogues: The dataset; `indices` chooses from it.
        indices: Indices of the dialogues to serve.
        tokenizer: A tokenizer with a chat template.
        max_length: Tokens after which a dialogue is cut off.
        batch_tokens: Most tokens of a batch, B * T.
        seed: Determines every order.
        shuffle: False serves the dialogues' windows and batches in the order of `indices`.
        endless: False stops after one epoch.
        n_embeddings: Number of tokens that the model has an embedding for; dialogues with others are dropped.

    Raises:
        UsageError: No dialogues, a length that is not positive, or a tokenizer without chat template.
        FastsaeError: While serving: an epoch has passed and every dialogue was dropped.
    """

    def __init__(
        self,
        dialogues: Sequence[Dialogue],
        indices: Sequence[int],
        tokenizer: Any,
        max_length: int = 8192,
        batch_tokens: int = 8192,
        seed: int = 0,
        shuffle: bool = True,
        endless: bool = True,
        n_embeddings: int | None = None,
    ) -> None:
        if len(indices) == 0:
            raise UsageError("no dialogues: expected at least one, but all were filtered out or the split is empty")
        if max_length < 2 or batch_tokens < 1:
            raise UsageError(
                f"expected max_length >= 2 and batch_tokens >= 1, got max_length={max_length} and "
                f"batch_tokens={batch_tokens}"
            )
        _check_template(tokenizer)
        self.dialogues, self.tokenizer = dialogues, tokenizer
        self.indices = np.asarray(indices, dtype=np.int64)
        self.max_length, self.batch_tokens = max_length, batch_tokens
        self.seed, self.shuffle, self.endless = seed, shuffle, endless
        self.n_embeddings = n_embeddings
        self.n_windows = -(-len(self.indices) // _WINDOW)
        self._refusal = ""
        self._order: tuple[int, np.ndarray] = (-1, self.indices)  # the epoch, and its order of dialogues
        self._batches: list[list[tuple[int, list[int]]]] | None = None
        self._seek(epoch=0, window=0, batch=0, dropped=0)

    @property
    def dropped(self) -> int:
        return self._dropped_before + self._dropped_in_window

    @property
    def epoch(self) -> int:
        return self._epoch

    def __next__(self) -> TokenBatch:
        while self._batches is None or self._batch == len(self._batches):
            if self._batches is not None:
                self._seek(self._epoch, self._window + 1, 0, self.dropped)
            if self._window == self.n_windows:
                if self._dropped_before == len(self.indices):
                    raise FastsaeError(
                        f"all {len(self.indices)} dialogues were dropped: the chat template refused them, or gave "
                        f"fewer than 2 tokens or tokens without an embedding. {self._refusal}"
                    )
                if not self.endless:
                    raise StopIteration
                self._seek(self._epoch + 1, 0, 0, 0)
            self._batches = self._prepare_window()
        self._batch += 1
        return self._pad(self._batches[self._batch - 1])

    def state_dict(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "n_dialogues": len(self.indices),
            "epoch": self._epoch,
            "window": self._window,
            "batch": self._batch,
            "dropped": self._dropped_before,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on with the batch that follows the one served before `state_dict()`.

        Raises:
            UsageError: The state belongs to another seed or another number of dialogues.
            ValueError: It lies behind the last window or batch.
        """
        for name, own in (("seed", self.seed), ("n_dialogues", len(self.indices))):
            if state[name] != own:
                raise UsageError(f"cannot resume: the checkpoint has {name} = {state[name]}, this run has {own}")
        if state["window"] >= self.n_windows:
            raise ValueError(f"window: expected one from 0 to {self.n_windows - 1}, got {state['window']}")
        self._seek(state["epoch"], state["window"], state["batch"], state["dropped"])
        self._batches = self._prepare_window()
        if state["batch"] > len(self._batches):
            raise ValueError(f"batch: expected one from 0 to {len(self._batches)}, got {state['batch']}")

    def _seek(self, epoch: int, window: int, batch: int, dropped: int) -> None:
        self._epoch, self._window, self._batch, self._dropped_before = epoch, window, batch, dropped
        self._dropped_in_window = 0
        self._batches = None  # of the current window; prepared when needed

    def _prepare_window(self) -> list[list[tuple[int, list[int]]]]:
        """Tokenise the current window and cut it into batches of (dialogue index, token ids)."""
        if self.shuffle and self._order[0] != self._epoch:
            self._order = (self._epoch, np.random.default_rng([self.seed, self._epoch]).permutation(self.indices))
        chosen = self._order[1][self._window * _WINDOW : (self._window + 1) * _WINDOW].tolist()
        texts = [(index, text) for index in chosen if (text := self._text(index)) is not None]
        token_lists = _tokenize(self.tokenizer, [text for _, text in texts], self.max_length)
        rows = [(index, ids) for (index, _), ids in zip(texts, token_lists, strict=True) if self._is_usable(ids)]
        self._dropped_in_window = len(chosen) - len(rows)
        rows.sort(key=lambda row: len(row[1]))
        batches: list[list[tuple[int, list[int]]]] = []
        for row in rows:
            # Rows come in ascending length, so this row's length is the padded length of its batch.
            if not batches or (len(batches[-1]) + 1) * len(row[1]) > self.batch_tokens:
                batches.append([])
            batches[-1].append(row)
        if self.shuffle:
            shuffled = np.random.default_rng([self.seed, self._epoch, self._window]).permutation(len(batches))
            batches = [batches[i] for i in shuffled]
        return batches

    def _is_usable(self, ids: list[int]) -> bool:
        return len(ids) >= 2 and (self.n_embeddings is None or max(ids) < self.n_embeddings)

    def _text(self, index: int) -> str | None:
        try:
            return _template_text(self.tokenizer, self.dialogues[index])
        except UsageError:
            raise
        except FastsaeError as error:
            self._refusal = f"The last refusal: {error}"
            return None

    def _pad(self, rows: list[tuple[int, list[int]]]) -> TokenBatch:
        length = max(len(ids) for _, ids in rows)
        padding = self.tokenizer.pad_token_id or 0
        input_ids = torch.full((len(rows), length), padding, dtype=torch.int64)
        attention_mask = torch.zeros((len(rows), length), dtype=torch.bool)
        for i, (_, ids) in enumerate(rows):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            attention_mask[i, : len(ids)] = True
        return TokenBatch(input_ids, attention_mask, torch.tensor([index for index, _ in rows]))


def _check_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template. Choose an "
            "instruction-tuned model, or set `tokenizer.chat_template` and save the tokenizer beside the model"
        )


def _template_text(tokenizer: Any, dialogue: Dialogue) -> str:
    from jinja2 import TemplateError

    _check_template(tokenizer)
    try:
        text: str = tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=False)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in dialogue)
        raise FastsaeError(f"the chat template refuses a dialogue with the roles {roles}: {error}") from error
    return text


def _tokenize(tokenizer: Any, texts: list[str], max_length: int) -> list[list[int]]:
    """Token ids of templated texts: the template has written every special token, so the tokenizer adds none."""
    if not texts:
        return []
    # `verbose=False`: no warning about texts longer than the model's context; they are cut off here.
    ids_of = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    cut = []
    for ids in ids_of:
        start = 1 if bos is not None and ids[:2] == [bos, bos] else 0
        cut.append(list(ids[start : start + max_length]))
    return cut
