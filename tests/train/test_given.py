"""Training from Python on one's own model, tokenizer and data, and what `--model-kwargs` hands to transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from stopped_runs import make_config, stopped_run, without_times

from fastsae import FastsaeError, UsageError
from fastsae.data.language_model import load_model
from fastsae.train import TrainConfig, train
from fastsae.train.evaluation import evaluate_folder
from fastsae.train.folder import read_config


@pytest.fixture
def config(tiny_model: Path, chats: Path) -> TrainConfig:
    return make_config(tiny_model, chats, checkpoint_every=1, model_dtype="float32")


@pytest.fixture
def objects(tiny_model: Path, chats: Path) -> dict[str, Any]:
    return {
        "model": transformers.AutoModelForCausalLM.from_pretrained(tiny_model),
        "tokenizer": transformers.AutoTokenizer.from_pretrained(tiny_model),
        "dialogues": (json.loads(line)["messages"] for line in chats.read_text().splitlines()),
    }


def test_objects_in_hand_train_as_their_names_do(config: TrainConfig, objects: dict[str, Any], tmp_path: Path) -> None:
    whole = train(config, tmp_path / "named", progress=False)
    plain = replace(config, model="demo", dataset="demo")
    found = train(plain, str(tmp_path / "given"), **objects, progress=False)
    assert without_times(found) == without_times(whole)
    weights = [(tmp_path / name / "sae_weights.safetensors").read_bytes() for name in ("named", "given")]
    assert weights[0] == weights[1]
    assert read_config(tmp_path / "given").dataset == "given-as-an-object"


def test_a_run_on_objects_resumes_with_the_same_objects(
    config: TrainConfig, objects: dict[str, Any], tmp_path: Path
) -> None:
    output = stopped_run(config, tmp_path / "run", at=5)
    dialogues = list(objects.pop("dialogues"))
    with pytest.raises(UsageError, match=r"dataset .* has changed"):
        train(read_config(output), output, **objects, dialogues=dialogues[::-1], resume=True, progress=False)
    train(read_config(output), output, **objects, dialogues=dialogues, resume=True, progress=False)


def test_texts_in_hand(config: TrainConfig, tmp_path: Path) -> None:
    texts = [f"The {i}th wave came in, and nobody on the beach had seen it. " * 9 for i in range(50)]
    metrics = train(
        replace(config, sequencing="block", block_length=64), tmp_path / "run", texts=iter(texts), progress=False
    )
    assert metrics["dialogues"] == 8
    assert metrics["padding_share"] == 0


def test_half_a_model_is_refused(config: TrainConfig, objects: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="model: expected a model and its tokenizer together"):
        train(config, tmp_path / "run", model=objects["model"])
    with pytest.raises(UsageError, match=r"model: expected a model in evaluation mode.*eval\(\)"):
        train(config, tmp_path / "run", model=objects["model"].train(), tokenizer=objects["tokenizer"])


def test_model_kwargs_reach_transformers(config: TrainConfig, tmp_path: Path) -> None:
    eager = json.dumps({"attn_implementation": "eager", "revision": "main"})
    train(replace(config, model_kwargs=eager), tmp_path / "run", progress=False)
    assert read_config(tmp_path / "run").model_kwargs == eager
    evaluate_folder(tmp_path / "run", read_config(tmp_path / "run"), progress=False)
    model, _ = load_model(config.model, "float32", options=json.loads(eager))
    assert model.config._attn_implementation == "eager"
    placed, _ = load_model(config.model, "float32", options={"device_map": {"": "cpu"}})
    assert placed.device.type == "cpu"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "model_kwargs: expected a JSON object"),
        ("[1]", "model_kwargs: expected a JSON object"),
        ('{"dtype": "float16"}', "model_kwargs: expected options that fastsae has no flag for, got 'dtype'"),
        ('{"trust_remote_code": true}', "model_kwargs: expected options that fastsae has no flag for"),
        ('{"attn_implementation": "no such"}', "could not be loaded .* with --model-kwargs attn_implementation"),
        ('{"no_such_option": 1}', "could not be loaded .* with --model-kwargs no_such_option"),
    ],
)
def test_model_kwargs_that_cannot_be_used_are_one_message(
    config: TrainConfig, tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(FastsaeError, match=message):
        train(replace(config, model_kwargs=text), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
