"""Work that the processes of a group do together: where one of them fails, all end, with a message that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastsae.distributed.faults import is_of_an_exchange
from fastsae.distributed.groups import Group
from fastsae.errors import FastsaeError


class OtherProcessError(FastsaeError):
    """Another process failed; its own error is raised there.

    Args:
        process: The number of that process among all, which tells the user.
        text: The message, for whoever catches this one.
    """

    def __init__(self, process: int, text: str) -> None:
        super().__init__(text)
        self.reported_by = self.process = process


@contextmanager
def together(group: Group, what: str) -> Iterator[None]:
    """Lets every process of a group work in its `with` block, and raises in all of them where any of them has raised.

    The block may contain collectives only if these raise in all processes where they raise in one.

    Args:
        group: The processes, all of which enter the block.
        what: What a process could not do, in the words of the message: "write the checkpoint".

    Raises:
        OtherProcessError: Another process has raised. An error of this process is raised as it is.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if is_of_an_exchange(caught):  # the processes cannot tell each other anything more
            raise
        error = caught
    failures = [(*found, rank) for rank, found in enumerate(group.gather_objects(_told(error))) if found is not None]
    if error is not None:
        raise error
    if failures:
        is_of_another, text, reported_by, rank = min(failures)  # the error of a process itself comes first
        process = group.global_rank(rank)
        if is_of_another:
            raise OtherProcessError(reported_by, text)
        raise OtherProcessError(process, f"process {process} could not {what}: {text}")


def _told(error: Exception | None) -> tuple[bool, str, int] | None:
    """What a process tells the others: whether the error is of another one, its text, and who tells the user."""
    if error is None:
        return None
    if isinstance(error, OtherProcessError):
        return True, str(error), error.process
    return False, str(error) or type(error).__name__, -1
