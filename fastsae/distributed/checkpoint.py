"""Tensors that several processes hold in parts: saved together, and loaded by any number of processes.

The storage is that of `torch.distributed.checkpoint` for safetensors, which writes where each part begins into the header of its
file, and finds the parts by the headers alone; the default storage would put a pickle beside them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastsae.distributed.groups import Group
from fastsae.distributed.parts import bounds, lengths
from fastsae.distributed.together import OtherProcessError

with warnings.catch_warnings():  # the import adds a filter for the warnings of another library
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.planner import WriteItem
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

OWN_FILE_BYTES = 2**20  # a tensor of so many has a file of its own in each process: a file is put together in memory


class _Planner(DefaultSavePlanner):
    """Turns a part into what a file holds when its turn comes: a copy of one tensor at a time, not of all."""

    def transform_object(self, write_item: WriteItem, object: Tensor) -> Tensor:
        return object.detach().cpu().contiguous()


def save_sharded(folder: Path, tensors: Mapping[str, Tensor], dims: Mapping[str, int], group: Group) -> None:
    """Writes parts of tensors to a folder; every process of the group calls it, and writes its own parts.

    Args:
        folder: Is made, and has nothing else in it.
        tensors: This process's parts by name, as `torch.chunk` divides them. Tensors that are whole in every process are written
            by the first one.
        dims: The dimension along which the tensor of a name is divided; tensors without one are whole in every process.
        group: The processes, in the order of their parts.

    Raises:
        OSError: The disk is full, or the folder cannot be written; in the process that has found it so.
        OtherProcessError: Another process could not write.
        ValueError: The processes' tensors do not fit together; in all of them.
    """
    sizes = {name: sum(found) for name, found in lengths(tensors, dims, group).items()}
    described = {
        name: _described(tensor, dims.get(name), sizes.get(name, 0), group) for name, tensor in tensors.items()
    }
    with _alone_or_together(group, "write"):
        save(
            described,
            storage_writer=HuggingFaceStorageWriter(str(folder), _files(described), save_distributed=True),
            planner=_Planner(dedup_save_to_lowest_rank=True),
            process_group=group.processes,
            no_dist=group.size == 1,
        )


def load_sharded(
    folder: Path, dims: Mapping[str, int], group: Group, wants: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """This process's parts of the tensors that `save_sharded` has written, whose processes may have been more or fewer.

    Args:
        folder: Where they are.
        dims: As for `save_sharded`.
        group: The processes that load them, in the order of their parts.
        wants: Whether the tensor of a name is loaded; the same in all processes.

    Raises:
        OSError: A file cannot be read; in the process that has found it so.
        OtherProcessError: Another process could not read.
        ValueError: A part of a tensor is missing.
    """
    reader = HuggingFaceStorageReader(str(folder))
    parts, described = dict[str, Tensor](), dict[str, Tensor]()
    for name, kind in reader.read_metadata().state_dict_metadata.items():
        if not wants(name):
            continue
        assert isinstance(kind, TensorStorageMetadata)
        if sum(math.prod(chunk.sizes) for chunk in kind.chunks) != math.prod(kind.size):
            raise ValueError(f"{name}: expected all parts of a tensor {list(kind.size)}, but some are missing")
        shape, dim = list(kind.size), dims.get(name)
        if dim is not None:
            start, end = bounds(shape[dim], group.size, group.rank)
            shape[dim] = end - start
        parts[name] = torch.empty(shape, dtype=kind.properties.dtype)
        described[name] = _described(parts[name], dim, 0 if dim is None else kind.size[dim], group)
    with _alone_or_together(group, "read"):
        load(described, storage_reader=reader, process_group=group.processes, no_dist=group.size == 1)
    return parts


def _described(part: Tensor, dim: int | None, size: int, group: Group) -> Tensor:
    """A part together with its place in the whole tensor, as PyTorch describes it.

    Raises:
        ValueError: It has not the length that `torch.chunk` gives it.
    """
    if dim is None or group.size == 1 or group.processes is None:
        return part
    start, end = bounds(size, group.size, group.rank)
    if part.shape[dim] != end - start:
        raise ValueError(f"expected {end - start} of {size} features in process {group.rank}, got {part.shape[dim]}")
    shape = list(part.shape)
    shape[dim] = size
    mesh = DeviceMesh.from_group(group.processes, part.device.type)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part.detach(), mesh, [Shard(dim)], run_check=False, shape=torch.Size(shape), stride=stride
    )


def _files(described: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file that each tensor goes to: small ones share the first."""
    files = dict[str, int]()
    for name, tensor in described.items():
        is_large = math.prod(tensor.shape) * tensor.element_size() >= OWN_FILE_BYTES
        files[name] = max(files.values(), default=1) + 1 if is_large else 1
    return files


@contextmanager
def _alone_or_together(group: Group, what: str) -> Iterator[None]:
    """Raises the error of this process where it has one, and else OtherProcessError; hides PyTorch's warning of one process."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        own = error.failures.get(group.rank)
        if own is not None:
            raise own[0] from None
        rank, (first, _) = min(error.failures.items(), key=lambda failure: failure[0])
        process = group.global_rank(rank)
        raise OtherProcessError(process, f"process {process} could not {what} its part: {first}") from None
