"""Checkpoints of a run on several processes: one folder that all of them write, and that any number of them loads.

step-000000100/
    shards/00000/*.safetensors  weights, moments and counts of the features, which the processes of a row divide among them
    rank-00002.safetensors      what process 2 had of the data, and
    rank-00002.json             what is no tensor of it
    state.json                  how many processes there were, and a digest of each file

All rows of processes train the same SAEs, on different tokens, and the first one writes them; or each row trains other SAEs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastsae.disk import digest, sync, write_json, write_tensors
from fastsae.distributed import Group, Groups
from fastsae.distributed.faults import is_of_an_exchange
from fastsae.distributed.parts import bounds
from fastsae.distributed.sharding import SLICED
from fastsae.distributed.together import gather_objects, of_first, together
from fastsae.fields import read_json
from fastsae.train import checkpoint
from fastsae.train.config import TrainConfig
from fastsae.train.repartition import Share, pooled_failures, pooled_trainers, repartition
from fastsae.train.trainer import Trainer

SHARDS, FILES, ROWS = "shards", "files", "rows"
DIVIDED = ("sae", "optimizer", "silent_tokens", "dead_mask")  # of a trainer's state, what is saved as `shards`


def _sliced_dims(trainers: Mapping[str, Trainer]) -> dict[str, int]:
    """In which dimension the tensors of a session's state are divided by features, by their dotted names.

    Args:
        trainers: By the numbers under which their states are saved.
    """
    dims = dict[str, int]()
    for i, trainer in trainers.items():
        own: dict[str, int] = {"silent_tokens": 0, "dead_mask": 0}
        names = {id(parameter): name for name, parameter in trainer.sae.named_parameters()}
        for name, dim in SLICED.items():
            own[f"sae.{name}"] = dim
        for number, parameter in enumerate(trainer.optimizer.param_groups[0]["params"]):
            dim_of_moments = SLICED.get(names[id(parameter)])
            if dim_of_moments is not None:
                own |= {f"optimizer.{number}.{moment}": dim_of_moments for moment in ("exp_avg", "exp_avg_sq")}
        dims |= {f"trainers.{i}.{name}": dim for name, dim in own.items()}
    return dims


def save(run: Path, step: int, state: dict[str, Any], trainers: Mapping[str, Trainer], groups: Groups) -> None:
    """Writes a checkpoint of `step` under `run`, then removes older ones; does nothing where it is there already.

    Args:
        run: The folder of the run, which all processes reach.
        step: What names the checkpoint.
        state: This process's state of a session.
        trainers: Those of this process, by the numbers that they have in the state.
        groups: The processes, which all call this.

    Raises:
        FastsaeError: A number of a state is not finite, or another process could not write; the older checkpoint stays.
        OSError: The disk is full, or the folder cannot be written; the older checkpoint stays.
    """
    final = run / checkpoint.FOLDER / f"step-{step:09d}"
    if of_first(groups.world, final.exists()):
        return
    rows = _rows(list(trainers), groups)
    # a feature is silent for as long as it is in the tokens of all processes that hold it
    divided, rest = _parted(state, next((trainer.groups.data for trainer in trainers.values()), Group()))
    with together(groups.world, "write a checkpoint"):
        for name, value in (*divided.items(), *rest.items()):
            if not checkpoint.all_finite(value):
                raise checkpoint.not_finite(step, f"{name} holds NaN or infinity")
    dims = _sliced_dims(trainers)
    write_folder(final, groups.world, partial(_write, divided=divided, rest=rest, dims=dims, rows=rows, groups=groups))
    if groups.world.rank == 0:
        for old in checkpoint.whole(run):
            if old != final:
                checkpoint.remove(old)


def _rows(own: list[str], groups: Groups) -> dict[str, list[str]]:
    """Which trainers each row of processes writes: those that no earlier row has."""
    found: dict[str, list[str]] = {}
    written = set[str]()
    for row, numbers in sorted(gather_objects(groups.world, (groups.data.rank, own))):
        if left := [i for i in numbers if i not in written]:
            found[f"{row:05d}"] = left
            written.update(left)
    return found


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
    final = run / checkpoint.FOLDER / f"{checkpoint.KEPT}{step:09d}"
    if not of_first(world, final.exists()):
        write_folder(final, world, write)
    if world.rank == 0:
        for old in sorted(checkpoint.whole(run, checkpoint.KEPT))[:-most]:
            checkpoint.remove(old)


def write_folder(final: Path, world: Group, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a folder in all processes; it has its name once all have written and synced.

    Args:
        final: Its name.
        world: The processes.
        write: Writes this process's files to a folder; raises in all of them where it raises in one.
    """
    temporary = checkpoint.temporary_of(final)
    try:
        with together(world, f"make {temporary}"):
            if world.rank == 0:
                checkpoint.begin_folder(temporary)
        write(temporary)
        with together(world, f"make {final}"):
            if world.rank == 0:
                checkpoint.end_folder(temporary, final)
    finally:
        if world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def _parted(state: dict[str, Any], data: Group) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is divided by features, as tensors by dotted names, and all else."""
    divided, trainers = dict[str, Tensor](), dict[str, Any]()
    for i, trainer in state["trainers"].items():
        silent = data.smallest_(trainer["silent_tokens"].clone(), "checkpoint")
        divided |= dict(
            _named({**{name: trainer[name] for name in DIVIDED}, "silent_tokens": silent}, f"trainers.{i}.")
        )
        trainers[i] = {name: value for name, value in trainer.items() if name not in DIVIDED}
    return divided, {**state, "trainers": trainers}


def _named(nested: dict[str, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in nested.items():
        if isinstance(value, dict):
            yield from _named(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _is_of(numbers: Collection[str], name: str) -> bool:
    """Whether a tensor of that dotted name belongs to one of the trainers."""
    return name.split(".")[1] in numbers


def _write(
    folder: Path,
    divided: dict[str, Tensor],
    rest: dict[str, Any],
    dims: Mapping[str, int],
    rows: dict[str, list[str]],
    groups: Groups,
) -> None:
    from fastsae.distributed.checkpoint import save_sharded  # its import takes a second

    world, features = groups.world, groups.features
    rank, row = f"rank-{world.rank:05d}", f"{groups.data.rank:05d}"
    with together(world, "write a checkpoint"):
        tensors, others = checkpoint.flatten(rest)
        write_tensors(folder / f"{rank}.safetensors", tensors)
        write_json(folder / f"{rank}.json", others)
    with together(world, "write a checkpoint"):
        if row in rows:
            parts = {name: tensor for name, tensor in divided.items() if _is_of(rows[row], name)}
            save_sharded(folder / SHARDS / row, parts, dims.get, features)
    digests = dict[str, str]()
    with together(world, "write a checkpoint"):
        shards = sorted((folder / SHARDS / row).iterdir())[features.rank :: features.size] if row in rows else []
        for path in (folder / f"{rank}.safetensors", folder / f"{rank}.json", *shards):
            sync(path)
            digests[path.relative_to(folder).as_posix()] = digest(path)
    files = {name: value for each in gather_objects(world, digests) for name, value in each.items()}
    with together(world, "write a checkpoint"):
        if world.rank == 0:
            for place in (folder / SHARDS, *(folder / SHARDS / row for row in rows)):
                sync(place)
            state = {"processes": world.size, "shard_features": features.size, ROWS: rows, FILES: files}
            write_json(folder / checkpoint.STATE, {**state, checkpoint.STATE_DIGEST: checkpoint.digest_of(state)})


class Saved:
    """A checkpoint whose files are as they were written, of one process or of several.

    Args:
        folder: The checkpoint.
        groups: The processes that load it.

    Raises:
        FastsaeError: It is corrupt or truncated.
    """

    def __init__(self, folder: Path, groups: Groups) -> None:
        self.folder, self.groups = folder, groups
        with reading(folder, groups.world):
            self._index = checkpoint.read_state(folder)
            self._whole: dict[str, Any] | None = None
            if FILES not in self._index:
                self._whole = checkpoint.load(folder, self._index)
                return
            files = self._index[FILES]
            there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            if {*there} != {*files, checkpoint.STATE}:
                raise ValueError(f"expected the files that {checkpoint.STATE} names")
            for name in sorted(files)[groups.world.rank :: groups.world.size]:
                if digest(folder / name) != files[name]:
                    raise ValueError(f"{name} is not the file that {checkpoint.STATE} describes")

    def state(self, trainers: Mapping[str, Trainer], config: TrainConfig, capacity: int) -> dict[str, Any]:
        """This process's state of a session.

        Args:
            trainers: Those of this process, by the numbers that they have in the state.
            config: The run.
            capacity: Rows that this process's mixing buffers hold.

        Raises:
            FastsaeError: The checkpoint does not hold the state of a session.
        """
        world = self.groups.world
        if self._whole is not None and world.size == 1:
            return self._whole
        share, dims = Share(config.batch_size, world.size, world.rank), _sliced_dims(trainers)
        with reading(self.folder, world):
            if self._whole is not None:
                divided, rest = _parted(self._whole, Group())
                rest = repartition([rest], share, config.order_seed, capacity)
            else:
                rest = self._rest(share, config.order_seed, capacity)
            rest["trainers"] = {i: trainer for i, trainer in rest["trainers"].items() if i in trainers}
        with reading(self.folder, world):
            if self._whole is not None:
                parts = {
                    name: _own_part(tensor, dims.get(name), self.groups.features)
                    for name, tensor in divided.items()
                    if _is_of(trainers, name)
                }
            else:
                parts = self._parts(trainers, dims)
            return checkpoint.unflatten(parts, rest)

    def _rest(self, share: Share, seed: int, capacity: int) -> dict[str, Any]:
        """What is not divided by features."""
        n_before, world = self._index["processes"], self.groups.world
        if (n_before, self._index["shard_features"]) == (world.size, self.groups.features.size):
            return self._of_process(world.rank)
        every = [self._of_process(rank) for rank in range(n_before)]
        if n_before != world.size:
            return repartition(every, share, seed, capacity)
        pooled = {"trainers": pooled_trainers(every, share.batch_size), "failures": pooled_failures(every)}
        return {**every[world.rank], **pooled}

    def _parts(self, trainers: Collection[str], dims: Mapping[str, int]) -> dict[str, Tensor]:
        """What is divided by features, of whatever row of processes has written it."""
        from fastsae.distributed.checkpoint import load_sharded

        parts = dict[str, Tensor]()
        for row, numbers in sorted(self._index[ROWS].items()):
            if not {*numbers}.isdisjoint(trainers):
                place = self.folder / SHARDS / row
                parts |= load_sharded(place, dims.get, self.groups.features, partial(_is_of, trainers))
        return parts

    def _of_process(self, rank: int) -> dict[str, Any]:
        path = self.folder / f"rank-{rank:05d}"
        return checkpoint.unflatten(load_file(path.with_suffix(".safetensors")), read_json(path.with_suffix(".json")))


def find(run: Path, groups: Groups | None = None) -> Saved | None:
    """The newest checkpoint under `run`, which all processes find; None where there is none yet.

    Raises:
        FastsaeError: It is corrupt or truncated.
    """
    groups = groups or Groups.alone()
    newest = of_first(groups.world, checkpoint.latest(run))
    return None if newest is None else Saved(newest, groups)


def _own_part(tensor: Tensor, dim: int | None, features: Group) -> Tensor:
    if dim is None:
        return tensor
    start, end = bounds(tensor.shape[dim], features.size, features.rank)
    return tensor.narrow(dim, start, end - start).clone()


@contextmanager
def reading(folder: Path, world: Group) -> Iterator[None]:
    """Calls whatever goes wrong a corrupt checkpoint, in all processes; the connection between them is another matter."""
    with together(world, "read a checkpoint"):
        try:
            yield
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            if is_of_an_exchange(error):
                raise
            raise checkpoint.corrupt(folder, error) from None
