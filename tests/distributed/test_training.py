"""Training on several processes against training in one: the same batches, every architecture, and what was sent."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import grid, run
from torch import Tensor, distributed

import fastsae
from fastsae.distributed import Group, Groups
from fastsae.pending import PendingGradient
from fastsae.train.config import TrainConfig
from fastsae.train.trainer import Trainer, build_sae

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this PyTorch has no gloo"
)
D_IN, BATCH, STEPS = 16, 50, 200
COMMON: dict[str, Any] = {
    "d_sae": 67, "batch_size": BATCH, "tokens": STEPS * BATCH, "buffer_tokens": 2 * BATCH, "init_l0": 8.0, "dead_tokens": 500,
    "lr": 1e-3, "log_every": 20,
}  # fmt: skip
CONFIGS = {
    "jumprelu": TrainConfig(**COMMON, target_l0=6.0),
    "quadratic": TrainConfig(
        **COMMON, target_l0=6.0, sparsity="quadratic", l0_coefficient=0.1, pre_act_loss_coefficient=1e-3, beta1=0.0
    ),
    "relu": TrainConfig(**COMMON, architecture="relu", target_l0=8.0, clip_norm=0.0),
    "topk": TrainConfig(**COMMON, architecture="topk", k=6),
    "batchtopk": TrainConfig(**COMMON, architecture="batchtopk", k=6, normalize_decoder=False),
}


def batches(rows: slice) -> Iterator[Tensor]:
    """Sums of a few directions out of 40, the given rows of each batch."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(40, D_IN, generator=generator)
    while True:
        weights = torch.rand(BATCH, 40, generator=generator) * (torch.rand(BATCH, 40, generator=generator) < 0.1)
        yield (weights @ directions)[rows]


def train(config: TrainConfig, groups: Groups | None, rows: slice, steps: int = STEPS) -> Trainer:
    trainer = Trainer(build_sae(config, D_IN, torch.device("cpu"), groups), batches(rows), config, groups)
    trainer.initialize(torch.cat([next(batches(slice(None)))] * 4))
    while trainer.step < steps:
        trainer.advance()
    return trainer


def described(trainer: Trainer) -> dict[str, Any]:
    state: dict[str, Any] = dict(trainer.sae.state_dict())
    history = [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in trainer.history]
    return {"state": state, "history": history}


def own_rows(groups: Groups) -> slice:
    """The rows of a batch that the processes see which share the features."""
    start = sum(groups.rows_of_batch(BATCH)[: groups.data.rank * groups.features.size])
    return slice(start, start + sum(groups.rows_of_group(BATCH)))


def together(names: list[str], shape: tuple[int, int], steps: int) -> dict[str, Any]:
    groups, found = grid(shape), {}
    for name in names:
        trainer = train(CONFIGS[name], groups, own_rows(groups), steps)
        assert trainer.sae.sharding is not None
        found[name] = {**described(trainer), "state": dict(fastsae.unshard(trainer.sae).state_dict())}
    return found


@pytest.mark.parametrize(
    ("shape", "names"),
    [((1, 2), list(CONFIGS)), ((2, 2), ["quadratic", "batchtopk"]), ((3, 1), ["jumprelu", "topk"])],
)
def test_two_hundred_steps_are_those_of_one_process(shape: tuple[int, int], names: list[str], tmp_path: Path) -> None:
    """Sums in another order differ in their last digits, which training carries on: to 1 % of the weights, 2 % of the curves.

    Where processes have other tokens, the FVU of a batch is the mean of that of its parts.
    """
    ranks = run(together, math.prod(shape), tmp_path, names, shape, STEPS)
    for name in names:
        alone = described(train(CONFIGS[name], None, slice(None)))
        for rank in ranks:
            for key, value in alone["state"].items():
                got = rank[name]["state"][key]
                assert torch.equal(got, ranks[0][name]["state"][key]), f"{name}: {key} differs between processes"
                assert (got - value).norm() <= 0.01 * value.norm(), f"{name}: {key} is off by {(got - value).norm()}"
            for row, want in zip(rank[name]["history"], alone["history"], strict=True):
                if shape[0] > 1:
                    row, want = ({name: value for name, value in each.items() if name != "fvu"} for each in (row, want))
                assert row == pytest.approx(want, rel=0.02, abs=0.02), f"{name}: step {want['step']}"


def in_sixteen_bits() -> dict[str, Any]:
    config = replace(CONFIGS["jumprelu"], dtype="bfloat16", reduce_dtype="bfloat16", overlap_chunks=2)
    groups = grid((1, 2))
    trainer = train(config, groups, own_rows(groups), 60)
    return {**described(trainer), "state": dict(fastsae.unshard(trainer.sae).state_dict())}


def test_products_and_parts_in_sixteen_bits(tmp_path: Path) -> None:
    """With the optimiser's 16-bit copies of the weights, and parts that travel in 16 bits: as one process within rounding."""
    ranks = run(in_sixteen_bits, 2, tmp_path)
    alone = described(train(replace(CONFIGS["jumprelu"], dtype="bfloat16"), None, slice(None), 60))
    for key, value in alone["state"].items():
        assert torch.equal(ranks[0]["state"][key], ranks[1]["state"][key])
        assert (ranks[0]["state"][key] - value).norm() <= 0.05 * value.norm(), key
    assert ranks[0]["history"][-1]["fvu"] == pytest.approx(alone["history"][-1]["fvu"], rel=0.05)


def twice(name: str, shape: tuple[int, int]) -> list[Any]:
    return [together([name], shape, 30)[name]["state"] for _ in range(2)]


@pytest.mark.parametrize("name", ["jumprelu", "topk", "batchtopk"])
def test_two_runs_have_the_same_bits(name: str, tmp_path: Path) -> None:
    first, second = run(twice, 4, tmp_path, name, (2, 2))[0]
    assert all(torch.equal(first[key], second[key]) for key in first)


ONE_FEATURE = {
    name: replace(CONFIGS[name], d_sae=1, dead_tokens=50, **change)
    for name, change in (("quadratic", {"target_l0": 0.5, "init_l0": 0.5}), ("topk", {"k": 1}))
}


def one_feature() -> dict[str, float]:
    found = {}
    for name, config in ONE_FEATURE.items():
        trainer = train(config, grid((1, 2)), slice(None), 30)
        trainer.load_state_dict(trainer.state_dict())
        found[name] = trainer.history[-1]["loss"]
    return found  # type: ignore[return-value]


def test_a_process_without_features_trains_with_the_others(tmp_path: Path) -> None:
    ranks = run(one_feature, 2, tmp_path)
    for name, config in ONE_FEATURE.items():
        want = train(config, None, slice(None), 30).history[-1]["loss"]
        assert [rank[name] for rank in ranks] == pytest.approx([want] * 2, rel=1e-4)


def placed() -> bool:
    groups = grid((2, 1))
    groups = groups._replace(data=Group(), world=groups.features)
    trainer = train(CONFIGS["topk"], groups, slice(None), 2)
    trainer.optimizer.zero_grad()
    trainer.optimizer.backward(trainer.sae.training_forward(next(batches(slice(None)))).loss)  # type: ignore[operator]
    return isinstance(trainer.sae.W_enc.grad, PendingGradient)


def test_saes_that_one_process_trains_alone_keep_no_gradient_of_the_weights(tmp_path: Path) -> None:
    assert run(placed, 2, tmp_path) == [True, True]


def in_one(name: str) -> Any:
    groups = grid((1, 1))
    return described(train(CONFIGS[name], groups, slice(None), 30))


@pytest.mark.parametrize("name", ["jumprelu", "batchtopk"])
def test_one_process_has_the_bits_of_a_run_without_processes(name: str, tmp_path: Path) -> None:
    (got,) = run(in_one, 1, tmp_path, name)
    want = described(train(CONFIGS[name], None, slice(None), 30))
    assert all(torch.equal(got["state"][key], value) for key, value in want["state"].items())
    assert got["history"] == want["history"]
