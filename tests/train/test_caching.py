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
from fastsae.train import caching, initialize, supply
from fastsae.train.caching import cache_activations, options_of
from fastsae.train.config import TrainConfig
from fastsae.train.pipeline import build_pipeline
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
    monkeypatch.setattr(supply, "read_layers", None)  # the model runs for the evaluation alone
    for layer, run in enumerate(trained):
        train(run, tmp_path / f"cached{layer}", progress=False)
        assert outcome(tmp_path / f"cached{layer}") == outcome(tmp_path / "live" / str(layer))


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """Plain texts, of which some fill several blocks and others are parts of one."""
    words = "one two three four five six seven eight nine ten".split()
    rows = [{"text": " ".join(words[(i * j) % 10] for j in range(20 + 37 * (i % 5)))} for i in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "texts.jsonl")


@pytest.mark.parametrize("sequencing", ["block", "packed", "fast"])
@pytest.mark.parametrize("of_texts", [False, True])
def test_blocks_and_texts_are_cached_as_they_are_read(
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    texts: str,
    sequencing: Any,
    of_texts: bool,
) -> None:
    config = replace(config, sequencing=sequencing, block_length=24, data_seed=42, text=texts if of_texts else None)
    cache_activations(replace(config, tokens=3000), [0, 1], tmp_path / "acts", progress=False)
    train(config, tmp_path / "live", progress=False)
    cached = replace(config, activations=str(tmp_path / "acts"))
    with monkeypatch.context() as patch:
        patch.setattr(supply, "read_layers", None)
        train(cached, tmp_path / "cached", progress=False)
    assert outcome(tmp_path / "cached") == outcome(tmp_path / "live")
    other = replace(cached, forward_tokens=96)
    if of_texts:  # of which the cache holds a part
        with pytest.raises(UsageError, match=r"forward_tokens: the cache .* was written with 256, this run has 96"):
            train(other, tmp_path / "run", progress=False)
    else:
        train(other, tmp_path / "other", progress=False)
    if sequencing == "block":
        with pytest.raises(UsageError, match=r"block_length: the cache .* was written with 24, this run has 32"):
            train(replace(cached, block_length=32), tmp_path / "run", progress=False)
    with pytest.raises(UsageError, match=r"text: the cache .* was written from another text than"):
        train(replace(cached, text=None if of_texts else texts), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_cache_of_blocks_goes_on_after_a_kill_and_serves_one_pass(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, sequencing="block", block_length=24, data_seed=42)
    everything = replace(config, tokens=10**6)
    whole = cache_activations(everything, [], tmp_path / "whole", progress=False)
    assert whole.holds_all
    assert {shard["tokens"] % 24 for shard in whole.shards} == {0}
    original, n_left = cache.write_tensors, 2

    def killed(*arguments: Any) -> None:
        nonlocal n_left
        n_left -= 1
        if n_left == 0:
            raise Stop
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_tensors", killed)
        with pytest.raises(Stop):
            cache_activations(everything, [], tmp_path / "acts", progress=False)
    cache_activations(everything, [], tmp_path / "acts", resume=True, progress=False)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "acts" / path.name).read_bytes() == path.read_bytes()
    longer = replace(config, activations=str(tmp_path / "acts"), tokens=whole.n_trainable)
    with pytest.raises(UsageError, match=r"tokens: expected at most the .* lower it, or the data hold no more"):
        train(longer, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


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


def test_what_cannot_be_written_leaves_nothing(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes in (
        {"sequencing": "block", "block_length": 500, "max_dialogues": 12},
        {"hook": "mlp_out", "model": str(tmp_path / "nowhere")},
    ):
        with pytest.raises(UsageError):
            cache_activations(replace(config, **changes), [], tmp_path / "acts", progress=False)  # type: ignore[arg-type]
        assert not (tmp_path / "acts").exists()
    (tmp_path / "none.txt").write_text("")
    with pytest.raises(UsageError, match=r"text: expected at least one text, got none in .*none.txt"):
        cache_activations(replace(config, text=str(tmp_path / "none.txt")), [], tmp_path / "acts", progress=False)
    assert not (tmp_path / "acts").exists()


def test_a_full_disk_says_how_to_go_on(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, n_left = cache.write_tensors, 2

    def full(path: Path, tensors: Any) -> None:
        nonlocal n_left
        n_left -= 1
        if n_left == 0:
            raise OSError(28, "No space left on device", str(path))
        original(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_tensors", full)
        with pytest.raises(
            FastsaeError, match=r"the disk is full, .*00001.* Go on with: fastsae cache .*acts --resume"
        ):
            cache_activations(config, [], tmp_path / "acts", progress=False)
    assert sorted(path.name for path in (tmp_path / "acts").iterdir()) == [
        "activations-00000.safetensors",
        "cache.json",
    ]
    assert cache_activations(config, [], tmp_path / "acts", resume=True, progress=False).is_complete


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


@pytest.mark.parametrize(
    ("changes", "found"),
    [({"tokens": 256}, "the first of them alone"), ({"sequencing": "block", "block_length": 24}, "blocks"), ({}, None)],
)
def test_several_processes_want_all_dialogues(
    config: TrainConfig, tmp_path: Path, changes: dict[str, Any], found: str | None
) -> None:
    config = replace(config, tokens=10**6, data_seed=42)
    cache_activations(replace(config, **changes), [], tmp_path / "acts", progress=False)
    of_run = replace(config, **{**changes, "tokens": 256}, activations=str(tmp_path / "acts"))
    pipeline = replace(build_pipeline(of_run), part=(1, 2))
    if found is None:
        served = caching.open_cache(pipeline, [pipeline.residual.layer])
        assert served is not None
        sequencer = pipeline.sequencer()
        assert all(len(served.read(next(sequencer))) == 1 for _ in range(10))
        return
    with pytest.raises(UsageError, match=f"expected a cache of all dialogues, .* for 2 processes, .* holds {found}"):
        caching.open_cache(pipeline, [pipeline.residual.layer])


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
    with pytest.raises(FastsaeError, match="format: expected 2, got 7"):
        options_of(tmp_path)
    with pytest.raises(UsageError, match="expected a new or empty folder"):
        cache_activations(config, [], tmp_path, progress=False)


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
