"""Samples of a stream: the smallest keys of each group, the same ones in whatever order and batches the entries come."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EMPTY = 2**63 - 1
"""The key of a slot in which there is nothing; every other key is smaller, and none is negative."""

_STEP, _FIRST, _SECOND = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def hashed(*parts: Tensor | int) -> Tensor:
    """Pseudo-random int64 from 0 to 2**63 - 1, which the parts alone determine: tensors of int64 that broadcast, or integers.

    Every part goes through the last step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), together with what came before.
    """
    found = torch.zeros((), dtype=torch.int64)
    for part in parts:
        x = found + _STEP + (part % 2**63 if isinstance(part, int) else part)  # sums and products wrap around
        x = (x ^ _shifted(x, 30)) * _FIRST
        x = (x ^ _shifted(x, 27)) * _SECOND
        found = x ^ _shifted(x, 31)
    return found & EMPTY


def _shifted(x: Tensor, bits: int) -> Tensor:
    """`x >> bits` as if `x` had no sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


class Tokens(NamedTuple):
    """Where tokens stand, `[n_tokens]` int64 each. All tokens of a unit come in the same call of `BottomK.add`."""

    units: Tensor  # from 0
    dialogues: Tensor
    positions: Tensor


class Taken(NamedTuple):
    """What `BottomK.add` took: which entries, and the slot of the group into which each was put. All `[n]` int64."""

    entries: Tensor
    groups: Tensor
    slots: Tensor


class BottomK:
    """For each group of a stream the `k` smallest keys and where they came from, in slots without an order.

    With a key that falls with a value these are the largest values. With a hash as the key they are a sample without
    replacement, drawn uniformly.

    Args:
        n_groups: Number of groups.
        k: Slots of each.
        device: Where they lie.

    Attributes:
        keys: `[n_groups, k]` int64, `EMPTY` where there is nothing.
        dialogues, positions: `[n_groups, k]` int32, the token that each key belongs to.
    """

    def __init__(self, n_groups: int, k: int, device: torch.device | str = "cpu") -> None:
        self.keys = torch.full((n_groups, k), EMPTY, device=device)
        self.dialogues = torch.zeros(n_groups, k, dtype=torch.int32, device=device)
        self.positions = torch.zeros_like(self.dialogues)
        self.refresh()

    def add(self, groups: Tensor, keys: Tensor, tokens: Tensor, where: Tokens) -> Taken:
        """Adds entries, of those of a unit at most one to a group: the one with the smallest key, the first of equals.

        After a while few entries are below the largest key of their group, and the others cost a comparison each.

        Args:
            groups: `[n]` group of each entry.
            keys: `[n]`, different for different units of a group.
            tokens: `[n]` token of each entry, an index into `where`.
            where: Where the tokens stand.

        Returns:
            What was taken, by which the caller keeps more about each slot; what was in the slot before is gone.
        """
        chosen = (keys < self._bounds[groups]).nonzero()[:, 0]
        chosen = _once_per_unit(chosen, groups, keys, where.units[tokens[chosen]])
        rows, counts = groups[chosen].unique_consecutive(return_counts=True)
        row = torch.arange(len(rows), device=rows.device).repeat_interleave(counts)
        rank = torch.arange(len(row), device=rows.device) - (counts.cumsum(0) - counts)[row]
        k = self.keys.shape[1]
        near = rank < k
        chosen, row, rank = chosen[near], row[near], rank[near]
        coming = torch.zeros(len(rows), int(rank.max()) + 1 if len(rank) else 0, dtype=torch.int64, device=rows.device)
        entry_of, coming = (
            coming.index_put((row, rank), chosen),
            coming.fill_(EMPTY).index_put((row, rank), keys[chosen]),
        )
        both = torch.cat([self.keys[rows], coming], dim=1)
        # stable, so that of slots and places that are all empty the slots stay
        best = both.argsort(dim=1, stable=True)[:, :k]
        stays = torch.zeros_like(both, dtype=torch.bool).scatter_(1, best, True)
        of_rows, slots = (~stays[:, :k]).nonzero(as_tuple=True)  # a row gives up as many slots as it takes entries
        taken = Taken(entry_of[stays[:, k:]], rows[of_rows], slots)
        place = taken.groups, taken.slots
        self.keys[place] = keys[taken.entries]
        self.dialogues[place] = where.dialogues[tokens[taken.entries]].int()
        self.positions[place] = where.positions[tokens[taken.entries]].int()
        self._bounds[rows] = self.keys[rows].amax(1)
        return taken

    def tensors(self) -> dict[str, Tensor]:
        """The attributes by name, themselves and no copies; whoever writes to them calls `refresh`."""
        return {"keys": self.keys, "dialogues": self.dialogues, "positions": self.positions}

    def refresh(self) -> None:
        """Takes notice of keys that were written."""
        self._bounds = self.keys.amax(1)  # below which a key must be to enter


def _once_per_unit(chosen: Tensor, groups: Tensor, keys: Tensor, units: Tensor) -> Tensor:
    """Of the chosen entries, which have these units, the first of each unit in each group, ordered by group and there by key."""
    order = keys[chosen].argsort(stable=True)
    order = order[groups[chosen[order]].argsort(stable=True)]
    chosen = chosen[order]
    cells = groups[chosen] * (units.max() + 1) + units[order] if len(units) else units
    of_cell = cells.argsort(stable=True)
    is_first = torch.ones_like(chosen, dtype=torch.bool)
    is_first[of_cell[1:]] = cells[of_cell].diff() > 0
    return chosen[is_first]
