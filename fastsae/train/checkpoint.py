"""Checkpoints: one folder each, complete before it has its name, so that a killed run always finds a whole one."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastsae.disk import digest, sync, write_json, write_tensors
from fastsae.distributed import Group
from fastsae.distributed.together import together
from fastsae.errors import FastsaeError
from fastsae.fields import is_finite, read_json

FOLDER = "checkpoints"
TENSORS, STATE = "tensors.safetensors", "state.json"
DIGEST, STATE_DIGEST = "sha256", "sha256_of_state"
KEPT = "sae-step-"  # of an SAE alone, as it was at a step


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
    """Undoes `flatten`; the tensors are put into `rest`.

    Raises:
        ValueError: A name leads into something that is no object.
    """
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        place: Any = rest
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(f"the tensor {name!r} has no place")
        place[leaf] = tensor
    return rest


def save(run: Path, step: int, state: dict[str, Any]) -> None:
    """Writes a checkpoint of `step` under `run`, then removes older ones; does nothing where it is there already.

    Raises:
        FastsaeError: A number of the state is not finite; the older checkpoint stays.
        OSError: The disk is full, or the folder cannot be written; the older checkpoint stays.
    """
    folder = run / FOLDER
    final = folder / f"step-{step:09d}"
    if final.exists():
        return
    tensors, rest = flatten(state)
    for name, value in (*tensors.items(), *rest.items()):
        if not all_finite(value):
            raise not_finite(step, f"{name} holds NaN or infinity")

    def write(temporary: Path) -> None:
        write_tensors(temporary / TENSORS, tensors)
        rest[DIGEST] = digest(temporary / TENSORS)
        write_json(temporary / STATE, {**rest, STATE_DIGEST: digest_of(rest)})

    write_folder(final, write, Group())
    for old in whole(run):
        if old != final:
            remove(old)


def keep(run: Path, step: int, most: int, write: Callable[[Path], None], world: Group) -> None:
    """Writes the SAE of `step` under `run`, then removes the oldest that are more than `most`.

    Args:
        run: The folder of the SAE's run.
        step: What names it; nothing is written where it is there already.
        most: How many stay.
        write: Writes this process's files to a folder; raises in all processes where it raises in one.
        world: The processes that train the SAE, which all call this.

    Raises:
        OSError: The disk is full, or the folder cannot be written; the older ones stay.
    """
    final = run / FOLDER / f"{KEPT}{step:09d}"
    if not world.broadcast_object(final.exists()):
        write_folder(final, write, world)
    if world.rank == 0:
        for old in sorted(whole(run, KEPT))[:-most]:
            remove(old)


def write_folder(final: Path, write: Callable[[Path], None], world: Group) -> None:
    """Lets every process write files to one folder, which gets its name once all have written and synced.

    Args:
        final: Its name.
        write: Writes this process's files to a folder; raises in all processes where it raises in one.
        world: The processes, which all call this.
    """
    temporary = final.with_name(f".{final.name}")
    try:
        with together(world, f"make {temporary}"):
            if world.rank == 0:
                final.parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
        write(temporary)
        with together(world, f"make {final}"):
            if world.rank == 0:
                sync(temporary)
                temporary.rename(final)
                sync(final.parent)  # the new one is safely there before an older one goes
    finally:
        if world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds beside its tensors.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not what was written.
    """
    rest = read_json(folder / STATE)
    if not isinstance(rest, dict) or rest.pop(STATE_DIGEST, None) != digest_of(rest):
        raise ValueError(f"{STATE} is not as it was written")
    return rest


def load(folder: Path, rest: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint, nested as it was saved; `rest` is what `read_state` has found in it.

    Raises:
        OSError: It cannot be read.
        SafetensorError: The file of the tensors is none.
        ValueError: They are not what was written.
    """
    if rest.pop(DIGEST, None) != digest(folder / TENSORS):
        raise ValueError(f"{TENSORS} is not the file that {STATE} describes")
    return unflatten(load_file(folder / TENSORS), rest)


def latest(run: Path) -> Path | None:
    """The folder of the newest checkpoint under `run`."""
    return max(whole(run), key=step_of, default=None)


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def whole(run: Path, prefix: str = "step-") -> list[Path]:
    """The folders under `run` that have their name."""
    return [path for path in (run / FOLDER).glob(f"{prefix}*") if re.fullmatch(prefix + "[0-9]{9,18}", path.name)]


def sweep(run: Path) -> None:
    """Removes what a killed run left of unfinished checkpoints, and the folder where nothing else is in it."""
    for begun in (".step-*", f".{KEPT}*"):
        for path in (run / FOLDER).glob(begun):
            shutil.rmtree(path, ignore_errors=True)
    if (run / FOLDER).is_dir() and not any((run / FOLDER).iterdir()):
        (run / FOLDER).rmdir()


def discard(run: Path) -> None:
    """Removes the checkpoints of a finished run, but not the SAEs that are kept."""
    for path in whole(run):
        remove(path)
    sweep(run)


def remove(whole: Path) -> None:
    """Takes a checkpoint's name first: a kill must not leave half of it under that."""
    doomed = whole.with_name(f".{whole.name}.old")
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        whole.rename(doomed)
    except OSError:
        return  # it is in nobody's way
    shutil.rmtree(doomed, ignore_errors=True)


def all_finite(value: Any) -> bool:
    """Whether a state holds neither NaN nor infinity."""
    if isinstance(value, Tensor):
        return is_finite(value)
    if isinstance(value, dict):
        return all(map(all_finite, value.values()))
    if isinstance(value, list):
        return all(map(all_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def digest_of(rest: dict[str, Any]) -> str:
    """SHA-256 of what a checkpoint holds beside its tensors."""
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def not_finite(step: int, what: str) -> FastsaeError:
    """The error for a run whose numbers have left the finite ones."""
    return FastsaeError(
        f"step {step}: {what}. Start a new run with a lower --lr or with "
        "--normalize-activations, or check the activations of this layer"
    )


def corrupt(place: Path, reason: object) -> FastsaeError:
    """The error for a checkpoint that cannot be used."""
    return FastsaeError(
        f"{place}: expected a whole checkpoint of this run, found a corrupt or truncated one ({reason}). "
        f"Delete the folder {FOLDER} and --resume to start again from the first step"
    )


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
