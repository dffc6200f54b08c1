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
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastsae.distributed import launch
from fastsae.distributed.launch import Processes
from fastsae.environment import is_first, n_processes
from fastsae.train.config import TrainConfig
from fastsae.train.plan import step_traffic
from fastsae.train.trainer import Trainer, build_sae

WARM_UP = 3


@dataclass(frozen=True)
class Row:
    """What one way to divide the features takes."""

    processes: int
    shard_features: int
    ms: float
    tokens_per_second: float
    mb_sent: float
    mb_planned: float
    mb_held: float


def main() -> None:
    """Measures one way to divide the features, and prints a row of a table and a line of JSON."""
    arguments = _arguments()
    row = _measured(arguments, arguments.shard_features or n_processes())
    if is_first():
        print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {arguments}")
        print("processes  sharing      ms  tokens/s  MB sent  MB planned  MB held")
        print(
            f"{row.processes:9} {row.shard_features:8} {row.ms:7.1f} {row.tokens_per_second:9,.0f} {row.mb_sent:8.2f} "
            f"{row.mb_planned:11.2f} {row.mb_held:8.0f}"
        )
        print(json.dumps(asdict(row)))


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


def _measured(arguments: argparse.Namespace, n_sharing: int) -> Row:
    options: dict[str, Any] = {"k": 32} if "topk" in arguments.architecture else {"init_l0": 32.0}
    config = TrainConfig(
        d_sae=arguments.d_sae, batch_size=arguments.batch_size, tokens=10**6 * arguments.batch_size, log_every=10**6,
        buffer_tokens=2 * arguments.batch_size, shard_features=n_sharing, dtype=arguments.dtype,
        architecture=arguments.architecture, reduce_dtype=arguments.reduce_dtype, overlap_chunks=arguments.overlap_chunks,
        **options,
    )  # fmt: skip
    with launch.start(n_sharing, 600, arguments.device) as processes:
        before = _memory(processes.device)
        seconds, sent, held = _steps(config, arguments, processes)
        found = processes.groups.world.gather_objects([seconds, held - before])
        bytes_of_acts = 2 if arguments.dtype == "bfloat16" else 4
        planned = step_traffic(config, arguments.d_in, arguments.d_sae, processes.size, bytes_of_acts)
        slowest = max(one[0] for one in found)
        return Row(
            processes.size,
            n_sharing,
            1e3 * slowest,
            config.batch_size / slowest,
            sent / 1e6,
            sum(planned.values()) / 1e6,
            max(one[1] for one in found) / 1e6,
        )


def _steps(config: TrainConfig, arguments: argparse.Namespace, processes: Processes) -> tuple[float, int, int]:
    """The median seconds of a step, the bytes of the last one, and the memory of this process."""
    groups, device = processes.groups, processes.device
    rows, of_group = groups.rows_of_batch(config.batch_size), groups.rows_of_group(config.batch_size)
    generator = torch.Generator().manual_seed(processes.rank)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    own = torch.randn(rows[processes.rank], arguments.d_in, generator=generator).to(device, dtype)
    trainer = Trainer(build_sae(config, arguments.d_in, device, groups), iter(()), config, groups)
    trainer.initialize(torch.randn(4096, arguments.d_in, generator=torch.Generator().manual_seed(9)))
    seconds, sent = [], 0
    for _ in range(WARM_UP + arguments.steps):
        processes.wait_for_all()
        sent = sum(sum(group.traffic.values()) for group in (groups.features, groups.data, groups.world))
        started = time.perf_counter()
        trainer.train_step(groups.features.gather_rows(own, of_group, "rows"))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    after = sum(sum(group.traffic.values()) for group in (groups.features, groups.data, groups.world))
    return median(seconds[WARM_UP:]), after - sent, _memory(device)


def _memory(device: torch.device) -> int:
    """Bytes that this process holds: on a GPU the most that tensors have taken, else what is resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()
