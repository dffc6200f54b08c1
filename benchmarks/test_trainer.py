"""What the trainer costs beside the step itself: schedules, statistics, a logged row, the progress bar."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from functools import partial
from itertools import repeat

import pytest
import torch

from benchmarks.harness import Call, Case, Provider, benchmark_of
from benchmarks.shapes import DEVICE, SHAPES, Shape, tokens
from benchmarks.steps import fused_step, make_sae
from fastsae import FusedSAEAdam
from fastsae.data.buffer import ActivationBatch
from fastsae.data.progress import bar
from fastsae.train.config import TrainConfig
from fastsae.train.trainer import Trainer

pytest.importorskip("tqdm", reason="the trainer needs pip install 'fastsae-kernels[train]'")

STEPS = 25  # of a call: as many as between two logged rows
LR = 1e-12  # nothing moves, so that both go on having the same work
TARGET_L0 = 32.0


def config_of(shape: Shape) -> TrainConfig:
    return TrainConfig(d_sae=shape.d_sae, batch_size=shape.n_tokens, tokens=shape.n_tokens * 10**6, lr=LR)


def by_trainer(shape: Shape) -> Call:
    config, nothing = config_of(shape), torch.zeros(shape.n_tokens, dtype=torch.int64, device=DEVICE)
    batch = ActivationBatch(tokens(shape), nothing, nothing, nothing)
    trainer = Trainer(make_sae(shape), repeat(batch), config)

    def run() -> None:
        trainer.config = replace(config, tokens=(trainer.step + STEPS) * shape.n_tokens)
        total = STEPS * shape.n_tokens
        with (
            contextlib.redirect_stderr(io.StringIO()),  # the bar is drawn, though nobody sees it
            bar("training", "tok", total=total, progress=True, delay=0) as advance,
        ):
            trainer.run(lambda row: advance(total, loss=f"{row['loss']:.4g}", l0=f"{row['l0']:.1f}"))

    return run


def alone(shape: Shape) -> Call:
    config, sae, x = config_of(shape), make_sae(shape), tokens(shape)
    optimizer = FusedSAEAdam(sae, lr=LR, max_grad_norm=config.clip_norm, normalize_decoder=config.normalize_decoder)

    step = fused_step(lambda x: sae.training_forward(x, 1.0, "quadratic", target_l0=TARGET_L0).loss, optimizer)
    return lambda: [step(x) for _ in range(STEPS)]


def case(shape_name: str) -> Case:
    shape = SHAPES[shape_name]
    providers = {
        f"{STEPS} steps alone": Provider(partial(alone, shape)),
        "trainer": Provider(partial(by_trainer, shape)),
    }
    return Case("trainer overhead", shape_name, shape, providers, "fp32")


test_trainer_overhead = benchmark_of([case("demo" if DEVICE == "cpu" else "gpt2-small x32")])
