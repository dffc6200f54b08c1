"""Results computed ahead in a thread: in order, never too many, errors where they belong, and no thread left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastsae.data.prefetch import Prefetch

CPU = torch.device("cpu")


def until(condition: Callable[[], bool]) -> None:
    """Waits, as a thread takes its time."""
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came true")


def is_running() -> bool:
    return any(thread.name == "fastsae prefetch" for thread in threading.enumerate())


def none_of(result: Any) -> tuple[()]:
    return ()


class Numbers(Iterator[int]):
    """Counts, and remembers what it was asked for; may fail at one number."""

    def __init__(self, end: int = 10**6, fails_at: int | None = None) -> None:
        self.made, self.end, self.fails_at = 0, end, fails_at

    def __next__(self) -> int:
        if self.made == self.end:
            raise StopIteration
        if self.made == self.fails_at:
            raise ValueError("the seventh is broken")
        self.made += 1
        return self.made - 1


@pytest.mark.parametrize("n_ahead", [1, 2, 5])
def test_results_come_in_order_and_no_more_are_made_than_may_wait(n_ahead: int) -> None:
    numbers = Numbers()
    ahead = Prefetch(numbers, n_ahead, CPU, none_of)
    for taken in range(20):
        until(lambda taken=taken: numbers.made == taken + n_ahead)  # type: ignore[misc]
        time.sleep(0.002)
        assert numbers.made == taken + n_ahead
        assert next(ahead) == taken
    ahead.close()
    assert not is_running()


def test_what_is_made_when_it_is_closed_can_be_taken_and_then_it_ends() -> None:
    numbers = Numbers()
    ahead = Prefetch(numbers, 3, CPU, none_of)
    until(lambda: numbers.made == 3)
    ahead.close()
    ahead.close()
    assert ahead.is_closed
    assert not is_running()
    assert list(ahead) == [0, 1, 2]
    assert numbers.made == 3
    assert next(numbers) == 3, "the iterator goes on behind what was taken"


def test_it_ends_with_its_iterator() -> None:
    ahead = Prefetch(Numbers(end=4), 2, CPU, none_of)
    assert list(ahead) == [0, 1, 2, 3]
    assert ahead.is_closed
    assert not is_running()
    assert list(ahead) == []


def test_an_error_comes_in_the_place_of_its_result_with_its_own_message() -> None:
    ahead = Prefetch(Numbers(fails_at=7), 3, CPU, none_of)
    assert [next(ahead) for _ in range(7)] == list(range(7))
    with pytest.raises(ValueError, match=r"^the seventh is broken$"):
        next(ahead)
    assert not is_running()


def test_a_signal_reaches_a_caller_that_waits_and_the_thread_can_still_be_ended() -> None:
    may_go_on = threading.Event()

    def results() -> Iterator[int]:
        yield 0
        os.kill(os.getpid(), signal.SIGUSR1)
        may_go_on.wait(20)
        yield 1

    def handler(*_: Any) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGUSR1, handler)
    try:
        ahead = Prefetch(results(), 1, CPU, none_of)
        with pytest.raises(KeyboardInterrupt):
            for _ in ahead:
                pass
        may_go_on.set()
        ahead.close()
    finally:
        signal.signal(signal.SIGUSR1, earlier)
    assert not is_running()


def test_the_thread_computes_with_as_many_cores_as_the_caller() -> None:
    earlier = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        (found,) = Prefetch((torch.get_num_threads() for _ in range(1)), 1, CPU, none_of)
    finally:
        torch.set_num_threads(earlier)
    assert found == 3


class FakeGPU:
    """Stands for the streams of a GPU, and writes down what is asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.local = threading.local()
        for name, value in {"Stream": self.stream, "current_stream": self.current, "stream": self.entered}.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def stream(self, device: torch.device) -> FakeStream:
        return FakeStream("own", device, self.log)

    def current(self, device: torch.device) -> FakeStream:
        return getattr(self.local, "stream", None) or FakeStream("caller's", device, self.log)

    @contextmanager
    def entered(self, stream: FakeStream) -> Iterator[None]:
        self.local.stream = stream
        yield
        self.local.stream = None


class FakeStream:
    def __init__(self, name: str, device: torch.device, log: list[tuple[Any, ...]]) -> None:
        self.name, self.device, self.log, self.n_events = name, device, log, 0

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append((self.name, "waits for", other.name))

    def record_event(self) -> str:
        self.n_events += 1
        return f"event {self.n_events}"

    def wait_event(self, event: str) -> None:
        self.log.append((self.name, "waits for", event))


class FakeTensor:
    """A tensor of a GPU, with the stream that computed it."""

    def __init__(self, computed_on: str, device: torch.device, log: list[tuple[Any, ...]]) -> None:
        self.computed_on, self.device, self.log = computed_on, device, log

    def record_stream(self, stream: FakeStream) -> None:
        self.log.append(("kept for", stream.name))


def test_on_a_gpu_the_callers_stream_waits_for_that_of_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, device = FakeGPU(monkeypatch), torch.device("cuda:0")

    def results() -> Iterator[list[Any]]:
        for _ in range(2):
            name = gpu.current(device).name
            yield [FakeTensor(name, place, gpu.log) for place in (device, torch.device("cuda:1"))]

    ahead = Prefetch(results(), 2, device, lambda tensors: tensors)
    assert [tensor.computed_on for tensors in ahead for tensor in tensors] == ["own"] * 4
    taken = [[("caller's", "waits for", f"event {i}"), ("kept for", "caller's")] for i in (1, 2)]
    assert gpu.log == [("own", "waits for", "caller's"), *taken[0], *taken[1]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_results_of_a_gpu_are_whole_when_the_caller_uses_them() -> None:
    device = torch.device("cuda:0")

    def results() -> Iterator[torch.Tensor]:
        for i in range(50):
            x = torch.full((2048, 2048), 1.0, device=device)
            for _ in range(20):
                x = (x @ x).clamp(max=1.0)  # so that the host is far ahead of the stream
            yield x * i

    ahead = Prefetch(results(), 4, device, lambda tensor: [tensor])
    sums = [x.sum() for x in ahead]
    assert torch.stack(sums).tolist() == [2048.0 * 2048.0 * i for i in range(50)]
