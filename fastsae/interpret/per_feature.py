"""What a pass over dialogues keeps of every feature; its size does not grow with the tokens, but for the tokens themselves.

The bytes, with 60 windows of 32 tokens per feature and a pool of 4,096 windows, are

    d_sae * (60 * (16 + 4 * 32) + 4 * 128 + 16 + 8 * 2 + 4096 / 8) + 4096 * 16 + 5 * tokens + 16 * dialogues

which makes 1.27 GB for 131,072 features, and 50 MB more for 10 million tokens. Beside these, a batch takes about 70 bytes for
each of its entries. While the slots fill it takes twice as much, and 2 kB for each feature that gets a window. These last
figures are counted in the code, not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.evaluate.token_kinds import KINDS
from fastsae.interpret.sampling import BottomK, Tokens, hashed
from fastsae.interpret.windows import WINDOW
from fastsae_kernels import SparseActs

N_TOP, N_SAMPLED = 20, 40  # windows of each feature
N_POOL = 4096  # windows of the pool
N_DRAWS = 8  # a dialogue lends the pool at most so many
SPECIAL = KINDS.index("special")  # those before it are no special tokens, those behind it are attention sinks

_LOWEST, _HIGHEST, _PARTS = -16, 16, 4  # octaves of the histogram, from 2**-16 to 2**16, and bins of each
N_BINS = (_HIGHEST - _LOWEST) * _PARTS
_LOOKUPS = 2**13  # windows that are looked up together, in tensors of 2 MB

EDGES = (
    *(2.0**octave * (1 + part / _PARTS) for octave in range(_LOWEST, _HIGHEST) for part in range(_PARTS)),
    2.0**_HIGHEST,
)
"""The borders of the histogram's bins; the first and the last bin hold whatever is smaller and larger, too."""


def window_starts(positions: Tensor, lengths: Tensor) -> Tensor:
    """Where the windows around some tokens begin in dialogues of these lengths.

    A window is as long as it may be: at either end of a dialogue it is moved, not cut, so that its length says nothing about
    where it was.
    """
    return (positions - WINDOW // 2).clamp_min(0).minimum((lengths - WINDOW).clamp_min(0))


class Rows(NamedTuple):
    """Whole dialogues, their real tokens one behind the other: B dialogues, N tokens, all on one device."""

    dialogues: Tensor  # [B] int64, index in the dataset
    lengths: Tensor  # [B] int64
    tokens: Tensor  # [N] token ids
    kinds: Tensor  # [N], index in KINDS

    @property
    def starts(self) -> Tensor:
        """`[B]`, the first token of each dialogue."""
        return self.lengths.cumsum(0) - self.lengths

    @property
    def where(self) -> Tokens:
        """Where the tokens stand; their units are the rows."""
        steps = torch.arange(len(self.tokens), device=self.lengths.device)
        row = torch.arange(len(self.lengths), device=self.lengths.device)
        row = row.repeat_interleave(self.lengths, output_size=len(self.tokens))
        return Tokens(row, self.dialogues[row], steps - self.starts[row])


_KEPT = {
    "dialogues": torch.int64,
    "lengths": torch.int64,
    "tokens": torch.int32,
    "kinds": torch.uint8,
}


class _Entries(NamedTuple):
    """The entries that count, ordered by token and there by feature, `[n]` each."""

    features: Tensor  # int64
    tokens: Tensor  # int64, counted in the rows
    values: Tensor  # fp32


class _KeptWindows:
    """Some windows of each feature, with its activations in them: `activations` `[d_sae, k, WINDOW]` fp32."""

    def __init__(self, d_sae: int, k: int, device: torch.device | str) -> None:
        self.kept = BottomK(d_sae, k, device)
        self.activations = torch.zeros(d_sae, k, WINDOW, device=device)

    def add(self, keys: Tensor, entries: _Entries, rows: Rows, where: Tokens) -> None:
        """Adds the entries with these keys; `where` says where the tokens of `rows` stand."""
        taken = self.kept.add(entries.features, keys, entries.tokens, where)
        d_sae, steps = len(self.activations), torch.arange(WINDOW, device=keys.device)
        places = entries.tokens * d_sae + entries.features  # ascending
        for part in range(0, len(taken.entries), _LOOKUPS):
            of_part, features, slots = (column[part : part + _LOOKUPS] for column in taken)
            peaks = entries.tokens[of_part]
            row = where.units[peaks]
            in_dialogue = window_starts(where.positions[peaks], rows.lengths[row])[:, None] + steps
            wanted = (rows.starts[row][:, None] + in_dialogue) * d_sae + features[:, None]
            found = torch.searchsorted(places, wanted).clamp_max(len(places) - 1)
            is_there = (places[found] == wanted) & (in_dialogue < rows.lengths[row][:, None])
            self.activations[features, slots] = torch.where(is_there, entries.values[found], 0)

    def tensors(self) -> dict[str, Tensor]:
        return {**self.kept.tensors(), "activations": self.activations}


class _Pool:
    """Windows drawn from the dialogues whatever a feature does, and which features fire in each.

    Which windows they are depends on the seed, the dialogues and their lengths alone. In each dialogue some tokens behind the
    first are drawn uniformly, and those whose window overlaps that of an earlier draw are left out. The pool holds the first
    draws of all dialogues or, where there are more of them than it can hold, a uniform sample; where there are fewer, second
    draws follow, and so on.

    Attributes:
        kept: A single group; the highest bits of a key are the number of the draw.
        fires: `[N_POOL, d_sae / 8]` uint8, one bit per feature, the lowest of a byte for the first.
    """

    def __init__(self, d_sae: int, seed: int, device: torch.device | str) -> None:
        self._seed = seed
        self.kept = BottomK(1, N_POOL, device)
        self.fires = torch.zeros(N_POOL, -(-d_sae // 8), dtype=torch.uint8, device=device)

    def add(self, entries: _Entries, rows: Rows) -> None:
        """Adds the windows that are drawn from these dialogues."""
        keys, row, where = self._draw(rows)
        taken = self.kept.add(torch.zeros_like(keys), keys, where.units, where)
        row, positions = row[taken.entries], where.positions[taken.entries]
        starts = rows.starts[row] + window_starts(positions, rows.lengths[row])
        ends = torch.minimum(starts + WINDOW, rows.starts[row] + rows.lengths[row])
        first, last = (torch.searchsorted(entries.tokens, bound) for bound in (starts, ends))
        counts = last - first
        slots = taken.slots.repeat_interleave(counts)
        steps = torch.arange(len(slots), device=slots.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        features = entries.features[first.repeat_interleave(counts) + steps]
        self._mark(taken.slots, slots, features)

    def _draw(self, rows: Rows) -> tuple[Tensor, Tensor, Tokens]:
        """The key of each draw `[n]`, the row of its dialogue, and where it stands; each draw is a unit of its own."""
        draws = torch.arange(N_DRAWS, device=rows.lengths.device)
        drawn = hashed(self._seed, rows.dialogues[:, None], -1 - draws)  # tokens are hashed with their position, from 0
        lengths = rows.lengths[:, None]
        positions = 1 + drawn % (lengths - 1).clamp_min(1)
        starts = window_starts(positions, lengths)
        near = (starts[:, :, None] - starts[:, None]).abs() < WINDOW
        use = ~near.tril(-1).any(-1) & (lengths > 1)
        keys = (draws << 60) | (hashed(drawn) >> 3)
        row, draw = use.nonzero(as_tuple=True)
        where = Tokens(torch.arange(len(row), device=row.device), rows.dialogues[row], positions[row, draw])
        return keys[row, draw], row, where

    def _mark(self, emptied: Tensor, slots: Tensor, features: Tensor) -> None:
        self.fires[emptied] = 0
        n_bytes = self.fires.shape[1]
        bits = (slots * n_bytes * 8 + features).unique()
        ones = torch.ones_like(bits, dtype=torch.uint8) << (bits % 8).to(torch.uint8)
        self.fires.view(-1).index_add_(0, bits // 8, ones)  # each bit comes once, so that sums are unions

    def tensors(self) -> dict[str, Tensor]:
        return {**self.kept.tensors(), "fires": self.fires}


class Gathered:
    """Everything that a pass has found so far; it grows by whole dialogues.

    The top windows of a feature are those around the largest activation of each dialogue. The sampled ones are what is left of
    the tokens on which it fires, drawn one after the other in a uniformly random order, if each whose dialogue was drawn
    before is skipped: the first is uniform over all of them, and a dialogue is the likelier to be drawn the more of them it
    has. Both, and the pool, are the same in whatever order and batches the dialogues come.

    Args:
        d_sae: Number of features.
        seed: Determines the samples.
        device: Where the entries come from.
    """

    def __init__(self, d_sae: int, seed: int, device: torch.device | str = "cpu") -> None:
        self._seed = seed
        self._feature_hash = hashed(torch.arange(d_sae, device=device))
        self._histogram = torch.zeros(d_sae, N_BINS, dtype=torch.int32, device=device)
        self._special_sum = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self._top = _KeptWindows(d_sae, N_TOP, device)
        self._sampled = _KeptWindows(d_sae, N_SAMPLED, device)
        self._pool = _Pool(d_sae, seed, device)
        self._rows = {name: [torch.empty(0, dtype=dtype)] for name, dtype in _KEPT.items()}
        self.seen: set[int] = set()

    def add(self, rows: Rows, acts: SparseActs) -> None:
        """Adds dialogues that were not there before, with the features of their tokens, packed."""
        entries = self._entries(rows, acts)
        features, tokens, values = entries
        where = rows.where
        bits = values.view(torch.int32)  # a positive number's bits, read as an integer, ascend with it
        bins = ((bits >> 21) - (127 + _LOWEST) * _PARTS).clamp(0, N_BINS - 1)  # exponent and two bits of the fraction
        ones = torch.ones(1, dtype=torch.int32, device=bins.device).expand(len(bins))
        self._histogram.view(-1).index_add_(0, features * N_BINS + bins, ones)
        on_special = rows.kinds[tokens] == SPECIAL
        self._special_sum.index_add_(0, features[on_special], values[on_special].double())
        by_value = ((2**31 - 1 - bits.long()) << 32) | where.dialogues[
            tokens
        ]  # where values are equal, the dialogue with the lower number goes first
        self._top.add(by_value, entries, rows, where)
        token_hash = hashed(self._seed, where.dialogues, where.positions)
        at_random = hashed(token_hash[tokens] + self._feature_hash[features])
        self._sampled.add(at_random, entries, rows, where)
        self._pool.add(entries, rows)
        self.seen.update(rows.dialogues.tolist())
        for name, dtype in _KEPT.items():
            self._rows[name].append(getattr(rows, name).to("cpu", dtype))

    @staticmethod
    def _entries(rows: Rows, acts: SparseActs) -> _Entries:
        tokens = acts.row_ids()
        counts = (acts.values > 0) & (rows.kinds <= SPECIAL)[tokens]
        return _Entries(acts.indices[counts].long(), tokens[counts], acts.values[counts].float())

    def tensors(self) -> dict[str, Tensor]:
        """All that was found, on the CPU; `restore` takes it back."""
        return {name: tensor.cpu() for name, tensor in self._tensors().items()} | {
            name: torch.cat(parts) for name, parts in self._rows.items()
        }

    def restore(self, found: Mapping[str, Tensor]) -> None:
        """Goes on from what `tensors` gave."""
        for name, own in self._tensors().items():
            own.copy_(found[name])
        for kept in (self._top.kept, self._sampled.kept, self._pool.kept):
            kept.refresh()
        self._rows = {name: [found[name]] for name in self._rows}
        self.seen = set(found["dialogues"].tolist())

    def _tensors(self) -> dict[str, Tensor]:
        kept: dict[str, _KeptWindows | _Pool] = {"top": self._top, "sampled": self._sampled, "pool": self._pool}
        found = {f"{place}.{name}": tensor for place, one in kept.items() for name, tensor in one.tensors().items()}
        return {**found, "histogram": self._histogram, "special_sum": self._special_sum}
