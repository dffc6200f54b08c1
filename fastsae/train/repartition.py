"""A run that goes on with another number of processes: their data are collected and divided among the new processes.

No row is lost and none comes twice: the rows that the mixing buffers held, and those that waited for a place in one, go to the
new processes in the proportion in which these serve the rows of a batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastsae.data.dropped import Dropped
from fastsae.distributed.parts import first_row

Rows: TypeAlias = dict[str, Tensor]  # the four tensors of an `ActivationBatch`
State: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class BatchPart:
    """The rows that one of several processes serves of each batch; see `first_row`.

    Args:
        batch_size: Rows of a batch.
        n_processes: How many processes serve it.
        rank: Which of them this is.
    """

    batch_size: int
    n_processes: int
    rank: int

    @property
    def rows(self) -> int:
        """How many rows of each batch."""
        return self._first_row(self.rank + 1) - self._first_row(self.rank)

    def of(self, n: int) -> tuple[int, int]:
        """Where this process's part of `n` things begins and ends, in the proportion of the rows; parts follow each other."""
        first, end = (n * self._first_row(rank) // self.batch_size for rank in (self.rank, self.rank + 1))
        return first, end

    def _first_row(self, rank: int) -> int:
        return first_row(self.batch_size, self.n_processes, rank)


def repartition(states: Sequence[State], part: BatchPart, seed: int, capacity: int) -> State:
    """What one of the new processes goes on with.

    Args:
        states: The states of a session of all processes that saved, in their order, without what is divided by features.
        part: Which of the new processes this is.
        seed: The seed of the data's order; the shuffles of a new process are drawn from it, the step and the process.
        capacity: Rows that this process's mixing buffers hold.

    Raises:
        KeyError: They are no states of a session. A value of the wrong kind may also raise another error of Python.
    """
    first = states[0]
    trainers = pooled_trainers(states, part.batch_size)
    step = next(iter(trainers.values()))["step"]
    generator_seed = [seed, step, part.n_processes, part.rank]
    place = _place(states, part)
    return {
        **first,
        "streams": {
            layer: {**_stream([state["streams"][layer] for state in states], part), "sequencer": place}
            for layer in first["streams"]
        },
        "buffers": {
            layer: _buffer([state["buffers"][layer] for state in states], part, step, capacity, generator_seed)
            for layer in first["buffers"]
        },
        "trainers": trainers,
        "failures": pooled_failures(states),
    }


def pooled_trainers(states: Sequence[State], batch_size: int) -> dict[str, State]:
    """The states of the trainers, without what is divided by features; the sums for the curves are of the whole batch."""
    found = dict[str, State]()
    for i in sorted({i for state in states for i in state["trainers"]}):
        own = [state["trainers"][i] for state in states if i in state["trainers"]]
        # where some processes train other SAEs, the others have the sums over the whole batch
        sums = _sums([trainer["sums"] for trainer in own], batch_size) if len(own) == len(states) else own[0]["sums"]
        found[i] = {**own[0], "sums": sums}
    return found


def pooled_failures(states: Sequence[State]) -> dict[str, str]:
    """What went wrong with the SAEs that any process has dropped."""
    return {i: text for state in states for i, text in state["failures"].items()}


def _place(states: Sequence[State], part: BatchPart) -> State:
    """The place in the data where all layers of a process go on, at which no dialogue comes again.

    It is where the furthest layer of the furthest process was. The first process counts the dialogues that all have dropped.
    """
    furthest = [
        max((stream["sequencer"]["at"] for stream in state["streams"].values()), key=_progress) for state in states
    ]
    drops = [Dropped.from_state(at["dropped"]) for at in furthest] if part.rank == 0 else []
    dropped = sum(drops, Dropped()).state_dict()
    place: State = max(furthest, key=_progress)
    return {"at": {**place, "dropped": dropped}, "taken": 0}


def _progress(at: State) -> tuple[int, int, int]:
    return at["epoch"], at["window"], at["batch"]


def _stream(streams: Sequence[State], part: BatchPart) -> State:
    counts = dict[str, int]()
    for name in streams[0]["counts"]:
        start, end = part.of(sum(stream["counts"][name] for stream in streams))
        counts[name] = end - start
    norms = [stream["median_norm"] for stream in streams if stream["median_norm"]]
    return {"median_norm": statistics.median(norms) if norms else 0.0, "counts": counts}


def _buffer(buffers: Sequence[State], part: BatchPart, step: int, capacity: int, seed: Sequence[int]) -> State:
    """Divides the rows that were to be served before the next refill, the other rows, and those that waited.

    A new process gets rows in the proportion of those that it serves of each batch, and in every process the same fraction of
    them is to be served before the next refill. What a process holds and what it has still to take then add up to what it
    serves until the end:

        taken = step * (its rows of a batch) + rows held
    """
    holding = [buffer for buffer in buffers if buffer["rows"] is not None]
    soon = [_cut(buffer["rows"], 0, buffer["to_serve"]) for buffer in holding]
    later = [_cut(buffer["rows"], buffer["to_serve"], _length(buffer["rows"])) for buffer in holding]
    n_soon, total = sum(map(_length, soon)), sum(_length(buffer["rows"]) for buffer in holding)
    start, end = part.of(total)
    # of the first `n` rows, `floor(n * n_soon / total)` are to be served soon: so no process gets more of these than rows
    first, last = (n * n_soon // max(total, 1) for n in (start, end))
    generator = torch.Generator().manual_seed(int(np.random.default_rng(seed).integers(2**63)))
    order = torch.randperm(last - first, generator=generator)  # rows of one old process shall not be served in a block
    own_soon = {name: tensor[order] for name, tensor in _taken(soon, first, last).items()}
    rows = _joined([own_soon, _taken(later, start - first, end - last)])
    waiting = [buffer["pending"] for buffer in buffers if buffer["pending"] is not None]
    pending = _joined(
        [_cut(rows, capacity, end - start), _taken(waiting, *part.of(sum(map(_length, waiting))))]
    )  # a part may be one row larger than a buffer
    rows = _cut(rows, 0, capacity)
    return {
        "rows": rows or None,
        "pending": pending if _length(pending) else None,
        "to_serve": min(last - first, capacity),
        "served_any": any(buffer["served_any"] for buffer in buffers),
        "taken": step * part.rows + _length(rows),
        "generator": generator.get_state(),
    }


def _sums(sums: Sequence[dict[str, Tensor]], batch_size: int) -> dict[str, Tensor]:
    """Sums of means over the tokens of each process, as sums of means over the whole batch."""
    if len(sums) == 1:
        return sums[0]
    rows = torch.tensor([BatchPart(batch_size, len(sums), rank).rows for rank in range(len(sums))], dtype=torch.float64)
    return {
        name: (torch.stack([own[name].double() for own in sums]) @ rows / batch_size).to(like.dtype)
        for name, like in sums[0].items()
    }


def _length(rows: Rows) -> int:
    return len(rows["acts"]) if rows else 0


def _cut(rows: Rows, start: int, end: int) -> Rows:
    return {name: tensor[start:end] for name, tensor in rows.items()}


def _taken(pieces: Sequence[Rows], start: int, end: int) -> Rows:
    """The rows from `start` to `end` of all pieces one after the other."""
    found = []
    for piece in pieces:
        found.append(_cut(piece, max(start, 0), max(end, 0)))
        start, end = start - _length(piece), end - _length(piece)
    return _joined(found)


def _joined(pieces: Sequence[Rows]) -> Rows:
    """The rows of all pieces in memory of their own; nothing where there are no pieces."""
    held = [piece for piece in pieces if piece]
    return {name: torch.cat([piece[name] for piece in held]) for name in held[0]} if held else {}
