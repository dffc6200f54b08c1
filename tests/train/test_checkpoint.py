"""Checkpoints survive a kill at any moment, and say so when they did not."""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import load_latest

from fastsae.errors import FastsaeError
from fastsae.train import checkpoint

STATE = {
    "step": 3,
    "nested": {"weights": torch.arange(6.0).view(2, 3), "rows": None, "history": [{"loss": 1.5}]},
    "generator": torch.tensor([1, 2], dtype=torch.uint8),
}


def latest(run: Path) -> dict[str, Any]:
    loaded = load_latest(run)
    assert loaded is not None
    return loaded


def test_round_trip(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 3, STATE)
    loaded = latest(tmp_path)
    assert loaded["step"] == 3
    assert loaded["nested"]["rows"] is None
    assert loaded["nested"]["history"] == [{"loss": 1.5}]
    assert torch.equal(loaded["nested"]["weights"], STATE["nested"]["weights"])  # type: ignore[index]
    assert loaded["generator"].dtype == torch.uint8


def test_newest_wins_and_older_ones_go(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        checkpoint.save(tmp_path, step, {"step": step})
    assert latest(tmp_path)["step"] == 20
    assert len(list((tmp_path / checkpoint.FOLDER).iterdir())) == 1


def test_failed_write_keeps_the_old_one_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 1, STATE)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("write_json", "write_tensors"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, full_disk)
            with pytest.raises(OSError, match="No space"):
                checkpoint.save(tmp_path, 2, STATE)
    assert [p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()] == ["step-000000001"]
    assert latest(tmp_path)["step"] == 3


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STATE])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_truncated_checkpoint_is_reported(tmp_path: Path, name: str, keep: float) -> None:
    checkpoint.save(tmp_path, 1, STATE)
    path = tmp_path / checkpoint.FOLDER / "step-000000001" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(FastsaeError, match="corrupt or truncated"):
        load_latest(tmp_path)


def test_flipped_byte_is_reported(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, STATE)
    path = tmp_path / checkpoint.FOLDER / "step-000000001" / checkpoint.TENSORS
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(FastsaeError, match="corrupt"):
        load_latest(tmp_path)


@pytest.mark.parametrize("content", ["[]", "3"])
def test_state_that_is_no_object_is_reported(tmp_path: Path, content: str) -> None:
    checkpoint.save(tmp_path, 1, STATE)
    (tmp_path / checkpoint.FOLDER / "step-000000001" / checkpoint.STATE).write_text(content)
    with pytest.raises(FastsaeError, match="corrupt"):
        load_latest(tmp_path)


def test_a_real_full_disk_is_an_os_error(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: safetensors itself would raise another class."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save(tmp_path, 1, {"weights": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / checkpoint.FOLDER).iterdir()) == []


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None


def test_optimizer_moments_keep_their_memory_layout() -> None:
    weight = torch.nn.Parameter(torch.randn(5, 3).t())
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.randn(5, 3).t()
    optimizer.step()
    tensors, rest = checkpoint.flatten(checkpoint.optimizer_state(optimizer))
    fresh = torch.optim.Adam([weight])
    checkpoint.load_optimizer_state(fresh, checkpoint.unflatten(tensors, rest))
    moment = fresh.state[weight]["exp_avg"]
    assert moment.stride() == weight.stride()
    assert torch.equal(moment, optimizer.state[weight]["exp_avg"])
