"""Runs a function in several processes that form a group, as torchrun would start them, and returns what each gives back."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from fastsae.distributed import Groups, groups_of

Work = Callable[..., Any]


def run(work: Work, n_processes: int, folder: Path, *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in each of the processes, in their order: tensors, numbers, texts, dicts and lists."""
    store = folder / "store"
    store.unlink(missing_ok=True)
    torch.multiprocessing.spawn(_begin, (work, n_processes, str(folder), arguments), nprocs=n_processes)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(n_processes)]


def _begin(rank: int, work: Work, n_processes: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store, limit = f"file://{folder}/store", timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=n_processes, timeout=limit)
    found = work(*arguments)
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def grid(shape: tuple[int, int]) -> Groups:
    """The groups of a process of a run, as many by `data` and by `feature` as the shape says."""
    return groups_of(init_device_mesh("cpu", shape, mesh_dim_names=("data", "feature")))
