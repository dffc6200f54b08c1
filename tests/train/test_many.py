"""Several SAEs on one stream of activations: each is what it would be alone, whatever happens to the others."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import Stop, load_latest, make_config, outcome, without_times

from fastsae import FastsaeError, UsageError
from fastsae.cli import main
from fastsae.data import stream
from fastsae.data.activations import ResidualStream
from fastsae.data.buffer import MixingBuffer
from fastsae.flags import parsed
from fastsae.interrupt import Interrupted
from fastsae.train import checkpoint
from fastsae.train.config import TrainConfig
from fastsae.train.folder import read_config, read_configs
from fastsae.train.grid import expand, read_spec, with_one_order
from fastsae.train.run import train, train_many
from fastsae.train.trainer import Trainer


@pytest.fixture
def configs(tiny_model: Path, chats: Path) -> dict[str, TrainConfig]:
    """Two layers, three architectures and two seeds; at that limit the layers differ in their attention sinks."""
    config = replace(make_config(tiny_model, chats, checkpoint_every=4), max_norm_multiple=1.2)
    return with_one_order(
        {
            "first": replace(config, layer=0, seed=0),
            "other seed": replace(config, layer=0, seed=1),
            "topk": replace(config, layer=1, architecture="topk", k=4),
            "batchtopk-0.5": replace(config, layer=0, architecture="batchtopk", k=4),
        }
    )


def test_each_is_what_it_would_be_alone(configs: dict[str, TrainConfig], tmp_path: Path) -> None:
    metrics = train_many(configs, tmp_path / "many", progress=False)
    assert list(metrics) == list(configs)
    assert not (tmp_path / "many" / "checkpoints").exists()
    left_out = {config.layer: metrics[name]["sinks_left_out"] for name, config in configs.items()}
    assert 0 < left_out[0] != left_out[1] > 0, "the layers are to differ in their sinks"
    for name in configs:
        alone = tmp_path / f"alone {name}"
        train(read_config(tmp_path / "many" / name), alone, progress=False)
        assert outcome(alone) == outcome(tmp_path / "many" / name), name
    assert outcome(tmp_path / "many" / "first")[0] != outcome(tmp_path / "many" / "other seed")[0]


def test_the_model_runs_once_for_all(configs: dict[str, TrainConfig], tmp_path: Path) -> None:
    def n_forwards(chosen: dict[str, TrainConfig]) -> int:
        calls = 0
        original = ResidualStream._forward

        def called(self: ResidualStream, *arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            return original(self, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ResidualStream, "_forward", called)
            patch.setattr("fastsae.train.run._finish", lambda *arguments: {})
            train_many(chosen, tmp_path / str(len(chosen)), progress=False)
        return calls

    without_sinks = {name: replace(config, max_norm_multiple=None) for name, config in configs.items()}
    del without_sinks["batchtopk-0.5"]  # which reads more at the end, to calibrate its threshold
    assert n_forwards(without_sinks) == n_forwards({"topk": without_sinks["topk"]})


@pytest.mark.parametrize("at", [5, 10, 12])
def test_resume_is_bit_equal(
    configs: dict[str, TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    chosen = {name: configs[name] for name in ("topk", "batchtopk-0.5")}
    train_many(chosen, tmp_path / "whole", progress=False)
    calls, step = 0, Trainer.train_step

    def train_step(self: Trainer, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 * at:  # after the first of the two has made this step
            raise Stop
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        with pytest.raises(Stop):
            train_many(chosen, tmp_path / "run", progress=False)
    assert checkpoint.latest(tmp_path / "run") is not None
    train_many(read_configs(tmp_path / "run"), tmp_path / "run", resume=True, progress=False)
    for name in chosen:
        assert outcome(tmp_path / "run" / name) == outcome(tmp_path / "whole" / name)


@pytest.mark.parametrize("refill", [3, 4, 35, 36, 38])  # the odd ones are of the first layer; the last ones read on
def test_a_signal_in_a_refill_loses_nothing_of_any_layer(
    configs: dict[str, TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refill: int
) -> None:
    chosen = {name: replace(configs[name], tokens=64 * 60) for name in ("first", "topk")}
    train_many(chosen, tmp_path / "whole", progress=False)
    original, n_refills = MixingBuffer._refill, 0

    def interrupted(self: MixingBuffer) -> None:
        nonlocal n_refills
        n_refills += 1
        if n_refills == refill:
            raise Interrupted
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(MixingBuffer, "_refill", interrupted)
        with pytest.raises(Interrupted, match="--resume"):
            train_many(chosen, tmp_path / "run", progress=False)
    saved = load_latest(tmp_path / "run")
    assert saved is not None
    assert 0 < saved["trainers"]["0"]["step"] == saved["trainers"]["1"]["step"] < 60
    train_many(read_configs(tmp_path / "run"), tmp_path / "run", resume=True, progress=False)
    for name in chosen:
        assert outcome(tmp_path / "run" / name) == outcome(tmp_path / "whole" / name)


def test_a_run_that_ends_while_it_writes_its_results_keeps_the_first(
    configs: dict[str, TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {name: configs[name] for name in ("topk", "first")}
    original = train_many.__globals__["write_run"]
    seen = []

    def written(*arguments: Any) -> Any:
        seen.append(arguments[2])
        if len(seen) == 2:
            raise Stop
        return original(*arguments)

    monkeypatch.setitem(train_many.__globals__, "write_run", written)
    with pytest.raises(Stop):
        train_many(chosen, tmp_path / "run", progress=False)
    files = sorted(path for path in (tmp_path / "run" / "topk").iterdir() if path.name != "config.json")
    first = [path.read_bytes() for path in files]
    metrics = train_many(read_configs(tmp_path / "run"), tmp_path / "run", resume=True, progress=False)
    assert seen == ["topk", "first", "first"]
    assert list(metrics) == list(chosen)
    assert [path.read_bytes() for path in files] == first


@pytest.mark.parametrize("resumes", [False, True])
def test_one_that_fails_is_dropped_and_the_others_go_on(
    configs: dict[str, TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumes: bool
) -> None:
    chosen = {name: configs[name] for name in ("first", "other seed")}
    step, made = Trainer.train_step, 0

    def spoiled(self: Trainer, batch: Any) -> Any:
        nonlocal made
        if self.config.seed == 0 and self.step == 5:
            with torch.no_grad():
                self.sae.b_enc.fill_(float("nan"))
        if self.step == 9 and resumes and not made:
            made = 1
            raise Stop
        return step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", spoiled)
    if resumes:
        with pytest.raises(Stop):
            train_many(chosen, tmp_path / "run", progress=False)
        chosen = read_configs(tmp_path / "run")
    with pytest.raises(FastsaeError, match=r"1 of 2 SAEs failed.*first: step \d+: .*not finite|NaN"):
        train_many(chosen, tmp_path / "run", resume=resumes, progress=False)
    assert not (tmp_path / "run" / "first" / "cfg.json").exists()
    train(read_config(tmp_path / "run" / "other seed"), tmp_path / "alone", progress=False)
    assert outcome(tmp_path / "run" / "other seed") == outcome(tmp_path / "alone")


def test_the_command_trains_a_grid(tiny_model: Path, chats: Path, tmp_path: Path, capsys: Any) -> None:
    command = (
        f"train --model {tiny_model} --dataset {chats} --layers 0,1 --target-l0 4,8.5 --d-sae 32 --tokens 512 --batch-size 64 "
        f"--buffer-tokens 256 --forward-tokens 256 --init-l0 8 --eval-dialogues 8 --output {tmp_path / 'grid'} --quiet"
    ).split()
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    cost = r"grid: 4 SAEs, 512 tokens in \d+ s, of which the evaluation took \d+ s \(.* s for all .* together, .* s for each\)"
    assert re.search(cost, lines[1])
    names = [f"layer-{layer}-target-l0-{l0}" for layer in (0, 1) for l0 in (4.0, 8.5)]
    assert [line.split()[0] for line in lines if line.startswith("layer")] == names
    assert {path.name for path in (tmp_path / "grid").iterdir()} == {*names, "saes.json", "metrics.json"}
    assert main([*command[:-1], "--resume"]) == 2
    assert "drop --spec and lists" in capsys.readouterr().err
    assert main(["train", "--output", str(tmp_path / "grid"), "--resume"]) == 2
    assert "is complete" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_file_lists_saes(tmp_path: Path, suffix: str) -> None:
    text = {
        ".json": '{"common": {"batch_size": 64, "lr": 1e-4}, '
        '"saes": {"small": {"d_sae": 32}, "k.4": {"architecture": "topk", "k": 4}}}',
        ".yaml": "common:\n  batch_size: 64\n  lr: 1e-4\nsaes:\n  small: {d_sae: 32}\n  k.4: {architecture: topk, k: 4}\n",
    }[suffix]
    (tmp_path / f"saes{suffix}").write_text(text)
    found = read_spec(tmp_path / f"saes{suffix}", {"log_every": 7}, {"seed": 3}, parsed)
    assert list(found) == ["small", "k.4"]
    assert found["small"] == TrainConfig(batch_size=64, lr=1e-4, d_sae=32, log_every=7, seed=3, data_seed=3)
    assert found["k.4"].k == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected {\"common\""),
        ('{"saes": {}}', "expected 1 to 1,000 SAEs"),
        ('{"saes": {"a": {}}, "more": 1}', "expected {\"common\""),
        ('{"saes": {"a": {"lrr": 1}}}', "a: expected options of a run.*'lrr'"),
        ('{"saes": {"a": {"batch_size": 64}}}', 'batch_size belongs under "common"'),
        ('{"saes": {"a": {}, "a": {}}}', "'a' is there twice"),
        ('{"saes": {"a": {}, "A": {}}}', "upper and lower case"),
        ('{"saes": {"../a": {}}}', "expected names of letters"),
        ('{"saes": {"": {}}}', "expected names of letters"),
        ('{"saes": {"a": {"d_sae": "many"}}}', "d_sae: expected a whole number, got 'many'"),
        ('{"saes": {"a": {"d_sae": -1}}}', "d_sae"),
        ('{"saes": {"a": 3}}', "a: expected an object"),
        ("{", "expected JSON"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "saes.json").write_text(text)
    with pytest.raises(FastsaeError, match=message):
        read_spec(tmp_path / "saes.json", {}, {}, parsed)
    with pytest.raises(UsageError, match="there is none at"):
        read_spec(tmp_path / "missing.json", {}, {}, parsed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("saes:\n  a: {seed: 1}\n  a: {seed: 2}\n", "the name 'a' is there twice"),
        ("saes:\n  a: {seed: 1, seed: 3}\n", "the name 'seed' is there twice"),
        ("saes: [", "expected YAML, got something else .*line 1"),
        ("saes:\n  ? [1]\n  : {}\n", "expected YAML, got something else"),
    ],
)
def test_a_bad_yaml_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "saes.yaml").write_text(text)
    with pytest.raises(FastsaeError, match=message) as found:
        read_spec(tmp_path / "saes.yaml", {}, {}, parsed)
    assert "\n" not in str(found.value)


def test_yaml_may_take_options_over(tmp_path: Path) -> None:
    (tmp_path / "saes.yaml").write_text("saes:\n  a: &a {seed: 1, d_sae: 8}\n  b: {<<: *a, seed: 2}\n")
    found = read_spec(tmp_path / "saes.yaml", {}, {}, parsed)
    assert (found["b"].seed, found["b"].d_sae) == (2, 8)


@pytest.mark.parametrize(
    ("varied", "message"),
    [
        ({"batch_size": (64, 128)}, "batch_size: expected one value"),
        ({"data_seed": (1, 2)}, "data_seed: expected one value"),
        ({"layer": (1, 1)}, "layer: expected different values, got 1, 1"),
        ({"seed": tuple(range(40)), "d_sae": tuple(range(1, 41))}, "at most 1,000 SAEs in one run, got 1,600"),
        ({"architecture": ("topk", "jumprelu")}, "k: expected"),
    ],
)
def test_a_bad_grid_is_one_message(varied: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        expand({}, varied)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("resumes", [False, True])
def test_nothing_is_computed_for_a_layer_all_of_whose_saes_have_failed(
    configs: dict[str, TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefetch: int, resumes: bool
) -> None:
    """The SAE of the deeper layer fails at step 5; the shallower one goes on as if it were alone."""
    monkeypatch.setattr(stream, "SAMPLE_TOKENS", 100)  # so that the first piece of so short a run is not all of it
    chosen = {name: replace(configs[name], prefetch=prefetch, tokens=64 * 40) for name in ("first", "topk")}
    chosen["topk"] = replace(chosen["topk"], architecture="batchtopk")  # the others are calibrated at the end
    step, stopped = Trainer.train_step, []
    read: list[int] = []  # the deepest layer of each pass, after the failure
    called = ResidualStream.__call__

    def spoiled(self: Trainer, batch: Any) -> Any:
        if self.config.architecture == "batchtopk" and self.step == 5:
            with torch.no_grad():
                self.sae.b_enc.fill_(float("nan"))
        if self.step == 19 and resumes and not stopped:
            stopped.append(True)
            raise Stop
        if self.step >= 10:  # when what was read ahead is used up
            monkeypatch.setattr(ResidualStream, "__call__", watched)
        return step(self, batch)

    def watched(self: ResidualStream, *arguments: Any) -> Any:
        read.append(self.layer)
        return called(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", spoiled)
    monkeypatch.setitem(train_many.__globals__, "_finish", lambda *arguments: {})
    if resumes:
        with pytest.raises(Stop):
            train_many(chosen, tmp_path / "run", progress=False)
        saved = load_latest(tmp_path / "run")
        assert saved is not None
        assert saved["streams"].keys() == saved["buffers"].keys() == {"0"}
        chosen = read_configs(tmp_path / "run")
    with pytest.raises(FastsaeError, match="1 of 2 SAEs failed"):
        train_many(chosen, tmp_path / "run", resume=resumes, progress=False)
    assert set(read) == {0}
    monkeypatch.undo()
    monkeypatch.setattr(stream, "SAMPLE_TOKENS", 100)
    history = (tmp_path / "run" / "first" / "metrics.jsonl").read_text().splitlines()
    train(read_config(tmp_path / "run" / "first"), tmp_path / "alone", progress=False)
    alone = (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()
    assert [without_times(json.loads(row)) for row in history] == [without_times(json.loads(row)) for row in alone]
