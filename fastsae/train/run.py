"""One training run from a config to a folder: data, training with checkpoints, evaluation, files, report."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae.data.activations import ResidualStream
from fastsae.data.buffer import ActivationBatch, MixingBuffer
from fastsae.data.chat import Dialogue
from fastsae.data.progress import bar
from fastsae.data.sequencing import Sequencer
from fastsae.data.sinks import MAX_NORM_MULTIPLE
from fastsae.data.stream import ActivationStream
from fastsae.disk import local_path, write_json
from fastsae.errors import FastsaeError, UsageError
from fastsae.evaluate import Evaluation, evaluate, write_report
from fastsae.fields import Fields, is_finite
from fastsae.interrupt import Interrupted, Postponed
from fastsae.sae import SparseAutoencoder, files
from fastsae.train import checkpoint, fingerprint
from fastsae.train.config import TrainConfig
from fastsae.train.folder import (
    CONFIG_FILE,
    METRICS_FILE,
    REPORT_FILE,
    check_fingerprints,
    described,
    how_to_go_on,
    kept_options,
    located,
    prepare,
    resumed_config,
)
from fastsae.train.initialize import SAMPLE
from fastsae.train.l0_control import l0_metrics
from fastsae.train.pipeline import Given, Pipeline, build_pipeline
from fastsae.train.saved_state import check_buffer, check_options, check_stream, check_trainer
from fastsae.train.trainer import Trainer, build_sae

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
    `metrics.json`, `report.html`, and, while it runs, a checkpoint. Nothing is written before model, data and options are
    known to fit.

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
    output = local_path(output)
    given = Given(model, tokenizer, dialogues, texts)
    try:
        return _train(given.named(config), output, given, resume=resume, progress=progress)
    except KeyboardInterrupt as interruption:
        raise Interrupted(how_to_go_on(output, config), getattr(interruption, "number", signal.SIGINT)) from None


def _train(config: TrainConfig, output: Path, given: Given, *, resume: bool, progress: bool) -> dict[str, Any]:
    started = time.perf_counter()
    text = None if config.text is None else located(config.text)
    config = replace(config, model=located(config.model), dataset=located(config.dataset), text=text)
    if resume:
        config = resumed_config(output, config)
    prepare(output, resume=resume)
    saved = checkpoint.load_latest(output) if resume else None
    pipeline = build_pipeline(config, progress=progress, given=given)
    config = pipeline.config
    fingerprints = {
        "dataset": fingerprint.of_dialogues(pipeline.dialogues, config.max_dialogues),
        "model": fingerprint.of_model(pipeline.residual.model, pipeline.tokenizer),
    }
    if pipeline.texts is not None:
        fingerprints["text"] = fingerprint.of_dialogues(pipeline.texts)
    if resume:
        check_fingerprints(output, config, fingerprints)
    parts = _Parts(config, pipeline, progress)
    if saved is not None:
        seconds_before = parts.restore(saved, output)
    else:
        seconds_before = 0.0
        logger.info("filling the buffer with the activations of %d tokens", parts.n_first)
        parts.trainer.initialize(parts.buffer.sample(SAMPLE))
        output.mkdir(parents=True, exist_ok=True)
    # a resumed run writes it again: model and dataset may have moved
    write_json(output / CONFIG_FILE, {**described(config), "fingerprints": fingerprints})

    def seconds() -> float:
        return seconds_before + time.perf_counter() - started

    parts.train(lambda: parts.save(output, seconds()), progress)
    if config.architecture == "batchtopk":
        parts.trainer.calibrate(parts.buffer.sample(SAMPLE))
    sae = parts.trainer.sae
    sae.fold_activation_scale_(parts.trainer.scale)
    save_sae(output, pipeline, parts)  # before the evaluation, which can fail
    trained_in = seconds()
    result = evaluate_sae(sae, pipeline, parts.stream.sequencer, progress=progress)
    metrics = {
        **result.metrics,
        **l0_metrics(config, result.metrics["l0"], parts.trainer.history[-1]["l0"]),
        **parts.stream.counts.metrics(),
        "tokens": config.steps * config.batch_size,
        "tokens_evaluated": result.metrics["tokens"],
        "seconds": seconds(),
        "seconds_of_evaluation": seconds() - trained_in,
    }
    write_run(output, pipeline, parts, result, metrics)
    return metrics


class _Parts:
    """The parts of a run that move from step to step, saved and restored together.

    They are the source of the trainer's batches too: a signal that comes while the buffer fills up ends that at once, and
    what is saved then is the state before.
    """

    def __init__(self, config: TrainConfig, pipeline: Pipeline, progress: bool = False) -> None:
        self.config, self.pipeline, self.device = config, pipeline, pipeline.residual.device
        self.postponed = Postponed()
        self.stream = ActivationStream(
            self._residual, pipeline.sequencer(), config.drop_first_position, config.max_norm_multiple
        )
        # BatchTopK's threshold is set at the end, by activations that no step has seen
        n_wanted = config.steps * config.batch_size + (SAMPLE if config.architecture == "batchtopk" else 0)
        self.n_first = min(config.buffer_tokens, n_wanted)
        self.buffer = MixingBuffer(
            self.stream, config.buffer_tokens, config.batch_size, config.seed, self.device, progress, n_wanted
        )
        self.trainer = Trainer(build_sae(config, pipeline.residual.d_in, self.device), self._batches(), config)
        self._stream_state = self.stream.state_dict()

    def _residual(self, *arguments: Tensor) -> Tensor:
        with self.postponed.at_once():
            return self.pipeline.residual(*arguments)

    def _batches(self) -> Iterator[ActivationBatch]:
        self._stream_state = self.stream.state_dict()
        for batch in self.buffer:
            self._stream_state = self.stream.state_dict()
            yield batch
            self.postponed.check()  # between two steps

    def train(self, save: Callable[[], None], progress: bool) -> None:
        """Trains to the last step; calls `save` where a checkpoint is due, and before a signal ends the run.

        Raises:
            Interrupted: By a signal.
            FastsaeError: A number has left the finite ones.
        """
        with self.postponed:
            try:
                run_with_bar(self.trainer, save, progress)
                self.postponed.check()
            except Interrupted:
                if self.config.checkpoint_every:
                    save()
                raise
            except ValueError:  # the ops refuse some of what a step with NaN left
                self._check_finite()
                raise
        self._check_finite()

    def _check_finite(self) -> None:
        """Raises FastsaeError where a weight is NaN or infinite, which no file shall hold."""
        for name, tensor in self.trainer.sae.state_dict().items():
            if not is_finite(tensor):
                raise checkpoint.not_finite(self.trainer.step, f"{name} holds NaN or infinity")

    def save(self, output: Path, seconds: float) -> None:
        state = {
            "options": kept_options(self.config),
            "stream": self._stream_state,
            "buffer": self.buffer.state_dict(),
            "trainer": self.trainer.state_dict(),
            "seconds": seconds,
        }
        checkpoint.save(output, self.trainer.step, state)

    def restore(self, saved: dict[str, Any], output: Path) -> float:
        """Goes on where `saved` was taken; returns the seconds that the run had taken until then."""
        try:
            found = Fields(saved)
            found.check_names(("options", "stream", "buffer", "trainer", "seconds"))
            check_options(found.fields("options"), kept_options(self.config))
            seconds: float = found.number("seconds", 0)
            check_trainer(found.fields("trainer"), self.trainer)
            d_in, n_dialogues = self.pipeline.residual.d_in, len(self.pipeline.trained_on)
            check_buffer(found.fields("buffer"), self.buffer, d_in, n_dialogues)
            check_stream(found.fields("stream"), self.stream)
            for name in ("stream", "buffer", "trainer"):
                getattr(self, name).load_state_dict(saved[name])
            return seconds
        except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise checkpoint.corrupt(output / checkpoint.FOLDER, error) from None


def run_with_bar(trainer: Trainer, save_checkpoint: Callable[[], None], progress: bool) -> None:
    """Trains to the last step behind a progress bar; calls `save_checkpoint` where one is due."""
    config = trainer.config
    done = trainer.step * config.batch_size
    total = config.steps * config.batch_size
    with bar("training", "tok", total=total, progress=progress, done=done, delay=0) as advance:  # rarely called

        def on_log(row: dict[str, float | None]) -> None:
            nonlocal done
            n_new, done = int(row["tokens"] or 0) - done, int(row["tokens"] or 0)
            fvu = "undefined" if row["fvu"] is None else f"{row['fvu']:.3f}"
            advance(n_new, loss=f"{row['loss']:.4g}", l0=f"{row['l0']:.1f}", fvu=fvu)

        trainer.run(on_log, save_checkpoint)


def hook_names(residual: ResidualStream) -> tuple[str, str]:
    """Names of the place in the model that an SAE reads: the module whose output it is, and TransformerLens' name."""
    modules = residual.model.named_modules()
    return next(
        name for name, module in modules if module is residual.block
    ), f"blocks.{residual.layer}.hook_resid_post"


def save_sae(output: Path, pipeline: Pipeline, parts: _Parts, **metadata: Any) -> None:
    """Saves the SAE with what SAELens' tools want to know of the model, of its place in it, and of the data."""
    config = pipeline.config
    is_block = config.sequencing == "block"
    parts.trainer.sae.save(
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
        median_norm=parts.stream.rule.median_norm,
        **metadata,
    )


def write_sparsity(output: Path, result: Evaluation) -> None:
    """Writes SAELens' `sparsity.safetensors`: log10 of the share of held-out tokens on which each feature fires.

    Attention sinks are left out, as in every figure. 1e-10 is added to each share, as SAELens does.
    """
    tokens = (result.metrics["tokens"] or 0) - (result.metrics["sinks"] or 0)
    share = result.feature_counts.float() / max(tokens, 1)
    files.save_sparsity((share + 1e-10).log10(), len(share), output)


def write_run(
    output: Path,
    pipeline: Pipeline,
    parts: _Parts,
    result: Evaluation,
    metrics: dict[str, Any],
) -> None:
    """Writes the run's files, the metrics last: where they are, the run is complete. Then drops its checkpoints."""
    save_sae(output, pipeline, parts, l0=metrics["l0"])
    write_sparsity(output, result)
    settings = described(pipeline.config)
    write_report(
        output / REPORT_FILE, config=settings, metrics=metrics, history=parts.trainer.history, evaluation=result
    )
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
        sae.store_by_feature_()
    except FileNotFoundError as error:
        raise UsageError(str(error)) from None
    except ValueError as error:
        raise FastsaeError(str(error)) from None
    pipeline = build_pipeline(config, progress=progress, evaluated=sae)
    trained_on = sae.metadata.get("hook_name")
    if trained_on not in (None, *hook_names(pipeline.residual)):
        logger.warning("this SAE was trained on %s, not on layer %d", trained_on, pipeline.residual.layer)
    return evaluate_sae(sae.to(pipeline.residual.device), pipeline, progress=progress)


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
