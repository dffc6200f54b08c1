"""The processes of a run: `torchrun` starts them; here they connect, compare options, agree on signals and end together."""

from __future__ import annotations

import json
import os
import threading
from datetime import timedelta
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import distributed

from fastsae.distributed.faults import Witness, named
from fastsae.distributed.groups import Group
from fastsae.distributed.mesh import Groups
from fastsae.errors import FastsaeError, UsageError, shown

if TYPE_CHECKING:  # not every PyTorch has it
    from torch.distributed import Store  # type: ignore[attr-defined]

_starts = count()  # numbers the runs of one program, which write into the same store


class Place(NamedTuple):
    """Which process of a run this is, and where it finds the others, as the environment says."""

    rank: int
    size: int
    local_rank: int
    host: str
    port: int

    @classmethod
    def of_environment(cls) -> Place:
        """What `torchrun` says; one process where it says nothing.

        Raises:
            UsageError: A variable is missing, or not what it should be.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls(0, 1, 0, "", 0)
        size = _number("WORLD_SIZE", 1)
        rank = _number("RANK", 0, size - 1)
        local_rank = _number("LOCAL_RANK", 0) if "LOCAL_RANK" in os.environ else rank
        if not os.environ.get("MASTER_ADDR"):
            raise _wrong("MASTER_ADDR", "the address of the machine of process 0")
        return cls(rank, size, local_rank, os.environ["MASTER_ADDR"], _number("MASTER_PORT", 1, 65535))


class Processes:
    """The processes of a run; without others, everything here does nothing.

    As a context manager it ends the connection, and raises the same failure in all processes; see `Witness.judged`.

    Attributes:
        rank, size: The number of this process, and how many there are.
        device: Where this process computes.
        groups: The groups that this process belongs to.
    """

    def __init__(self, place: Place, device: torch.device, shard_features: int = 1) -> None:
        self.rank, self.size, self.device = place.rank, place.size, device
        self._shape = (place.size // shard_features, shard_features)
        self._witness: Witness | None = None
        self._is_interrupted = False
        self._control, self.groups = Group(), Groups.alone()

    @property
    def is_first(self) -> bool:
        """Whether this process writes what one alone is to write."""
        return self.rank == 0

    def wait_for_all(self) -> None:
        """Returns once every process has called it."""
        self.agree(0)

    def connect(self, place: Place, timeout: float) -> None:
        """Waits for the other processes and makes the groups.

        Raises:
            UsageError: Another program uses the port.
            FastsaeError: The others were not found within `timeout` seconds.
        """
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        prefix = f"fastsae/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_starts)}"
        witness = Witness(lambda: PrefixStore(prefix, _open_store(place, timeout)), place.rank, place.size, timeout)
        witness.meet()
        self._witness = witness
        seconds = timedelta(seconds=timeout)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        store = PrefixStore(f"{prefix}/groups", _open_store(place, timeout))
        distributed.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=seconds)
        grid = torch.arange(self.size).view(self._shape)
        data = Group(distributed.new_subgroups_by_enumeration(grid.T.tolist(), timeout=seconds)[0])
        features = Group(distributed.new_subgroups_by_enumeration(grid.tolist(), timeout=seconds)[0])
        self.groups = Groups(features, data, Group(distributed.group.WORLD))
        self._control = Group(distributed.group.WORLD)  # its traffic is not that of training

    def check_same(self, what: dict[str, Any]) -> None:
        """Raises UsageError in all processes where one of the named values is not the same in all of them."""
        found = [json.loads(text) for text in self.groups.world.gather_objects(json.dumps(what, default=str))]
        different = [name for name in dict.fromkeys(name for one in found for name in one) if not _agree(found, name)]
        if not different:
            return
        name = different[0]
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(found):
            ranks.setdefault(_shown(one, name), []).append(rank)
        told = ", ".join(f"{value} in {named(those)}" for value, those in ranks.items())
        more = f"; {', '.join(different[1:5])} as well" if len(different) > 1 else ""
        raise UsageError(f"{name}: expected the same in all processes, got {told}{more}")

    def agree(self, number: int) -> int:
        """The highest number that any process has called this with, in a few bytes."""
        if self.size == 1:
            return number
        number = -int(self._control.smallest_(torch.tensor([-number]), "signal"))
        self._is_interrupted = number != 0
        return number

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, _: type | None, error: BaseException | None, __: TracebackType | None) -> None:
        if self._witness is None:
            return
        try:
            if error is None or (isinstance(error, SystemExit) and not error.code):
                return
            if self._is_interrupted and isinstance(error, KeyboardInterrupt):
                error.reported_by = 0  # type: ignore[attr-defined]
                return
            judged = self._witness.judged(error)
            if judged is not error:
                raise judged from error
        finally:
            self.close()

    def close(self) -> None:
        """Ends the connection."""
        if self._witness is not None:
            self._witness.close()
            self._witness = None
        if distributed.is_initialized():
            distributed.destroy_process_group()


def start(shard_features: int = 1, timeout: float = 600, device: str = "cpu") -> Processes:
    """Connects the processes that `torchrun` has started; without it, there is this one.

    Args:
        shard_features: How many processes share the features of an SAE.
        timeout: Seconds after which a process that waits for others gives up.
        device: `cpu`, or `cuda`: then each process has the GPU of its number on its machine.

    Raises:
        UsageError: The number of processes is no multiple of `shard_features`, this machine has fewer GPUs than processes, the
            program has a process group of its own, or the environment is not as `torchrun` makes it.
        FastsaeError: The others were not found in time.
    """
    place = Place.of_environment()
    if place.size % shard_features:
        raise UsageError(
            f"shard_features: expected a divisor of the number of processes, {place.size}, got {shard_features}; "
            "their number is that of torchrun --nproc-per-node, times the machines"
        )
    if place.size == 1:
        return Processes(place, torch.device(device))
    if not (distributed.is_available() and distributed.is_gloo_available()):
        raise UsageError("this PyTorch was built without torch.distributed and gloo: expected one process")
    if distributed.is_initialized():
        raise UsageError(
            "expected a program without a process group of torch.distributed, because the run makes its own; call "
            "destroy_process_group() before"
        )
    processes = Processes(place, _device(device, place.local_rank), shard_features)
    try:
        processes.connect(place, timeout)
    except BaseException as error:
        processes.__exit__(type(error), error, None)
        raise
    return processes


def _device(name: str, local_rank: int) -> torch.device:
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise UsageError(f"device: expected cuda for several processes, each of which has its own GPU, got {name}")
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"device: expected a GPU for each process of a machine, got {torch.cuda.device_count()} for process {local_rank}"
        )
    return torch.device("cuda", local_rank)


def _open_store(place: Place, timeout: float) -> Store:
    """A connection to the store of the run, which `torchrun` keeps, or else process 0."""
    from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

    keeps = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"{place.host}:{place.port} (MASTER_ADDR, MASTER_PORT)"
    found: list[Store | RuntimeError] = []

    def connect() -> None:
        seconds, options = timedelta(seconds=timeout), {"wait_for_workers": False, "multi_tenant": keeps}
        try:
            found.append(TCPStore(place.host, place.port, None, keeps, seconds, **options))
        except RuntimeError as error:
            found.append(error)

    # A program of another kind that listens there may never answer, for which PyTorch would wait without an end
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout + 1)
    if found and isinstance(found[0], Store):
        return found[0]
    if found and any(word in str(found[0]).lower() for word in ("eaddrinuse", "in use")):
        raise UsageError(f"MASTER_PORT: expected a free port, but another program uses {where}; choose another")
    raise FastsaeError(
        f"the store of the run at {where} was not reached within {timeout:g} seconds (--process-timeout): process 0 has not "
        "started there, or the address is wrong"
    )


def _agree(found: list[dict[str, Any]], name: str) -> bool:
    """Whether all have one value; NaN is the same as NaN."""
    return len({json.dumps(one[name], sort_keys=True) if name in one else "" for one in found}) == 1


def _shown(options: dict[str, Any], name: str) -> str:
    value = options.get(name)
    if name not in options:
        return "nothing"
    return shown(json.dumps(value) if isinstance(value, dict | list) else value)


def _number(name: str, low: int, high: int | None = None) -> int:
    """A whole number of the environment."""
    text = os.environ.get(name, "")
    if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
        raise _wrong(name, f"a whole number >= {low}" if high is None else f"a whole number from {low} to {high}")
    return int(text)


def _wrong(name: str, expected: str) -> UsageError:
    got = shown(os.environ[name]) if name in os.environ else "nothing"
    return UsageError(
        f"{name}: expected {expected} in the environment, as torchrun sets it for several processes, got {got}"
    )
