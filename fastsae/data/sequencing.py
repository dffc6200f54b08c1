"""Sequencing: dialogues as rows of tokens, in an order that seed and position determine alone.

`fast` gives each dialogue a row of its own. `packed` puts several into one row, where they do not see each other. `block`
concatenates them and cuts that into blocks of one length, in which a token sees whatever stands before it: block training.
"""

from __future__ import annotations

import bisect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastsae.data.dropped import Dropped
from fastsae.data.tokens import TokenRows
from fastsae.errors import FastsaeError, UsageError

WINDOW = 1024  # dialogues tokenised and cut into batches together; a second for the demo's
# Starting a pass of the model costs as much as computing so many tokens more. With the demo's dialogues and batches of 8,192
# tokens, a window takes 36 passes, and 2.4 % of the computed tokens are padding; with the fewest passes, 20, it is 6.1 %.
_COST_OF_A_PASS = 128
# A row of packed dialogues is as short as it may be, because on a CPU its attention costs the square of its length.
_SHORTEST_ROW = 512

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenBatch:
    """Token ids in rows, padded on the right, with the place of each token.

    Shapes `[B, T]`: `input_ids` int64; `attention_mask` bool, False on padding; `dialogue_ids` int64, the index of the
    token's dialogue or text in its dataset; `positions` int64, its place there, from 0. Both are 0 on padding.

    Attributes:
        is_packed: Whether the dialogues of a row do not see each other. Otherwise a row is one context.
    """

    input_ids: Tensor
    attention_mask: Tensor
    dialogue_ids: Tensor
    positions: Tensor
    is_packed: bool = False

    @classmethod
    def one_per_row(cls, input_ids: Tensor, attention_mask: Tensor, dialogue_ids: Tensor) -> TokenBatch:
        """A batch of whole dialogues, each alone in its row; `dialogue_ids` are `[B]`."""
        positions = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        mask = attention_mask.bool()
        return cls(input_ids, attention_mask, dialogue_ids[:, None] * mask, positions * mask)

    @property
    def context_positions(self) -> Tensor:
        """`[B, T]`, the place of each token in what the model sees as one text, from 0."""
        if self.is_packed:
            return self.positions
        return torch.arange(self.input_ids.shape[1]).expand(self.input_ids.shape)

    def __getitem__(self, part: Any) -> TokenBatch:
        """Rows, or rows and columns."""
        return TokenBatch(
            self.input_ids[part],
            self.attention_mask[part],
            self.dialogue_ids[part],
            self.positions[part],
            self.is_packed,
        )


class Piece(NamedTuple):
    """Tokens that follow each other in one dialogue, the first of them at position `start`."""

    dialogue: int
    start: int
    ids: list[int]


Row: TypeAlias = list[Piece]


class Sequencer(Iterator[TokenBatch], ABC):
    """Serve the chosen dialogues or texts as batches, in an order that seed and position determine alone.

    Each epoch takes them in a new seeded order. A window of 1,024 of them is tokenised and cut into batches of at most
    `batch_tokens` tokens, padding included; a longer row is a batch by itself. The window's batches come in a seeded
    order. `state_dict()` names the next batch in a few integers.

    Several processes each serve a part of the dialogues: of the order of an epoch, process `rank` of `size` takes those at
    `rank`, `rank + size`, `rank + 2 size` and so on, so that together they serve each dialogue once per epoch.

    `drops` counts the dialogues that cannot be used, by reason: the template or the tokenizer fails on them, or they
    have fewer than two tokens, or a token that the model has no embedding for. Each of them counts once, in the first
    epoch. A warning tells of them as soon as they are more than 1 % of those looked at.

    Args:
        dialogues: The dataset; `indices` chooses from it. Its items are dialogues, plain texts or lists of token ids.
        indices: Indices of the dialogues to serve.
        tokenizer: A tokenizer, with a chat template where the items are dialogues.
        max_length: Tokens after which a dialogue is cut off.
        batch_tokens: Most tokens of a batch, B * T.
        seed: Determines every order.
        shuffle: False serves the dialogues' windows and batches in the order of `indices`.
        endless: False stops after one epoch.
        n_embeddings: Number of tokens that the model has an embedding for; dialogues with others are dropped.
        part: The number of this process, and how many there are.

    Raises:
        UsageError: No dialogues, or fewer than processes, a length that is not positive, or a tokenizer without a usable
            chat template.
        FastsaeError: While serving: an epoch has passed without a batch.
    """

    is_packed = False

    def __init__(
        self,
        dialogues: Sequence[Any],
        indices: Sequence[int],
        tokenizer: Any,
        max_length: int = 8192,
        batch_tokens: int = 8192,
        seed: int = 0,
        shuffle: bool = True,
        endless: bool = True,
        n_embeddings: int | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if len(indices) == 0:
            raise UsageError("no dialogues: expected at least one, but all were filtered out or the split is empty")
        if len(indices) < part[1]:
            raise UsageError(
                f"dialogues: expected at least one for each of the {part[1]} processes, got {len(indices)}; start fewer processes"
            )
        if max_length < 2 or batch_tokens < 1:
            raise UsageError(
                f"expected max_length >= 2 and batch_tokens >= 1, got max_length={max_length} and "
                f"batch_tokens={batch_tokens}"
            )
        self.tokens = TokenRows(dialogues, tokenizer, max_length, n_embeddings)
        self.indices = np.asarray(indices, dtype=np.int64)
        self.batch_tokens, self.seed, self.shuffle, self.endless = batch_tokens, seed, shuffle, endless
        self.part = part
        self.n_own = len(self.indices[part[0] :: part[1]])
        self.n_windows = -(-self.n_own // WINDOW)
        self._has_warned = self._has_served = False
        self._order: tuple[int, np.ndarray] = (-1, self.indices)  # the epoch, and its order of dialogues
        self._batches: list[list[Row]] | None = None
        self._seek(epoch=0, window=0, batch=0, drops=Dropped())

    @abstractmethod
    def _cut(self, pieces: list[Piece]) -> list[list[Row]]:
        """Cuts the whole dialogues of a window into batches of rows."""

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
                if not self._has_served:
                    raise self._nothing_to_serve()
                if not self.endless:
                    raise StopIteration
                self._seek(self._epoch + 1, 0, 0, self.drops)
            self._batches = self._prepare_window()
        self._batch += 1
        self._has_served = True
        return self._pad(self._batches[self._batch - 1])

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "n_dialogues": len(self.indices),
            "parts": self.part[1],
            "epoch": self._epoch,
            "window": self._window,
            "batch": self._batch,
            "dropped": self._drops_before.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the batch that follows the one served before `state_dict()`.

        A state that was saved with another number of parts goes on at the same place of the epoch's order of all dialogues,
        which is the same whatever the number of parts. Parts that have each served `w` windows have together served the first
        `w * WINDOW * parts` dialogues of that order; a window that was begun counts as served. From there on, each part starts
        with its next whole window. So what is left of the window that was begun, and less than one window of each new part,
        is skipped in this epoch, and no dialogue that stands before that place comes again. Where the saved parts were at
        different places, the state of the furthest is the one to load in every process.

        Raises:
            UsageError: The state belongs to another seed or another number of dialogues.
            ValueError: It is no state of a sequencer.
        """
        state = {"parts": 1, **state}  # earlier versions did not write it
        for name in ("seed", "n_dialogues", "parts", "epoch", "window", "batch"):
            if type(state[name]) is not int or state[name] < (name == "parts"):
                raise ValueError(f"sequencer: expected a whole number as {name}, got {state[name]!r}")
        for name, own in (("seed", self.seed), ("n_dialogues", len(self.indices))):
            if state[name] != own:
                raise UsageError(f"cannot resume: the checkpoint has {name} = {state[name]}, this run has {own}")
        if state["parts"] != self.part[1]:
            state = {**state, "window": self._same_place(state), "batch": 0}
        self._seek(state["epoch"], state["window"], 0, Dropped.from_state(state["dropped"]))
        if state["window"] < self.n_windows:
            self._batches = self._prepare_window()
        if state["window"] > self.n_windows or state["batch"] > len(self._batches or []):
            raise ValueError(f"sequencer: there is no batch {state['batch']} of window {state['window']}")
        self._batch = state["batch"]
        self._has_served = self._batch > 0 or self._window > 0 or self._epoch > 0

    def _same_place(self, state: dict[str, Any]) -> int:
        """The first window of this part that holds no dialogue that the parts of `state` have served."""
        at_once = WINDOW * state["parts"]  # dialogues of a window of each part
        n_begun = state["window"] + (state["batch"] > 0)
        if n_begun > -(-len(self.indices) // at_once):
            raise ValueError(f"sequencer: there is no batch {state['batch']} of window {state['window']}")
        n_served = min(n_begun * at_once, len(self.indices))
        return min(-(-n_served // (WINDOW * self.part[1])), self.n_windows)

    def _nothing_to_serve(self) -> FastsaeError:
        return FastsaeError(f"all {self.n_own} dialogues were dropped: {self.drops}. {self.tokens.refusal}")

    def _seek(self, epoch: int, window: int, batch: int, drops: Dropped) -> None:
        self._epoch, self._window, self._batch, self._drops_before = epoch, window, batch, drops
        self._drops_in_window = Dropped()
        self._batches = None  # of the current window; prepared when needed

    def _prepare_window(self) -> list[list[Row]]:
        """Tokenise the current window and cut it into batches."""
        if self.shuffle and self._order[0] != self._epoch:
            self._order = (self._epoch, np.random.default_rng([self.seed, self._epoch]).permutation(self.indices))
        own = self._order[1][self.part[0] :: self.part[1]]
        chosen = own[self._window * WINDOW : (self._window + 1) * WINDOW].tolist()
        rows, drops = self.tokens.read(chosen)
        if self._epoch == 0:  # every dialogue is counted in the first epoch
            self._drops_in_window = drops
            if not self._has_warned and self.drops.is_worth_a_warning:
                logger.warning("%s", self.drops)
                self._has_warned = True
        batches = self._cut([Piece(index, 0, ids) for index, ids in rows])
        if self.shuffle:
            shuffled = np.random.default_rng([self.seed, self._epoch, self._window]).permutation(len(batches))
            batches = [batches[i] for i in shuffled]
        return batches

    def _pad(self, rows: list[Row]) -> TokenBatch:
        length = max(_length(row) for row in rows)
        shape = len(rows), length
        input_ids = torch.full(shape, self.tokens.tokenizer.pad_token_id or 0, dtype=torch.int64)
        dialogue_ids, positions = torch.zeros(2, *shape, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            start = 0
            for piece in row:
                place = i, slice(start, start + len(piece.ids))
                input_ids[place] = torch.tensor(piece.ids)
                attention_mask[place], dialogue_ids[place] = True, piece.dialogue
                positions[place] = torch.arange(piece.start, piece.start + len(piece.ids))
                start += len(piece.ids)
        return TokenBatch(input_ids, attention_mask, dialogue_ids, positions, self.is_packed)


class FastSequencer(Sequencer):
    """Each dialogue alone in its row, never concatenated; dialogues of like length make a batch."""

    def _cut(self, pieces: list[Piece]) -> list[list[Row]]:
        """Cuts the dialogues, sorted by length, where padding and number of passes cost least together.

        `cost[i]`, the least cost of the `i` shortest, is the least of `cost[j] + (i - j) * (length of the i-th) + that of a
        pass` over the places `j` where the last batch can begin.
        """
        pieces = sorted(pieces, key=lambda piece: len(piece.ids))
        cost, starts = [0], [0]
        for end in range(1, len(pieces) + 1):
            length = len(pieces[end - 1].ids)
            first = max(0, end - max(1, self.batch_tokens // length))
            cost_from = [cost[start] + (end - start) * length for start in range(first, end)]
            least = min(cost_from)
            starts.append(first + cost_from.index(least))
            cost.append(least + _COST_OF_A_PASS)
        batches, end = list[list[Row]](), len(pieces)
        while end:
            batches.append([[piece] for piece in pieces[starts[end] : end]])
            end = starts[end]
        return batches[::-1]


class PackedSequencer(Sequencer):
    """Whole dialogues packed into rows, where they do not see each other: hardly any padding, and the same activations.

    Each batch takes the longest dialogue that is left as its rows' length, or 512 tokens, and fills each row with the
    longest dialogues that fit.
    """

    is_packed = True

    def _cut(self, pieces: list[Piece]) -> list[list[Row]]:
        left = sorted(pieces, key=lambda piece: len(piece.ids))
        batches: list[list[Row]] = []
        while left:
            length = max(len(left[-1].ids), min(_SHORTEST_ROW, self.batch_tokens))
            batches.append([])
            while left and len(batches[-1]) < max(1, self.batch_tokens // length):
                batches[-1].append(self._row(left, length))
        return batches

    @staticmethod
    def _row(left: list[Piece], length: int) -> Row:
        """Takes dialogues for a row of `length` tokens out of `left`, which is sorted by length."""
        row: Row = []
        while n_fit := bisect.bisect_right(left, length - _length(row), key=lambda piece: len(piece.ids)):
            row.append(left.pop(n_fit - 1))
        return row


class BlockSequencer(Sequencer):
    """Dialogues concatenated and cut into blocks of one length; what is left of a window, less than a block, is left out.

    Args:
        block_length: Tokens of a block.
        arguments: Those of every sequencer.
        options: Those of every sequencer.
    """

    def __init__(self, *arguments: Any, block_length: int, **options: Any) -> None:
        self.block_length = block_length
        super().__init__(*arguments, **options)

    def _cut(self, pieces: list[Piece]) -> list[list[Row]]:
        blocks: list[Row] = [[]]
        for piece in pieces:
            while piece.ids:
                space = self.block_length - _length(blocks[-1])
                blocks[-1].append(Piece(piece.dialogue, piece.start, piece.ids[:space]))
                piece = Piece(piece.dialogue, piece.start + space, piece.ids[space:])
                if _length(blocks[-1]) == self.block_length:
                    blocks.append([])
        blocks.pop()
        size = max(1, self.batch_tokens // self.block_length)
        return [blocks[start : start + size] for start in range(0, len(blocks), size)]

    def _nothing_to_serve(self) -> FastsaeError:
        if self.dropped == self.n_own:
            return super()._nothing_to_serve()
        n = self.n_own
        held = "all of them hold" if n <= WINDOW else f"any {WINDOW:,} that follow each other hold"
        return UsageError(
            f"block_length: expected a block that the {n:,} dialogues or texts can fill, got {self.block_length:,} tokens, which "
            f"is more than {held} together; lower it, or use more of them"
        )


def _length(row: Row) -> int:
    return sum(len(piece.ids) for piece in row)
