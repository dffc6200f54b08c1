"""A training run from configs to folders: data, training with checkpoints, evaluation, files, report."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastsae.data.chat import Dialogue
from fastsae.data.stream import StreamCounts
from fastsae.disk import local_path, write_json
from fastsae.distributed import Group, launch
from fastsae.distributed.launch import Processes
from fastsae.distributed.together import together
from fastsae.errors import FastsaeError
from fastsae.fields import read_json
from fastsae.interrupt import Interrupted
from fastsae.train import checkpoint, joint_checkpoint
from fastsae.train.config import TrainConfig
from fastsae.train.curves import Curves, Row, check_loggers
from fastsae.train.evaluation import evaluate_saes
from fastsae.train.folder import (
    CONFIG_FILE,
    METRICS_FILE,
    check_fingerprints,
    how_to_go_on,
    located_config,
    prepare,
    read_origin,
    resumed_config,
    write_configs,
)
from fastsae.train.init_from import load_source, with_options_of
from fastsae.train.l0_control import l0_metrics
from fastsae.train.pipeline import Given, Pipeline, build_pipeline, resolve_device
from fastsae.train.plan import check_processes
from fastsae.train.results import save_sae, write_features_pages, write_run
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
    pages: bool = False,
) -> dict[str, Any]:
    """Trains, evaluates and saves an SAE; returns the metrics, of several processes in the first.

    Writes to `output`: SAELens' `cfg.json`, `sae_weights.safetensors` and `sparsity.safetensors`, `config.json`,
    `metrics.json`, `report.html`, and, while it runs, `metrics.jsonl` with the curves and a checkpoint; with
    `keep_checkpoints` also the SAEs of the newest ones, as folders `checkpoints/sae-step-N`. Nothing is written before model,
    data and options are known to fit.

    Args:
        config: The run.
        output: A folder that is new or empty, or, to resume, the folder of a run.
        model: A causal language model of transformers, in the place of `config.model`; it is used where it is, as it is.
        tokenizer: Its tokenizer.
        dialogues: Dialogues, each a list of `{"role", "content"}` messages, in the place of `config.dataset`.
        texts: Plain texts or lists of token ids to train on, in the place of `config.text`.
        resume: Go on from the newest checkpoint in `output`; from the first step where there is none yet.
        progress: Show progress bars.
        pages: At the end also collect examples of features, and write `features.html`.

    Raises:
        UsageError: An option, or `output`, does not fit.
        FastsaeError: The run failed for a reason the message names.
    """
    given = Given(model, tokenizer, dialogues, texts)
    return _until_interrupted({"": config}, local_path(output), given, resume, progress, pages).get("", {})


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
    configs: dict[str, TrainConfig], output: Path, given: Given, resume: bool, progress: bool, pages: bool = False
) -> dict[str, dict[str, Any]]:
    named = {name: given.named(config) for name, config in configs.items()}
    first = next(iter(named.values()))
    device = resolve_device(first.device)
    try:
        with launch.start(first.shard_features, first.process_timeout, device) as processes:
            progress = progress and processes.is_first
            return _train(named, output, given, resume, progress, pages, processes)
    except KeyboardInterrupt as interruption:
        message = how_to_go_on(output, next(iter(configs.values())))
        raise Interrupted(message, getattr(interruption, "number", signal.SIGINT)) from None


def _train(
    configs: dict[str, TrainConfig],
    output: Path,
    given: Given,
    resume: bool,
    progress: bool,
    pages: bool,
    processes: Processes,
) -> dict[str, dict[str, Any]]:
    started = time.perf_counter()
    session, seconds_before = _prepared(configs, output, given, resume, progress, processes)
    configs = session.configs

    def seconds() -> float:
        return seconds_before + time.perf_counter() - started

    with _curves(output, session) as on_rows:
        session.train(lambda: _save(output, session, seconds()), on_rows)
    speeds = session.speeds()
    session.calibrate()
    counts = {layer: session.supply.counts(layer) for layer in session.supply.streams}
    if processes.groups.data.rank > 0 and not session.is_placed:
        return {}  # the processes of the first group have the whole SAE
    metrics = _finish(output, session, counts, speeds, seconds, progress)
    if session.is_placed:
        for other in processes.groups.world.gather_objects({"metrics": metrics, "failures": session.failures}):
            metrics |= other["metrics"]
            session.failures |= other["failures"]
        metrics = {name: metrics[name] for name in configs if name in metrics}
    if not processes.is_first:
        return {}
    if "" not in configs:
        write_json(output / METRICS_FILE, {"saes": metrics, "failures": session.failures, "seconds": seconds()})
    checkpoint.discard(output)
    if session.failures:
        raise FastsaeError(
            f"{len(session.failures)} of {len(configs)} SAEs failed, the others are complete. "
            + " ".join(f"{name}: {text}." for name, text in session.failures.items())
        )
    if pages and processes.groups.features.size == 1:
        write_features_pages(output, session, progress)
    return metrics


def _prepared(
    configs: dict[str, TrainConfig],
    output: Path,
    given: Given,
    resume: bool,
    progress: bool,
    processes: Processes,
) -> tuple[Session, float]:
    """The SAEs of a run, new or as a checkpoint has them, and the seconds that the run has taken before."""
    _check_options(configs, output, resume, processes)
    configs = {name: located_config(config) for name, config in configs.items()}
    check_loggers(configs.values())
    if resume:
        configs = {name: resumed_config(output / name, config) for name, config in configs.items()}
    if processes.is_first:
        prepare(output, resume=resume)
    processes.wait_for_all()
    saved = joint_checkpoint.find(output, processes.groups) if resume else None
    begin = configs if saved is None else {}
    sources = {name: load_source(config) for name, config in begin.items() if config.init_from is not None}
    configs |= {name: with_options_of(configs[name], source.sae) for name, source in sources.items()}
    pipeline = _build_pipeline(configs, given, progress, processes)
    configs = {name: pipeline.resolved(config) for name, config in configs.items()}
    fingerprints = pipeline.fingerprints()
    processes.check_same({**fingerprints, "eval_dialogues": pipeline.config.eval_dialogues})
    if resume:
        for name, config in configs.items():
            check_fingerprints(output / name, config, fingerprints)
    session, seconds_before = Session(pipeline, configs, progress, processes), 0.0
    if saved is not None:
        seconds_before = session.resume(saved, output)
        session.origins = {name: read_origin(output / name) for name in configs}
    else:
        session.initialize(sources)
    # a resumed run writes them again: model and dataset may have moved
    if processes.is_first:
        write_configs(output, configs, fingerprints, session.origins)
    return session, seconds_before


def _build_pipeline(configs: dict[str, TrainConfig], given: Given, progress: bool, processes: Processes) -> Pipeline:
    """Model and data; all processes compute the model in the format that is fastest where the first one is."""
    options: dict[str, Any] = {"progress": progress, "given": given, "part": (processes.rank, processes.size)}
    pipeline = build_pipeline(next(iter(configs.values())), list(configs.values()), **options)
    wanted = processes.groups.world.broadcast_object(pipeline.config.model_dtype)
    if wanted == pipeline.config.model_dtype:
        return pipeline
    configs = {name: replace(config, model_dtype=wanted) for name, config in configs.items()}
    return build_pipeline(next(iter(configs.values())), list(configs.values()), **options)


def _check_options(configs: Mapping[str, TrainConfig], output: Path, resume: bool, processes: Processes) -> None:
    """Raises UsageError where options are not the same in all processes, or do not fit so many of them."""
    if processes.size == 1:
        return
    first = next(iter(configs.values()))
    alike = {name: value for name, value in asdict(first).items() if name not in ("device", "log")}
    others = {name: asdict(config) for name, config in configs.items() if config is not first}
    processes.check_same({**alike, **others, "output": str(output), "resume": resume})
    for config in configs.values():
        check_processes(config, processes.size)


@contextmanager
def _curves(output: Path, session: Session) -> Iterator[Callable[[dict[str, Row]], object]]:
    """What takes new points of the curves; in a process that writes no files they are written nowhere."""
    if not session.writes:
        yield lambda rows: None
        return
    history = {name: trainer.history for name, trainer in session.trainers.items()}
    configs = {name: session.configs[name] for name in history}
    curves = Curves({name: output / name for name in history}, configs, history)
    try:
        yield curves.add
    finally:
        curves.close()


def _save(output: Path, session: Session, seconds: float) -> None:
    """Writes a checkpoint, and before it, where one is due, the SAEs that are to be kept."""
    most = session.common.keep_checkpoints
    if most is not None and session.checkpoint_is_due:
        session.drop_what_is_not_finite()
        for name, trainer in session.trainers.items():
            write = partial(_write_kept, output=output, session=session, name=name, world=trainer.groups.world)
            checkpoint.keep(output / name, session.step, most, write, trainer.groups.world)
    session.save(output, seconds)


def _write_kept(folder: Path, output: Path, session: Session, name: str, world: Group) -> None:
    """Writes the SAE as it is now to a folder, by all processes that train it."""
    sae = session.sae_now(name)
    with together(world, f"write {folder}"):
        save_sae(folder, session, name, sae)
        if session.writes:
            write_json(folder / CONFIG_FILE, read_json(output / name / CONFIG_FILE))


def _finish(
    output: Path,
    session: Session,
    counts: Mapping[int, StreamCounts],
    speeds: dict[str, float | None],
    seconds: Callable[[], float],
    progress: bool,
) -> dict[str, dict[str, Any]]:
    """Evaluates the SAEs and writes their files; what a killed run has finished already is read again."""
    places = {name: output / name / METRICS_FILE for name in session.trainers}
    found: dict[str, dict[str, Any]] = {name: read_json(path) for name, path in places.items() if path.exists()}
    left = {name: trainer for name, trainer in session.trainers.items() if name not in found}
    for name, trainer in left.items():
        trainer.sae.fold_activation_scale_(trainer.scale)
        save_sae(output / name, session, name, trainer.sae)  # before the evaluation, which can fail
    trained_in = seconds()
    saes = {name: (trainer.sae, session.view(name).residual) for name, trainer in left.items()}
    options: dict[str, Any] = {"progress": progress, "on_failure": session.drop}
    results = evaluate_saes(saes, session.pipeline, session.supply.forward.drops, **options) if saes else {}
    cost = {"seconds": seconds(), "seconds_of_evaluation": seconds() - trained_in}
    for name, result in results.items():
        config = session.configs[name]
        metrics = {
            **result.metrics,
            **l0_metrics(config, result.metrics["l0"], left[name].history[-1]["l0"]),
            **counts[session.view(name).residual.layer].metrics(),
            **speeds,
            "tokens": config.steps * config.batch_size,
            "tokens_evaluated": result.metrics["tokens"],
            **cost,
            "seconds_of_evaluation_alone": result.seconds,
        }
        write_run(output / name, session, name, result, metrics)
        found[name] = metrics
    return {name: found[name] for name in session.trainers}
