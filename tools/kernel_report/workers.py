"""Many pieces of work in processes of their own, any of which may crash: the death of a pool would take all other work along."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Generic, TypeVar

Result = TypeVar("Result")
EXIT_SECONDS = 5.0  # for a process that was told to end


class _Worker(Generic[Result]):
    """A forked process that calls a function with one number after another, which it gets through a pipe."""

    def __init__(self, function: Callable[[int], Result], number: int) -> None:
        context = get_context("fork")  # what the function needs cannot be sent, as Triton's kernels cannot
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=self._serve, args=(function, theirs), daemon=True)
        self.process.start()
        theirs.close()  # the process alone has this end now, so its death is the end of the pipe
        self.begin(number)

    @staticmethod
    def _serve(function: Callable[[int], Result], connection: Connection) -> None:
        with suppress(EOFError):  # whoever asks is gone
            while (number := connection.recv()) is not None:
                try:
                    connection.send((function(number), None))
                except Exception as error:
                    connection.send((None, error))

    def begin(self, number: int) -> None:
        self.number = number
        self.connection.send(number)

    def result(self) -> Result | None:
        """What the function returned, and what it raised is raised here; None where the process died instead."""
        try:
            result: Result
            result, error = self.connection.recv()
        except (EOFError, OSError):
            return None
        if error is not None:
            raise error
        return result

    def end(self) -> str:
        """Ends the process; returns how it ended."""
        with suppress(OSError):
            self.connection.send(None)
        self.connection.close()
        self.process.join(EXIT_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def in_processes(function: Callable[[int], Result], n: int, died: Callable[[int, str], Result]) -> Iterator[Result]:
    """`function(0)` to `function(n - 1)`, in this order, by as many processes as this one may use cores.

    Args:
        function: Runs in a forked process; what it returns (never None) or raises travels by pickle.
        n: How many pieces of work there are.
        died: The result of a piece whose process died, from its number and how the process ended, such as "SIGSEGV".

    Raises:
        Exception: Whatever `function` raised first.
    """
    waiting, results, n_given = iter(range(n)), dict[int, Result](), 0
    busy: list[_Worker[Result]] = []
    try:
        for _, number in zip(os.sched_getaffinity(0), waiting, strict=False):
            busy.append(_Worker(function, number))
        while busy:
            ready = wait([worker.connection for worker in busy])
            for worker in [worker for worker in busy if worker.connection in ready]:
                result = worker.result()
                lives = result is not None
                results[worker.number] = died(worker.number, worker.end()) if result is None else result
                following = next(waiting, None)
                if lives and following is not None:
                    worker.begin(following)
                    continue
                busy.remove(worker)
                if lives:
                    worker.end()
                elif following is not None:
                    busy.append(_Worker(function, following))
            while n_given in results:
                yield results.pop(n_given)
                n_given += 1
    finally:
        for worker in busy:
            worker.process.kill()
            worker.end()
