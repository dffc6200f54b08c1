"""Saved SAEs, and SAEs of a run, on the held-out dialogues of its options."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastsae.data.activations import ResidualStream
from fastsae.data.dropped import Dropped
from fastsae.data.hooks import place_of
from fastsae.errors import FastsaeError, UsageError
from fastsae.evaluate import Evaluation, evaluate_many
from fastsae.sae import SparseAutoencoder
from fastsae.train.config import TrainConfig
from fastsae.train.gradients import Measure, measure_gradients
from fastsae.train.pipeline import Pipeline, build_pipeline

logger = logging.getLogger(__name__)


def load_sae(folder: Path) -> SparseAutoencoder:
    """The SAE of a folder.

    Raises:
        UsageError: The folder holds none.
        FastsaeError: It is corrupt, or none that this library runs.
    """
    try:
        return SparseAutoencoder.load(folder)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from None
    except ValueError as error:
        raise FastsaeError(str(error)) from None


def evaluate_folder(
    folder: Path, config: TrainConfig, measures: Collection[Measure] = (), *, progress: bool = True
) -> Evaluation:
    """Evaluates the SAE of a folder on the held-out dialogues of `config`; raises as `load_sae` and `evaluate_saved` do."""
    return evaluate_saved(load_sae(folder), config, measures, progress=progress)


def evaluate_saved(
    sae: SparseAutoencoder, config: TrainConfig, measures: Collection[Measure] = (), *, progress: bool = True
) -> Evaluation:
    """Evaluates a loaded SAE on the held-out dialogues of `config`; with `measures`, those of `fastsae.train.gradients` too.

    Raises:
        UsageError: The SAE does not fit the model.
    """
    sae.store_by_feature_()
    pipeline = build_pipeline(config, progress=progress, evaluated=sae)
    trained_on, own = sae.metadata.get("hook_name"), pipeline.residual.place
    place = place_of(sae.metadata)
    if trained_on is not None and (place is None or place.as_output != own.as_output):
        logger.warning("this SAE was trained on %s, not on %s of layer %d", trained_on, own.hook, own.layer)
    sae = sae.to(pipeline.residual.device)
    (result,) = evaluate_saes({"": (sae, pipeline.residual)}, pipeline, progress=progress).values()
    gradients = measure_gradients(sae, pipeline, measures, progress=progress)
    return replace(result, metrics=result.metrics | gradients)


def evaluate_saes(
    saes: Mapping[str, tuple[SparseAutoencoder, ResidualStream]],
    pipeline: Pipeline,
    *trained_on: Dropped,
    **options: Any,
) -> dict[str, Evaluation]:
    """Evaluates SAEs on the held-out dialogues of a pipeline; the metrics tell of dialogues dropped since loading."""
    held_out = pipeline.held_out_batches()
    results = evaluate_many(
        saes,
        pipeline.tokenizer,
        held_out,
        special_tokens=pipeline.special_tokens,
        n_dialogues=len(pipeline.held_out),
        max_norm_multiple=pipeline.max_norm_multiple,
        **options,
    )
    of_the_data = pipeline.all_drops(held_out.drops, *trained_on).metrics() | {"unknown_roles": pipeline.unknown_roles}
    return {name: replace(result, metrics=result.metrics | of_the_data) for name, result in results.items()}
