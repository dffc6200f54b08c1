"""What a resumed run must find as it was, and what a killed run may leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import make_config, stopped_run

from fastsae import UsageError, cli
from fastsae.disk import write_json
from fastsae.train import checkpoint, fingerprint
from fastsae.train.config import TrainConfig
from fastsae.train.evaluation import evaluate_folder
from fastsae.train.folder import CONFIG_FILE, described, is_new, located, read_config, resumed_config
from fastsae.train.run import train


def rewritten(chats: Path, change: Callable[[list[str]], list[str]]) -> None:
    lines = chats.read_text().splitlines(keepends=True)
    chats.write_text("".join(change(lines)))


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[::-1],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines[:-1], lines[-1].replace("words", "digits")],
        lambda lines: [*lines[:5], lines[5].replace("user", "system"), *lines[6:]],
        lambda lines: lines[:-1],
    ],
    ids=["reversed", "two swapped", "another word", "another role", "one less"],
)
def test_other_data_are_refused_on_resume(tiny_model: Path, chats: Path, tmp_path: Path, change: Any) -> None:
    data = Path(shutil.copy(chats, tmp_path / "chats.jsonl"))
    output = stopped_run(make_config(tiny_model, data, checkpoint_every=2), tmp_path / "run", at=5)
    good = data.read_text()
    rewritten(data, change)
    with pytest.raises(UsageError, match=r"dataset .* has changed"):
        train(read_config(output), output, resume=True, progress=False)
    data.write_text(good)
    train(read_config(output), output, resume=True, progress=False)


def test_dialogues_that_are_not_used_may_change(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    data = Path(shutil.copy(chats, tmp_path / "chats.jsonl"))
    config = make_config(tiny_model, data, checkpoint_every=2, max_dialogues=30)
    output = stopped_run(config, tmp_path / "run", at=5)
    rewritten(data, lambda lines: [*lines, lines[3].replace("words", "new words")])
    train(read_config(output), output, resume=True, progress=False)


def test_a_resumed_run_keeps_its_options(tmp_path: Path) -> None:
    saved = TrainConfig(layer=3, model_dtype="float32", lr=1e-2)
    write_json(tmp_path / CONFIG_FILE, described(saved))
    assert resumed_config(tmp_path, TrainConfig(lr=1e-2, device="cpu")) == replace(saved, device="cpu")
    for other in ({"lr": 1e-3}, {"lr": 1e-2, "layer": 2}, {"lr": 1e-2, "model_dtype": "bfloat16"}):
        with pytest.raises(UsageError, match=f"{list(other)[-1]}: the run in .* was started with"):
            resumed_config(tmp_path, TrainConfig(**other))


def test_a_long_dataset_is_told_by_a_sample_of_it() -> None:
    class Long(list):
        read = 0

        def __getitem__(self, index: Any) -> Any:
            Long.read += 1
            return super().__getitem__(index)

    rows = Long([{"role": "user", "content": f"\ud800 {i}"}] for i in range(3 * fingerprint.SAMPLE))
    first = fingerprint.of_dialogues(rows)
    assert Long.read <= fingerprint.SAMPLE
    assert fingerprint.of_dialogues(rows) == first
    assert fingerprint.of_dialogues(Long(rows[::-1])) != first
    assert fingerprint.of_dialogues(Long(rows[:-1])) != first


def test_another_model_is_refused_on_resume(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    import transformers

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    output = stopped_run(make_config(model, chats, checkpoint_every=2), tmp_path / "run", at=5)
    torch.manual_seed(1)
    transformers.Qwen2ForCausalLM(transformers.AutoConfig.from_pretrained(model)).save_pretrained(model)
    with pytest.raises(UsageError, match=r"model .* has changed"):
        train(read_config(output), output, resume=True, progress=False)


def test_a_models_fingerprint_is_that_of_its_weights_in_any_dtype(tiny_model: Path) -> None:
    from fastsae.data.language_model import load_model

    wide, tokenizer = load_model(str(tiny_model), "float32")
    narrow, _ = load_model(str(tiny_model), "bfloat16")
    first = fingerprint.of_model(wide, tokenizer)
    assert fingerprint.of_model(narrow, tokenizer) == first
    tokenizer.chat_template += " "
    assert fingerprint.of_model(wide, tokenizer) != first


def test_a_run_is_found_from_any_folder(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model, tmp_path / "here" / "model")
    shutil.copy(chats, tmp_path / "here" / "chats.jsonl")
    monkeypatch.chdir(tmp_path / "here")
    config = make_config(Path("model"), Path("./chats.jsonl"), checkpoint_every=2)
    stopped_run(config, Path("run"), at=5)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    output = Path("../here/run")
    assert read_config(output).model == str(tmp_path / "here" / "model")
    assert cli.main(["train", "--resume", "--quiet", "--output", str(output), "--model", "../here/model"]) == 0
    evaluate_folder(output, read_config(output), progress=False)


def test_model_data_and_folder_may_move(
    tiny_model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copy(chats, tmp_path / "chats.jsonl")
    config = make_config(tmp_path / "model", tmp_path / "chats.jsonl", checkpoint_every=2)
    stopped_run(config, tmp_path / "run", at=5)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    train(config, tmp_path / "whole", resume=True, progress=False)
    for name in ("model", "chats.jsonl", "run"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    resume = ["train", "--resume", "--quiet", "--output", str(tmp_path / "moved-run")]
    assert cli.main(resume) == 2
    assert f"model '{tmp_path}/model': expected a folder" in capsys.readouterr().err
    places = ["--model", str(tmp_path / "moved-model"), "--dataset", str(tmp_path / "moved-chats.jsonl")]
    assert cli.main([*resume, *places]) == 0
    weights = "sae_weights.safetensors"
    assert (tmp_path / "moved-run" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    evaluate_folder(tmp_path / "moved-run", read_config(tmp_path / "moved-run"), progress=False)


def test_another_dataset_is_no_moved_one(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    output = stopped_run(make_config(tiny_model, chats, checkpoint_every=2), tmp_path / "run", at=5)
    other = Path(shutil.copy(chats, tmp_path / "other.jsonl"))
    rewritten(other, lambda lines: lines[::-1])
    config = replace(read_config(output), dataset=str(other))
    with pytest.raises(UsageError, match=r"dataset .*other\.jsonl' has changed .* started with .*chats\.jsonl'"):
        train(config, output, resume=True, progress=False)
    assert read_config(output).dataset == str(chats)
    saved = json.loads((output / CONFIG_FILE).read_text())
    del saved["fingerprints"]  # without them only the name tells
    write_json(output / CONFIG_FILE, saved)
    with pytest.raises(UsageError, match="has changed"):
        train(config, output, resume=True, progress=False)
    train(read_config(output), output, resume=True, progress=False)


def test_names_that_are_no_paths_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "demo").mkdir()
    (tmp_path / "mine").mkdir()
    assert located("demo") == "demo"
    assert located("Qwen/Qwen2.5-0.5B-Instruct") == "Qwen/Qwen2.5-0.5B-Instruct"
    assert located("./mine") == located("~/mine") == located("mine") == str(tmp_path / "mine")
    assert located("x" * 5000) == "x" * 5000
    assert located("a\0b") == "a\0b"


def test_leftovers_of_a_killed_run_count_as_nothing(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    (output / "checkpoints" / ".step-000000500").mkdir(parents=True)
    (output / ".config.json.abc_1234").write_text("{")
    assert is_new(output)
    train(make_config(tiny_model, chats), output, progress=False)
    assert {path.name for path in output.iterdir()} == {
        "cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "dialogues.npz", "config.json", "metrics.json",
        "metrics.jsonl", "report.html",
    }  # fmt: skip
    assert not is_new(output)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".config.json.mine").write_text("")  # no name that this library gives
    assert not is_new(tmp_path / "other")


def test_a_run_killed_before_its_first_file_starts_with_resume_too(
    tiny_model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    assert cli.main(["train", "--resume", "--output", str(output)]) == 2
    assert "start it again with its options" in capsys.readouterr().err
    options = "--tokens 256 --batch-size 64 --buffer-tokens 256 --d-sae 32 --eval-dialogues 4 --quiet".split()
    arguments = ["train", "--resume", "--output", str(output), "--model", str(tiny_model), "--dataset", str(chats)]
    assert cli.main([*arguments, *options]) == 0


def test_a_complete_run_loses_the_checkpoints_that_a_kill_left(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model, chats)
    train(config, tmp_path / "run", progress=False)
    checkpoint.save(tmp_path / "run", 12, {"step": 12})
    with pytest.raises(UsageError, match="complete"):
        train(config, tmp_path / "run", resume=True, progress=False)
    assert not (tmp_path / "run" / checkpoint.FOLDER).exists()
