"""Tensors that are divided among the processes of a group along one dimension, as `torch.chunk` divides them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from fastsae.distributed.groups import Group
from fastsae.distributed.together import gather_objects, number

SlicedDim: TypeAlias = Callable[[str], "int | None"]
"""The dimension along which the tensor of a name is divided; None where each process has all of it."""


def bounds(size: int, n_parts: int, part: int) -> tuple[int, int]:
    """Where a part begins and ends: `ceil(size / n_parts)` each; the last ones are shorter, or empty."""
    length = -(-size // n_parts)
    return min(part * length, size), min((part + 1) * length, size)


def lengths(tensors: Mapping[str, Tensor], sliced_dim: SlicedDim, group: Group) -> dict[str, list[int]]:
    """How long each process's part of every divided tensor is, along the dimension in which it is divided.

    Raises:
        ValueError: The processes have tensors of other names, dtypes or other sizes; in all of them.
    """
    own = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    found = gather_objects(group, own)
    for rank, other in enumerate(found):
        if list(other) != list(own):
            raise ValueError(f"expected the same tensors in all processes, got {list(found[0])} and {list(other)}")
        for name in own:
            dim = sliced_dim(name)
            alike = [_without(kind, dim) for kind in (found[0][name], other[name])]
            if alike[0] != alike[1]:
                kinds = f"got {found[0][name]} and {other[name]} in process {number(group, rank)}"
                raise ValueError(f"{name}: expected parts of one tensor, {kinds}")
    dims = {name: dim for name in own if (dim := sliced_dim(name)) is not None}
    return {name: [other[name][1][dim] for other in found] for name, dim in dims.items()}


def _without(kind: tuple[torch.dtype, tuple[int, ...]], dim: int | None) -> tuple[torch.dtype, list[int]]:
    """A dtype and a shape, but for one dimension's size."""
    dtype, shape = kind
    return dtype, [size for i, size in enumerate(shape) if i != dim]
