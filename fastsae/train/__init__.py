"""Training: config, trainer, checkpoints, and the run that ties them to data and evaluation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastsae.train.config import TrainConfig
from fastsae.train.presets import PRESETS

if TYPE_CHECKING:
    from fastsae.train.run import train
    from fastsae.train.trainer import Trainer

__all__ = ["PRESETS", "TrainConfig", "Trainer", "train"]
_MODULES = {"Trainer": "trainer", "train": "run"}  # they import torch, which the command line's help does not need


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fastsae.train' has no attribute {name!r}")
    return getattr(import_module(f"fastsae.train.{_MODULES[name]}"), name)
