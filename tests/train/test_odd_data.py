"""Runs on a stranger's data: what cannot be used is counted in the metrics, the summary, the report and across a resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tqdm
import transformers

from fastsae import cli
from fastsae.data.chat import load_chats
from fastsae.train.config import TrainConfig
from fastsae.train.folder import read_config
from fastsae.train.held_out import split_dialogues
from fastsae.train.run import train
from fastsae.train.trainer import Trainer

FAILS_ON_TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'tool' %}{{ m.tool_call_id | tojson }}{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
)


@pytest.fixture
def odd(tmp_path: Path, tiny_model: Path, chats: Path) -> TrainConfig:
    """40 good dialogues between Human and Alice, 10 with a tool's turn on which the template fails, 2 damaged lines."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = FAILS_ON_TOOLS
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    for row in rows:
        row["messages"][0]["role"] = "Human"
        row["messages"][1]["role"] = "Alice"
    tools = [
        {"messages": [*rows[i]["messages"][:1], {"role": "tool", "content": f"result {i}"}]} for i in range(0, 40, 4)
    ]
    lines = [*map(json.dumps, [*rows, *tools]), '{"messages": [', "[" * 100_000]
    (tmp_path / "odd.jsonl").write_text("\n".join(lines))
    return TrainConfig(
        model=str(tmp_path / "model"),
        dataset=str(tmp_path / "odd.jsonl"),
        dedup_words=0,
        eval_dialogues=12,
        d_sae=64,
        tokens=64 * 60,
        batch_size=64,
        buffer_tokens=512,
        forward_tokens=256,
        checkpoint_every=10,
    )


EXPECTED = {
    "the line is damaged JSON": 1,
    "the JSON is nested too deeply": 1,
    "the chat template raised an error (TypeError)": 10,
}


def check(metrics: dict[str, Any]) -> None:
    assert metrics["dialogues_dropped"] == 12
    assert metrics["dropped_by_reason"] == EXPECTED
    assert metrics["dropped_first_rows"].keys() == EXPECTED.keys()
    assert metrics["dropped_first_rows"]["the line is damaged JSON"] == 50
    assert metrics["unknown_roles"] == {"Alice": 40}


def test_every_dialogue_that_cannot_be_used_counts_once_however_often_the_data_repeats(
    odd: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "fastsae"):
        metrics = train(odd, tmp_path / "run", progress=False)
    assert metrics["tokens"] / 40 > 60  # several times over the 40 dialogues
    check(metrics)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    page = (tmp_path / "run" / "report.html").read_text()
    assert "the chat template raised an error (TypeError), such as row" in page
    assert "<code>Alice</code>" in page
    assert "the chat template raised an error (TypeError) (such as row" in caplog.text
    assert "'Alice' (40)" in caplog.text
    assert "number" not in caplog.text  # a word of every dialogue: a warning never holds their text


def test_the_counts_survive_a_resume(odd: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.train_step

    def killed(self: Trainer, batch: Any) -> Any:
        if self.step == 45:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(odd, tmp_path / "run", progress=False)
    check(train(read_config(tmp_path / "run"), tmp_path / "run", resume=True, progress=False))


def test_the_summary_names_them(odd: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(odd, tmp_path / "run", progress=False)
    assert cli.main(["evaluate", str(tmp_path / "run"), "--json", str(tmp_path / "m.json"), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert "dialogues could not be used: " in captured.out
    assert "1 because the line is damaged JSON" in captured.out
    assert "'Alice' (40)" in captured.out
    assert "of 52 dialogues cannot be used" in captured.err
    measured = json.loads((tmp_path / "m.json").read_text())
    assert measured["dropped_by_reason"]["the line is damaged JSON"] == 1
    assert measured["dialogues_dropped"] < 12  # the held-out ones alone, and those of the file


def test_a_good_dataset_has_nothing_to_tell(
    tiny_model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = "--eval-dialogues 4 --d-sae 32 --tokens 256 --batch-size 64 --buffer-tokens 256 --forward-tokens 256".split()
    output = tmp_path / "run"
    arguments = ["train", "--model", str(tiny_model), "--dataset", str(chats), "--output", str(output), *fast]
    assert cli.main([*arguments, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert "could not be used" not in captured.out
    assert "roles" not in captured.out + captured.err
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["dialogues_dropped"] == 0
    assert metrics["dropped_by_reason"] == metrics["unknown_roles"] == {}
    assert "Unusual dialogues" not in (output / "report.html").read_text()


def test_bars_of_long_work_alone_and_none_when_quiet(
    odd: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    delays = []
    plain = tqdm.tqdm

    def without_delay(*items: Any, delay: float, **options: Any) -> Any:
        delays.append(delay)
        return plain(*items, **options)

    def work(progress: bool) -> str:
        split_dialogues(load_chats(odd.dataset, progress=progress), replace(odd, dedup_words=20), progress=progress)
        return capsys.readouterr().err

    monkeypatch.setattr(tqdm, "tqdm", without_delay)
    shown = work(True)
    assert "reading dialogues: 100%" in shown
    assert "52.0/52.0" in shown
    assert "removing repeated dialogues: 100%" in shown
    assert delays == [1, 1, 1]  # seconds of work without a bar
    work(False)
    assert len(delays) == 3  # no bar was made
