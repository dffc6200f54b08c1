"""The command line: one clear message and the right exit status for a user's mistake, never a traceback."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsae import FusedJumpReLUSAE, cli
from fastsae.flags import without_effect
from fastsae.train.config import TrainConfig

FAST = "--eval-dialogues 4 --d-sae 32 --tokens 256 --batch-size 64 --buffer-tokens 256 --forward-tokens 256 --quiet".split()


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_train_then_evaluate(capsys: pytest.CaptureFixture[str], tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    status, out, err = run(capsys, "train", "--model", tiny_model, "--dataset", chats, "--output", output, *FAST)
    assert status == 0, err
    assert "FVU" in out
    assert str(output) in out
    status, out, err = run(capsys, "evaluate", output, "--json", tmp_path / "m.json", "--quiet")
    assert status == 0, err
    trained = json.loads((output / "metrics.json").read_text())
    assert json.loads((tmp_path / "m.json").read_text())["fvu"] == pytest.approx(trained["fvu"], rel=1e-6)


def test_gradients_on_demand(capsys: pytest.CaptureFixture[str], tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    output, file, page = tmp_path / "run", tmp_path / "m.json", tmp_path / "page.html"
    status, _, err = run(capsys, "train", "--model", tiny_model, "--dataset", chats, "--output", output, *FAST)
    assert status == 0, err
    arguments = ["evaluate", output, "--json", file, "--report", page, "--quiet"]
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    assert not {"gsnr", "leakage"} & json.loads(file.read_text()).keys()
    assert "Leakage" not in page.read_text()
    status, out, err = run(capsys, *arguments, "--gsnr", "--leakage", "--block-length", "32")
    assert status == 0, err
    assert "GSNR" in out
    assert "behind another dialogue" in out
    metrics = json.loads(file.read_text())
    assert metrics["gsnr"]["per_token"]["threshold"]["pooled"] is not None
    assert metrics["gsnr"]["coefficient"] == metrics["leakage"]["coefficient"] > 0
    assert metrics["leakage"]["packed"]["begins_behind_another"]["activation"]["mean"] < 1e-9
    assert metrics["leakage"]["block"]["begins_behind_another"]["activation"]["median"] > 1e-9
    assert "Gradient signal-to-noise ratios" in page.read_text()
    assert "Leakage" in page.read_text()
    status, _, err = run(capsys, *arguments, "--leakage")
    assert status == 2
    assert "--block-length: expected a block that the" in err
    assert "can fill, got 512 tokens" in err
    assert run(capsys, "evaluate", output, "--report", tmp_path)[0] == 2


@pytest.mark.parametrize(("architecture", "name"), [("topk", "FusedTopKSAE"), ("batchtopk", "FusedBatchTopKSAE")])
def test_train_topk(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, chats: Path, tmp_path: Path, architecture: str, name: str
) -> None:
    arguments = ["--model", tiny_model, "--dataset", chats, "--output", tmp_path / "run", "--k", 4]
    status, out, err = run(capsys, "train", "--architecture", architecture, *arguments, *FAST)
    assert status == 0, err
    assert f"fastsae.{name}.load(" in out


def test_every_option_is_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "train", "--help")
    assert status == 0
    for field in fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in out
    assert run(capsys, "--help")[0] == 0


def bad_inputs(model: Path, chats: Path, tmp: Path) -> dict[str, tuple[list[object], int, str]]:
    """Name -> arguments, exit status, and a word that the message must hold."""
    base: list[object] = ["train", "--model", model, "--dataset", chats, "--output", tmp / "out", *FAST]
    columns = tmp / "columns.jsonl"
    columns.write_text('{"question": "a", "answer": "b"}\n')
    empty = tmp / "empty.jsonl"
    empty.write_text("")
    full = tmp / "full"
    full.mkdir()
    (full / "file").write_text("")
    corrupt = tmp / "corrupt"
    FusedJumpReLUSAE(16, 32).save(corrupt)
    (corrupt / "sae_weights.safetensors").write_bytes(b"broken")
    return {
        "unknown flag": (["train", "--learning-rate", 1], 2, "learning-rate"),
        "not a number": (["train", "--lr", "fast"], 2, "--lr"),
        "abbreviated flag": (["train", "--tok", 5], 2, "--tok"),
        "text for a whole number": (["train", "--tokens", "many"], 2, "--tokens: expected a whole number, got 'many'"),
        "half a token": (["train", "--tokens", 1.5], 2, "--tokens: expected a whole number, got '1.5'"),
        "many zeros": (["train", "--buffer-tokens", "1e15"], 2, "--buffer-tokens: expected a whole number from 1 to 1,000,"),
        "two dashes": (["train", "--dataset=--"], 2, "--dataset"),
        "no such choice": (["train", "--architecture", "gated"], 2, "expected jumprelu or relu or topk or batchtopk, got"),
        "no such GPU": ([*base, "--device", "cuda:99"], 2, "--device: expected"),
        "no such split": ([*base, "--split", "dev"], 2, "--split: dataset"),
        "no such SAE": (["evaluate", tmp / "nothing"], 2, "expected a folder, a file or a hub id"),
        "metrics over a folder": (["evaluate", full, "--json", full], 2, "--json: expected the name of a file"),
        "features beyond memory": ([*base, "--d-sae", 2_000_000_000], 2, "--d-sae: expected a run that fits"),
        "unknown command": (["trian"], 2, "trian"),
        "unknown model": ([*base, "--model", tmp / "nothing"], 2, "nothing"),
        "unknown dataset": ([*base, "--dataset", tmp / "nothing.jsonl"], 2, "nothing.jsonl"),
        "layer out of range": ([*base, "--layer", 7], 2, "0 to 1"),
        "no chat column": ([*base, "--dataset", columns], 2, "question"),
        "empty dataset": ([*base, "--dataset", empty], 2, "empty"),
        "topk without k": ([*base, "--architecture", "topk"], 2, "--k: expected"),
        "k above d_sae": ([*base, "--k", 33], 2, "--d-sae = 32"),
        "output exists": ([*base, "--output", full], 2, "--output"),
        "nothing to resume": (["train", "--resume", "--output", full], 2, "config.json"),
        "resume without output": (["train", "--resume"], 2, "--output"),
        "all held out": ([*base, "--eval-dialogues", 40], 2, "--eval-dialogues"),
        "bad device": ([*base, "--device", "tpu9"], 2, "device"),
        "not an SAE": (["evaluate", full], 2, "--model"),
        "not an SAE, data named": (
            ["evaluate", full, "--model", model, "--dataset", chats, "--layer", 0], 2, "cfg.json"
        ),
        "corrupt SAE": (
            ["evaluate", corrupt, "--model", model, "--dataset", chats, "--layer", 0], 1, "corrupt"
        ),
    }  # fmt: skip


NAMES = (
    "abbreviated flag|text for a whole number|half a token|many zeros|two dashes|no such choice|no such GPU|no such split|"
    "no such SAE|metrics over a folder|features beyond memory|"
    "unknown flag|not a number|unknown command|unknown model|unknown dataset|layer out of range|no chat column|"
    "empty dataset|topk without k|k above d_sae|output exists|nothing to resume|resume without output|all held out|bad device|"
    "not an SAE|not an SAE, data named|corrupt SAE"
).split("|")


@pytest.mark.parametrize("name", NAMES)
def test_bad_input(
    name: str, capsys: pytest.CaptureFixture[str], tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    arguments, expected_status, word = bad_inputs(tiny_model, chats, tmp_path)[name]
    before = sorted(path.name for path in tmp_path.iterdir())
    status, _, err = run(capsys, *arguments)
    assert status == expected_status, err
    assert word in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_resume_refuses_other_options(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    run(capsys, "train", "--model", tiny_model, "--dataset", chats, "--output", output, *FAST)
    status, _, err = run(capsys, "train", "--resume", "--output", output, "--lr", "0.5")
    assert status == 2
    assert "--lr" in err


def test_full_disk_is_said_in_words() -> None:
    message = cli.describe_os_error(OSError(28, "No space left on device", "/data/x"))
    assert "disk is full" in message
    assert "--resume" in message


def test_options_without_effect_are_named(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    base = ["train", "--model", tiny_model, "--dataset", chats, *FAST]
    unused = ["--architecture", "topk", "--k", 4, "--target-l0", 8, "--no-log-threshold", "--expansion", 2]
    status, _, err = run(capsys, *base, *unused, "--output", tmp_path / "run")
    assert status == 0
    assert "without effect on a topk run: --target-l0, --log-threshold, --expansion" in err
    assert "without effect" not in run(capsys, *base, "--target-l0", 8, "--output", tmp_path / "other")[2]


def test_a_target_beside_a_given_weight_is_without_effect() -> None:
    given: dict[str, Any] = {"target_l0": 8.0, "l0_coefficient": 1.0}
    assert without_effect(TrainConfig(**given), given) == ["target_l0"]
    assert without_effect(TrainConfig(sparsity="quadratic", **given), given) == []
    start = {"init_from": "my-sae", "d_sae": 8, "init_l0": 9.0, "lr": 1e-3}
    assert without_effect(TrainConfig(**start), start) == ["init_l0"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 8 TiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 TiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8796093022208 bytes"),
    ],
    ids=["NumPy", "GPU", "CPU"],
)  # fmt: skip
def test_no_memory_left_is_said_in_words(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(arguments: object) -> None:
        raise error

    monkeypatch.setattr(cli.COMMANDS["train"], "run", fails)
    status, _, err = run(capsys, "train")
    assert status == 1
    assert "there is not enough memory; lower --max-length" in err


def test_home_folder_in_paths(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert str(tmp_path / "full") in run(capsys, "train", "--output", "~/full", "--model", "./none")[2]
    assert str(tmp_path / "full") in run(capsys, "evaluate", "~/full")[2]
    assert str(tmp_path / "full") in run(capsys, "evaluate", "~/full", "--json", "~/full")[2]
