"""The folder of a run: what a new one may be, what a killed run leaves in it, and what it says of itself."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fastsae.disk import is_temporary, local_path, write_json
from fastsae.errors import FastsaeError, UsageError
from fastsae.evaluate.dialogues import DIALOGUES_FILE
from fastsae.fields import Fields, read_json
from fastsae.sae import files
from fastsae.train import checkpoint
from fastsae.train.config import OF_THE_SOURCE, TrainConfig, field_names
from fastsae.train.curves import CURVES_FILE
from fastsae.version import __version__

CONFIG_FILE, METRICS_FILE, REPORT_FILE = "config.json", "metrics.json", "report.html"
_SINCE_EVER = ("model", "dataset", "architecture", "batch_size", "tokens")  # options that every run has written
SAES_FILE = "saes.json"  # names of the SAEs of a run that trains several
# options that a resumed run may be given anew: places, and what changes no result
PROCESSES = (
    "shard_features",
    "overlap_chunks",
    "process_timeout",
)  # another number of them changes the last digits of sums
MAY_MOVE = ("model", "dataset", "text", "activations", "device", "prefetch", *PROCESSES)
FILES = (
    CONFIG_FILE,
    METRICS_FILE,
    REPORT_FILE,
    SAES_FILE,
    CURVES_FILE,
    files.CONFIG_FILE,
    files.WEIGHTS_FILE,
    files.SPARSITY_FILE,
    DIALOGUES_FILE,
)


def prepare(output: Path, *, resume: bool) -> None:
    """Sweeps what a killed run left unfinished in `output`.

    Raises:
        UsageError: `output` cannot be the folder of the run: it holds something else, it cannot be written, or, with
            `resume`, its run is complete.
    """
    check_writable("--output", output)
    if resume and (output / METRICS_FILE).exists():
        checkpoint.discard(output)  # a kill may have come before
        raise UsageError(f"--resume: the run in {output} is complete, its metrics are in {METRICS_FILE}; nothing to do")
    if not output.exists():
        return
    leftovers = [path for path in output.iterdir() if is_temporary(path.name, FILES)]
    if not resume and not is_new(output):
        raise UsageError(
            f"--output: expected a new or empty folder, but {output} exists; "
            "choose another with --output, or go on with an interrupted run with --resume"
        )
    for path in leftovers:
        path.unlink(missing_ok=True)
    checkpoint.sweep(output)


def is_new(output: Path) -> bool:
    """Whether a folder holds nothing, or nothing but what a run leaves that was killed before its first file."""
    if not output.is_dir():
        return not output.exists()
    return all(
        is_temporary(path.name, FILES) or (path.name == checkpoint.FOLDER and checkpoint.latest(output) is None)
        for path in output.iterdir()
    )


def is_complete(output: Path) -> bool:
    """Whether a folder holds a run that has ended, none of whose SAEs has failed; then its checkpoints are removed."""
    if not (output / METRICS_FILE).exists() or read_json(output / METRICS_FILE).get("failures"):
        return False
    checkpoint.discard(output)
    return True


def check_writable(option: str, place: Path) -> None:
    """Raises UsageError where the folder `place` is no folder, or neither it nor the one to make it in can be written."""
    existing = place
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UsageError(f"{option}: expected a folder, but {existing} exists and is none")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{option}: expected a folder that can be written, but {existing} cannot be")


def located(name: str) -> str:
    """The absolute path where `name` is a file or folder of this machine, so that it is found from any other folder.

    Other names, such as `demo` and those of the hub, stay as they are.
    """
    path = local_path(name)
    return os.path.abspath(path) if name != "demo" and os.path.exists(path) else name


def located_config(config: TrainConfig) -> TrainConfig:
    """The options with absolute paths of what is on this machine."""
    given = {name: getattr(config, name) for name in ("model", "dataset", "text", "activations", "init_from")}
    places: dict[str, Any] = {name: located(value) for name, value in given.items() if value is not None}
    return replace(config, **places)


def described(config: TrainConfig) -> dict[str, Any]:
    """The resolved config and what it ran on."""
    versions = {"fastsae": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {**asdict(config), "versions": versions}


def write_configs(
    output: Path, configs: Mapping[str, TrainConfig], fingerprints: dict[str, str], origins: Mapping[str, Any]
) -> None:
    """Writes the config of each SAE of a run into its folder, then, where they are several, the list of their names.

    Args:
        output: The folder of the run.
        configs: By name.
        fingerprints: Those of model and data.
        origins: The files of the SAEs that training went on from, by name.
    """
    for name, config in configs.items():
        (output / name).mkdir(parents=True, exist_ok=True)
        found = {**fingerprints, "init_from": origins[name]} if origins.get(name) else fingerprints
        write_json(output / name / CONFIG_FILE, {**described(config), "fingerprints": found})
    if "" not in configs:
        write_json(output / SAES_FILE, {"saes": list(configs)})


def read_configs(output: Path) -> dict[str, TrainConfig]:
    """The configs that a run of one or several SAEs saved, by name; that of a single one has none.

    Raises:
        UsageError: `output` holds none.
        FastsaeError: One is corrupt.
    """
    if not (output / SAES_FILE).exists():
        return {"": read_config(output)}
    try:
        names = Fields(read_json(output / SAES_FILE)).get("saes")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
            raise ValueError("it has no list of names")
    except ValueError as error:
        raise FastsaeError(f"{output / SAES_FILE}: expected the names of SAEs, got a corrupt file ({error})") from None
    return {name: read_config(output / name) for name in names}


def read_origin(folder: Path) -> list[dict[str, str]]:
    """The files of the SAE that the run in `folder` went on from; empty where it did not."""
    found: list[dict[str, str]] = read_json(folder / CONFIG_FILE).get("fingerprints", {}).get("init_from", [])
    return found


def kept_options(config: TrainConfig) -> dict[str, Any]:
    """The options that a resumed run must have as they were."""
    return {name: value for name, value in asdict(config).items() if name not in MAY_MOVE}


def read_config(folder: Path) -> TrainConfig:
    """The config that a run saved; an option that came later, after a run of an older version, has its default.

    Raises:
        UsageError: `folder` holds none.
        FastsaeError: It is corrupt.
    """
    path = folder / CONFIG_FILE
    try:
        saved = Fields(read_json(path))
        if missing := [name for name in _SINCE_EVER if name not in saved]:
            raise ValueError(f"it has no {', '.join(missing[:3])}; is it that of a language model?")
        return TrainConfig(**{name: saved.values[name] for name in field_names() if name in saved})
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{folder}: expected the folder of a run of `fastsae train`, {CONFIG_FILE} is missing"
        ) from None
    except (ValueError, TypeError, UsageError) as error:
        raise FastsaeError(f"{path}: expected the options of a run, got another or a corrupt file ({error})") from None


def resumed_config(output: Path, config: TrainConfig) -> TrainConfig:
    """The options of the run in `output`, which those given must agree with, on the device that is given.

    Model and dataset are those given, too: they may have moved, and `check_fingerprints` tells whether they are the same.

    Raises:
        UsageError: An option differs.
    """
    if not (output / CONFIG_FILE).exists():
        return config
    saved = read_config(output)
    found_out = (
        "layer",
        "model_dtype",
        "eval_dialogues",
        *(OF_THE_SOURCE if config.init_from else ()),
    )  # by the run itself
    for name in field_names():
        given, started_with = getattr(config, name), getattr(saved, name)
        is_open = given is None and name in found_out
        if given != started_with and not is_open and name not in MAY_MOVE:
            raise UsageError(
                f"{name}: the run in {output} was started with {started_with}, got {given}; "
                "drop the flag to resume, or start a new run without --resume"
            )
    return replace(saved, **{name: getattr(config, name) for name in MAY_MOVE})


def check_fingerprints(output: Path, config: TrainConfig, found: dict[str, str]) -> None:
    """Raises UsageError where the run in `output` was started with other data or another model than it `found` now."""
    if not (output / CONFIG_FILE).exists():
        return
    try:
        saved = Fields(read_json(output / CONFIG_FILE))
        fingerprints = saved.fields("fingerprints", default={})
    except ValueError as error:
        raise FastsaeError(
            f"{output / CONFIG_FILE}: expected the options of a run, got a corrupt file ({error})"
        ) from None
    for what, fingerprint in found.items():
        name, started_with = getattr(config, what), saved.get(what)
        is_same = fingerprints.values[what] == fingerprint if what in fingerprints else name == started_with
        if not is_same:
            raise UsageError(
                f"--resume: the {what} {name!r} has changed since this run was started with {started_with!r}: its content "
                "or its order is not the same. Put it back as it was, or start a new run with another --output"
            )


def how_to_go_on(output: Path, config: TrainConfig) -> str:
    """What an interrupted run leaves in its folder, and the command that takes it up."""
    place = shlex.quote(str(output))
    if (output / METRICS_FILE).exists():
        return f"interrupted; the run is complete. The page of its features is written by: fastsae pages {place}"
    again = f"fastsae train --output {place} --resume"
    newest = checkpoint.latest(output)
    if newest is not None:
        step = checkpoint.step_of(newest)
        rest = (
            "training is done, the evaluation is left" if step == config.steps else f"step {step:,} of {config.steps:,}"
        )
        return f"interrupted; a checkpoint holds what was computed ({rest}). Go on with: {again}"
    if (output / CONFIG_FILE).exists() or (output / SAES_FILE).exists():
        reason = " (checkpoint_every is 0)" if config.checkpoint_every == 0 else ""
        return f"interrupted; there is no checkpoint{reason}. Start again from the first step with: {again}"
    return "interrupted before training began; nothing was written. The same command starts it again"
