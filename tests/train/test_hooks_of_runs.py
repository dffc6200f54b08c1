"""Runs that read another place than the stream after a block: what they train on, write, refuse and evaluate."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import make_config

from fastsae import FusedJumpReLUSAE, UsageError, cli
from fastsae.data.activations import ResidualStream
from fastsae.data.language_model import load_model
from fastsae.train.caching import cache_activations
from fastsae.train.config import TrainConfig
from fastsae.train.evaluation import evaluate_folder
from fastsae.train.folder import read_config
from fastsae.train.results import place_metadata
from fastsae.train.run import train, train_many

HOOKS = ("resid_pre", "attn_out", "mlp_out")


@pytest.fixture
def config(tiny_model: Path, chats: Path) -> TrainConfig:
    return make_config(tiny_model, chats)


def test_a_run_reads_its_hook_and_evaluates_there(config: TrainConfig, tmp_path: Path) -> None:
    metrics = {
        hook: train(replace(config, hook=hook), tmp_path / hook, progress=False) for hook in (*HOOKS, "resid_post")
    }
    assert len({found["mse"] for found in metrics.values()}) == 4
    for hook, name in (
        ("resid_pre", "model.layers.0"), ("attn_out", "model.layers.1.self_attn"), ("mlp_out", "model.layers.1.mlp")
    ):  # fmt: skip
        known = json.loads((tmp_path / hook / "cfg.json").read_text())["metadata"]
        assert (known["hook_name"], known["hook_layer"], known["hook"]) == (name, 1, hook)
        assert known["model_class_name"] == "AutoModelForCausalLM"
        assert f"hook <code>{hook}</code>" in (tmp_path / hook / "report.html").read_text()
        again = evaluate_folder(tmp_path / hook, read_config(tmp_path / hook), progress=False).metrics
        assert again["recovered"] == metrics[hook]["recovered"]
        assert again["kl"] == metrics[hook]["kl"]


def test_before_the_first_block_there_is_no_module(tiny_model: Path) -> None:
    model, _ = load_model(str(tiny_model))
    known = place_metadata(ResidualStream(model, 0, "resid_pre"))
    assert known["hook_name"] == "blocks.0.hook_resid_pre"
    assert known["model_class_name"] == "HookedTransformer"


def test_several_layers_with_one_hook_are_as_alone(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, hook="mlp_out", data_seed=42)
    runs = {f"{layer}": replace(config, layer=layer) for layer in (0, 1)}
    train_many(runs, tmp_path / "many", progress=False)
    for name, run in runs.items():
        train(run, tmp_path / name, progress=False)
        both = [tmp_path / name, tmp_path / "many" / name]
        assert len({(folder / "sae_weights.safetensors").read_bytes() for folder in both}) == 1


def test_every_layer_is_checked_before_the_run(config: TrainConfig, tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(str(tiny_model))
    model.model.layers[0].register_forward_hook(lambda _module, args, output: output + args[0])
    runs = {f"{layer}": replace(config, layer=layer, hook="mlp_out", data_seed=42) for layer in (1, 0)}
    with pytest.raises(UsageError, match=r"hook: expected for mlp_out .* whose block 0 adds something else"):
        train_many(runs, tmp_path / "run", model=model, tokenizer=tokenizer, progress=False)
    assert not (tmp_path / "run").exists()


def test_a_cache_serves_its_own_hook(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(config, hook="attn_out", layer=0, data_seed=42)
    cache_activations(replace(config, tokens=3000), [0, 1], tmp_path / "acts", progress=False)
    train(config, tmp_path / "live", progress=False)
    cached = replace(config, activations=str(tmp_path / "acts"))
    train(cached, tmp_path / "cached", progress=False)
    both = [tmp_path / "live", tmp_path / "cached"]
    assert len({(folder / "sae_weights.safetensors").read_bytes() for folder in both}) == 1
    with pytest.raises(UsageError, match=r"hook: the cache .* was written with attn_out, this run has mlp_out"):
        train(replace(cached, hook="mlp_out"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("hook", HOOKS)
def test_evaluate_takes_layer_and_hook_from_another_librarys_sae(
    hook: str, config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FusedJumpReLUSAE(16, 32).save(tmp_path / "sae", hook_name=f"blocks.1.hook_{hook}")
    data = ["--model", config.model, "--dataset", config.dataset, "--eval-dialogues", "8", "--quiet"]
    assert cli.main(["evaluate", str(tmp_path / "sae"), *data, "--json", str(tmp_path / "m.json")]) == 0
    assert "was trained on" not in capsys.readouterr().err
    expected = evaluate_folder(tmp_path / "sae", replace(config, hook=hook, layer=1), progress=False).metrics
    assert json.loads((tmp_path / "m.json").read_text())["ce_spliced"] == pytest.approx(expected["ce_spliced"])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("blocks.1.attn.hook_z", [], "names no layer that fastsae reads (its hook is blocks.1.attn.hook_z); give --layer"),
        ("blocks.1.hook_mlp_out", ["--hook", "resid"], "expected resid_post or resid_pre or attn_out or mlp_out, got 'resid'"),
        ("blocks.1.hook_mlp_out", ["--hook", "attn_out"], "was trained on blocks.1.hook_mlp_out, not on attn_out of layer 1"),
    ],
)  # fmt: skip
def test_a_hook_that_does_not_fit_is_one_message(
    name: str,
    arguments: list[str],
    message: str,
    config: TrainConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    FusedJumpReLUSAE(16, 32).save(tmp_path, hook_name=name)
    data = ["--model", config.model, "--dataset", config.dataset, "--eval-dialogues", "8", "--quiet"]
    with contextlib.suppress(SystemExit):
        cli.main(["evaluate", str(tmp_path), *data, *arguments])
    assert message in capsys.readouterr().err


def test_saelens_tools_read_the_same_activations(config: TrainConfig, tiny_model: Path) -> None:
    load: Any = pytest.importorskip("sae_lens.load_model").load_model
    input_ids = torch.randint(0, 500, (2, 16))
    model, _ = load_model(str(tiny_model))
    for hook in HOOKS:
        residual = ResidualStream(model, 1, hook)
        name = place_metadata(residual)["hook_name"]
        theirs = load("AutoModelForCausalLM", str(tiny_model), device="cpu", hook_names=[name])
        _, cache = theirs.run_with_cache(input_ids, names_filter=[name])
        torch.testing.assert_close(cache[name], residual(input_ids, torch.ones_like(input_ids)))
