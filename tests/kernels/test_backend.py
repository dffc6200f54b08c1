"""Which backend runs, and what the activity hint decides."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from gpu_helpers import SECOND_DEVICE, TwoDevices

from fastsae_kernels import ActivityHint, AutoencodeSpec, cpu, use_backend
from fastsae_kernels.activity import DENSE, MAX_DENSITY
from fastsae_kernels.backend import choose, sparse_backend
from fastsae_kernels.types import PassInputs

SPEC = AutoencodeSpec()
D_SAE = 10_000


def inputs(device: str = "cpu") -> PassInputs:
    x, W, vector = torch.empty(1, 1, device=device), torch.empty(1, D_SAE, device=device), torch.empty(0, device=device)
    return PassInputs(x, W, vector, vector, W.t(), vector)


def test_cpu_tensors_run_on_the_cpu_unless_told_otherwise() -> None:
    def name() -> str:
        return choose(inputs(), SPEC, ActivityHint())[0]

    assert name() == "cpu"
    with use_backend("dense"):
        assert name() == "dense"
        assert sparse_backend(torch.zeros(1)) is cpu  # entries are listed all the same
        with use_backend(None):
            assert name() == "cpu"
    assert name() == "cpu"


def test_rows_on_a_cpu_hold_what_is_sparse_and_everything_where_it_is_forced() -> None:
    assert choose(inputs(), SPEC, None) == ("cpu", (D_SAE, int(MAX_DENSITY["cpu"] * D_SAE) + 1))
    assert choose(inputs(), SPEC, DENSE) == ("dense", DENSE)
    with use_backend("cpu"):
        assert choose(inputs(), SPEC, None) == ("cpu", (D_SAE, D_SAE))


def test_a_gpu_takes_the_dense_backend_until_activity_is_known_to_be_sparse() -> None:
    pytest.importorskip("triton")
    hint, on_gpu = ActivityHint(), inputs("meta")
    assert choose(on_gpu, SPEC, hint) == ("dense", DENSE)
    assert choose(on_gpu, AutoencodeSpec(k=5), hint) == ("triton", ActivityHint.UNKNOWN)  # a rank needs all features
    with use_backend("triton"):
        assert choose(on_gpu, SPEC, hint) == ("triton", ActivityHint.UNKNOWN)
    hint.update(torch.full((8,), 20), D_SAE)
    assert choose(on_gpu, SPEC, hint) == ("triton", (32, 32))
    assert choose(on_gpu, SPEC, DENSE) == ("dense", DENSE)
    assert choose(on_gpu, SPEC, None) == ("triton", ActivityHint.UNKNOWN)


def test_gpu_tensor_never_falls_back_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_triton(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "triton":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_triton)
    with pytest.raises(RuntimeError, match="need Triton"):
        choose(inputs("meta"), SPEC, None)


def test_hint_starts_dense_and_follows_activity() -> None:
    hint = ActivityHint()
    assert hint.is_dense(10_000, "cuda")
    hint.update(torch.full((8,), 5_000), D_SAE)
    assert hint.is_dense(10_000, "cuda")
    hint.update(torch.tensor([20, 30, 40, 30]), D_SAE)
    assert not hint.is_dense(10_000, "cuda")
    edge = int(MAX_DENSITY["cuda"] * 10_000)
    for mean, expected in ((edge, False), (edge + 1, True)):
        hint.update(torch.full((8,), mean), D_SAE)
        assert hint.is_dense(10_000, "cuda") is expected


def test_capacity_of_a_row_is_a_power_of_two_with_headroom() -> None:
    hint = ActivityHint()
    assert hint.capacity(10_000) == (256, 256)  # nothing is known
    hint.update(torch.tensor([10, 60]), D_SAE)
    assert hint.capacity(10_000) == (128, 64)
    assert hint.capacity(100) == (100, 64)
    hint.update(torch.zeros(0), D_SAE)
    assert hint.capacity(10_000) == (128, 64)


def test_few_tokens_with_many_entries_raise_no_capacity() -> None:
    hint, counts = ActivityHint(), torch.full((4096,), 60)
    hint.update(counts, D_SAE)
    assert hint.capacity(D_SAE) == (128, 96)
    counts[:4] = 3_000
    hint.update(counts, D_SAE)
    assert hint.capacity(D_SAE) == (128, 96)
    counts[:5] = 3_000
    hint.update(counts, D_SAE)
    assert hint.capacity(D_SAE).row == 4096
    assert hint.capacity(100) == (100, 96)
    assert hint.capacity(64) == (64, 64)


class Counts(torch.Tensor):
    """Counts on the second of two GPUs, as far as one can tell."""

    is_cuda = True
    device = SECOND_DEVICE  # type: ignore[assignment]


class Events:
    """CUDA events that arrive at once; they remember which device was current at each call."""

    def __init__(self, devices: TwoDevices) -> None:
        self.devices = devices
        self.recorded: list[int] = []
        self.queried: list[int] = []

    def __call__(self) -> Events:
        return self

    def record(self) -> None:
        self.recorded.append(self.devices.current)

    def query(self) -> bool:
        self.queried.append(self.devices.current)
        return True


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> TwoDevices:
    devices, empty = TwoDevices(monkeypatch), torch.empty
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    return devices


def test_hint_waits_on_the_device_of_the_counts(devices: TwoDevices, monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(devices)
    monkeypatch.setattr(torch.cuda, "Event", events)
    hint = ActivityHint()
    hint.update(torch.tensor([2, 4]).as_subclass(Counts), D_SAE)
    assert (events.recorded, events.queried, hint.mean) == ([1], [], None)
    assert not hint.is_dense(10_000, "cuda")
    assert (events.queried, hint.mean, hint.largest) == ([1], 3.0, 4)
    assert devices.current == 0


def test_hint_is_left_alone_while_its_device_captures_a_cuda_graph(
    devices: TwoDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, hint, capturing = Events(devices), ActivityHint(), [1]
    monkeypatch.setattr(torch.cuda, "Event", events)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: devices.current in capturing)
    counts = torch.tensor([2, 4]).as_subclass(Counts)
    hint.update(counts, D_SAE)
    assert events.recorded == []
    capturing[:] = [0]
    hint.update(counts, D_SAE)
    assert events.recorded == [1]
    capturing[:] = [1]
    assert hint.is_dense(10_000, "cuda")
    assert events.queried == []
    capturing[:] = [0]
    assert not hint.is_dense(10_000, "cuda")
    assert (hint.mean, hint.largest) == (3.0, 4)
