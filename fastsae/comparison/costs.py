"""What a comparison will take, told before it starts: whether each arm has its data, time by a first batch, memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastsae.comparison.arms import Plan
from fastsae.data.activations import read_layers
from fastsae.data.texts import load_texts
from fastsae.data.tokens import TokenRows
from fastsae.errors import UsageError
from fastsae.train.config import TrainConfig
from fastsae.train.held_out import cost_of_evaluation
from fastsae.train.limits import needed_memory
from fastsae.train.pipeline import Pipeline, build_pipeline, check_sequencing
from fastsae.train.trainer import Trainer, build_sae

_STEPS = 3  # that are timed, after one that is not
_WINDOW = 1024  # dialogues or texts whose tokens are counted together


@dataclass(frozen=True)
class Costs:
    """What a comparison takes.

    Attributes:
        forward: Seconds of the language model, up to the layer, for a token.
        step: Seconds of a training step of one SAE for a token, with as many active features as it starts with.
        evaluation: Seconds of the evaluation's passes of the language model for a token, that of all SAEs of a stream together
            and that of each, estimated by their products.
        mean_length: Tokens of a held-out dialogue.
        n_bytes: Memory that the largest stream needs at least, beside the language model.
    """

    forward: float
    step: float
    evaluation: tuple[float, float]
    mean_length: float
    n_bytes: int

    def seconds(self, saes: Mapping[str, TrainConfig]) -> float:
        """What one stream takes."""
        config = next(iter(saes.values()))
        evaluated = (config.eval_dialogues or 0) * self.mean_length
        together, each = self.evaluation
        return config.tokens * (self.forward + self.step * len(saes)) + evaluated * (together + each * len(saes))


def estimate(plan: Plan, *, progress: bool = False) -> Costs:
    """Finds out what a comparison would take; loads the model and the data, and computes a few batches.

    Raises:
        UsageError: The model cannot take what an arm feeds it, or an arm has too few tokens.
        FastsaeError: The model or the data are at fault, as the message says.
    """
    streams = plan.streams()
    configs = {name: next(iter(saes.values())) for name, saes in streams.items()}
    first = configs["fast"]
    pipeline = build_pipeline(first, list(streams["fast"].values()), progress=progress)
    _check_tokens("dataset", first, pipeline, pipeline.dialogues, pipeline.train)
    for config in configs.values():
        check_sequencing(pipeline.residual, pipeline.tokenizer, config, pipeline.max_length)
        if config.text is not None:
            texts = load_texts(config.text, n_tokens=config.tokens, progress=progress)
            _check_tokens("text", config, pipeline, texts, range(len(texts)))
    residual = pipeline.residual
    itemsize = residual.model.dtype.itemsize
    n_bytes = max(needed_memory(list(s.values()), residual.d_in, itemsize, residual.device) for s in streams.values())
    return Costs(*_measure(pipeline, first), n_bytes=n_bytes)


def _check_tokens(option: str, config: TrainConfig, pipeline: Pipeline, data: Any, indices: Any) -> None:
    """Raises UsageError where an arm would see some of its data twice, and the others would not."""
    rows = TokenRows(data, pipeline.tokenizer, config.max_length, None)
    n_tokens = 0
    for start in range(0, len(indices), _WINDOW):
        n_tokens += sum(len(ids) for _, ids in rows.read(indices[start : start + _WINDOW])[0])
        if n_tokens >= config.tokens:
            return
    raise UsageError(
        f"{option}: expected at least the {config.tokens:,} tokens of an arm in {getattr(config, option)!r}, so that none is "
        f"seen twice, got {n_tokens:,}; lower --tokens, or give more data"
    )


def _measure(pipeline: Pipeline, config: TrainConfig) -> tuple[float, float, tuple[float, float], float]:
    """The first four figures of `Costs`, from a batch or two of the language model and a few steps of an SAE."""
    residual, batches = pipeline.residual, pipeline.sequencer()
    parts, seconds = list[torch.Tensor](), 0.0
    while sum(map(len, parts)) < config.batch_size:
        batch = next(batches)
        started = time.perf_counter()
        (acts,) = read_layers([residual], batch.input_ids, batch.attention_mask)
        parts.append(acts[batch.attention_mask.bool().to(acts.device)])
        seconds += time.perf_counter() - started
    acts = torch.cat(parts)
    taken = acts[-config.batch_size :]
    trainer = Trainer(build_sae(config, residual.d_in, residual.device), iter(()), config)
    trainer.initialize(acts)
    trainer.train_step(taken)
    started = time.perf_counter()
    for _ in range(_STEPS):
        loss = trainer.train_step(taken).loss
    loss.item()  # a GPU is done only now
    step = (time.perf_counter() - started) / (_STEPS * config.batch_size)
    held_out = next(pipeline.held_out_batches())
    mean_length = held_out.attention_mask.sum().item() / len(held_out.input_ids)
    forward = seconds / len(acts)
    of_one, of_two = (cost_of_evaluation(residual.model, [residual.layer] * n) for n in (1, 2))
    evaluation = forward * (2 * of_one - of_two), forward * (of_two - of_one)
    return forward, step, evaluation, mean_length
