"""The training curves as the run goes: `metrics.jsonl` beside the SAE, and the loggers that one asks for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fastsae.disk import write_atomically
from fastsae.errors import FastsaeError
from fastsae.train.config import TrainConfig

CURVES_FILE = "metrics.jsonl"
Row = dict[str, float | None]


class Logger(Protocol):
    """Takes each new point of the curves."""

    def log(self, row: Row) -> None:
        """A point: `step`, `tokens`, `loss`, `l0`, `fvu`, `lr`, `dead_share`, the speeds and the parts of the loss."""

    def close(self) -> None:
        """Writes what it holds."""


class Curves:
    """Writes the curves of the SAEs of a run.

    Args:
        folders: The folder of each SAE, by its name.
        configs: Their options.
        history: The points that a resumed run has made before; files and loggers begin with them.
    """

    def __init__(
        self, folders: Mapping[str, Path], configs: Mapping[str, TrainConfig], history: Mapping[str, Sequence[Row]]
    ) -> None:
        self._files = {name: folder / CURVES_FILE for name, folder in folders.items()}
        for name, path in self._files.items():
            text = "".join(_line(row) for row in history.get(name, ()))
            write_atomically(path, partial(Path.write_text, data=text, encoding="utf-8"))
        self._loggers: dict[str, Logger] = {}
        for name, config in configs.items():
            if config.log is not None:
                self._loggers[name] = _LOGGERS[config.log](folders[name], config)
                for row in history.get(name, ()):
                    self._loggers[name].log(row)

    def add(self, rows: Mapping[str, Row]) -> None:
        """Writes new points of some of the SAEs."""
        for name, row in rows.items():
            with self._files[name].open("a", encoding="utf-8") as file:
                file.write(_line(row))
            if name in self._loggers:
                self._loggers[name].log(row)

    def close(self) -> None:
        """Closes the loggers."""
        for logger in self._loggers.values():
            logger.close()


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def check_loggers(configs: Iterable[TrainConfig]) -> None:
    """Raises FastsaeError where the package of a logger is not installed."""
    for package in {config.log for config in configs} - {None}:
        if find_spec(str(package)) is None:
            raise FastsaeError(
                f"--log {package}: expected the package {package}, which is not installed: pip install {package}"
            )


class _Wandb:
    """A run of Weights & Biases, in the project `fastsae` unless its own environment variables say otherwise."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        import wandb

        self._run: Any = wandb.init(project="fastsae", name=folder.name, dir=str(folder), config=asdict(config))

    def log(self, row: Row) -> None:
        self._run.log({name: value for name, value in row.items() if value is not None}, step=int(row["step"] or 0))

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    """Event files in the SAE's folder."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, row: Row) -> None:
        for name, value in row.items():
            if value is not None and name != "step":
                self._writer.add_scalar(name, value, int(row["step"] or 0))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


_LOGGERS: dict[str, type[_Wandb | _TensorBoard]] = {"wandb": _Wandb, "tensorboard": _TensorBoard}
