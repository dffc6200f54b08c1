"""The files of a run's SAEs: weights, metrics, report, page."""

from __future__ import annotations

import logging
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from fastsae.data.activations import ResidualStream, decoder_layers
from fastsae.disk import write_json
from fastsae.errors import FastsaeError
from fastsae.evaluate import Evaluation, write_report
from fastsae.interpret.examine import Subject
from fastsae.interpret.run import write_pages
from fastsae.sae import SparseAutoencoder, files
from fastsae.train.folder import METRICS_FILE, REPORT_FILE, described
from fastsae.train.session import Session

logger = logging.getLogger(__name__)


def place_metadata(residual: ResidualStream) -> dict[str, Any]:
    """What the metadata say of the place that an SAE reads: that module of transformers whose output it is.

    The stream before the first block is no module's output: SAELens' tools find it in a model of TransformerLens alone.
    """
    place = residual.place
    found = {"hook_layer": place.layer, "hook": place.hook}
    at = place.as_output
    if at.hook == "resid_pre":
        return {**found, "model_class_name": "HookedTransformer", "hook_name": at.lens_name}
    wanted = residual.module if at == place else decoder_layers(residual.model)[at.layer]
    name = next(name for name, module in residual.model.named_modules() if module is wanted)
    # SAELens' word for a model of transformers, as it is
    return {**found, "model_class_name": "AutoModelForCausalLM", "hook_name": name}


def save_sae(output: Path, session: Session, name: str, sae: SparseAutoencoder, **metadata: Any) -> None:
    """Saves an SAE with what SAELens' tools want to know of the model, of its place in it, and of the data."""
    pipeline, config = session.view(name), session.configs[name]
    is_block, trainer = config.sequencing == "block", session.trainers[name]
    coefficient = trainer.sparsity_coefficient
    if origin := session.origins.get(name):
        metadata["init_from"] = {"path": config.init_from, "files": origin}
    sae.save(
        output,
        model_name=config.model,
        **place_metadata(pipeline.residual),
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
        median_norm=session.supply.streams[pipeline.residual.layer].rule.median_norm,
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
    save_sae(output, session, name, session.trainers[name].sae, l0=metrics["l0"])
    if not session.writes:
        return
    write_sparsity(output, result)
    result.dialogues.save(output)
    settings, history = described(session.configs[name]), session.trainers[name].history
    write_report(output / REPORT_FILE, config=settings, metrics=metrics, history=history, evaluation=result)
    write_json(output / METRICS_FILE, metrics)


def write_features_pages(output: Path, session: Session, progress: bool) -> None:
    """Writes the page of each SAE's features. The run is complete, so what goes wrong here is told and does not end it."""
    for name, trainer in session.trainers.items():
        folder = output / name
        data, seed = partial(session.view, name), session.configs[name].seed
        subject = Subject(folder.resolve().name, trainer.sae, data, folder, seed)
        try:
            write_pages([subject], folder, progress=progress)
        except (FastsaeError, OSError) as error:
            again = f"fastsae pages {shlex.quote(str(folder))}"
            logger.warning(
                "the page of features was not written: %s. The run is complete; %s tries again", error, again
            )
