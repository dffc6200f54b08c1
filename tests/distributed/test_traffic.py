"""What processes send each other in a step: as the plan says, as the groups count it, and as the system has written it."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import grid, run
from torch import Tensor, distributed

from fastsae.distributed import Groups
from fastsae.train.config import TrainConfig
from fastsae.train.plan import step_traffic
from fastsae.train.trainer import Trainer, build_sae

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this PyTorch has no gloo"
)
D_IN, D_SAE, BATCH = 64, 2048, 4096
NOT_PLANNED = {"counts", "means"}  # a few numbers each
OPTIONS: dict[str, dict[str, Any]] = {
    "jumprelu": {},
    "tanh": {"sparsity": "tanh", "l0_coefficient": 0.1},
    "relu without clipping": {"architecture": "relu", "clip_norm": 0.0},
    "topk": {"architecture": "topk", "k": 16},
    "batchtopk": {"architecture": "batchtopk", "k": 16},
    "bfloat16": {"reduce_dtype": "bfloat16", "overlap_chunks": 3},
}


def config_of(name: str, n_shards: int) -> TrainConfig:
    return TrainConfig(
        d_sae=D_SAE, batch_size=BATCH, tokens=100 * BATCH, buffer_tokens=2 * BATCH, shard_features=n_shards,
        log_every=100, **OPTIONS[name],
    )  # fmt: skip


def written() -> int:
    """Bytes that this process has written, to sockets too."""
    found = re.search(r"wchar: (\d+)", Path("/proc/self/io").read_text())
    return int(found[1]) if found else 0


def step(names: list[str], shape: tuple[int, int]) -> dict[str, Any]:
    groups = grid(shape)
    return {name: one_step(config_of(name, shape[1]), groups) for name in names}


def one_step(config: TrainConfig, groups: Groups) -> dict[str, Any]:
    rows, of_group = groups.rows_of_batch(BATCH), groups.rows_of_group(BATCH)
    generator = torch.Generator().manual_seed(groups.world.rank)
    batches: list[Tensor] = []
    trainer = Trainer(build_sae(config, D_IN, torch.device("cpu"), groups), iter(batches), config, groups)
    trainer.initialize(torch.randn(1024, D_IN, generator=torch.Generator().manual_seed(9)))

    def advance() -> None:
        acts = torch.randn(rows[groups.world.rank], D_IN, generator=generator)
        trainer.train_step(groups.features.gather_rows(acts, of_group, "rows"))

    advance()  # connections are made with the first exchange
    for group in groups:
        group.traffic.clear()
    distributed.barrier()
    before = written()
    advance()
    sent = written() - before
    counted: dict[str, int] = {}
    for group in {id(group): group for group in groups}.values():
        for name, n in group.traffic.items():
            counted[name] = counted.get(name, 0) + n
    return {"counted": counted, "written": sent}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process has written")
@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((1, 2), list(OPTIONS)),
        ((1, 4), ["jumprelu", "topk", "bfloat16"]),
        ((2, 2), ["jumprelu", "batchtopk"]),
        ((2, 1), ["jumprelu", "batchtopk"]),
    ],
)
def test_bytes_are_those_of_the_plan(shape: tuple[int, int], names: list[str], tmp_path: Path) -> None:
    """The plan says exactly what the groups count; the system has written as much and the headers of the messages."""
    n_processes = math.prod(shape)
    first = run(step, n_processes, tmp_path, names, shape)[0]
    for name in names:
        planned = step_traffic(config_of(name, shape[1]), D_IN, D_SAE, n_processes, 4)
        counted = first[name]["counted"]
        assert sum(counted.pop(few, 0) for few in NOT_PLANNED) < 100
        if name == "topk":  # a few tokens are looked at twice
            assert counted["candidates"] == pytest.approx(planned["candidates"], rel=0.1)
            planned["candidates"] = counted["candidates"]
        assert counted == pytest.approx(planned, rel=1e-6, abs=2), name
        assert first[name]["written"] == pytest.approx(sum(planned.values()), rel=0.05, abs=50_000), name
