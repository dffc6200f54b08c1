"""Whole runs by every sequencing: held out are whole dialogues, what was left out is told, and each run resumes exactly."""

from __future__ import annotations

import gzip
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from stopped_runs import make_config, stopped_run, without_times

from fastsae import UsageError, cli
from fastsae.data import stream
from fastsae.train.config import TrainConfig
from fastsae.train.evaluation import evaluate_folder
from fastsae.train.folder import read_config
from fastsae.train.pipeline import build_pipeline
from fastsae.train.run import train

SEQUENCINGS = ("fast", "packed", "block")


@pytest.fixture(autouse=True)
def short_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SAMPLE_TOKENS", 200)  # so that the first piece of so short a run is not all of it


@pytest.fixture
def config(tiny_model: Path, chats: Path) -> TrainConfig:
    return make_config(tiny_model, chats, block_length=32, checkpoint_every=1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "plain.jsonl"
    rows = [
        {"id": i, "text": f"Chapter {i}. " + "The ship sailed on, and nobody spoke. " * (1 + i % 5)} for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def outcome(output: Path) -> tuple[bytes, dict[str, Any]]:
    metrics = json.loads((output / "metrics.json").read_text())
    return (output / "sae_weights.safetensors").read_bytes(), without_times(metrics)


@pytest.mark.parametrize("sequencing", [*SEQUENCINGS, "text"])
def test_a_run_stopped_at_any_step_resumes_to_the_same(
    config: TrainConfig, texts: Path, tmp_path: Path, sequencing: Any
) -> None:
    options: dict[str, Any] = {"sequencing": sequencing}
    if sequencing == "text":
        options = {"sequencing": "block", "text": str(texts)}
    config = replace(config, **options)
    train(config, tmp_path / "whole", progress=False)
    for step in range(1, 12, 2):
        output = stopped_run(config, tmp_path / f"run{step}", at=step)
        train(read_config(output), output, resume=True, progress=False)
        assert outcome(output) == outcome(tmp_path / "whole")


def test_the_evaluation_reads_the_same_whole_dialogues(config: TrainConfig, texts: Path) -> None:
    found = []
    for options in ({"sequencing": "fast"}, {"sequencing": "packed"}, {"sequencing": "block"}, {"text": str(texts)}):
        pipeline = build_pipeline(replace(config, **options))  # type: ignore[arg-type]
        found.append([batch.input_ids.tolist() for batch in pipeline.held_out_batches()])
        assert len(pipeline.train) == (60 if "text" in options else 32)
        assert not set(pipeline.held_out) & set(pipeline.train) or "text" in options
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize("sequencing", SEQUENCINGS)
def test_the_saved_sae_and_its_metrics_say_how_it_was_trained(
    config: TrainConfig, tmp_path: Path, sequencing: Any
) -> None:
    metrics = train(replace(config, sequencing=sequencing), tmp_path / "run", progress=False)
    metadata = json.loads((tmp_path / "run" / "cfg.json").read_text())["metadata"]
    assert metadata["sequencing"] == sequencing
    assert metadata["disable_concat_sequences"] is (sequencing != "block")
    assert metadata["context_size"] == (32 if sequencing == "block" else 512)
    assert metadata["max_norm_multiple"] == 10
    assert metadata["median_norm"] > 0
    assert 0 <= metrics["padding_share"] < 0.05
    assert metrics["sinks_left_out"] == 0
    assert metrics["first_tokens_left_out"] > 0
    assert 0 < metrics["seconds_of_evaluation"] < metrics["seconds"]
    assert metrics["tokens_computed"] < 64 * 12 + 2 * 256 + 300  # what is trained on, and no buffer more


def with_a_sink(folder: Path, tiny_model: Path) -> str:
    """The tiny model with an embedding of `number`, a word of every dialogue, that is a thousand times as long."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    (word,) = tokenizer(" number", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[word] *= 1000
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_sinks_are_left_out_of_training_and_evaluation_by_one_rule(
    config: TrainConfig, tiny_model: Path, tmp_path: Path
) -> None:
    config = replace(config, model=with_a_sink(tmp_path / "model", tiny_model))
    metrics = train(config, tmp_path / "run", progress=False)
    assert metrics["sinks_left_out"] > 10
    assert metrics["sinks_beyond_position_0"] > 5
    assert metrics["norm"] < 10 * metrics["norm_median"]
    kept = train(replace(config, max_norm_multiple=None), tmp_path / "kept", progress=False)
    assert kept["sinks_left_out"] == 0
    assert kept["sinks_beyond_position_0"] == metrics["sinks_beyond_position_0"]  # the headline figures stay comparable
    assert json.loads((tmp_path / "kept" / "cfg.json").read_text())["metadata"]["max_norm_multiple"] is None
    wide = evaluate_folder(tmp_path / "run", replace(config, max_norm_multiple=1e6), progress=False)
    assert wide.metrics["sinks_beyond_position_0"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequencing": "block", "block_length": 513}, "block_length: expected at most the 512 positions of the model"),
        ({"text": "/no/such.txt"}, "text '/no/such.txt': there is no such file"),
        (
            {"sequencing": "block", "block_length": 500, "max_dialogues": 9},
            "block_length: expected a block that the .* can fill",
        ),
    ],
)
def test_what_cannot_be_sequenced_is_one_message(
    config: TrainConfig, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(replace(config, eval_dialogues=4, **options), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_text_without_dialogues_to_evaluate_on_is_refused(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--text", str(texts), "--output", str(tmp_path / "run")]) == 2
    assert "--text: expected --dataset with dialogues for the evaluation" in capsys.readouterr().err


def test_a_changed_text_is_refused_on_resume(config: TrainConfig, texts: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_bytes(texts.read_bytes())
    output = stopped_run(replace(config, text=str(mine)), tmp_path / "run", at=3)
    mine.write_text(mine.read_text().replace("ship", "boat"))
    with pytest.raises(UsageError, match=r"text .* has changed"):
        train(read_config(output), output, resume=True, progress=False)


def test_a_doubled_bos_is_told_once(config: TrainConfig, tiny_model: Path, tmp_path: Path, caplog: Any) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = (
        "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    transformers.AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        pipeline = build_pipeline(replace(config, model=str(tmp_path)))
    assert sum("writes the BOS token twice" in message for message in caplog.messages) == 1
    batch = next(pipeline.sequencer())
    assert (batch.input_ids[:, 0] == tokenizer.bos_token_id).all()
    assert (batch.input_ids[:, 1] != tokenizer.bos_token_id).all()


def test_the_evaluation_is_sized_by_the_run(config: TrainConfig, chats: Path, tmp_path: Path) -> None:
    many = tmp_path / "many.jsonl"
    many.write_text("".join(chats.read_text().replace("number ", f"number {i}") for i in range(60)))
    config = replace(config, dataset=str(many), dedup_words=0, eval_dialogues=None)
    sizes = [len(build_pipeline(replace(config, tokens=tokens)).held_out) for tokens in (768, 10**6, 10**9)]
    assert sizes[0] == 16
    assert sizes[2] == 240  # a tenth of the dialogues
    assert sizes[0] < sizes[1] < sizes[2]
    held_out = [build_pipeline(replace(config, tokens=tokens)).held_out for tokens in (768, 10**6)]
    assert held_out[1][:16] == held_out[0]
    assert build_pipeline(replace(config, tokens=768)).config.eval_dialogues == 16


def test_the_evaluation_of_several_saes_is_sized_by_all_their_passes(
    config: TrainConfig, chats: Path, tmp_path: Path
) -> None:
    many = tmp_path / "many.jsonl"
    many.write_text("".join(chats.read_text().replace("number ", f"number {i}") for i in range(60)))
    config = replace(config, dataset=str(many), dedup_words=0, eval_dialogues=None, tokens=2 * 10**6, layer=1)
    pipelines = [build_pipeline(config, [replace(config, seed=seed) for seed in range(n)]) for n in (1, 8)]
    one, eight = (len(pipeline.held_out) for pipeline in pipelines)
    model = pipelines[0].residual.model
    blocks, head = ([*part.parameters()] for part in (model.model.layers, model.lm_head))
    whole, last = (sum(weight.numel() for weight in weights) for weights in (blocks + head, head))
    assert 16 < eight < one < 240
    # behind the last of the two blocks there is the head alone: a pass with zeros, and one for each SAE
    assert eight / one == pytest.approx((whole + 2 * last) / (whole + 9 * last), rel=0.05)


def test_a_run_with_its_own_number_of_dialogues_resumes(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, eval_dialogues=None)
    output = stopped_run(config, tmp_path / "run", at=3)
    assert read_config(output).eval_dialogues == 4
    train(config, output, resume=True, progress=False)


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "folder", "tokens"])
def test_plain_text_of_every_kind_trains(config: TrainConfig, texts: Path, tmp_path: Path, kind: str) -> None:
    lines = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    path = tmp_path / f"data.{kind}"
    if kind == "txt":
        path.write_text("\n".join(lines))
    elif kind == "txt.gz":
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    elif kind == "folder":
        path.mkdir()
        for i, line in enumerate(lines):
            (path / f"{i:03}.txt").write_text(line)
    else:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps({"input_ids": list(range(i, i + 40))}) + "\n" for i in range(60)))
    metrics = train(replace(config, sequencing="block", text=str(path)), tmp_path / "run", progress=False)
    assert metrics["tokens"] == 64 * 12
    assert metrics["padding_share"] == 0
