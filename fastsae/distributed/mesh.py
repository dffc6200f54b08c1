"""The groups that a process belongs to, from a mesh of processes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

from torch import distributed

from fastsae.distributed.groups import Group
from fastsae.distributed.parts import first_row
from fastsae.errors import UsageError

DATA, FEATURE = "data", "feature"  # the dimensions of a mesh


class Groups(NamedTuple):
    """The groups that a process belongs to; without other processes, each of them is this process alone.

    Attributes:
        features: Processes that hold different features of one SAE, and see the same tokens.
        data: Processes that hold the same features, and see different tokens.
        world: All processes. Process `i` of `data` and `j` of `features` is process `i * features.size + j` of `world`.
    """

    features: Group
    data: Group
    world: Group

    @classmethod
    def alone(cls) -> Groups:
        """The groups of a process without others."""
        return cls(Group(), Group(), Group())

    def rows_of_batch(self, batch_size: int) -> list[int]:
        """How many rows of a batch each process of `world` serves."""
        firsts = [first_row(batch_size, self.world.size, rank) for rank in range(self.world.size + 1)]
        return [end - start for start, end in pairwise(firsts)]

    def rows_of_group(self, batch_size: int) -> list[int]:
        """How many rows of a batch each process of `features` serves."""
        first = self.data.rank * self.features.size
        return self.rows_of_batch(batch_size)[first : first + self.features.size]


def groups_of(mesh: Any) -> Groups:
    """The groups of a mesh.

    Args:
        mesh: `Groups`; a DeviceMesh of PyTorch with the dimensions `data` and `feature`, or with one of them; or a process
            group, whose processes share the features.

    Raises:
        UsageError: It is none of these, or has other dimensions.
    """
    if isinstance(mesh, Groups):
        return mesh
    if distributed.is_available() and isinstance(mesh, distributed.ProcessGroup):
        features = Group(mesh)
        return Groups(features, Group(), features)
    names = getattr(mesh, "mesh_dim_names", None)
    if not names or not {DATA, FEATURE} >= set(names):
        raise UsageError(
            f"mesh: expected a ProcessGroup, or a DeviceMesh with the dimensions '{DATA}' and '{FEATURE}' or one of them, got "
            f"{type(mesh).__name__} with {names or 'no names of dimensions'}"
        )
    features, data = (Group(mesh.get_group(name)) if name in names else Group() for name in (FEATURE, DATA))
    if len(names) == 1:
        return Groups(features, data, features if features.size > 1 else data)
    if mesh.size() != distributed.get_world_size():
        raise UsageError(
            f"mesh: expected one of all {distributed.get_world_size()} processes where it has two dimensions, got {mesh.size()}"
        )
    return Groups(features, data, Group(distributed.group.WORLD))
