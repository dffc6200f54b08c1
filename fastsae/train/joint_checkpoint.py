"""Checkpoints of a run on several processes: one folder that all of them write, and that any number of them loads.

step-000000100/
    shards/*.safetensors        weights, moments and counts of the features, which are divided among the processes
    rank-00002.safetensors      what process 2 had of the data, and
    rank-00002.json             what is no tensor of it
    state.json                  how many processes there were, and a digest of each file
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
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
from fastsae.train.repartition import Share, repartition
from fastsae.train.trainer import Trainer

SHARDS, FILES = "shards", "files"
DIVIDED = ("sae", "optimizer", "silent_tokens", "dead_mask")  # of a trainer's state, what is saved as `shards`


def sliced_dims(trainers: Mapping[str, Trainer]) -> dict[str, int]:
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


def save(run: Path, step: int, state: dict[str, Any], dims: Mapping[str, int], groups: Groups) -> None:
    """Writes a checkpoint of `step` under `run`, then removes older ones; does nothing where it is there already.

    Args:
        run: The folder of the run, which all processes reach.
        step: What names the checkpoint.
        state: This process's state of a session.
        dims: See `sliced_dims`.
        groups: The processes, which all call this.

    Raises:
        FastsaeError: A number of a state is not finite, or another process could not write; the older checkpoint stays.
        OSError: The disk is full, or the folder cannot be written; the older checkpoint stays.
    """
    final = run / checkpoint.FOLDER / f"step-{step:09d}"
    if of_first(groups.world, final.exists()):
        return
    divided, rest = _parted(state, groups.data)
    with together(groups.world, "write a checkpoint"):
        for name, value in (*divided.items(), *rest.items()):
            if not checkpoint.all_finite(value):
                raise checkpoint.not_finite(step, f"{name} holds NaN or infinity")
    write_folder(final, groups.world, partial(_write, divided=divided, rest=rest, dims=dims, groups=groups))
    if groups.world.rank == 0:
        for old in checkpoint.whole(run):
            if old != final:
                checkpoint.remove(old)


def keep(run: Path, step: int, most: int, write: Callable[[Path], None], world: Group) -> None:
    """As `checkpoint.keep`; all processes call it, and `write`, which raises in all of them where it raises in one."""
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
        # a feature is silent for as long as it is in the tokens of all processes that hold it
        silent = data.smallest_(trainer["silent_tokens"].clone(), "checkpoint")
        own = {**{name: trainer[name] for name in DIVIDED}, "silent_tokens": silent}
        divided |= dict(_named(own, f"trainers.{i}."))
        trainers[i] = {name: value for name, value in trainer.items() if name not in DIVIDED}
    return divided, {**state, "trainers": trainers}


def _named(nested: dict[str, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in nested.items():
        if isinstance(value, dict):
            yield from _named(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _write(
    folder: Path, divided: dict[str, Tensor], rest: dict[str, Any], dims: Mapping[str, int], groups: Groups
) -> None:
    from fastsae.distributed.checkpoint import save_sharded  # its import takes a second

    world, features, is_first_row = groups.world, groups.features, groups.data.rank == 0
    own = f"rank-{world.rank:05d}"
    with together(world, "write a checkpoint"):
        tensors, others = checkpoint.flatten(rest)
        write_tensors(folder / f"{own}.safetensors", tensors)
        write_json(folder / f"{own}.json", others)
    with together(world, "write a checkpoint"):
        if is_first_row:  # the other rows hold the same features
            save_sharded(folder / SHARDS, divided, dims.get, features)
    digests = dict[str, str]()
    with together(world, "write a checkpoint"):
        shards = sorted((folder / SHARDS).iterdir())[features.rank :: features.size] if is_first_row else []
        for path in (folder / f"{own}.safetensors", folder / f"{own}.json", *shards):
            sync(path)
            digests[path.relative_to(folder).as_posix()] = digest(path)
    found = {name: value for each in gather_objects(world, digests) for name, value in each.items()}
    with together(world, "write a checkpoint"):
        if world.rank == 0:
            sync(folder / SHARDS)
            state = {"processes": world.size, "shard_features": features.size, FILES: found}
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
        with _reading(folder, groups.world):
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

    def state(self, dims: Mapping[str, int], config: TrainConfig, capacity: int) -> dict[str, Any]:
        """This process's state of a session.

        Args:
            dims: See `sliced_dims`.
            config: The run.
            capacity: Rows that this process's mixing buffers hold.

        Raises:
            FastsaeError: The checkpoint does not hold the state of a session.
        """
        world, features = self.groups.world, self.groups.features
        share = Share(config.batch_size, world.size, world.rank)
        if self._whole is not None:
            if world.size == 1:
                return self._whole
            with _reading(self.folder, world):
                divided, rest = _parted(self._whole, Group())
                parts = {name: _own_part(tensor, dims.get(name), features) for name, tensor in divided.items()}
                return checkpoint.unflatten(parts, repartition([rest], share, config.order_seed, capacity))
        from fastsae.distributed.checkpoint import load_sharded

        with _reading(self.folder, world):
            n_before = self._index["processes"]
            if n_before == world.size:
                rest = self._of_process(world.rank)
            else:
                every = [self._of_process(rank) for rank in range(n_before)]
                rest = repartition(every, share, config.order_seed, capacity)
        with _reading(self.folder, world):
            return checkpoint.unflatten(load_sharded(self.folder / SHARDS, dims.get, features), rest)

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
def _reading(folder: Path, world: Group) -> Iterator[None]:
    """Calls whatever goes wrong a corrupt checkpoint, in all processes; the connection between them is another matter."""
    with together(world, "read a checkpoint"):
        try:
            yield
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            if is_of_an_exchange(error):
                raise
            raise checkpoint.corrupt(folder, error) from None
