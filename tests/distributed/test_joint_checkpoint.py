"""Checkpoints that several processes write together: resumed by as many, by others, or by one; whole or not there."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from processes import grid, run
from stopped_runs import load_latest
from torch import Tensor, distributed

import fastsae
from fastsae import FusedTopKSAE
from fastsae.data.buffer import ActivationBatch, MixingBuffer
from fastsae.distributed import Group, Groups
from fastsae.distributed.together import OtherProcessError
from fastsae.errors import FastsaeError
from fastsae.train import checkpoint, joint_checkpoint
from fastsae.train.config import TrainConfig
from fastsae.train.folder import kept_options
from fastsae.train.trainer import Trainer, build_sae

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this PyTorch has no gloo"
)
D_IN, D_SAE, BATCH, STEPS = 6, 7, 10, 25
CONFIG = TrainConfig(
    architecture="topk",
    k=2,
    d_sae=D_SAE,
    batch_size=BATCH,
    tokens=100 * BATCH,
    buffer_tokens=8 * BATCH,
    dead_tokens=BATCH,
    log_every=4,
)
CONFIGS = {"0": CONFIG, "1": replace(CONFIG, d_sae=5, seed=7), "2": replace(CONFIG, d_sae=3, seed=8)}
NOT_COMPARED = ("tokens_per_second",)


class Source(Iterator[ActivationBatch]):
    """Pieces that rank and number determine."""

    def __init__(self, rank: int) -> None:
        self.rank, self.n_served = rank, 0
        self.directions = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(99))

    def __next__(self) -> ActivationBatch:
        start = self.rank * 10**6 + 6 * self.n_served
        acts = torch.randn(6, D_IN, generator=torch.Generator().manual_seed(start)).relu() @ self.directions
        ids = torch.arange(start, start + 6)
        self.n_served += 1
        return ActivationBatch(acts, ids, ids, ids)


class Run:
    """What a session has of its SAEs: each trained by all processes, or, where they are placed, by one group of processes."""

    def __init__(self, groups: Groups, numbers: Sequence[str] = ("0",), placed: bool = False) -> None:
        rank, size = groups.world.rank, groups.world.size
        self.rows = groups.rows_of_batch(BATCH)
        self.groups, self.capacity = groups, -(-CONFIG.buffer_tokens // size)
        self.source = Source(rank)
        n_wanted = CONFIG.steps * self.rows[rank]
        self.buffer = MixingBuffer(self.source, self.capacity, self.rows[rank], rank, n_wanted=n_wanted)
        self.together = groups.world if placed else groups.features
        own = groups._replace(data=Group(), world=groups.features) if placed else groups
        self.trainers = {
            i: Trainer(build_sae(CONFIGS[i], D_IN, torch.device("cpu"), own), self.batches(), CONFIGS[i], own)
            for i in numbers
            if not placed or int(i) % groups.data.size == groups.data.rank
        }
        self.batch = torch.empty(0)

    @property
    def trainer(self) -> Trainer:
        return next(iter(self.trainers.values()))

    def batches(self) -> Iterator[Tensor]:
        while True:
            yield self.batch

    def train(self, steps: int) -> None:
        first = 0 if self.together is self.groups.world else self.groups.data.rank * self.groups.features.size
        rows = self.rows[first : first + self.together.size]
        while self.trainer.step < steps:
            self.batch = self.together.gather_rows(next(self.buffer).acts, rows, "rows")
            for trainer in self.trainers.values():
                trainer.advance()

    def state(self) -> dict[str, Any]:
        dropped = {"seen": 9, "counts": {"it is long": 1}, "first_rows": {"it is long": 4}}
        at = {"seed": 0, "epoch": 0, "window": self.groups.world.rank, "batch": 1, "dropped": dropped}
        counts = {"computed": 5}
        return {
            "options": {i: kept_options(config) for i, config in CONFIGS.items()},
            "streams": {"4": {"sequencer": {"at": at, "taken": 2}, "median_norm": 1.5, "counts": counts}},
            "buffers": {"4": self.buffer.state_dict()},
            "trainers": {i: trainer.state_dict() for i, trainer in self.trainers.items()},
            "failures": {},
            "seconds": 2.5,
        }

    def save(self, folder: Path) -> None:
        joint_checkpoint.save(folder, self.trainer.step, self.state(), self.trainers, self.groups)

    def restore(self, folder: Path) -> dict[str, Any]:
        saved = joint_checkpoint.find(folder, self.groups)
        assert saved is not None
        state = saved.state(self.trainers, CONFIG, self.capacity)
        assert state["trainers"].keys() == self.trainers.keys()
        for i, trainer in self.trainers.items():
            trainer.load_state_dict(state["trainers"][i])
        self.buffer.load_state_dict(state["buffers"]["4"])
        return state

    def whole(self, i: str = "0") -> dict[str, Any]:
        """The whole SAE and moments, which all processes of a group have the same."""
        trainer, sharding = self.trainers[i], self.trainers[i].sae.sharding
        sae = trainer.sae if sharding is None else fastsae.unshard(trainer.sae)
        found = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
        parameters = dict(trainer.sae.named_parameters())
        for name, parameter in parameters.items():
            for moment, value in trainer.optimizer.state[parameter].items():
                is_part = value.shape == parameter.shape and sharding is not None
                found[f"{name}.{moment}"] = (sharding.whole(name, value) if is_part else value).clone()
        silent = trainer.groups.data.smallest_(trainer.silent_tokens.clone(), "test")
        found["silent_tokens"] = silent if sharding is None else sharding.whole("b_enc", silent)
        mask = torch.zeros_like(trainer.silent_tokens) if trainer.dead_mask is None else trainer.dead_mask
        found["dead_mask"] = mask.bool() if sharding is None else sharding.whole("b_enc", mask.int()).bool()
        return found

    def history(self) -> list[dict[str, Any]]:
        rows = self.trainer.history
        return [{name: value for name, value in row.items() if name not in NOT_COMPARED} for row in rows]


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def save_and_go_on(folder: str, shape: tuple[int, int]) -> dict[str, Any]:
    """The whole SAE as it is saved; and as many processes as saved it go on as if nothing had been."""
    groups = grid(shape)
    first, second = Run(groups), Run(groups)
    first.train(STEPS)
    assert first.trainer.dead_mask is not None
    first.save(Path(folder))
    saved = first.whole()
    second.restore(Path(folder))
    second.source.n_served = first.source.n_served  # as its stream's state would do
    for each in (first, second):
        each.train(STEPS + 30)
    same(second.whole(), first.whole())
    assert second.history() == first.history()
    for name, tensor in first.trainer.state_dict()["sums"].items():
        assert torch.equal(second.trainer.state_dict()["sums"][name], tensor)
    assert torch.equal(next(first.buffer).token_ids, next(second.buffer).token_ids)
    return saved


def load(folders: list[str], shape: tuple[int, int]) -> list[dict[str, Any]]:
    """What other processes find: the whole SAEs, and which rows each of them holds; they go on with training."""
    found = []
    for folder in folders:
        own = Run(grid(shape))
        state = own.restore(Path(folder))
        found.append({"whole": own.whole(), "rows": state["buffers"]["4"]["rows"]["token_ids"]})
        own.train(STEPS + 5)
    return found


def rows_in(folder: Path) -> list[int]:
    every = [
        checkpoint.load_file(path)["buffers.4.rows.token_ids"] for path in sorted(folder.rglob("rank-*.safetensors"))
    ]
    return sorted(torch.cat(every).tolist())


@pytest.mark.parametrize(("before", "after"), [((2, 2), (1, 3)), ((1, 2), (2, 1))])
def test_resumed_by_as_many_by_others_and_by_one(
    before: tuple[int, int], after: tuple[int, int], tmp_path: Path
) -> None:
    joint, alone = tmp_path / "joint", tmp_path / "alone"
    saved = run(save_and_go_on, math.prod(before), tmp_path, str(joint), before)
    for each in saved[1:]:
        same(each, saved[0])
    one = Run(Groups.alone())
    state = one.restore(joint)
    same(one.whole(), saved[0])
    assert sorted(state["buffers"]["4"]["rows"]["token_ids"].tolist()) == rows_in(joint)
    checkpoint.save(alone, STEPS, one.state())
    same_state = load_latest(alone)
    assert same_state is not None
    assert same_state["trainers"]["0"]["optimizer"].keys() == state["trainers"]["0"]["optimizer"].keys()
    found = run(load, math.prod(after), tmp_path, [str(joint), str(alone)], after)
    for number in (0, 1):
        for each in found:
            same(each[number]["whole"], saved[0])
        assert sorted(torch.cat([each[number]["rows"] for each in found]).tolist()) == rows_in(joint)
    one.train(STEPS + 5)


def save_placed(folder: str, shape: tuple[int, int]) -> dict[str, Any]:
    """Each group of processes has SAEs of its own, and goes on with them; returns the whole ones as they are saved."""
    groups = grid(shape)
    first, second = (Run(groups, [*CONFIGS], placed=True) for _ in range(2))
    first.train(STEPS)
    first.save(Path(folder))
    saved = {i: first.whole(i) for i in first.trainers}
    second.restore(Path(folder))
    second.source.n_served = first.source.n_served
    for each in (first, second):
        each.train(STEPS + 5)
    for i in first.trainers:
        same(second.whole(i), first.whole(i))
    return saved


def load_placed(folder: str, shape: tuple[int, int], placed: bool) -> dict[str, Any]:
    own = Run(grid(shape), [*CONFIGS], placed)
    own.restore(Path(folder))
    return {i: own.whole(i) for i in own.trainers}


def test_saes_of_which_each_group_of_processes_has_its_own(tmp_path: Path) -> None:
    first, second = run(save_placed, 2, tmp_path, str(tmp_path), (2, 1))
    assert first.keys() == {"0", "2"}
    assert second.keys() == {"1"}
    for shape, placed in (((1, 2), False), ((3, 1), True)):
        for found in run(load_placed, math.prod(shape), tmp_path, str(tmp_path), shape, placed):
            for i, whole in found.items():
                same(whole, (first | second)[i])
    one = Run(Groups.alone(), [*CONFIGS])
    one.restore(tmp_path)
    for i in CONFIGS:
        same(one.whole(i), (first | second)[i])


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refused(folder: str) -> list[str]:
    """What this process says of saves that fail in one of them, and of checkpoints that are corrupt."""
    own, place, said = Run(grid((1, 3))), Path(folder), list[str]()
    own.train(STEPS)
    own.save(place)
    own.train(STEPS + 1)
    is_first, is_second = own.groups.world.rank == 0, own.groups.world.rank == 1

    def attempt(way: Any) -> None:
        try:
            way()
            said.append("nothing")
        except OtherProcessError as error:
            said.append(f"{error.process}: {error}")
        except OSError as error:
            said.append(errno.errorcode[error.errno or 0])
        except FastsaeError as error:
            said.append(str(error))

    from fastsae.distributed import checkpoint as shards

    for module, name, here in (
        (joint_checkpoint, "write_tensors", is_second),
        (joint_checkpoint, "write_json", is_first),  # of its own state
        (shards, "save", False),
        (joint_checkpoint, "digest", is_second),
        (checkpoint, "sync", is_first),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if here:
                patch.setattr(module, name, full)
            elif name == "save" and is_second:
                patch.setattr(shards._Planner, "transform_object", full)
            attempt(lambda: own.save(place))
    with torch.no_grad():
        if is_second:
            own.trainer.sae.W_enc[0, 0] = math.inf
        attempt(lambda: own.save(place))
    distributed.barrier()
    names = sorted(path.name for path in (place / checkpoint.FOLDER).iterdir())
    said.append(" ".join(names))
    own.restore(place)
    said.append(str(own.trainer.step))
    own.train(STEPS + 2)
    own.save(place)  # nothing of what failed stands in the way
    distributed.barrier()
    said.append(" ".join(path.name for path in (place / checkpoint.FOLDER).iterdir()))
    return said


def test_a_failure_in_one_process_ends_all_and_leaves_the_older_one(tmp_path: Path) -> None:
    said = run(refused, 3, tmp_path, str(tmp_path))
    no_space = f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}"
    written = f"could not write a checkpoint: {no_space}"
    for case, process, text in (
        (0, 1, written),
        (1, 0, written),
        (2, 1, f"could not write its part: {no_space}"),
        (3, 1, written),
    ):
        assert [words[case] for words in said] == [
            "ENOSPC" if rank == process else f"{process}: process {process} {text}" for rank in range(3)
        ]
    assert said[0][4] == "ENOSPC"
    assert said[1][4].startswith("0: process 0 could not make ")
    assert said[1][5].startswith(f"step {STEPS + 1}: trainers.0.sae.W_enc holds NaN or infinity")
    assert said[2][5].startswith(f"1: process 1 could not write a checkpoint: step {STEPS + 1}: trainers.0.sae.W_enc")
    for words in said:
        assert words[6:] == [f"step-{STEPS:09d}", str(STEPS), f"step-{STEPS + 2:09d}"]


def killed(folder: str) -> None:
    own, place = Run(grid((1, 2))), Path(folder)
    own.train(STEPS)
    own.save(place)
    own.train(STEPS + 1)
    if own.groups.world.rank == 1:

        def kill(*_: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        joint_checkpoint.sync = kill  # type: ignore[assignment]
    own.save(place)


def test_a_killed_save_leaves_the_older_one_and_what_sweep_removes(tmp_path: Path) -> None:
    with pytest.raises((torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException)):
        run(killed, 2, tmp_path, str(tmp_path))
    folder = tmp_path / checkpoint.FOLDER
    (folder / f".step-{STEPS + 1:09d}").mkdir(exist_ok=True)  # process 0 may have had the time to remove it
    checkpoint.sweep(tmp_path)
    assert [path.name for path in folder.iterdir()] == [f"step-{STEPS:09d}"]
    assert Run(Groups.alone()).restore(tmp_path)["trainers"]["0"]["step"] == STEPS
    everything = tmp_path / "copy"
    for damage in (flip_shard, flip_rank, edit_state, lose, add):
        shutil.copytree(folder, everything / checkpoint.FOLDER, dirs_exist_ok=True)
        damage(everything / checkpoint.FOLDER / f"step-{STEPS:09d}")
        with pytest.raises(FastsaeError, match="corrupt or truncated"):
            joint_checkpoint.find(everything)
        shutil.rmtree(everything)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def flip_shard(step: Path) -> None:
    flip(max((step / joint_checkpoint.SHARDS).rglob("*.safetensors")))


def flip_rank(step: Path) -> None:
    flip(step / "rank-00001.safetensors")


def edit_state(step: Path) -> None:
    path = step / checkpoint.STATE
    path.write_text(path.read_text().replace('"processes": 2', '"processes": 1'))


def lose(step: Path) -> None:
    max((step / joint_checkpoint.SHARDS).rglob("*.safetensors")).unlink()


def add(step: Path) -> None:
    shutil.copy(step / "rank-00001.safetensors", step / joint_checkpoint.SHARDS / "00000" / "more.safetensors")


def kept(folder: str) -> list[str]:
    own, place = Run(grid((1, 2))), Path(folder)
    for step in (1, 2, 2, 3):
        checkpoint.keep(place, step, 2, own.trainer.sae.save, own.groups.world)
    distributed.barrier()
    return sorted(path.name for path in (place / checkpoint.FOLDER).iterdir())


def test_saes_that_are_kept(tmp_path: Path) -> None:
    names = run(kept, 2, tmp_path, str(tmp_path))
    assert names == [["sae-step-000000002", "sae-step-000000003"]] * 2
    assert FusedTopKSAE.load(tmp_path / checkpoint.FOLDER / names[0][0]).W_dec.shape == (D_SAE, D_IN)


def test_dims_are_those_of_the_shapes() -> None:
    own = Run(Groups.alone())
    own.train(1)
    tensors, _ = checkpoint.flatten({"trainers": {"0": own.trainer.state_dict()}})
    divided = {name: tensor.shape.index(D_SAE) for name, tensor in tensors.items() if D_SAE in tensor.shape}
    dims = joint_checkpoint._feature_dims(own.trainers)
    assert {name: dim for name, dim in dims.items() if name in tensors and tensors[name].numel()} == divided
