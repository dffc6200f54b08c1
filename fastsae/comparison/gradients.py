"""The gradients of the arms: their signal-to-noise ratios, and what blocks do to the gradient of one token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsae.comparison.arms import REFERENCE
from fastsae.comparison.result import GsnrRow, LeakagePoint
from fastsae.data.sinks import MAX_NORM_MULTIPLE
from fastsae.disk import write_json
from fastsae.errors import FastsaeError
from fastsae.evaluate.gsnr import gsnr
from fastsae.fields import Fields, read_json
from fastsae.sae import SparseAutoencoder
from fastsae.train.config import TrainConfig
from fastsae.train.folder import read_config
from fastsae.train.gradients import measure_gradients, sparsity_term
from fastsae.train.pipeline import Pipeline, build_pipeline

GRADIENTS_FILE = "gradients.json"
_LEAKED = "W_dec"  # the parameter whose leak is shown
_BEHIND = "begins_behind_another"  # tokens that see another dialogue, and the whole of their own before them


def measure(places: Mapping[str, Path], *, progress: bool) -> dict[str, Any]:
    """The parts `gsnr` and `leakage` of a comparison's result.

    Both are measured on the held-out dialogues: the ratios of each arm in rows as it was trained on, alone, packed or in
    blocks, and the leak with the SAE of the reference, whose tokens see nothing but their own dialogue. An arm that was trained
    on plain text has no ratios, because they mean something on an SAE's own data alone. What was measured is kept in the folder
    of the SAE, so that a comparison that is interrupted here measures the other arms alone.

    Args:
        places: The folder of one SAE of each arm.
        progress: Show progress bars.

    Raises:
        FastsaeError: A file is damaged.
    """
    pipelines: dict[bool, Pipeline] = {}
    found: dict[str, Any] = {"gsnr": [], "leakage": []}
    for arm, place in places.items():
        config = read_config(place)
        if config.text is not None:
            continue
        kept = place / GRADIENTS_FILE
        if not kept.exists():
            write_json(kept, _measured(arm, place, config, pipelines, progress))
        part = _read(kept)
        found = {name: [*found[name], *part[name]] for name in found}
    return found


def _measured(
    arm: str, place: Path, config: TrainConfig, pipelines: dict[bool, Pipeline], progress: bool
) -> dict[str, Any]:
    """An arm's part; its pipeline is taken from `pipelines`, where it is kept for others of the same language model."""
    sae = SparseAutoencoder.load(place)
    sae.store_by_feature_()
    if config.random_model not in pipelines:
        pipelines[config.random_model] = build_pipeline(config, evaluated=sae, progress=progress)
    pipeline = pipelines[config.random_model]
    residual = pipeline.residual
    sae = sae.to(residual.device)
    found = gsnr(
        sae,
        residual,
        pipeline.held_out_batches(config.sequencing),
        sparsity_term(sae, config),
        max_norm_multiple=config.max_norm_multiple or MAX_NORM_MULTIPLE,
        progress=progress,
    )
    leakage: list[LeakagePoint] = []
    if arm == REFERENCE:
        leakage = _points(measure_gradients(sae, pipeline, ["leakage"], progress=progress)["leakage"])
    return {"gsnr": _rows(arm, found), "leakage": leakage}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = Fields(read_json(path))
        found.check_names(("gsnr", "leakage"))
        return {"gsnr": list(found.get("gsnr")), "leakage": list(found.get("leakage"))}
    except (ValueError, TypeError) as error:
        raise FastsaeError(
            f"{path}: expected the gradients of a comparison, got a damaged file ({error}); delete it to measure again"
        ) from None


def _rows(arm: str, found: Mapping[str, Any]) -> list[GsnrRow]:
    rows: list[GsnrRow] = []
    for unit in ("token", "dialogue"):
        for parameter, summary in found[f"per_{unit}"].items():
            for features in ("live", "dead", "all"):
                quartiles = summary.get(features)
                if quartiles is None or quartiles["median"] is None:
                    continue
                rows.append(
                    {
                        "arm": arm,
                        "group": parameter,
                        "features": features,
                        "unit": unit,
                        "median": quartiles["median"],
                        "low": quartiles["lower_quartile"],
                        "high": quartiles["upper_quartile"],
                        "pooled": summary["pooled"],
                    }
                )
    return rows


def _points(found: Mapping[str, Any]) -> list[LeakagePoint]:
    points: list[LeakagePoint] = []
    for context in ("block", "packed"):
        for one in found[context][_BEHIND]["bins"] if found[context] is not None else ():
            leak = one[_LEAKED]
            if leak["median"] is not None:
                points.append(
                    {
                        "context": context,
                        "distance": (one["from"] + one["to"]) / 2,
                        "leak": leak["median"],
                        "low": leak["lower_quartile"],
                        "high": leak["upper_quartile"],
                        "tokens": leak["tokens"],
                    }
                )
    return points
