"""Finds out which process of a run failed, so that one message names it and the others end quietly.

The processes leave notes in the store that `torchrun` keeps beside them, which outlives each of them:

    here/R     process R has started
    beat/R     changes twice a second while process R lives, and says where it computes
    ended/R    process R has ended, or is about to, and knows of it
    verdict    what ended the run, and which process reports it: written once, by whoever is first
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsae.errors import FastsaeError
from fastsae.interrupt import Postponed

if TYPE_CHECKING:  # not every PyTorch has it
    from torch.distributed import Store  # type: ignore[attr-defined]

BEAT = 0.5  # seconds from one sign of life to the next
SILENCE = 5.0  # seconds without one after which a process counts as gone
_LOOK = 0.1  # seconds between two looks into the store
_WAITING, _INTERRUPTED = "waiting", "interrupted"
_ON = "run again, with --resume if training had begun; torchrun --max-restarts N does so by itself"
# where a process is while it waits for others: these frames of its main thread are skipped in favour of this word
_EXCHANGES = (str(Path("fastsae", "distributed", "groups.py")), str(Path("torch", "distributed")))


class Witness:
    """Tells the other processes of a run that this one lives or why it ends, and finds out the same about them.

    Args:
        open_store: Connects to the store. It is called twice: the signs of life have a connection of their own, because a
            connection serves one thread at a time.
        rank: The number of this process.
        size: The number of processes.
        timeout: Seconds that a process waits for others.
    """

    def __init__(self, open_store: Callable[[], Store], rank: int, size: int, timeout: float) -> None:
        self.rank, self.timeout = rank, timeout
        self._others = [other for other in range(size) if other != rank]
        self._store, self._beats = open_store(), open_store()
        self._over = threading.Event()
        self._main = threading.get_ident()

    def meet(self) -> None:
        """Waits until all processes have started.

        Raises:
            FastsaeError: Some have not within the time-out, or before a signal came.
        """
        self._store.set(f"here/{self.rank}", "1")
        began = time.monotonic()
        missing = self._others
        while missing := [other for other in missing if not self._store.check([f"here/{other}"])]:
            if time.monotonic() - began > self.timeout:
                raise FastsaeError(
                    f"{named(missing)} did not start within {self.timeout:g} seconds (--process-timeout); start as many "
                    "processes as WORLD_SIZE says"
                )
            try:
                time.sleep(_LOOK)  # a signal ends it, which it would not do within an exchange
            except KeyboardInterrupt:
                raise FastsaeError(f"ended by a signal before {named(missing)} had started") from None
        threading.Thread(target=self._live, daemon=True).start()

    def close(self) -> None:
        """Ends the signs of life, and says that this process ends by itself."""
        self._over.set()
        with suppress(RuntimeError):  # the store may have ended before
            self._end()

    def judged(self, error: BaseException) -> BaseException:
        """The error that this process ends with: `error` itself, or one that says what happened in another process and caused it.

        Its attribute `reported_by` is the number of the process that prints the message.
        """
        try:
            self._store.set_timeout(timedelta(seconds=SILENCE))
            with Postponed():  # torchrun ends the others as soon as the first has ended
                broken = next((link for link in _chain(error) if is_of_an_exchange(link)), None)
                if broken is not None:
                    return self._after_a_broken_exchange(broken)
                if isinstance(error, KeyboardInterrupt):
                    return self._interrupted(error)
                return self._own(error)
        except (RuntimeError, ValueError):  # the store is gone as well
            gone = FastsaeError(
                "the process that keeps the store of the run no longer answers: torchrun of the first machine, or process 0 "
                "where the run was started without it"
            )
            gone.reported_by = min(self.rank, 1)
            return gone if is_of_an_exchange(error) else error

    def _own(self, error: BaseException) -> BaseException:
        """Tells the others of an error of this process; of several processes with the same error, one reports it."""
        if getattr(error, "reported_by", None) is not None:
            return error  # it names the process that failed
        text = str(error) or type(error).__name__
        verdict = self._settle(f"process {self.rank} failed: {text}", text)
        is_known = text in verdict["text"] or verdict["of"] in text
        error.reported_by = verdict["reported_by"] if is_known else self.rank  # type: ignore[attr-defined]
        return error

    def _interrupted(self, error: KeyboardInterrupt) -> BaseException:
        """Tells the others of a signal, which the first process reports, unless another process has died.

        When a process has died, `torchrun` ends the others by a signal.
        """
        before = self._signs()
        self._end()
        if gone := self._silent(before):
            return self._of_another(self._settle(_of_gone(gone)))
        verdict = self._settle(f"process {self.rank} was interrupted; {_ON}", _INTERRUPTED, reported_by=0)
        if verdict["of"] != _INTERRUPTED:
            return self._of_another(verdict)
        error.reported_by = 0  # type: ignore[attr-defined]
        return error

    def _after_a_broken_exchange(self, error: BaseException) -> BaseException:
        before = self._signs()
        late = [o for o in self._others if not self._has_ended(o) and not before[o].endswith(_WAITING)]
        self._end()
        gone = self._silent(before)
        end = time.monotonic() + (0 if gone or _is_late(error) else SILENCE)
        while time.monotonic() < end and self._verdict() is None:  # another process may know more
            time.sleep(_LOOK)
        if (verdict := self._verdict()) is not None:
            return self._of_another(verdict)
        text = self._explanation(error, gone, {other: before[other].partition(" ")[2] for other in late})
        return self._of_another(self._settle(text))

    def _silent(self, before: dict[int, str]) -> list[int]:
        """The processes that have given no sign of life since `before`, after some seconds; none where there is a verdict."""
        end, silent = time.monotonic() + SILENCE, list(self._others)
        while silent and time.monotonic() < end and self._verdict() is None:
            time.sleep(_LOOK)
            signs = self._signs()
            silent = [other for other in silent if signs[other] == before[other] and not self._has_ended(other)]
        return silent if self._verdict() is None else []

    def _explanation(self, error: BaseException, gone: Sequence[int], late: dict[int, str]) -> str:
        """The message: which processes gave no sign of life, or for which ones the others waited, and what they were doing."""
        if gone:
            return _of_gone(gone)
        reason = " ".join(str(error).split()).partition(". This is typically")[0]
        if not _is_late(error):
            return f"the connection between the processes failed, though all of them live ({reason[-200:]}); {_ON}"
        if not late:
            return f"all processes waited for each other for {self.timeout:g} seconds (--process-timeout); {_ON}"
        where = "; ".join(f"process {other} was at {place}" for other, place in list(late.items())[:4])
        return (
            f"{named(list(late))} did not come to an exchange within {self.timeout:g} seconds, and the others waited ({where}); "
            f"raise --process-timeout if it is only slow, and {_ON}"
        )

    def _of_another(self, verdict: dict[str, Any]) -> FastsaeError:
        error = FastsaeError(verdict["text"])
        error.reported_by = verdict["reported_by"]
        return error

    def _settle(self, text: str, of: str | None = None, reported_by: int | None = None) -> dict[str, Any]:
        """Writes the verdict, unless there is one; returns the one that holds."""
        own = json.dumps(
            {"reported_by": self.rank if reported_by is None else reported_by, "text": text, "of": of or text}
        )
        verdict: dict[str, Any] = json.loads(self._store.compare_set("verdict", "", own))
        return verdict

    def _verdict(self) -> dict[str, Any] | None:
        return json.loads(self._store.get("verdict")) if self._store.check(["verdict"]) else None

    def _end(self) -> None:
        self._store.set(f"ended/{self.rank}", "1")

    def _has_ended(self, other: int) -> bool:
        return self._store.check([f"ended/{other}"])

    def _signs(self) -> dict[int, str]:
        """The newest sign of life of each other process."""
        keys = {other: f"beat/{other}" for other in self._others}
        return {o: self._store.get(key).decode() if self._store.check([key]) else "" for o, key in keys.items()}

    def _live(self) -> None:
        with suppress(RuntimeError):  # the store is gone, and with it the run
            for number in count():
                self._beats.set(f"beat/{self.rank}", f"{number} {self._place()}")
                if self._over.wait(BEAT):
                    return

    def _place(self) -> str:
        """The line of this package at which the main thread is, or the word for waiting for other processes."""
        frame = sys._current_frames().get(self._main)
        place = "code of other packages"
        while frame is not None:
            name = frame.f_code.co_filename
            if any(part in name for part in _EXCHANGES):
                return _WAITING
            if place.startswith("code") and "fastsae" in name:
                place = f"{Path(name).name}, line {frame.f_lineno}"
            frame = frame.f_back
        return place


def is_of_an_exchange(error: BaseException) -> bool:
    """Whether the connection to other processes or to the store failed, and not the code of this process."""
    from torch.distributed import DistError

    return isinstance(error, RuntimeError) and (isinstance(error, DistError) or "gloo/transport" in str(error))


def _is_late(error: BaseException) -> bool:
    return any(word in str(error).lower() for word in ("timed out", "timeout"))


def named(ranks: Sequence[int]) -> str:
    """`process 3`, `processes 1 and 3`."""
    *most, last = map(str, ranks)
    return f"processes {', '.join(most)} and {last}" if most else f"process {last}"


def _of_gone(ranks: Sequence[int]) -> str:
    answer = "answer" if len(ranks) > 1 else "answers"
    return f"{named(ranks)} no longer {answer}: killed, or cut off from the others; {_ON}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it came from, or came during."""
    link: BaseException | None = error
    for _ in range(100):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__
