"""Output that never ends a run: a terminal without the letters of a text, a pipe whose reader has left, no output at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class _Unbreakable:
    """A text stream on which writing goes to nowhere once the reader of its pipe has left."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except BrokenPipeError:
            self._give_up()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._give_up()

    def _give_up(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def tolerant_output() -> Iterator[None]:
    """Within it, stdout and stderr write letters that they cannot encode as `\\xe9`, and outlive a reader that leaves."""
    before = sys.stdout, sys.stderr
    opened = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the process was started with it closed
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - closed below
            opened.append(stream)
        with suppress(AttributeError):  # a stream of another kind in its place, as in a notebook
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Unbreakable(stream))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
        for stream in opened:
            stream.close()
