"""Results that a thread computes ahead of the one that takes them, in a bounded queue."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Prefetch(Iterator[T]):
    """Give the results of an iterator in order, while a thread computes those that come next.

    An exception of the thread is raised where its result would have come. On a GPU the thread computes on a stream of its
    own; the stream of the caller waits for a result before it uses it, and the host does not.

    The queues are those that Python implements in C: an exception that a signal's handler raises while the caller waits
    leaves no lock behind that the thread needs.

    Args:
        results: The iterator; only the thread uses it until `close` has returned.
        n_ahead: Results that are computed at most while nobody has taken them.
        device: Where they are computed.
        tensors: Names the tensors of a result.

    Attributes:
        is_closed: Whether nothing more is computed.
    """

    def __init__(
        self, results: Iterator[T], n_ahead: int, device: torch.device, tensors: Callable[[T], Iterable[Tensor]]
    ) -> None:
        self._results, self._tensors = results, tensors
        self.is_closed = False
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # on which the model was loaded
        self._ready: SimpleQueue[tuple[T, Any] | BaseException] = SimpleQueue()
        self._orders: SimpleQueue[bool] = SimpleQueue()  # True for each result that may be computed
        for _ in range(n_ahead):
            self._orders.put(True)
        self._thread = threading.Thread(target=self._run, name="fastsae prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                while self._orders.get() and not self.is_closed:
                    result = next(self._results)
                    self._ready.put((result, None if self._stream is None else self._stream.record_event()))
                    del result  # which the caller alone holds from here on
        except BaseException as error:  # the caller gets it, or the end of the results
            self._ready.put(error)

    def __next__(self) -> T:
        if self.is_closed and self._ready.empty():
            raise StopIteration
        found = self._ready.get()
        if isinstance(found, BaseException):
            self.close()
            raise found
        result, is_computed = found
        self._orders.put(True)
        if self._stream is not None:
            self._hand_over(result, is_computed)
        return result

    def _hand_over(self, result: T, is_computed: Any) -> None:
        """Lets the caller's stream wait for a result, and memory be kept until that stream is done with it."""
        stream = torch.cuda.current_stream(self._stream.device)
        stream.wait_event(is_computed)
        for tensor in self._tensors(result):
            if tensor.device == self._stream.device:
                tensor.record_stream(stream)

    def close(self) -> None:
        """End the thread as soon as the result it computes is there; results that nobody has taken can still be taken."""
        self.is_closed = True
        self._orders.put(False)
        self._thread.join()
