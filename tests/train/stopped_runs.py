"""Tiny runs that end in the middle, for the tests of what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastsae.train import joint_checkpoint
from fastsae.train.config import TrainConfig
from fastsae.train.run import train
from fastsae.train.trainer import Trainer


def make_config(model: Path, chats: Path, **options: Any) -> TrainConfig:
    return TrainConfig(
        model=str(model), dataset=str(chats), eval_dialogues=8, d_sae=32, tokens=64 * 12, batch_size=64,
        buffer_tokens=256, forward_tokens=256, init_l0=8, target_l0=4, log_every=4, **options,
    )  # fmt: skip


def without_times(found: dict[str, Any]) -> dict[str, Any]:
    """Metrics, or a row of the curves, without what differs between two runs of the same bits."""
    return {name: value for name, value in found.items() if "second" not in name}


def load_latest(run: Path) -> dict[str, Any] | None:
    """The state in the newest checkpoint of a run, as one process goes on with it; None where there is none yet."""
    saved = joint_checkpoint.find(run)
    return None if saved is None else saved.state({}, TrainConfig(), 0)


class Stop(Exception):  # noqa: N818 - what ends the run does not matter
    """Ends a run as an error would."""


def stopped_run(config: TrainConfig, output: Path, at: int) -> Path:
    """A run that ended at a step, with its last checkpoint."""
    step = Trainer.train_step

    def train_step(self: Trainer, batch: Any) -> Any:
        if self.step == at:
            raise Stop
        return step(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        with pytest.raises(Stop):
            train(config, output, progress=False)
    return output


def outcome(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """Weights and metrics of a run, without the times."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return (folder / "sae_weights.safetensors").read_bytes(), without_times(metrics)
