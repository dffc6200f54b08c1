"""Which backend runs, and what the activity hint decides."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch

from fastsae_kernels import ActivityHint, use_backend
from fastsae_kernels.dispatch import MAX_DENSITY, backend_of


def test_cpu_tensors_run_on_the_cpu_unless_told_otherwise() -> None:
    x = torch.zeros(1, 1)
    assert backend_of(x) == "cpu"
    with use_backend("dense"):
        assert backend_of(x) == "dense"
        with use_backend(None):
            assert backend_of(x) == "cpu"
    assert backend_of(x) == "cpu"


def test_gpu_tensor_never_falls_back_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_triton(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "triton":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_triton)
    with pytest.raises(RuntimeError, match="need Triton"):
        backend_of(torch.zeros(1, 1, device="meta"))


def test_hint_starts_dense_and_follows_activity() -> None:
    hint = ActivityHint()
    assert hint.is_dense(10_000, "cuda")
    hint.update(torch.full((8,), 5_000))
    assert hint.is_dense(10_000, "cuda")
    hint.update(torch.tensor([20, 30, 40, 30]))
    assert not hint.is_dense(10_000, "cuda")
    edge = int(MAX_DENSITY["cuda"] * 10_000)
    for mean, expected in ((edge, False), (edge + 1, True)):
        hint.update(torch.full((8,), mean))
        assert hint.is_dense(10_000, "cuda") is expected


def test_capacity_is_a_power_of_two_with_headroom() -> None:
    hint = ActivityHint()
    assert hint.capacity(10_000) == 256  # nothing is known
    hint.update(torch.tensor([10, 60]))
    assert hint.capacity(10_000) == 128
    assert hint.capacity(100) == 100
    hint.update(torch.zeros(0))
    assert hint.capacity(10_000) == 128


def test_pending_counts_are_left_alone_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        queries = 0

        def query(self) -> bool:
            self.queries += 1
            return True

    hint, event = ActivityHint(), Event()
    hint._pending = (torch.tensor([5.0, 9.0]), event)  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert hint.is_dense(10_000, "cuda")
    assert event.queries == 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not hint.is_dense(10_000, "cuda")
    assert (hint.mean, hint.largest) == (5.0, 9)
