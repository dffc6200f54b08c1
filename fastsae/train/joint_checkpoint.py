"""Checkpoints of a run on several processes: one folder that all of them write, and that any number of them loads.

step-000000100/
    shards/00000/*.safetensors  what is divided by features: weights, moments and counts, written by the processes of group 0
    rank-00002.safetensors      what process 2 had of the data: its tensors,
    rank-00002.json             and the rest of it
    state.json                  how many processes there were, and a digest of each file

The processes of a group share the features of an SAE. Either all groups train the same SAEs on different tokens, and group 0
writes them; or the SAEs are placed, and each group writes those that it trains.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
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
from fastsae.distributed.parts import own_part
from fastsae.distributed.sharding import FEATURE_DIMS
from fastsae.distributed.together import together
from fastsae.fields import read_json
from fastsae.train import checkpoint
from fastsae.train.config import TrainConfig
from fastsae.train.repartition import BatchPart, pooled_failures, pooled_trainers, repartition
from fastsae.train.trainer import Trainer

SHARDS, FILES, GROUPS = "shards", "files", "groups"
DIVIDED = (
    "sae",
    "optimizer",
    "silent_tokens",
    "dead_mask",
)  # what of a trainer's state is saved in the folder `shards`


def _feature_dims(trainers: Mapping[str, Trainer]) -> dict[str, int]:
    """The dimension of the features in those tensors of a session's state that have one, by their dotted names.

    Args:
        trainers: The trainers of this process, by the numbers under which their states are saved.
    """
    dims = dict[str, int]()
    for i, trainer in trainers.items():
        own: dict[str, int] = {"silent_tokens": 0, "dead_mask": 0}
        names = {id(parameter): name for name, parameter in trainer.sae.named_parameters()}
        for name, dim in FEATURE_DIMS.items():
            own[f"sae.{name}"] = dim
        for number, parameter in enumerate(trainer.optimizer.param_groups[0]["params"]):
            dim_of_moments = FEATURE_DIMS.get(names[id(parameter)])
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
        trainers: The trainers of this process, by the numbers that they have in the state.
        groups: The groups of this process; all processes call this.

    Raises:
        FastsaeError: A number of a state is not finite, or another process could not write; the older checkpoint stays.
        OSError: The disk is full, or the folder cannot be written; the older checkpoint stays.
    """
    final = run / checkpoint.FOLDER / f"step-{step:09d}"
    if groups.world.broadcast_object(final.exists()):
        return
    by_group = _trainers_by_group(list(trainers), groups)
    # a feature is silent for as long as it is in the tokens of all processes that hold it
    divided, rest = _parted(state, next((trainer.groups.data for trainer in trainers.values()), Group()))
    with together(groups.world, "write a checkpoint"):
        for name, value in (*divided.items(), *rest.items()):
            if not checkpoint.all_finite(value):
                raise checkpoint.not_finite(step, f"{name} holds NaN or infinity")
    dims = _feature_dims(trainers)
    write = partial(_write, divided=divided, rest=rest, dims=dims, by_group=by_group, groups=groups)
    checkpoint.write_folder(final, write, groups.world)
    if groups.world.rank == 0:
        for old in checkpoint.whole(run):
            if old != final:
                checkpoint.remove(old)


def _trainers_by_group(own: list[str], groups: Groups) -> dict[str, list[str]]:
    """Which trainers each group of processes writes, by the name of its folder: those that no earlier group has."""
    found: dict[str, list[str]] = {}
    written = set[str]()
    for group, numbers in sorted(groups.world.gather_objects((groups.data.rank, own))):
        if left := [i for i in numbers if i not in written]:
            found[f"{group:05d}"] = left
            written.update(left)
    return found


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
    by_group: dict[str, list[str]],
    groups: Groups,
) -> None:
    from fastsae.distributed.checkpoint import save_sharded  # its import takes a second

    world, features = groups.world, groups.features
    rank, group = f"rank-{world.rank:05d}", f"{groups.data.rank:05d}"
    with together(world, "write a checkpoint"):
        tensors, others = checkpoint.flatten(rest)
        write_tensors(folder / f"{rank}.safetensors", tensors)
        write_json(folder / f"{rank}.json", others)
    with together(world, "write a checkpoint"):
        if group in by_group:
            parts = {name: tensor for name, tensor in divided.items() if _is_of(by_group[group], name)}
            save_sharded(folder / SHARDS / group, parts, dims, features)
    digests = dict[str, str]()
    with together(world, "write a checkpoint"):
        shards = sorted((folder / SHARDS / group).iterdir()) if group in by_group else []
        for path in (folder / f"{rank}.safetensors", folder / f"{rank}.json", *shards[features.rank :: features.size]):
            sync(path)
            digests[path.relative_to(folder).as_posix()] = digest(path)
    files = {name: value for each in world.gather_objects(digests) for name, value in each.items()}
    with together(world, "write a checkpoint"):
        if world.rank == 0:
            for place in (folder / SHARDS, *(folder / SHARDS / group for group in by_group)):
                sync(place)
            state = {"processes": world.size, "shard_features": features.size, GROUPS: by_group, FILES: files}
            write_json(folder / checkpoint.STATE, {**state, checkpoint.STATE_DIGEST: checkpoint.digest_of(state)})


class Saved:
    """A checkpoint whose files are as they were written, of one process or of several.

    Args:
        folder: The checkpoint.
        groups: The groups of this process; all processes load it.

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
            trainers: The trainers of this process, by the numbers that they have in the state.
            config: The run.
            capacity: Rows that this process's mixing buffers hold.

        Raises:
            FastsaeError: The checkpoint does not hold the state of a session.
        """
        world = self.groups.world
        if self._whole is not None and world.size == 1:
            return self._whole
        part, dims = BatchPart(config.batch_size, world.size, world.rank), _feature_dims(trainers)
        with reading(self.folder, world):
            if self._whole is not None:
                divided, rest = _parted(self._whole, Group())
                rest = repartition([rest], part, config.order_seed, capacity)
            else:
                rest = self._rest(part, config.order_seed, capacity)
            rest["trainers"] = {i: trainer for i, trainer in rest["trainers"].items() if i in trainers}
        with reading(self.folder, world):
            if self._whole is not None:
                parts = {
                    name: own_part(tensor, dims.get(name), self.groups.features).clone()
                    for name, tensor in divided.items()
                    if _is_of(trainers, name)
                }
            else:
                parts = self._parts(trainers, dims)
            return checkpoint.unflatten(parts, rest)

    def _rest(self, part: BatchPart, seed: int, capacity: int) -> dict[str, Any]:
        """What is not divided by features."""
        n_before, world = self._index["processes"], self.groups.world
        if (n_before, self._index["shard_features"]) == (world.size, self.groups.features.size):
            return self._of_process(world.rank)
        every = [self._of_process(rank) for rank in range(n_before)]
        if n_before != world.size:
            return repartition(every, part, seed, capacity)
        pooled = {"trainers": pooled_trainers(every, part.batch_size), "failures": pooled_failures(every)}
        return {**every[world.rank], **pooled}

    def _parts(self, trainers: Collection[str], dims: Mapping[str, int]) -> dict[str, Tensor]:
        """What is divided by features, whichever group of processes has written it."""
        from fastsae.distributed.checkpoint import load_sharded

        parts = dict[str, Tensor]()
        for group, numbers in sorted(self._index[GROUPS].items()):
            if not {*numbers}.isdisjoint(trainers):
                place = self.folder / SHARDS / group
                parts |= load_sharded(place, dims, self.groups.features, partial(_is_of, trainers))
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
    newest = groups.world.broadcast_object(checkpoint.latest(run))
    return None if newest is None else Saved(newest, groups)


@contextmanager
def reading(folder: Path, world: Group) -> Iterator[None]:
    """Raises in all processes that the checkpoint is corrupt where any of them cannot read it, unless their connection failed."""
    with together(world, "read a checkpoint"):
        try:
            yield
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            if is_of_an_exchange(error):
                raise
            raise checkpoint.corrupt(folder, error) from None
