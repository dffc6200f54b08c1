"""Activations on disk: a run that reads them is the run that computes them, and a bad cache is one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import Stop, make_config, without_times

from fastsae import FastsaeError, UsageError
from fastsae.cli import main
from fastsae.data import cache
from fastsae.data.cache import CachedActivations, Manifest
from fastsae.interrupt import Interrupted
from fastsae.train import caching, initialize, session
from fastsae.train.caching import cache_activations, options_of
from fastsae.train.config import TrainConfig
from fastsae.train.run import train, train_many


@pytest.fixture
def config(tiny_model: Path, chats: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    for module in (caching, initialize):
        monkeypatch.setattr(module, "SAMPLE", 64)
    monkeypatch.setattr(cache, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(cache.write_cache, "__defaults__", (20_000,))
    return make_config(tiny_model, chats)


def outcome(folder: Path) -> tuple[bytes, dict[str, Any]]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return (folder / "sae_weights.safetensors").read_bytes(), without_times(metrics)


@pytest.mark.parametrize("sequencing", ["fast", "packed"])
def test_a_run_that_reads_them_is_the_one_that_computes_them(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sequencing: Any
) -> None:
    config = replace(config, sequencing=sequencing, max_norm_multiple=1.2)
    manifest = cache_activations(replace(config, tokens=3000), [1, 0], tmp_path / "acts", progress=False)
    assert manifest.layers == [0, 1]
    assert len(manifest.shards) > 1
    whole = {f"{layer}": replace(config, layer=layer, data_seed=42) for layer in (0, 1)}
    train_many(whole, tmp_path / "live", progress=False)
    trained = [
        replace(config, activations=str(tmp_path / "acts"), **changes) for changes in ({"layer": 0}, {"layer": 1})
    ]
    monkeypatch.setattr(session, "read_layers", None)  # the model runs for the evaluation alone
    for layer, run in enumerate(trained):
        train(run, tmp_path / f"cached{layer}", progress=False)
        assert outcome(tmp_path / f"cached{layer}") == outcome(tmp_path / "live" / str(layer))


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_cache_that_was_killed_goes_on_bit_for_bit(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_activations(config, [], tmp_path / "whole", progress=False)
    n_shards, original = 0, cache.write_tensors

    def killed(*arguments: Any) -> None:
        nonlocal n_shards
        n_shards += 1
        if n_shards == 2:
            raise Stop
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_tensors", killed)
        with pytest.raises(Stop):
            cache_activations(config, [], tmp_path / "acts", progress=False)
    with pytest.raises(FastsaeError, match="was interrupted; go on with fastsae cache --resume"):
        CachedActivations(tmp_path / "acts", [1])
    with monkeypatch.context() as patch:
        patch.setattr(caching, "write_cache", interrupted)
        with pytest.raises(Interrupted, match=r"whole shards stay. Go on with: fastsae cache .*acts --resume"):
            cache_activations(config, [], tmp_path / "acts", resume=True, progress=False)
    cache_activations(config, [], tmp_path / "acts", resume=True, progress=False)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "acts" / path.name).read_bytes() == path.read_bytes()


def test_tokens_can_be_added(config: TrainConfig, tmp_path: Path) -> None:
    cache_activations(replace(config, tokens=128), [0, 1], tmp_path / "acts", progress=False)
    with pytest.raises(
        UsageError, match=r"tokens: expected at most the .* of the cache .* got 768; lower it, or write more"
    ):
        train(replace(config, activations=str(tmp_path / "acts"), data_seed=42), tmp_path / "run", progress=False)
    with pytest.raises(UsageError, match=r"layer: expected one of those in the cache .*, 0, 1, got 2"):
        cache_activations(config, [2], tmp_path / "acts", resume=True, progress=False)
    manifest = cache_activations(replace(config, tokens=3000), [1], tmp_path / "acts", resume=True, progress=False)
    assert manifest.layers == [0, 1]
    train(replace(config, activations=str(tmp_path / "acts"), data_seed=42), tmp_path / "run", progress=False)


def test_a_whole_dataset_serves_several_epochs(config: TrainConfig, tmp_path: Path) -> None:
    few = replace(config, max_dialogues=14, eval_dialogues=4, dedup_words=0)
    manifest = cache_activations(replace(few, tokens=10**6), [], tmp_path / "acts", progress=False)
    assert manifest.holds_all
    train(replace(few, activations=str(tmp_path / "acts"), data_seed=42), tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 0}, "layer: expected one of those in the cache .*, 1, got 0"),
        ({"max_length": 20}, "max_length: the cache .* was written with 8192, this run has 20"),
        ({"data_seed": 3}, "data_seed: the cache .* was written with 42, this run has 3"),
        ({"sequencing": "packed"}, "sequencing: the cache .* was written with fast, this run has packed"),
    ],
)
def test_a_cache_of_other_options_is_refused(
    config: TrainConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    cache_activations(config, [], tmp_path / "acts", progress=False)
    with pytest.raises(UsageError, match=message):
        train(replace(config, activations=str(tmp_path / "acts"), **changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_cache_of_another_model_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    cache_activations(config, [], tmp_path / "acts", progress=False)
    manifest = Manifest.read(tmp_path / "acts")
    manifest.fingerprints["model"] = "0" * 32
    manifest.write(tmp_path / "acts")
    with pytest.raises(UsageError, match=r"model: the cache .* was written from another model than"):
        train(replace(config, activations=str(tmp_path / "acts")), tmp_path / "run", progress=False)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncated, flipped, Path.unlink])
def test_a_bad_shard_is_one_message(config: TrainConfig, tmp_path: Path, harm: Callable[[Path], None]) -> None:
    cache_activations(config, [], tmp_path / "acts", progress=False)
    harm(tmp_path / "acts" / "activations-00000.safetensors")
    with pytest.raises(FastsaeError, match=r"activations-00000.*missing, truncated or changed"):
        train(replace(config, activations=str(tmp_path / "acts")), tmp_path / "run", progress=False)


def test_bad_folders_are_one_message(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a folder of `fastsae cache`"):
        options_of(tmp_path)
    (tmp_path / "cache.json").write_text('{"format": 7}')
    with pytest.raises(FastsaeError, match="format: expected 1, got 7"):
        options_of(tmp_path)
    with pytest.raises(UsageError, match="expected a new or empty folder"):
        cache_activations(config, [], tmp_path, progress=False)
    with pytest.raises(UsageError, match="sequencing: expected fast or packed"):
        cache_activations(replace(config, sequencing="block"), [], tmp_path / "new", progress=False)


def test_the_command_takes_its_options_from_the_cache(
    tiny_model: Path, chats: Path, config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    acts = tmp_path / "acts"
    options = f"--model {tiny_model} --dataset {chats} --eval-dialogues 8 --forward-tokens 256 --tokens 3000 --quiet"
    assert main(["cache", str(acts), "--layers", "0,1", *options.split()]) == 0
    assert f"--activations {acts}" in capsys.readouterr().out
    command = "--layers 0,1 --d-sae 32 --batch-size 64 --buffer-tokens 256 --init-l0 8 --target-l0 4 --quiet"
    assert main(["train", "--activations", str(acts), *command.split(), "--output", str(tmp_path / "grid")]) == 0
    assert torch.isfinite(torch.tensor(json.loads((tmp_path / "grid" / "layer-0" / "metrics.json").read_text())["fvu"]))
