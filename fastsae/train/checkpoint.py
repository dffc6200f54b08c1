"""Checkpoints: one folder each, complete before it has its name, so that a killed run always finds a whole one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastsae.disk import digest, sync, write_json, write_tensors
from fastsae.errors import FastsaeError

FOLDER = "checkpoints"
TENSORS, STATE, DIGEST = "tensors.safetensors", "state.json", "sha256"


def flatten(nested: dict[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits a nested state dict into tensors under dotted names and the rest, nested as it was."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Tensor):
            tensors[prefix + name] = value.detach().cpu().contiguous()
        elif isinstance(value, dict):
            inner, rest[str(name)] = flatten(value, f"{prefix}{name}.")
            tensors.update(inner)
        else:
            rest[str(name)] = value
    return tensors, rest


def unflatten(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """Undoes `flatten`."""
    nested = json.loads(json.dumps(rest))
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = tensor
    return nested


def save(run: Path, step: int, state: dict[str, Any]) -> None:
    """Writes a checkpoint of `step` under `run`, then removes older ones."""
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    temporary, final = folder / f".step-{step:09d}", folder / f"step-{step:09d}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        tensors, rest = flatten(state)
        write_tensors(temporary / TENSORS, tensors)
        write_json(temporary / STATE, {**rest, DIGEST: digest(temporary / TENSORS)})
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync(folder)  # the new one is safely there before an older one goes
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in folder.glob("step-*"):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)


def load_latest(run: Path) -> dict[str, Any] | None:
    """The newest checkpoint under `run`, nested as it was saved; None where there is none yet.

    Raises:
        FastsaeError: It is corrupt or truncated.
    """
    found = sorted((run / FOLDER).glob("step-*"))
    if not found:
        return None
    newest = found[-1]
    try:
        rest = json.loads((newest / STATE).read_text(encoding="utf-8"))
        if not isinstance(rest, dict) or rest.pop(DIGEST, None) != digest(newest / TENSORS):
            raise corrupt(newest, f"{TENSORS} is not the file that {STATE} describes")
        tensors = load_file(newest / TENSORS)
    except (OSError, SafetensorError, ValueError) as error:
        raise corrupt(newest, error) from None
    return unflatten(tensors, rest)


def corrupt(place: Path, reason: object) -> FastsaeError:
    """The error for a checkpoint that cannot be used."""
    return FastsaeError(
        f"{place}: expected a whole checkpoint of this run, found a corrupt or truncated one ({reason}). "
        f"Delete the folder {FOLDER} and --resume to start again from the first step"
    )


def discard(run: Path) -> None:
    """Removes the checkpoints of a finished run."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's per-parameter state, keyed by strings."""
    return {str(index): values for index, values in optimizer.state_dict()["state"].items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Undoes `optimizer_state`, memory layout of the moments included."""
    whole = optimizer.state_dict()
    whole["state"] = {int(index): values for index, values in state.items()}
    optimizer.load_state_dict(whole)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state[parameter].items():
                if value.shape == parameter.shape:
                    optimizer.state[parameter][name] = torch.empty_like(parameter.detach()).copy_(value)
