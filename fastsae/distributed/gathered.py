"""One safetensors file of tensors whose parts several processes hold; no process ever holds a whole one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedWriter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from fastsae.disk import write_atomically
from fastsae.distributed.groups import Group
from fastsae.distributed.parts import lengths
from fastsae.distributed.together import together

BLOCK_BYTES = 2**25  # A tensor is sent and written in blocks of this size.


class Block(NamedTuple):
    """Rows of one tensor that the first process writes at once.

    Attributes:
        name: The name of the tensor.
        rows: Which rows these are, in the part of each process that sends some.
        senders: The numbers of these processes, in the order of their parts.
    """

    name: str
    rows: slice
    senders: Sequence[int]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dims: Mapping[str, int], group: Group) -> None:
    """Writes the whole tensors to one safetensors file, the same bytes as `safetensors.torch.save_file` would.

    Every process of the group calls it, and the first one writes. A tensor travels in blocks of rows, so that no process needs
    memory for more than a few blocks.

    Args:
        path: The file; it is there only once it is whole.
        tensors: This process's parts by name, and tensors that are whole in every process, on one device.
        dims: The dimension along which the tensor of a name is divided, 0, or 1 of two; tensors without one are whole in
            every process.
        group: The processes, in the order of their parts.

    Raises:
        OSError: The disk is full, or the place cannot be written; in the first process.
        OtherProcessError: The first process could not write; in the others.
        ValueError: The processes' tensors do not fit together; in all of them.
    """
    sizes = lengths(tensors, dims, group)
    names, header = _header(tensors, dims, sizes)
    blocks = [block for name in names for block in _blocks(name, tensors[name], dims.get(name), sizes.get(name, []))]
    parts = _Parts(tensors, dims, sizes, group)
    with together(group, f"write {path}"):
        if group.rank == 0:
            try:
                write_atomically(path, lambda temporary: _write(temporary, header, blocks, parts))
            finally:
                parts.wants_more(False)  # no process is left with a block that nobody takes
        else:
            for block in blocks:
                if not parts.wants_more():
                    return
                parts.send(block)
            parts.wants_more()


def _header(
    tensors: Mapping[str, Tensor], dims: Mapping[str, int], sizes: Mapping[str, list[int]]
) -> tuple[list[str], bytes]:
    """The tensors' names in the order of the file, and all that comes before their data."""
    from safetensors.torch import save

    # in which order tensors of several dtypes stand is safetensors' own matter, and empty ones show it
    shown = save({name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()})
    entries = json.loads(shown[8 : 8 + int.from_bytes(shown[:8], "little")])
    start = 0
    for name, entry in entries.items():
        shape, dim = list(tensors[name].shape), dims.get(name)
        if dim is not None:
            shape[dim] = sum(sizes[name])
        end = start + math.prod(shape) * tensors[name].element_size()
        entry["shape"], entry["data_offsets"] = shape, [start, end]
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return list(entries), len(text).to_bytes(8, "little") + text


def _blocks(name: str, tensor: Tensor, dim: int | None, sizes: list[int]) -> Iterator[Block]:
    """The blocks of a tensor in the order of the file."""
    if dim == 1:
        senders = [rank for rank, size in enumerate(sizes) if size]
        yield from _cut(name, len(tensor), sum(sizes) * tensor.element_size(), senders)
        return
    row = tensor.element_size() * (math.prod(tensor.shape[1:]) if tensor.dim() else 1)
    for rank, n_rows in enumerate([len(tensor) if tensor.dim() else 1] if dim is None else sizes):
        yield from _cut(name, n_rows, row, [rank])


def _cut(name: str, n_rows: int, row_bytes: int, senders: list[int]) -> Iterator[Block]:
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    if row_bytes and senders:
        for start in range(0, n_rows, step):
            yield Block(name, slice(start, min(start + step, n_rows)), senders)


class _Parts:
    """Brings blocks to the first process."""

    def __init__(
        self, tensors: Mapping[str, Tensor], dims: Mapping[str, int], sizes: Mapping[str, list[int]], group: Group
    ) -> None:
        self._tensors, self._dims, self._sizes, self._group = tensors, dims, sizes, group
        self._device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))

    def wants_more(self, wants: bool = True) -> bool:
        """Whether the first process takes another block; `wants` counts there alone."""
        if self._group.size == 1:
            return wants
        flag = torch.tensor([wants], dtype=torch.uint8, device=self._device)
        distributed.broadcast(flag, group=self._group.processes, group_src=0)
        return bool(flag.item())

    def send(self, block: Block) -> None:
        """Sends this process's rows of a block, where it has some."""
        if self._group.rank in block.senders:
            distributed.send(_bytes(self._own(block)), group=self._group.processes, group_dst=0)

    def receive(self, block: Block) -> Tensor:
        """The rows of a block, on the CPU of the first process."""
        rows = [self._own(block) if sender == 0 else self._received(block, sender) for sender in block.senders]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def _own(self, block: Block) -> Tensor:
        tensor = self._tensors[block.name]
        return (tensor.detach() if tensor.dim() else tensor.detach()[None])[block.rows].contiguous()

    def _received(self, block: Block, sender: int) -> Tensor:
        own = self._tensors[block.name]
        shape = [block.rows.stop - block.rows.start, *own.shape[1:]]
        if self._dims.get(block.name) == 1:
            shape[1] = self._sizes[block.name][sender]
        rows = torch.empty(shape, dtype=own.dtype, device=own.device)
        distributed.recv(_bytes(rows), group=self._group.processes, group_src=sender)
        return rows


def _write(path: Path, header: bytes, blocks: list[Block], parts: _Parts) -> None:
    with path.open("wb") as file:
        file.write(header)
        for block in blocks:
            parts.wants_more()
            _write_block(file, parts.receive(block))


def _write_block(file: BufferedWriter, rows: Tensor) -> None:
    if rows.numel():
        file.write(_bytes(rows.cpu()).numpy().data)


def _bytes(rows: Tensor) -> Tensor:
    """The memory of a contiguous tensor; one of a single element may have any strides, which `view` would refuse."""
    return rows.as_strided((rows.numel(),), (1,)).view(torch.uint8)
