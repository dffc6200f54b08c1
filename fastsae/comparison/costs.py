"""What a comparison will take, told before it starts: tokens, memory, and the time by the speed of its first batches."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fastsae.data.activations import read_layers
from fastsae.data.buffer import ActivationBatch
from fastsae.train.config import TrainConfig
from fastsae.train.held_out import cost_of_evaluation
from fastsae.train.limits import needed_memory
from fastsae.train.pipeline import Pipeline
from fastsae.train.trainer import Trainer, build_sae

_STEPS = 3  # that are timed, after one that is not


@dataclass(frozen=True)
class Speed:
    """Seconds per token of the parts of a run, measured.

    Attributes:
        forward: The language model up to the layer.
        step: A training step of one SAE, with as many active features as it starts with.
        evaluation: The language model's passes of the evaluation, estimated by their products.
        mean_length: Tokens of a held-out dialogue.
    """

    forward: float
    step: float
    evaluation: float
    mean_length: float

    def seconds(self, saes: Mapping[str, TrainConfig], n_held_out: int) -> float:
        """What one stream takes."""
        config = next(iter(saes.values()))
        return config.tokens * (self.forward + self.step * len(saes)) + (
            n_held_out * self.mean_length * self.evaluation * len(saes)
        )


def measure(pipeline: Pipeline, config: TrainConfig) -> Speed:
    """Times a batch of the language model and a few steps of an SAE."""
    residual = pipeline.residual
    batches = pipeline.sequencer()
    rows, seconds, n_tokens = list[torch.Tensor](), 0.0, 0
    while n_tokens < 2 * config.batch_size:
        batch = next(batches)
        started = time.perf_counter()
        (acts,) = read_layers([residual], batch.input_ids, batch.attention_mask)
        mask = batch.attention_mask.bool().to(acts.device)
        rows.append(acts[mask])
        seconds += time.perf_counter() - started
        n_tokens += len(rows[-1])
    acts = torch.cat(rows)
    nothing = torch.zeros(config.batch_size, dtype=torch.int64)
    taken = ActivationBatch(acts[-config.batch_size :], nothing, nothing, nothing)
    trainer = Trainer(build_sae(config, residual.d_in, residual.device), iter(()), config)
    trainer.initialize(acts)
    trainer.train_step(taken)
    started = time.perf_counter()
    for _ in range(_STEPS):
        loss = trainer.train_step(taken).loss
    loss.item()  # a GPU is done only now
    step = (time.perf_counter() - started) / (_STEPS * config.batch_size)
    lengths = pipeline.held_out_batches()
    first = next(lengths)
    mean_length = first.attention_mask.sum().item() / len(first.input_ids)
    forward = seconds / n_tokens
    return Speed(forward, step, forward * cost_of_evaluation(residual), mean_length)


def memory(pipeline: Pipeline, streams: Mapping[str, Mapping[str, TrainConfig]]) -> int:
    """Bytes that the largest stream needs at least, the language model apart."""
    residual = pipeline.residual
    itemsize = residual.model.dtype.itemsize
    return max(
        needed_memory(list(saes.values()), residual.d_in, itemsize, residual.device) for saes in streams.values()
    )
