"""The gradients of the arms: their signal-to-noise ratios, and what blocks do to the gradient of one token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsae.comparison.arms import REFERENCE
from fastsae.comparison.result import GsnrRow, LeakagePoint
from fastsae.data.sinks import MAX_NORM_MULTIPLE
from fastsae.evaluate.gsnr import gsnr
from fastsae.sae import SparseAutoencoder
from fastsae.train.folder import read_config
from fastsae.train.gradients import measure_gradients, sparsity_term
from fastsae.train.pipeline import Pipeline, build_pipeline

_LEAKED = "W_dec"  # the parameter whose leak is shown
_BEHIND = "begins_behind_another"  # tokens that see another dialogue, and the whole of their own before them


def measure(places: Mapping[str, Path], *, progress: bool) -> dict[str, Any]:
    """The parts `gsnr` and `leakage` of a comparison's result.

    Both are measured on the held-out dialogues: the ratios of each arm in rows as it was trained on, alone, packed or in
    blocks, and the leak with the SAE of the reference, whose tokens see nothing but their own dialogue. An arm that was trained
    on plain text has no ratios, because they mean something on an SAE's own data alone.

    Args:
        places: The folder of one SAE of each arm.
        progress: Show progress bars.

    Raises:
        FastsaeError: A file is damaged.
    """
    rows: list[GsnrRow] = []
    leakage: list[LeakagePoint] = []
    pipelines: dict[bool, Pipeline] = {}
    for arm, place in places.items():
        config = read_config(place)
        if config.text is not None:
            continue
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
        rows += _rows(arm, found)
        if arm == REFERENCE:
            leakage = _points(measure_gradients(sae, pipeline, ["leakage"], progress=progress)["leakage"])
    return {"gsnr": rows, "leakage": leakage}


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
