"""A training step on several processes: its time, what it sends and what it holds.

    torchrun --standalone --nproc-per-node 4 -m benchmarks.distributed
    torchrun --standalone --nproc-per-node 4 -m benchmarks.distributed --shard-features 1
    torchrun --standalone --nproc-per-node 8 -m benchmarks.distributed --device cuda --d-in 3584 --d-sae 1048576 --batch-size 8192

Activations are random and L0 is 32 from the start, so that a step is what it is in the middle of a run, without the language
model. Times are medians over steps, of the slowest process; memory is what a process has taken for SAE and steps, of the
largest one. Without torchrun it is one process, with which the others are compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from statistics import median
from typing import Any

import torch

from benchmarks.peak import resident_mib
from fastsae.distributed import launch
from fastsae.distributed.launch import Processes
from fastsae.distributed.mesh import Groups
from fastsae.environment import is_first, n_processes
from fastsae.train.config import TrainConfig
from fastsae.train.plan import step_traffic
from fastsae.train.trainer import Trainer, build_sae

WARM_UP = 3


def main() -> None:
    """Measures one way to divide the features, and prints the options and a line of JSON."""
    arguments = _arguments()
    row = _measured(arguments, arguments.shard_features or n_processes())
    if is_first():
        print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {arguments}")
        print(json.dumps({name: round(value, 2) for name, value in row.items()}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.distributed")
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=65_536)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--shard-features", type=int, help="processes that share the features (default: all)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--architecture", default="jumprelu")
    parser.add_argument("--reduce-dtype", default="float32")
    parser.add_argument("--overlap-chunks", type=int, default=1)
    return parser.parse_args()


def _measured(arguments: argparse.Namespace, n_sharing: int) -> dict[str, float]:
    options: dict[str, Any] = {"k": 32} if "topk" in arguments.architecture else {"init_l0": 32.0}
    config = TrainConfig(
        d_sae=arguments.d_sae, batch_size=arguments.batch_size, tokens=10**6 * arguments.batch_size, log_every=10**6,
        buffer_tokens=2 * arguments.batch_size, shard_features=n_sharing, dtype=arguments.dtype,
        architecture=arguments.architecture, reduce_dtype=arguments.reduce_dtype, overlap_chunks=arguments.overlap_chunks,
        **options,
    )  # fmt: skip
    dtype = getattr(torch, config.dtype)
    with launch.start(n_sharing, 600, arguments.device) as processes:
        seconds, sent, held = _steps(config, arguments.d_in, dtype, arguments.steps, processes)
        found = processes.groups.world.gather_objects([seconds, held])
        planned = step_traffic(config, arguments.d_in, arguments.d_sae, processes.size, dtype.itemsize)
        slowest = max(seconds for seconds, _ in found)
        return {
            "processes": processes.size,
            "shard_features": n_sharing,
            "ms": 1e3 * slowest,
            "tokens_per_second": config.batch_size / slowest,
            "mb_sent": sent / 1e6,
            "mb_planned": sum(planned.values()) / 1e6,
            "mb_held": max(held for _, held in found),
        }


def _steps(
    config: TrainConfig, d_in: int, dtype: torch.dtype, n_steps: int, processes: Processes
) -> tuple[float, int, float]:
    """The median seconds of a step, the bytes of the last one, and the MB that SAE and steps have taken."""
    groups, device = processes.groups, processes.device
    before = _held_mb(device)
    rows, of_group = groups.rows_of_batch(config.batch_size), groups.rows_of_group(config.batch_size)
    generator = torch.Generator().manual_seed(processes.rank)
    own = torch.randn(rows[processes.rank], d_in, generator=generator).to(device, dtype)
    trainer = Trainer(build_sae(config, d_in, device, groups), iter(()), config, groups)
    trainer.initialize(torch.randn(4096, d_in, generator=torch.Generator().manual_seed(9)))
    seconds, sent = [], 0
    for _ in range(WARM_UP + n_steps):
        processes.wait_for_all()
        sent, started = _sent(groups), time.perf_counter()
        trainer.train_step(groups.features.gather_rows(own, of_group, "rows"))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return median(seconds[WARM_UP:]), _sent(groups) - sent, _held_mb(device) - before


def _sent(groups: Groups) -> int:
    return sum(sum(group.traffic.values()) for group in (groups.features, groups.data, groups.world))


def _held_mb(device: torch.device) -> float:
    """What this process holds: on a GPU the most that tensors have taken, else what is resident."""
    n_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_mib() * 2**20
    return n_bytes / 1e6


if __name__ == "__main__":
    main()
