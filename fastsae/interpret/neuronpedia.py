"""Features as Neuronpedia takes them: files `batch-N.json` with the fields of sae-dashboard 0.8.0."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastsae.disk import write_atomically
from fastsae.interpret.page_data import PageFeature, TokenTable, intervals
from fastsae.interpret.windows import Window

_TOP = -1  # stands for lower end and share of the group of the largest activations
_DIGITS = 3  # behind the point, as SAEDashboard rounds
# tables of neurons and of features that fire together, which SAEDashboard leaves empty too where it is not asked for them
_TABLES = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1",
    "correlated_features_pearson", "decoder_weights_dist",
)  # fmt: skip


def export_neuronpedia(
    folder: str | Path,
    features: Sequence[PageFeature],
    token_text: Callable[[int], str],
    *,
    model: str,
    layer: int,
    name: str,
    dataset: str = "",
    n_dialogues: int = 0,
    vectors: Sequence[Sequence[float]] | None = None,
    batch_size: int = 128,
) -> list[Path]:
    """Writes the features into `batch-0.json`, `batch-1.json` and so on, each atomically.

    Explanations, scores and nearest features have no field in this format. As in SAEDashboard's files, the share of an
    interval is one of all tokens, so that the lowest interval holds those on which a feature is silent.

    Args:
        folder: Made where it is missing; files of these names in it are replaced.
        features: In the order of the files.
        token_text: Text of a token id.
        model: Neuronpedia's name of the model.
        layer: Number of the block, from 0.
        name: Name of the SAE there.
        dataset: From which the dialogues come.
        n_dialogues: How many were read.
        vectors: A decoder row for each feature; None leaves them out.
        batch_size: Features per file.

    Returns:
        The files.

    Raises:
        OSError: The disk is full, or the place cannot be written.
    """
    table = TokenTable(token_text)
    paths = []
    for start in range(0, len(features), batch_size):
        packed = []
        for i, feature in enumerate(features[start : start + batch_size], start):
            vector = [] if vectors is None else [float(x) for x in vectors[i]]
            about = {"n_prompts_total": n_dialogues, "n_tokens_in_prompt": 0, "dataset": dataset, "vector": vector}
            packed.append({**_feature(feature, table), **about})
        batch = {"model_id": model, "layer": layer, "sae_set": name, "sae_id_suffix": None, "features": packed}
        paths.append(Path(folder, f"batch-{start // batch_size}.json"))
        _write(paths[-1], json.dumps(batch, allow_nan=False))
    return paths


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _feature(feature: PageFeature, table: TokenTable) -> dict[str, Any]:
    examples, logits = feature.examples, feature.logits
    activations = [_activation(w, (_TOP, examples.maximum, _TOP), table) for w in examples.top]
    for interval in intervals(examples):
        share = interval.share * examples.density + (1 - examples.density if interval.low == 0 else 0)
        group = (interval.low, interval.high, share)
        activations += [_activation(window, group, table) for window in interval.windows]
    negative, positive = ((), ()) if logits is None else (logits.negative, logits.positive)
    return {
        "feature_index": examples.feature,
        **{field: [] for field in _TABLES},
        "neg_str": [table.text(token) for token, _ in negative],
        "neg_values": [round(value, _DIGITS) for _, value in negative],
        "pos_str": [table.text(token) for token, _ in positive],
        "pos_values": [round(value, _DIGITS) for _, value in positive],
        "frac_nonzero": examples.density,
        "freq_hist_data_bar_values": _middles(examples.edges),
        "freq_hist_data_bar_heights": list(examples.histogram),
        "logits_hist_data_bar_heights": [] if logits is None else list(logits.histogram),
        "logits_hist_data_bar_values": [] if logits is None else _middles(logits.edges),
        "activations": activations,
    }


def _activation(window: Window, group: tuple[float, float, float], table: TokenTable) -> dict[str, Any]:
    low, high, share = group
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": share,
        "tokens": [table.text(token) for token in window.tokens],
        "values": [round(value, _DIGITS) for value in window.activations],
        "qualifying_token_index": window.peak,
    }


def _middles(edges: Sequence[float]) -> list[float]:
    return [round((low + high) / 2, 5) for low, high in pairwise(edges)]
