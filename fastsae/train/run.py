"""One training run from a config to a folder: data, training with checkpoints, evaluation, files, report."""

from __future__ import annotations

import json
import logging
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastsae.data.buffer import MixingBuffer, activation_stream
from fastsae.data.sequencing import FastSequencer
from fastsae.errors import FastsaeError, UsageError
from fastsae.evaluate import Evaluation, evaluate, write_report
from fastsae.sae import SparseAutoencoder
from fastsae.sae.files import write_json
from fastsae.train import checkpoint
from fastsae.train.config import TrainConfig, field_names
from fastsae.train.initialize import SAMPLE
from fastsae.train.pipeline import Pipeline, build_pipeline
from fastsae.train.trainer import Trainer, build_sae
from fastsae.version import __version__

CONFIG_FILE, METRICS_FILE, REPORT_FILE = "config.json", "metrics.json", "report.html"

logger = logging.getLogger(__name__)


def train(config: TrainConfig, output: Path, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Trains, evaluates and saves an SAE; returns the metrics.

    Writes to `output`: SAELens' `cfg.json` and `sae_weights.safetensors`, `config.json`, `metrics.json`, `report.html`, and,
    while it runs, a checkpoint. Nothing is written before model, data and options are known to fit.

    Args:
        config: The run.
        output: A folder that is new or empty, or, to resume, the folder of a run.
        resume: Go on from the newest checkpoint in `output`; from the first step where there is none yet.
        progress: Show progress bars.

    Raises:
        UsageError: An option, or `output`, does not fit.
        FastsaeError: The run failed for a reason the message names.
    """
    started = time.perf_counter()
    if not resume:
        check_output(output)
    elif (output / METRICS_FILE).exists():
        raise UsageError(f"--resume: the run in {output} is complete, its metrics are in {METRICS_FILE}; nothing to do")
    saved = checkpoint.load_latest(output) if resume else None
    pipeline = build_pipeline(config)
    config = replace(config, layer=pipeline.residual.layer)
    parts = _Parts.build(config, pipeline)
    if saved is not None:
        seconds_before = parts.restore(saved, output)
    else:
        seconds_before = 0.0
        logger.info("filling the buffer with the activations of %d tokens", config.buffer_tokens)
        parts.trainer.initialize(parts.buffer.sample(SAMPLE))
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / CONFIG_FILE, described(config))

    def seconds() -> float:
        return seconds_before + time.perf_counter() - started

    run_with_bar(parts.trainer, lambda: parts.save(output, seconds()), progress)
    sae = parts.trainer.sae
    sae.fold_activation_scale_(parts.trainer.scale)
    save_sae(output, config, sae)  # before the evaluation, which can fail
    result = evaluate_sae(sae, config, pipeline, progress=progress)
    dropped = parts.sequencer.dropped
    if dropped:
        logger.warning("the chat template refused %d dialogues of the last pass over the data", dropped)
    metrics = {
        **result.metrics,
        "tokens": config.steps * config.batch_size,
        "tokens_evaluated": result.metrics["tokens"],
        "dialogues_dropped": dropped,
        "seconds": seconds(),
    }
    write_run(output, config, sae, parts.trainer, result, metrics)
    return metrics


@dataclass(frozen=True)
class _Parts:
    """The parts of a run that move from step to step, saved and restored together."""

    sequencer: FastSequencer
    buffer: MixingBuffer
    trainer: Trainer

    @classmethod
    def build(cls, config: TrainConfig, pipeline: Pipeline) -> _Parts:
        device = pipeline.residual.device
        sequencer = pipeline.sequencer(config)
        stream = activation_stream(pipeline.residual, sequencer, config.drop_first_position)
        buffer = MixingBuffer(stream, config.buffer_tokens, config.batch_size, config.seed, device)
        return cls(sequencer, buffer, Trainer(build_sae(config, pipeline.residual.d_in, device), buffer, config))

    def save(self, output: Path, seconds: float) -> None:
        state = {name: getattr(self, name).state_dict() for name in ("sequencer", "buffer", "trainer")}
        checkpoint.save(output, self.trainer.step, {**state, "seconds": seconds})

    def restore(self, saved: dict[str, Any], output: Path) -> float:
        """Goes on where `saved` was taken; returns the seconds that the run had taken until then."""
        try:
            for name in ("sequencer", "buffer", "trainer"):
                getattr(self, name).load_state_dict(saved[name])
            return float(saved["seconds"])
        except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise checkpoint.corrupt(output / checkpoint.FOLDER, repr(error)) from None


def run_with_bar(trainer: Trainer, save_checkpoint: Any, progress: bool) -> None:
    """Trains to the last step behind a progress bar; calls `save_checkpoint` where one is due."""
    config = trainer.config
    with tqdm(
        total=config.steps * config.batch_size,
        initial=trainer.step * config.batch_size,
        unit="tok",
        unit_scale=True,
        desc="training",
        disable=not progress,
    ) as bar:

        def on_log(row: dict[str, float]) -> None:
            bar.update(row["tokens"] - bar.n)
            bar.set_postfix(loss=f"{row['loss']:.4g}", l0=f"{row['l0']:.1f}", fvu=f"{row['fvu']:.3f}")

        trainer.run(on_log, save_checkpoint)


def check_output(output: Path) -> None:
    """Raises UsageError unless `output` is new or an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(
            f"--output: expected a new or empty folder, but {output} exists; "
            "choose another with --output, or go on with an interrupted run with --resume"
        )


def described(config: TrainConfig) -> dict[str, Any]:
    """The resolved config and what it ran on."""
    versions = {"fastsae": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {**asdict(config), "versions": versions}


def read_config(folder: Path) -> TrainConfig:
    """The config that a run saved.

    Raises:
        UsageError: `folder` holds none.
        FastsaeError: It is corrupt.
    """
    path = folder / CONFIG_FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return TrainConfig(**{name: saved[name] for name in field_names()})
    except FileNotFoundError:
        raise UsageError(
            f"{folder}: expected the folder of a run of `fastsae train`, {CONFIG_FILE} is missing"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise FastsaeError(f"{path}: expected the options of a run, got a corrupt file ({error!r})") from None


def hook_name(layer: int | None) -> str:
    """TransformerLens' name of the residual stream after a block, which SAELens writes and reads."""
    return f"blocks.{layer}.hook_resid_post"


def save_sae(output: Path, config: TrainConfig, sae: SparseAutoencoder, **metadata: Any) -> None:
    """Saves the SAE with what SAELens wants to know of its place in the model."""
    sae.save(
        output,
        model_name=config.model,
        hook_name=hook_name(config.layer),
        dataset_path=config.dataset,
        context_size=config.max_length,
        **metadata,
    )


def write_run(
    output: Path,
    config: TrainConfig,
    sae: SparseAutoencoder,
    trainer: Trainer,
    result: Evaluation,
    metrics: dict[str, Any],
) -> None:
    """Writes the run's files, the metrics last: where they are, the run is complete. Then drops its checkpoints."""
    save_sae(output, config, sae, l0=metrics["l0"])
    settings = described(config)
    write_report(output / REPORT_FILE, config=settings, metrics=metrics, history=trainer.history, evaluation=result)
    write_json(output / METRICS_FILE, metrics)
    checkpoint.discard(output)


def evaluate_folder(folder: Path, config: TrainConfig, *, progress: bool = True) -> Evaluation:
    """Evaluates a saved SAE on the held-out dialogues of `config`.

    Raises:
        UsageError: The SAE does not fit the model.
        FastsaeError: The folder holds no readable SAE.
    """
    try:
        sae = SparseAutoencoder.load(folder)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from None
    except ValueError as error:
        raise FastsaeError(str(error)) from None
    pipeline: Pipeline = build_pipeline(config)
    if sae.d_in != pipeline.residual.d_in:
        raise UsageError(
            f"{folder}: expected an SAE of width d_in = {pipeline.residual.d_in} as {config.model!r} has, got {sae.d_in}"
        )
    trained_on = sae.metadata.get("hook_name")
    if trained_on not in (None, hook_name(pipeline.residual.layer)):
        logger.warning("this SAE was trained on %s, not on layer %d", trained_on, pipeline.residual.layer)
    return evaluate_sae(sae.to(pipeline.residual.device), config, pipeline, progress=progress)


def evaluate_sae(sae: SparseAutoencoder, config: TrainConfig, pipeline: Pipeline, *, progress: bool) -> Evaluation:
    """Evaluates an SAE on the held-out dialogues of a pipeline."""
    return evaluate(
        sae,
        pipeline.residual,
        pipeline.tokenizer,
        pipeline.held_out_batches(config),
        special_tokens=pipeline.special_tokens,
        n_dialogues=len(pipeline.held_out),
        progress=progress,
    )
