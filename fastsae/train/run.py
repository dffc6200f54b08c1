"""A training run from configs to folders: data, training with checkpoints, evaluation, files, report."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastsae.data.activations import ResidualStream
from fastsae.data.chat import Dialogue
from fastsae.data.sequencing import Sequencer
from fastsae.data.sinks import MAX_NORM_MULTIPLE
from fastsae.disk import local_path, write_json
from fastsae.errors import FastsaeError, UsageError
from fastsae.evaluate import Evaluation, evaluate, write_report
from fastsae.fields import read_json
from fastsae.interrupt import Interrupted
from fastsae.sae import SparseAutoencoder, files
from fastsae.train import checkpoint
from fastsae.train.config import TrainConfig
from fastsae.train.curves import Curves, check_loggers
from fastsae.train.folder import (
    METRICS_FILE,
    REPORT_FILE,
    check_fingerprints,
    described,
    how_to_go_on,
    located,
    prepare,
    resumed_config,
    write_configs,
)
from fastsae.train.gradients import Measure, measure_gradients
from fastsae.train.l0_control import l0_metrics
from fastsae.train.pipeline import Given, Pipeline, build_pipeline
from fastsae.train.session import Session

logger = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    output: Path | str,
    *,
    model: Any = None,
    tokenizer: Any = None,
    dialogues: Iterable[Dialogue] | None = None,
    texts: Iterable[Any] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains, evaluates and saves an SAE; returns the metrics.

    Writes to `output`: SAELens' `cfg.json`, `sae_weights.safetensors` and `sparsity.safetensors`, `config.json`,
    `metrics.json`, `report.html`, and, while it runs, `metrics.jsonl` with the curves and a checkpoint. Nothing is written
    before model, data and options are known to fit.

    Args:
        config: The run.
        output: A folder that is new or empty, or, to resume, the folder of a run.
        model: A causal language model of transformers, in the place of `config.model`; it is used where it is, as it is.
        tokenizer: Its tokenizer.
        dialogues: Dialogues, each a list of `{"role", "content"}` messages, in the place of `config.dataset`.
        texts: Plain texts or lists of token ids to train on, in the place of `config.text`.
        resume: Go on from the newest checkpoint in `output`; from the first step where there is none yet.
        progress: Show progress bars.

    Raises:
        UsageError: An option, or `output`, does not fit.
        FastsaeError: The run failed for a reason the message names.
    """
    given = Given(model, tokenizer, dialogues, texts)
    return _until_interrupted({"": config}, local_path(output), given, resume, progress)[""]


def train_many(
    configs: Mapping[str, TrainConfig],
    output: Path | str,
    *,
    model: Any = None,
    tokenizer: Any = None,
    dialogues: Iterable[Dialogue] | None = None,
    texts: Iterable[Any] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Trains several SAEs on one stream of activations, each as `train` would alone; returns their metrics by name.

    The model runs once for all of them, up to the deepest of their layers. Each SAE has the folder `output/NAME`, with the
    same files, and on a CPU the same bits in them, as if it were trained alone with the options of its `config.json`.
    `output/saes.json` lists them. An SAE that fails is dropped, and the others go on.

    Args:
        configs: The SAEs by name; see `fastsae.train.grid`, which makes them of a grid or a file.
        output: A folder that is new or empty, or, to resume, that of such a run.
        model: As for `train`, and so are the next three.
        tokenizer: The model's tokenizer.
        dialogues: Dialogues.
        texts: Plain texts or lists of token ids.
        resume: Go on from the newest checkpoint in `output`; from the first step where there is none yet.
        progress: Show progress bars.

    Raises:
        UsageError: An option, or `output`, does not fit.
        FastsaeError: The run failed, or some of its SAEs did, for reasons that the message names; the others are complete.
    """
    given = Given(model, tokenizer, dialogues, texts)
    return _until_interrupted(dict(configs), local_path(output), given, resume, progress)


def _until_interrupted(
    configs: dict[str, TrainConfig], output: Path, given: Given, resume: bool, progress: bool
) -> dict[str, dict[str, Any]]:
    try:
        return _train({name: given.named(config) for name, config in configs.items()}, output, given, resume, progress)
    except KeyboardInterrupt as interruption:
        message = how_to_go_on(output, next(iter(configs.values())))
        raise Interrupted(message, getattr(interruption, "number", signal.SIGINT)) from None


def _train(
    configs: dict[str, TrainConfig], output: Path, given: Given, resume: bool, progress: bool
) -> dict[str, dict[str, Any]]:
    started = time.perf_counter()
    configs = {name: _located(config) for name, config in configs.items()}
    check_loggers(configs.values())
    if resume:
        configs = {name: resumed_config(output / name, config) for name, config in configs.items()}
    prepare(output, resume=resume)
    saved = checkpoint.load_latest(output) if resume else None
    first = next(iter(configs.values()))
    pipeline = build_pipeline(first, list(configs.values()), progress=progress, given=given)
    configs = {name: pipeline.resolved(config) for name, config in configs.items()}
    fingerprints = pipeline.fingerprints()
    if resume:
        for name, config in configs.items():
            check_fingerprints(output / name, config, fingerprints)
    session = Session(pipeline, configs, progress)
    if saved is not None:
        seconds_before = session.restore(saved, output)
    else:
        seconds_before = 0.0
        session.initialize()
    # a resumed run writes them again: model and dataset may have moved
    write_configs(output, configs, fingerprints)

    def seconds() -> float:
        return seconds_before + time.perf_counter() - started

    history = {name: trainer.history for name, trainer in session.trainers.items()}
    curves = Curves({name: output / name for name in configs}, configs, history)
    try:
        session.train(lambda: session.save(output, seconds()), curves.add)
    finally:
        curves.close()
    session.calibrate()
    metrics = {name: _finish(output / name, session, name, seconds, progress) for name in session.trainers}
    if "" not in configs:
        write_json(output / METRICS_FILE, {"saes": metrics, "failures": session.failures, "seconds": seconds()})
    checkpoint.discard(output)
    if session.failures:
        raise FastsaeError(
            f"{len(session.failures)} of {len(configs)} SAEs failed, the others are complete. "
            + " ".join(f"{name}: {text}." for name, text in session.failures.items())
        )
    return metrics


def _located(config: TrainConfig) -> TrainConfig:
    given = {name: getattr(config, name) for name in ("model", "dataset", "text", "activations")}
    places: dict[str, Any] = {name: located(value) for name, value in given.items() if value is not None}
    return replace(config, **places)


def _finish(output: Path, session: Session, name: str, seconds: Callable[[], float], progress: bool) -> dict[str, Any]:
    """Evaluates an SAE and writes its files; what a killed run has finished already is read again."""
    if (output / METRICS_FILE).exists():
        found: dict[str, Any] = read_json(output / METRICS_FILE)
        return found
    trainer, config, pipeline = session.trainers[name], session.configs[name], session.view(name)
    trainer.sae.fold_activation_scale_(trainer.scale)
    save_sae(output, session, name)  # before the evaluation, which can fail
    trained_in = seconds()
    result = evaluate_sae(trainer.sae, pipeline, session.forward.sequencer, progress=progress)
    metrics = {
        **result.metrics,
        **l0_metrics(config, result.metrics["l0"], trainer.history[-1]["l0"]),
        **session.counts(name).metrics(),
        "tokens": config.steps * config.batch_size,
        "tokens_evaluated": result.metrics["tokens"],
        "seconds": seconds(),
        "seconds_of_evaluation": seconds() - trained_in,
    }
    write_run(output, session, name, result, metrics)
    return metrics


def hook_names(residual: ResidualStream) -> tuple[str, str]:
    """Names of the place in the model that an SAE reads: the module whose output it is, and TransformerLens' name."""
    modules = residual.model.named_modules()
    return next(
        name for name, module in modules if module is residual.block
    ), f"blocks.{residual.layer}.hook_resid_post"


def save_sae(output: Path, session: Session, name: str, **metadata: Any) -> None:
    """Saves an SAE with what SAELens' tools want to know of the model, of its place in it, and of the data."""
    pipeline, config = session.view(name), session.configs[name]
    is_block, trainer = config.sequencing == "block", session.trainers[name]
    coefficient = trainer.sparsity_coefficient
    trainer.sae.save(
        output,
        model_name=config.model,
        model_class_name="AutoModelForCausalLM",  # SAELens' word for a model of transformers, as it is
        hook_name=hook_names(pipeline.residual)[0],
        dataset_path=config.dataset if config.text is None else config.text,
        context_size=config.block_length if is_block else pipeline.max_length,
        prepend_bos=pipeline.begins_with_bos(),
        seqpos_slice=[1, None] if config.drop_first_position else None,
        exclude_special_tokens=False,
        disable_concat_sequences=not is_block,  # each dialogue is a context of its own
        sequencing=config.sequencing,
        max_norm_multiple=config.max_norm_multiple,
        sparsity_coefficient=None if coefficient is None else float(coefficient),
        activation_scale=trainer.scale,
        median_norm=session.streams[pipeline.residual.layer].rule.median_norm,
        **metadata,
    )


def write_sparsity(output: Path, result: Evaluation) -> None:
    """Writes SAELens' `sparsity.safetensors`: log10 of the share of held-out tokens on which each feature fires.

    Attention sinks are left out, as in every figure. 1e-10 is added to each share, as SAELens does.
    """
    tokens = (result.metrics["tokens"] or 0) - (result.metrics["sinks"] or 0)
    share = result.feature_counts.float() / max(tokens, 1)
    files.save_sparsity((share + 1e-10).log10(), len(share), output)


def write_run(output: Path, session: Session, name: str, result: Evaluation, metrics: dict[str, Any]) -> None:
    """Writes the files of an SAE, the metrics last: where they are, it is complete."""
    save_sae(output, session, name, l0=metrics["l0"])
    write_sparsity(output, result)
    settings, history = described(session.configs[name]), session.trainers[name].history
    write_report(output / REPORT_FILE, config=settings, metrics=metrics, history=history, evaluation=result)
    write_json(output / METRICS_FILE, metrics)


def evaluate_folder(
    folder: Path, config: TrainConfig, measures: Collection[Measure] = (), *, progress: bool = True
) -> Evaluation:
    """Evaluates a saved SAE on the held-out dialogues of `config`; with `measures`, those of `fastsae.train.gradients` too.

    Raises:
        UsageError: The SAE does not fit the model.
        FastsaeError: The folder holds no readable SAE.
    """
    try:
        sae = SparseAutoencoder.load(folder)
        sae.store_by_feature_()
    except FileNotFoundError as error:
        raise UsageError(str(error)) from None
    except ValueError as error:
        raise FastsaeError(str(error)) from None
    pipeline = build_pipeline(config, progress=progress, evaluated=sae)
    trained_on = sae.metadata.get("hook_name")
    if trained_on not in (None, *hook_names(pipeline.residual)):
        logger.warning("this SAE was trained on %s, not on layer %d", trained_on, pipeline.residual.layer)
    sae = sae.to(pipeline.residual.device)
    result = evaluate_sae(sae, pipeline, progress=progress)
    gradients = measure_gradients(sae, pipeline, measures, progress=progress)
    return replace(result, metrics=result.metrics | gradients)


def evaluate_sae(sae: SparseAutoencoder, pipeline: Pipeline, *trained_on: Sequencer, progress: bool) -> Evaluation:
    """Evaluates an SAE on the held-out dialogues of a pipeline; the metrics tell of dialogues dropped since loading."""
    held_out = pipeline.held_out_batches()
    result = evaluate(
        sae,
        pipeline.residual,
        pipeline.tokenizer,
        held_out,
        special_tokens=pipeline.special_tokens,
        n_dialogues=len(pipeline.held_out),
        max_norm_multiple=pipeline.config.max_norm_multiple or MAX_NORM_MULTIPLE,
        progress=progress,
    )
    of_the_data = pipeline.all_drops(held_out, *trained_on).metrics() | {"unknown_roles": pipeline.unknown_roles}
    return replace(result, metrics=result.metrics | of_the_data)
