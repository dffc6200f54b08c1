"""FAST sequencing: every dialogue alone in its row of a batch, in the model's own chat template, never concatenated."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae.data.chat import Dialogue
from fastsae.data.chat_template import ChatTemplate, RefusedDialogueError
from fastsae.data.dropped import Dropped
from fastsae.errors import FastsaeError, UsageError

# Dialogues tokenised and sorted by length together. With the demo's dialogues and batches of 8,192 tokens, padding adds
# 21 % to the tokens the model computes with a window of 256, 12 % with 512 and 6 % with 1024.
WINDOW = 1024
# A text much longer than `max_length` tokens is not tokenised whole, but to the first of so many characters per token.
# Of those, the last tokens can differ from the whole text's: where the cut goes through the longest of a vocabulary,
# usually 128 characters, as many single ones stand in its place.
_CHARACTERS_PER_TOKEN = 16
_UNSURE = 256

logger = logging.getLogger(__name__)


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
    return _tokenize(tokenizer, [ChatTemplate(tokenizer).text(dialogue)], max_length)[0]


class FastSequencer(Iterator[TokenBatch]):
    """Serve the chosen dialogues as padded batches, in an order that seed and position determine alone.

    Each epoch takes the dialogues in a new seeded order. A window of 1,024 of them is tokenised, sorted by length and
    cut into batches of at most `batch_tokens` tokens, padding included; a dialogue longer than that is a batch by
    itself. The window's batches come in a seeded order. `state_dict()` names the next batch in a few integers.

    `drops` counts the dialogues that cannot be used, by reason: the template or the tokenizer fails on them, or they
    have fewer than two tokens, or a token that the model has no embedding for. Each of them counts once, in the first
    epoch. A warning tells of them as soon as they are more than 1 % of those looked at.

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
        UsageError: No dialogues, a length that is not positive, or a tokenizer without a usable chat template.
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
        self.template = ChatTemplate(tokenizer)
        self.dialogues, self.tokenizer = dialogues, tokenizer
        self.indices = np.asarray(indices, dtype=np.int64)
        self.max_length, self.batch_tokens = max_length, batch_tokens
        self.seed, self.shuffle, self.endless = seed, shuffle, endless
        self.n_embeddings = n_embeddings
        self.n_windows = -(-len(self.indices) // WINDOW)
        self._refusal = ""
        self._has_warned = False
        self._order: tuple[int, np.ndarray] = (-1, self.indices)  # the epoch, and its order of dialogues
        self._batches: list[list[tuple[int, list[int]]]] | None = None
        self._seek(epoch=0, window=0, batch=0, drops=Dropped())

    @property
    def drops(self) -> Dropped:
        return self._drops_before + self._drops_in_window

    @property
    def dropped(self) -> int:
        return self.drops.total

    @property
    def epoch(self) -> int:
        return self._epoch

    def __next__(self) -> TokenBatch:
        while self._batches is None or self._batch == len(self._batches):
            if self._batches is not None:
                self._seek(self._epoch, self._window + 1, 0, self.drops)
            if self._window == self.n_windows:
                if self.dropped == len(self.indices):
                    raise FastsaeError(f"all {len(self.indices)} dialogues were dropped: {self.drops}. {self._refusal}")
                if not self.endless:
                    raise StopIteration
                self._seek(self._epoch + 1, 0, 0, self.drops)
            self._batches = self._prepare_window()
        self._batch += 1
        return self._pad(self._batches[self._batch - 1])

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "n_dialogues": len(self.indices),
            "epoch": self._epoch,
            "window": self._window,
            "batch": self._batch,
            "dropped": self._drops_before.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the batch that follows the one served before `state_dict()`.

        Raises:
            UsageError: The state belongs to another seed or another number of dialogues.
            ValueError: It is no state of a sequencer.
        """
        for name in ("seed", "n_dialogues", "epoch", "window", "batch"):
            if type(state[name]) is not int or state[name] < 0:
                raise ValueError(f"sequencer: expected a whole number as {name}, got {state[name]!r}")
        for name, own in (("seed", self.seed), ("n_dialogues", len(self.indices))):
            if state[name] != own:
                raise UsageError(f"cannot resume: the checkpoint has {name} = {state[name]}, this run has {own}")
        self._seek(state["epoch"], state["window"], 0, Dropped.from_state(state["dropped"]))
        if state["window"] < self.n_windows:
            self._batches = self._prepare_window()
        if state["window"] > self.n_windows or state["batch"] > len(self._batches or []):
            raise ValueError(f"sequencer: there is no batch {state['batch']} of window {state['window']}")
        self._batch = state["batch"]

    def _seek(self, epoch: int, window: int, batch: int, drops: Dropped) -> None:
        self._epoch, self._window, self._batch, self._drops_before = epoch, window, batch, drops
        self._drops_in_window = Dropped()
        self._batches = None  # of the current window; prepared when needed

    def _prepare_window(self) -> list[list[tuple[int, list[int]]]]:
        """Tokenise the current window and cut it into batches of (dialogue index, token ids)."""
        if self.shuffle and self._order[0] != self._epoch:
            self._order = (self._epoch, np.random.default_rng([self.seed, self._epoch]).permutation(self.indices))
        chosen = self._order[1][self._window * WINDOW : (self._window + 1) * WINDOW].tolist()
        self._drops_in_window = Dropped(seen=len(chosen))
        rows = self._token_rows(chosen)
        if self._epoch > 0:  # every dialogue was counted in the first epoch
            self._drops_in_window = Dropped()
        elif not self._has_warned and self.drops.is_worth_a_warning:
            logger.warning("%s", self.drops)
            self._has_warned = True
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

    def _token_rows(self, chosen: list[int]) -> list[tuple[int, list[int]]]:
        """The (dialogue index, token ids) of the dialogues that can be used."""
        texts = {}
        for index in chosen:
            try:
                texts[index] = self.template.text(self.dialogues[index])
            except RefusedDialogueError as error:
                self._drop(index, error.reason)
                self._refusal = f"The last refusal: {error}"
        try:
            token_lists = _tokenize(self.tokenizer, list(texts.values()), self.max_length)
            rows = list(zip(texts, token_lists, strict=True))
        except Exception:  # a text that the tokenizer cannot take: find it
            rows = [(index, ids) for index, text in texts.items() if (ids := self._tokens(index, text)) is not None]
        return [(index, ids) for index, ids in rows if self._is_usable(index, ids)]

    def _is_usable(self, index: int, ids: list[int]) -> bool:
        """Whether the model can run on these tokens; counts the dialogue as dropped where not."""
        if len(ids) < 2:
            self._drop(index, "it has fewer than 2 tokens")
            return False
        if self.n_embeddings is not None and max(ids) >= self.n_embeddings:
            self._drop(index, "the model has no embedding for one of its tokens")
            return False
        return True

    def _tokens(self, index: int, text: str) -> list[int] | None:
        try:
            return _tokenize(self.tokenizer, [text], self.max_length)[0]
        except Exception as error:
            self._drop(index, f"the tokenizer raised an error ({type(error).__name__})")
            self._refusal = f"The last error of the tokenizer: {str(error)[:300]}"
            return None

    def _drop(self, index: int, reason: str) -> None:
        rows = getattr(self.dialogues, "kept_rows", None)
        self._drops_in_window.add(reason, [index if rows is None else int(rows[index])])

    def _pad(self, rows: list[tuple[int, list[int]]]) -> TokenBatch:
        length = max(len(ids) for _, ids in rows)
        padding = self.tokenizer.pad_token_id or 0
        input_ids = torch.full((len(rows), length), padding, dtype=torch.int64)
        attention_mask = torch.zeros((len(rows), length), dtype=torch.bool)
        for i, (_, ids) in enumerate(rows):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            attention_mask[i, : len(ids)] = True
        return TokenBatch(input_ids, attention_mask, torch.tensor([index for index, _ in rows]))


def _tokenize(tokenizer: Any, texts: list[str], max_length: int) -> list[list[int]]:
    """Token ids of templated texts: the template has written every special token, so the tokenizer adds none."""
    if not texts:
        return []
    n_characters = _CHARACTERS_PER_TOKEN * (max_length + _UNSURE)
    # `verbose=False`: no warning about texts longer than the model's context; they are cut off here.
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    ids_of = tokenizer([text[:n_characters] for text in texts], **options)["input_ids"]
    bos = tokenizer.bos_token_id
    cut = []
    for text, ids in zip(texts, ids_of, strict=True):
        n_read = n_characters
        while n_read < len(text) and len(ids) < max_length + _UNSURE:  # few tokens, of many characters each
            n_read *= 8
            ids = tokenizer([text[:n_read]], **options)["input_ids"][0]
        start = 1 if bos is not None and ids[:2] == [bos, bos] else 0
        cut.append(list(ids[start : start + max_length]))
    return cut
