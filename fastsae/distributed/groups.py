"""A group of processes: the few collectives that training needs, and a count of the bytes that they move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Traffic(Counter[str]):
    """Bytes that this process has sent, by the name of what they were, as ring collectives among `P` processes send them.

    gather  (P - 1) times what each process holds
    sum     2 (P - 1) / P times the tensor
    """


class Pending:
    """A sum that is under way, and the tensor that will hold it."""

    def __init__(self, tensor: Tensor, work: Any = None, then: Any = None) -> None:
        self._tensor, self._work, self._then = tensor, work, then

    def wait(self) -> Tensor:
        """The sum. On a GPU the stream waits for it, and the host goes on."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._then is not None:
            self._tensor, self._then = self._then(), None
        return self._tensor


class Group:
    """Processes that exchange tensors; a group of one exchanges nothing.

    Every method is called by all of them, with tensors of one dtype, in the same order.

    Args:
        processes: The group; None for this process alone.

    Attributes:
        rank, size: The number of this process in the group, and how many it has.
        traffic: The bytes that this process has sent.
    """

    def __init__(self, processes: ProcessGroup | None = None) -> None:
        self.processes = processes
        self.rank = 0 if processes is None else distributed.get_rank(processes)
        self.size = 1 if processes is None else distributed.get_world_size(processes)
        self.traffic = Traffic()

    def __deepcopy__(self, _: dict[int, Any]) -> Group:
        return self  # a copy of an SAE works with the same processes

    def sum_(self, tensor: Tensor, name: str) -> Tensor:
        """Replaces a contiguous tensor by its sum over the processes, which has the same bits in all of them."""
        return self.start_sum_(tensor, name).wait()

    def start_sum_(self, tensor: Tensor, name: str) -> Pending:
        """Starts what `sum_` does, and returns before the sum is there."""
        if self.size == 1 or tensor.numel() == 0:
            return Pending(tensor)
        self._count(name, 2 * tensor.nbytes * (self.size - 1) / self.size)
        return Pending(tensor, distributed.all_reduce(tensor, group=self.processes, async_op=True))

    def smallest_(self, tensor: Tensor, name: str) -> Tensor:
        """Replaces each element of a contiguous tensor by the smallest that any process has there."""
        if self.size > 1 and tensor.numel():
            self._count(name, 2 * tensor.nbytes * (self.size - 1) / self.size)
            distributed.all_reduce(tensor, distributed.ReduceOp.MIN, group=self.processes)
        return tensor

    def gather(self, tensor: Tensor, name: str) -> Tensor:
        """`[size, ...]`: the tensor of each process, which all have the same shape."""
        if self.size == 1:
            return tensor[None]
        self._count(name, tensor.nbytes * (self.size - 1))
        out = tensor.new_empty(self.size * tensor.numel())
        # PyTorch 2.13 has renamed it
        gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
        gather(out, tensor.contiguous().view(-1), group=self.processes)
        return out.view(self.size, *tensor.shape)

    def gather_rows(self, rows: Tensor, counts: Sequence[int] | None, name: str) -> Tensor:
        """The rows of all processes one after the other; process `r` has `counts[r]` of them, which may be none.

        Where no counts are given, the processes first tell each other how many rows they have.
        """
        if self.size == 1:
            return rows
        if counts is None:
            counts = self.gather(torch.tensor([len(rows)], device=rows.device), "counts").flatten().tolist()
        most = max(counts)
        padded = rows if len(rows) == most else torch.cat([rows, rows.new_empty(most - len(rows), *rows.shape[1:])])
        gathered = self.gather(padded, name)
        if min(counts) == most:
            return gathered.flatten(0, 1)
        return torch.cat([part[:n] for part, n in zip(gathered, counts, strict=True)])

    def broadcast_(self, tensor: Tensor, name: str) -> Tensor:
        """Replaces a contiguous tensor by that of process 0."""
        if self.size > 1 and tensor.numel():
            if self.rank == 0:
                self._count(name, tensor.nbytes)
            distributed.broadcast(tensor, group=self.processes, group_src=0)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """The value of each process: small Python objects, which `traffic` does not count."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.processes)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """The value of process 0: a small Python object, which `traffic` does not count."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, group=self.processes, group_src=0)
        return values[0]

    def global_rank(self, rank: int) -> int:
        """The number in the whole run of the process that is `rank` in this group."""
        return rank if self.processes is None else distributed.get_global_rank(self.processes, rank)

    def _count(self, name: str, n_bytes: float) -> None:
        self.traffic[name] += round(n_bytes)
