"""Work that the processes of a group do together: where one of them fails, all end, with a message that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

from fastsae.distributed.groups import Group
from fastsae.errors import FastsaeError


class OtherProcessError(FastsaeError):
    """Another process failed; its own error is raised there."""


@contextmanager
def together(group: Group, what: str) -> Iterator[None]:
    """Lets this process do its part, and raises in all of them where that of any has raised.

    The part may call collectives only if these raise in all processes where they raise in one.

    Args:
        group: The processes, all of which do their part.
        what: What a process could not do, as the message says it: "write the checkpoint".

    Raises:
        OtherProcessError: The part of another process has failed. The error of this process's own part stays as it is.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    # an error that only tells of another process's is the last to be told of
    told = None if error is None else (isinstance(error, OtherProcessError), str(error) or type(error).__name__)
    failures = [
        (found[0], rank, found[1]) for rank, found in enumerate(gather_objects(group, told)) if found is not None
    ]
    if error is not None:
        raise error
    if failures:
        is_told, rank, text = min(failures)
        raise OtherProcessError(text if is_told else f"process {number(group, rank)} could not {what}: {text}")


def number(group: Group, rank: int) -> int:
    """The number among all processes of the one that is `rank` in the group."""
    return rank if group.processes is None else distributed.get_global_rank(group.processes, rank)


def gather_objects(group: Group, value: Any) -> list[Any]:
    """What each process of the group has; small Python objects only."""
    if group.size == 1:
        return [value]
    values: list[Any] = [None] * group.size
    distributed.all_gather_object(values, value, group=group.processes)
    return values


def of_first(group: Group, value: Any) -> Any:
    """What the first process of the group has; a small Python object."""
    if group.size == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, group=group.processes, group_src=0)
    return values[0]
