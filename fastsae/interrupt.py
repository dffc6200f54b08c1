"""Ctrl-C and SIGTERM: at once while nothing would be lost, else as soon as what was computed is saved."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 1.0  # seconds for the program to end by itself; a long computation in PyTorch cannot be interrupted


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; the message says what is kept and how to go on.

    Args:
        message: What the user should know.
        number: The signal.
    """

    def __init__(self, message: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


def exit_status(interruption: KeyboardInterrupt) -> int:
    """What a shell reports for a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + int(getattr(interruption, "number", signal.SIGINT))


class Postponed:
    """While it is entered, the first Ctrl-C or SIGTERM waits for `check`; a second one acts as it did before.

    Nothing is postponed in another thread than the main one, where Python allows no handlers, and for a signal that the
    process ignores.

    Args:
        agree: Where several processes compute together, gives the highest number that any of them has called it with. All of
            them then call `check` at the same places, and a signal that reached one of them ends all of them at the next.
    """

    active: ClassVar[Postponed | None] = None

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self.number: int | None = None
        self._agree = agree
        self._raises = False
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> Postponed:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._earlier[number] = signal.signal(number, self._take)
        Postponed.active = self
        return self

    def __exit__(self, *_: object) -> None:
        Postponed.active = None
        self._restore()

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self._agree is not None:
            self.number = self._agree(self.number or 0) or None
        if self.number is not None:
            raise Interrupted(number=self.number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, where an exception harms nothing, a signal need not wait, unless other processes have to agree."""
        if self._agree is not None:
            yield
            return
        self.check()
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _take(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self._restore()
        if self._raises:
            self.check()

    def _restore(self) -> None:
        while self._earlier:
            signal.signal(*self._earlier.popitem())


@contextmanager
def signals_end_the_command() -> Iterator[None]:
    """For a whole command: SIGTERM is an exception as Ctrl-C is, and neither waits for a long computation.

    PyTorch may compute for many seconds in one call, in which Python runs no handler. A thread, which sees the signal
    at once, then ends the process; temporary files are swept at the next start.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.getsignal(signal.SIGTERM)
    if earlier is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _raise)
    seen, sent = socket.socketpair()
    sent.setblocking(False)
    earlier_descriptor = signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(seen,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier_descriptor)
        if earlier is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, earlier)
        sent.close()


def _raise(number: int, _: FrameType | None) -> None:
    raise Interrupted(number=number)


def _watch(seen: socket.socket) -> None:
    n_signals = 0
    with seen:
        while byte := seen.recv(1):  # nothing comes once the command is over
            if byte[0] not in SIGNALS or signal.getsignal(byte[0]) is signal.SIG_IGN:
                continue
            n_signals += 1
            if n_signals == 1 and Postponed.active is not None:
                continue
            seen.settimeout(PATIENCE)
            try:
                while seen.recv(1):
                    pass
                return
            except TimeoutError:
                if n_signals == 1 and Postponed.active is not None:  # it has begun to end
                    seen.settimeout(None)
                    continue
                message = (
                    "\nfastsae: interrupted in the middle of a computation; --resume goes on if training had begun\n"
                )
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())
                os._exit(128 + byte[0])
