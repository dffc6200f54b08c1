"""Training: config, trainer, checkpoints, and the run that ties them to data and evaluation."""

from typing import TYPE_CHECKING, Any

from fastsae.train.config import PRESETS, TrainConfig

if TYPE_CHECKING:
    from fastsae.train.trainer import Trainer

__all__ = ["PRESETS", "TrainConfig", "Trainer"]


def __getattr__(name: str) -> Any:
    if name != "Trainer":
        raise AttributeError(f"module 'fastsae.train' has no attribute {name!r}")
    from fastsae.train.trainer import Trainer  # imports torch, which the command line's help does not need

    return Trainer
