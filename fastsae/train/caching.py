"""The cache of activations between options and folders: writing one, and whether a run can read it."""

from __future__ import annotations

import errno
import logging
import shlex
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastsae.data.activations import ResidualStream, check_layer, read_layers
from fastsae.data.cache import CachedActivations, Manifest, write_cache
from fastsae.data.progress import bar
from fastsae.data.sequencing import Sequencer, TokenBatch
from fastsae.disk import local_path
from fastsae.errors import FastsaeError, UsageError, shown
from fastsae.interrupt import Interrupted
from fastsae.train.config import TrainConfig
from fastsae.train.folder import check_writable, located_config
from fastsae.train.initialize import SAMPLE
from fastsae.train.pipeline import Pipeline, build_pipeline

# Options that decide which tokens the model reads, and how; model and dataset are known by their fingerprints.
DEPENDS_ON = (
    "split",
    "model_dtype",
    "max_length",
    "max_dialogues",
    "dedup_words",
    "eval_dialogues",
    "data_seed",
    "sequencing",
    "hook",
)

_SINKS = 50  # one token in so many may be a sink, which no run trains on

logger = logging.getLogger(__name__)


def cache_activations(
    config: TrainConfig, layers: list[int], folder: Path | str, *, resume: bool = False, progress: bool = True
) -> Manifest:
    """Writes the activations of the dialogues that a run would train on, in its order, for `config.activations` of later runs.

    Args:
        config: The run; `tokens` says how many, or all dialogues where there are fewer.
        layers: The layers, written in one pass of the model; empty for that of `config`.
        folder: A folder that is new or empty, or, to resume or to add more tokens, a cache.
        resume: Go on behind the last shard that is there.
        progress: Show a progress bar.

    Raises:
        UsageError: An option or the folder does not fit.
        FastsaeError: The model, the data or the folder is at fault, as the message says.
            A full disk is one of them: what was written stays, and `resume` goes on.
    """
    folder = local_path(folder)
    check_writable("DIR", folder)
    if not resume and folder.exists() and any(folder.iterdir()):
        raise UsageError(
            f"{folder}: expected a new or empty folder; --resume goes on with a cache, or adds --tokens to it"
        )
    earlier = Manifest.read(folder) if resume else None
    config = replace(located_config(config), data_seed=config.order_seed)
    pipeline = build_pipeline(config, progress=progress)
    sequencer = pipeline.sequencer()
    if earlier is None:
        for layer in layers:
            check_layer(pipeline.residual.model, layer)
        chosen = sorted(set(layers)) or [pipeline.residual.layer]
        manifest = Manifest(asdict(pipeline.config), chosen, pipeline.fingerprints(), {}, 0, False, False, [])
    else:
        manifest = earlier
        check_fits(manifest, folder, pipeline, layers)
        if manifest.shards:
            sequencer.load_state_dict(manifest.sequencer)
        logger.info("%s holds %d tokens already", folder, manifest.tokens)
    residuals = [ResidualStream(pipeline.residual.model, layer, config.hook) for layer in manifest.layers]
    _check_it_serves(sequencer)
    folder.mkdir(parents=True, exist_ok=True)

    def read(batch: TokenBatch) -> list[Any]:
        positions = (batch.positions,) if batch.is_packed else ()
        return read_layers(residuals, batch.input_ids, batch.attention_mask, *positions)

    manifest.is_complete, manifest.options["tokens"] = False, config.tokens
    manifest.write(folder)
    wanted = config.tokens + config.tokens // _SINKS + SAMPLE
    try:
        with bar("caching", "tok", total=wanted, progress=progress, done=manifest.tokens) as advance:
            write_cache(folder, manifest, sequencer, read, wanted, advance)
    except KeyboardInterrupt as interruption:
        message = f"interrupted; {_go_on_with(folder)}"
        raise Interrupted(message, getattr(interruption, "number", signal.SIGINT)) from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise FastsaeError(
            f"the disk is full, {error.filename} could not be written; free some space; {_go_on_with(folder)}"
        ) from error
    return manifest


def _go_on_with(folder: Path) -> str:
    return f"whole shards stay. Go on with: fastsae cache {shlex.quote(str(folder))} --resume"


def _check_it_serves(sequencer: Sequencer) -> None:
    """Raises what a sequencer without a batch raises, before anything is written."""
    state = sequencer.state_dict()
    next(sequencer)
    sequencer.load_state_dict(state)


def check_fits(manifest: Manifest, folder: Path, pipeline: Pipeline, layers: list[int]) -> None:
    """Raises UsageError where a cache was written with other options, or from another model or dataset, than a run's."""
    config = pipeline.config
    names = list(DEPENDS_ON)
    if config.sequencing == "block":
        names.append("block_length")
    if not manifest.holds_all:
        names.append("forward_tokens")  # by which the order of the batches differs, and so which of the data are there
    for name in names:
        own = config.order_seed if name == "data_seed" else getattr(config, name)
        if manifest.options.get(name) != own:
            raise UsageError(
                f"{name}: the cache {folder} was written with {manifest.options.get(name)}, this run has {own}; "
                "leave the option out, or write another cache"
            )
    found = pipeline.fingerprints()
    for what in {**manifest.fingerprints, **found}:
        if manifest.fingerprints.get(what) != found.get(what):
            raise UsageError(
                f"{what}: the cache {folder} was written from another {what} than {shown(getattr(config, what))}, or from "
                "an earlier version of it; write another cache"
            )
    if missing := [layer for layer in layers if layer not in manifest.layers]:
        there = ", ".join(map(str, manifest.layers))
        raise UsageError(f"layer: expected one of those in the cache {folder}, {there}, got {missing[0]}")


def open_cache(pipeline: Pipeline, layers: list[int]) -> CachedActivations | None:
    """The cache that a run names, checked against what it will read; None where it names none."""
    if pipeline.config.activations is None:
        return None
    folder = local_path(pipeline.config.activations)
    manifest = Manifest.read(folder)
    check_fits(manifest, folder, pipeline, layers)
    is_block = pipeline.config.sequencing == "block"  # a second pass over the data cuts it into other blocks
    n_processes = pipeline.part[1]
    if n_processes > 1 and (is_block or not manifest.holds_all):  # each would need others than those that are there
        found = "blocks" if is_block else "the first of them alone"
        raise UsageError(
            f"activations: expected a cache of all dialogues, each by itself, for {n_processes} processes, which read them in "
            f"another order than one does, got {folder}, which holds {found}; start one process, or leave the option out"
        )
    n_usable = _n_usable(manifest)
    if (is_block or not manifest.holds_all) and pipeline.config.tokens > n_usable:
        more = "the data hold no more" if manifest.holds_all else "write more with fastsae cache --resume --tokens N"
        raise UsageError(
            f"tokens: expected at most the {n_usable:,} of the cache {folder}, beside those kept for sinks, got "
            f"{pipeline.config.tokens:,}; lower it, or {more}"
        )
    return CachedActivations(folder, layers)


def _n_usable(manifest: Manifest) -> int:
    """The tokens that a run can surely be trained on, although some that are left are sinks."""
    found = max(0, manifest.n_trainable - SAMPLE) * _SINKS // (_SINKS + 1)
    return found if manifest.holds_all else max(found, manifest.options["tokens"])  # for which it was written


def options_of(folder: Path) -> dict[str, Any]:
    """The options that a run on a cache takes over from it where it gives no others.

    Raises:
        UsageError: The folder is no cache.
        FastsaeError: It is corrupt.
    """
    manifest = Manifest.read(folder)
    names = ("model", "dataset", "text", "model_kwargs", *DEPENDS_ON, "block_length", "forward_tokens", "tokens")
    found = {name: manifest.options[name] for name in names if name in manifest.options}
    return {**found, "layer": manifest.layers[0]} if len(manifest.layers) == 1 else found
