"""The export for Neuronpedia: its fields, and the files read by sae-dashboard's own classes where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from page_examples import page_features, token_text

from fastsae.interpret.neuronpedia import export_neuronpedia

N = 7
ABOUT = {"model": "smollm2-135m", "layer": 15, "name": "fast", "dataset": "chats", "n_dialogues": 400}


def exported(folder: Path, **options: Any) -> list[Path]:
    return export_neuronpedia(folder, page_features(N), token_text, **{**ABOUT, **options})


def test_batches_hold_all_features_in_order(tmp_path: Path) -> None:
    paths = exported(tmp_path / "new", batch_size=3)
    assert [path.name for path in paths] == ["batch-0.json", "batch-1.json", "batch-2.json"]
    batches = [json.loads(path.read_text()) for path in paths]
    assert [f["feature_index"] for batch in batches for f in batch["features"]] == [7 * i for i in range(N)]
    assert {(b["model_id"], b["layer"], b["sae_set"]) for b in batches} == {("smollm2-135m", 15, "fast")}


def test_fields_say_what_is_known_of_a_feature(tmp_path: Path) -> None:
    vectors = [[float(i), 0.5] for i in range(N)]
    (path,) = exported(tmp_path, vectors=vectors)
    found, feature = json.loads(path.read_text())["features"][2], page_features(N)[2]
    one, logits = feature.examples, feature.logits
    assert logits is not None
    assert found["pos_str"] == [token_text(token) for token, _ in logits.positive]
    assert found["neg_values"] == [round(value, 3) for _, value in logits.negative]
    assert found["frac_nonzero"] == one.density
    assert (found["n_prompts_total"], found["dataset"], found["vector"]) == (400, "chats", [2.0, 0.5])
    assert len(found["freq_hist_data_bar_values"]) == len(found["freq_hist_data_bar_heights"]) == len(one.histogram)
    assert len(found["logits_hist_data_bar_values"]) == len(found["logits_hist_data_bar_heights"]) == 40
    top = [a for a in found["activations"] if a["bin_min"] == -1]
    assert [a["values"][a["qualifying_token_index"]] for a in top] == [round(w.value, 3) for w in one.top]
    assert {(a["bin_max"], a["bin_contains"]) for a in top} == {(one.maximum, -1)}
    assert top[0]["tokens"] == [token_text(token) for token in one.top[0].tokens]
    others = [a for a in found["activations"] if a["bin_min"] != -1]
    assert len(others) == len(one.sampled)
    assert all(a["bin_min"] <= a["values"][a["qualifying_token_index"]] + 1e-3 <= a["bin_max"] + 2e-3 for a in others)
    shares = {a["bin_min"]: a["bin_contains"] for a in others}
    assert shares[0] > 1 - one.density  # silent tokens lie in the lowest interval
    assert sum(shares.values()) <= 1 + 1e-9


def test_sae_dashboard_reads_what_is_written(tmp_path: Path) -> None:
    reader = pytest.importorskip(
        "sae_dashboard.neuronpedia.neuronpedia_dashboard", reason="sae-dashboard is not installed"
    )
    for path in exported(tmp_path, batch_size=3, vectors=[[1.0, 2.0]] * N):
        written = json.loads(path.read_text())
        batch = reader.NeuronpediaDashboardBatch(**written)
        assert batch.to_dict() == written
        for feature, plain in zip(batch.features, written["features"], strict=True):
            assert feature == reader.NeuronpediaDashboardFeature(**plain)
