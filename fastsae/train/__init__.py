"""Training: config, trainer, checkpoints, and the run that ties them to data and evaluation."""

from fastsae.train.config import PRESETS, TrainConfig
from fastsae.train.trainer import Trainer

__all__ = ["PRESETS", "TrainConfig", "Trainer"]
