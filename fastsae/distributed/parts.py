"""How tensors and batches are divided among the processes of a group: which part each process has.

A tensor is divided along one dimension, as `torch.chunk` divides it. Functions that take several tensors take `dims` beside
them: the dimension along which the tensor of a name is divided. A tensor without a name in it is whole in every process.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastsae.distributed.groups import Group


def bounds(size: int, n_parts: int, part: int) -> tuple[int, int]:
    """Where a part begins and ends: `ceil(size / n_parts)` each; the last ones are shorter, or empty."""
    length = -(-size // n_parts)
    return min(part * length, size), min((part + 1) * length, size)


def own_part(whole: Tensor, dim: int | None, group: Group) -> Tensor:
    """The part of a tensor that this process has, as a view; all of it where `dim` is None."""
    if dim is None:
        return whole
    start, end = bounds(whole.shape[dim], group.size, group.rank)
    return whole.narrow(dim, start, end - start)


def first_row(batch_size: int, n_parts: int, part: int) -> int:
    """The row of a batch at which a part begins: parts are as even as can be, and the first ones have one row more."""
    even, rest = divmod(batch_size, n_parts)
    return part * even + min(part, rest)


def lengths(tensors: Mapping[str, Tensor], dims: Mapping[str, int], group: Group) -> dict[str, list[int]]:
    """How long each process's part of every divided tensor is, along the dimension in which it is divided.

    Raises:
        ValueError: The processes have tensors of other names, dtypes or other sizes; in all of them.
    """
    own = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    found = group.gather_objects(own)
    for rank, other in enumerate(found):
        if list(other) != list(own):
            raise ValueError(f"expected the same tensors in all processes, got {list(found[0])} and {list(other)}")
        for name in own:
            dim = dims.get(name)
            alike = [_without(kind, dim) for kind in (found[0][name], other[name])]
            if alike[0] != alike[1]:
                kinds = f"got {found[0][name]} and {other[name]} in process {group.global_rank(rank)}"
                raise ValueError(f"{name}: expected parts of one tensor, {kinds}")
    return {name: [other[name][1][dims[name]] for other in found] for name in own if name in dims}


def _without(kind: tuple[torch.dtype, tuple[int, ...]], dim: int | None) -> tuple[torch.dtype, list[int]]:
    """A dtype and a shape, but for one dimension's size."""
    dtype, shape = kind
    return dtype, [size for i, size in enumerate(shape) if i != dim]
