"""The mixing buffer: fill, shuffle, serve half, refill, so that a batch mixes the tokens of many dialogues."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastsae.data.progress import bar
from fastsae.errors import FastsaeError, UsageError
from fastsae.machine import to_device


@dataclass(frozen=True)
class ActivationBatch:
    """Activations of tokens, with what each one is.

    Shapes: `acts` [b, d_in]; `token_ids`, `positions` (in the dialogue, from 0) and `dialogue_ids` [b] int64.
    """

    acts: Tensor
    token_ids: Tensor
    positions: Tensor
    dialogue_ids: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, rows: slice | Tensor) -> ActivationBatch:
        return self.map(lambda tensor: tensor[to_device(rows, tensor.device) if isinstance(rows, Tensor) else rows])

    @classmethod
    def joined(cls, pieces: Sequence[ActivationBatch]) -> ActivationBatch:
        """The rows of all pieces, one after the other."""
        if len(pieces) == 1:
            return pieces[0]
        return cls(*(torch.cat([getattr(piece, field.name) for piece in pieces]) for field in fields(cls)))

    def map(self, change: Callable[[Tensor], Tensor]) -> ActivationBatch:
        """Apply `change` to each of the four tensors."""
        return ActivationBatch(*(change(getattr(self, field.name)) for field in fields(self)))

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class MixingBuffer(Iterator[ActivationBatch]):
    """Serve a source's rows shuffled, in batches of exactly `batch_size`.

    The buffer fills to `capacity` rows, shuffles them, serves half of them, keeps the rest, fills up again, and so
    on. When the source ends, all rows left are shuffled and served; fewer than `batch_size` rows remain unserved. So it
    does when it holds all rows that are still wanted: the last ones are mixed with half a buffer of others, as all are.

    Memory: `capacity` rows on `device` plus one batch and one piece. Rows are not moved when shuffled, only the order
    of their slots is; new rows go to the slots of those served.

    Args:
        source: Pieces of any length. They are consumed only as far as needed.
        capacity: Rows held, at least twice `batch_size`.
        batch_size: Rows of a batch.
        seed: Seed of the shuffles, which are drawn on the CPU and so the same on every device.
        device: Where the rows are held and served.
        progress: Show a progress bar while the buffer fills.
        n_wanted: Rows that are taken from the source at most, in all; None takes every one.

    Raises:
        UsageError: `batch_size` is not positive or `capacity` is less than twice as much.
        FastsaeError: The source ends before the first batch is full.
    """

    def __init__(
        self,
        source: Iterable[ActivationBatch],
        capacity: int,
        batch_size: int,
        seed: int,
        device: str | torch.device = "cpu",
        progress: bool = False,
        n_wanted: int | None = None,
    ) -> None:
        if batch_size < 1 or capacity < 2 * batch_size:
            raise UsageError(
                "mixing buffer: expected a batch size of at least 1 and a capacity of at least twice the batch size, "
                f"got a batch size of {batch_size} and a capacity of {capacity}"
            )
        self.capacity, self.batch_size, self.device = capacity, batch_size, torch.device(device)
        self._source, self._progress = iter(source), progress
        self._generator = torch.Generator().manual_seed(seed)
        self._storage: ActivationBatch | None = None
        self._order = torch.empty(0, dtype=torch.int64)  # slots of the rows held, in the order they will be served
        self._slots = self._order.to(self.device)  # the same on the device, where a copy per batch would be waited for
        self._to_serve = 0  # of these, how many before the next refill
        self._pending: ActivationBatch | None = None  # rows of a piece that did not fit
        self._n_wanted, self._n_taken = n_wanted, 0
        self._served_any = False

    @property
    def n_missing(self) -> int:
        """Rows that are still to be taken from the source, as far as `n_wanted` says."""
        n_pending = 0 if self._pending is None else len(self._pending)
        return max(0, (self._n_wanted or 0) - self._n_taken - n_pending)

    def prepare(self) -> None:
        """Fill up if the next batch needs it; the batch itself is then at hand."""
        if self._to_serve < self.batch_size:
            self._refill()

    def __next__(self) -> ActivationBatch:
        self.prepare()
        if self._to_serve < self.batch_size or self._storage is None:
            if not self._served_any:
                raise FastsaeError(
                    f"the data ended after {len(self._order)} tokens, before one batch of {self.batch_size} was full. "
                    "Use more dialogues or a smaller batch"
                )
            raise StopIteration
        slots = self._slots[: self.batch_size]
        self._order, self._slots = self._order[self.batch_size :], self._slots[self.batch_size :]
        self._to_serve -= self.batch_size
        self._served_any = True
        return self._storage[slots]

    def sample(self, n_rows: int) -> Tensor:
        """Return the next activations [n, d_in], at most `n_rows`, which are still to be served; fills an empty buffer.

        Raises:
            FastsaeError: The source is empty.
        """
        if self._storage is None:
            self._refill()
        if self._storage is None:
            raise FastsaeError("the data has no tokens at all. Use more dialogues")
        return self._storage.acts[self._slots[:n_rows]]

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the coming batches depend on, besides the source's own state, as new tensors.

        `rows` and `pending` hold the four tensors of an `ActivationBatch` on the CPU, or None.
        """
        rows = None
        if self._storage is not None:
            rows = self._storage[self._order.to(self.device)].map(Tensor.cpu).tensors()
        pending = None if self._pending is None else self._pending.map(lambda held: held.cpu().clone()).tensors()
        return {
            "rows": rows,
            "pending": pending,
            "to_serve": self._to_serve,
            "served_any": self._served_any,
            "taken": self._n_taken,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the batch that follows the one served before `state_dict()`, bit for bit.

        The buffer must have the capacity and batch size of the one saved, and a source that goes on where that one's
        source stopped.

        Raises:
            UsageError: More rows were saved than this buffer holds.
        """
        self._storage, self._order = None, torch.empty(0, dtype=torch.int64)
        if state["rows"] is not None:
            rows = ActivationBatch(**state["rows"])
            if len(rows) > self.capacity:
                raise UsageError(
                    f"cannot resume: the checkpoint's buffer holds {len(rows)} rows, this run's only {self.capacity}"
                )
            self._order = torch.arange(len(rows))
            self._slots = self._order.to(self.device)
            self._write(rows, self._order)
        self._pending = None if state["pending"] is None else ActivationBatch(**state["pending"])
        self._to_serve, self._served_any, self._n_taken = state["to_serve"], state["served_any"], state["taken"]
        self._generator.set_state(state["generator"])

    def _refill(self) -> None:
        """Fill up from the source, shuffle, and release half of the rows, or all of them if no others will come."""
        is_free = torch.ones(self.capacity, dtype=torch.bool)
        is_free[self._order] = False
        free = is_free.nonzero().squeeze(1)
        n_left = None if self._n_wanted is None else self._n_wanted - self._n_taken
        is_last = n_left is not None and n_left <= len(free)
        free = free[:n_left]
        with bar("filling the buffer", "tok", total=len(free), progress=self._progress, leave=False) as advance:
            n_new = self._fill(free, advance)
        held = torch.cat([self._order, free[:n_new]])
        self._order = held[torch.randperm(len(held), generator=self._generator)]
        self._slots = to_device(self._order, self.device)
        self._n_taken += n_new
        self._to_serve = self.capacity // 2 if n_new == len(free) and not is_last else len(held)

    def _fill(self, free: Tensor, advance: Callable[[int], object]) -> int:
        """Write new rows to the slots `free`; return how many there were, fewer than slots where the source has ended."""
        n_new, pending = 0, self._pending
        while n_new < len(free):
            try:
                piece = self._pending if self._pending is not None else next(self._source, None)
            except BaseException:  # interrupted: new rows lie in free slots alone, so all is as it was
                self._pending = pending
                raise
            if piece is None:
                break
            slots = free[n_new : n_new + len(piece)]
            self._write(piece[: len(slots)], slots)
            self._pending = piece[len(slots) :] if len(slots) < len(piece) else None
            n_new += len(slots)
            advance(len(slots))
        return n_new

    def _write(self, rows: ActivationBatch, slots: Tensor) -> None:
        if self._storage is None:
            self._storage = rows.map(
                lambda new: torch.empty((self.capacity, *new.shape[1:]), dtype=new.dtype, device=self.device)
            )
        places = to_device(slots, self.device)
        stored = self._storage.tensors()
        for name, new in rows.tensors().items():
            if new.dtype != stored[name].dtype:
                dtypes = f"are {stored[name].dtype}, those of this run {new.dtype}"
                raise UsageError(f"cannot resume: the {name} of the checkpoint's buffer {dtypes}")
            stored[name].index_copy_(0, places, to_device(new, self.device))
