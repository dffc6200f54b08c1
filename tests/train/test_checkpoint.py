"""Checkpoints survive a kill at any moment, and say so when they did not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastsae.errors import FastsaeError, UsageError
from fastsae.train import checkpoint

STATE = {
    "step": 3,
    "nested": {"weights": torch.arange(6.0).view(2, 3), "rows": None, "history": [{"loss": 1.5}]},
    "generator": torch.tensor([1, 2], dtype=torch.uint8),
}


def test_round_trip(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 3, STATE)
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded["step"] == 3
    assert loaded["nested"]["rows"] is None
    assert loaded["nested"]["history"] == [{"loss": 1.5}]
    assert torch.equal(loaded["nested"]["weights"], STATE["nested"]["weights"])  # type: ignore[index]
    assert loaded["generator"].dtype == torch.uint8


def test_newest_wins_and_older_ones_go(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        checkpoint.save(tmp_path, step, {"step": step})
    assert checkpoint.load_latest(tmp_path)["step"] == 20
    assert len(list((tmp_path / checkpoint.FOLDER).iterdir())) == 1


def test_failed_write_keeps_the_old_one_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 1, STATE)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, STATE)
    assert [p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()] == ["step-000000001"]
    assert checkpoint.load_latest(tmp_path)["step"] == 3


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STATE])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_truncated_checkpoint_is_reported(tmp_path: Path, name: str, keep: float) -> None:
    checkpoint.save(tmp_path, 1, STATE)
    path = tmp_path / checkpoint.FOLDER / "step-000000001" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(FastsaeError, match="corrupt or truncated"):
        checkpoint.load_latest(tmp_path)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found none"):
        checkpoint.load_latest(tmp_path)


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
