"""What a model may do to a run: its positions, its tokens, its dtype and its kind are known before the data is read."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastsae import FastsaeError, UsageError
from fastsae.data import model_dtype
from fastsae.train.config import TrainConfig
from fastsae.train.pipeline import build_pipeline


@pytest.fixture
def config(tiny_model: Path, chats: Path) -> TrainConfig:
    return TrainConfig(model=str(tiny_model), dataset=str(chats), eval_dialogues=8, forward_tokens=256)


def save(folder: Path, model: Any, tokenizer_folder: Path, **added: Any) -> str:
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    if added:
        tokenizer.add_special_tokens(added)
    tokenizer.save_pretrained(folder)
    return str(folder)


def gpt2(n_words: int, n_positions: int = 32) -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=n_words, n_positions=n_positions, **sizes))


@pytest.mark.parametrize(("max_length", "expected"), [(8192, 32), (32, 32), (20, 20)])
def test_dialogues_are_cut_at_the_positions_of_the_model(
    config: TrainConfig,
    tiny_model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    max_length: int,
    expected: int,
) -> None:
    model = save(tmp_path, gpt2(4096), tiny_model)
    with caplog.at_level(logging.INFO):
        pipeline = build_pipeline(replace(config, model=model, max_length=max_length))
    assert pipeline.max_length == expected
    assert pipeline.config.max_length == max_length  # what was asked for, so that --resume agrees with it
    message = "dialogues are cut off at 32 tokens, the model's own limit, below max_length 8192"
    assert (message in caplog.messages) is (max_length > 32)
    batches = list(pipeline.held_out_batches())
    assert max(batch.input_ids.shape[1] for batch in batches) == expected
    for batch in batches:
        pipeline.residual(batch.input_ids, batch.attention_mask)


def test_tokens_without_an_embedding_drop_their_dialogue(config: TrainConfig, tiny_model: Path, tmp_path: Path) -> None:
    added = {"pad_token": "[PAD]", "additional_special_tokens": ["[IMAGE]"]}
    model = save(tmp_path / "model", gpt2(4096, 256), tiny_model, **added)
    rows = [json.loads(line) for line in Path(config.dataset).read_text().splitlines()]
    rows[3]["messages"][0]["content"] += " [IMAGE]"
    rows[7]["messages"][1]["content"] += "[PAD]"
    dataset = tmp_path / "chats.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pipeline = build_pipeline(replace(config, model=model, dataset=str(dataset), dedup_words=0))
    assert pipeline.tokenizer.pad_token_id >= 4096
    training, held_out = pipeline.sequencer(), pipeline.held_out_batches()
    seen = [index for batch in held_out for index in batch.dialogue_ids[:, 0].tolist()]
    while training.epoch == 0:
        batch = next(training)
        if training.epoch == 0:
            seen += batch.dialogue_ids[:, 0].tolist()
        pipeline.residual(batch.input_ids, batch.attention_mask)
    assert sorted(seen) == sorted(set(range(40)) - {3, 7})


def test_tokenizer_of_a_larger_vocabulary_is_refused(config: TrainConfig, tiny_model: Path, tmp_path: Path) -> None:
    model = save(tmp_path, gpt2(4000), tiny_model)
    with pytest.raises(UsageError, match=r"model: expected token ids below 4000.*ids up to 4095"):
        build_pipeline(replace(config, model=model))


def test_model_that_cannot_be_read_rightly_is_refused_before_the_data_is_read(
    config: TrainConfig, tiny_model: Path, tmp_path: Path
) -> None:
    bert = transformers.BertConfig(
        vocab_size=4096, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = save(tmp_path, transformers.BertLMHeadModel(bert), tiny_model)
    with pytest.raises(UsageError, match="models of type 'bert'"):
        build_pipeline(replace(config, model=model, dataset="/no/such.jsonl"))


@pytest.mark.parametrize(
    ("failure", "raised", "message"),
    [
        (
            TypeError("'NoneType' object\nis not subscriptable"),
            UsageError,
            r"fails on a short dialogue \(TypeError: .* is",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError, "can't allocate memory"),
        (FastsaeError("its own message"), FastsaeError, "its own message"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_model_whose_own_code_fails_is_one_message(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, failure: Exception, raised: type[Exception], message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(transformers.Qwen2Model, "forward", fail)
    with pytest.raises(raised, match=message) as caught:
        build_pipeline(replace(config, dataset="/no/such.jsonl"))
    assert type(caught.value) is raised


@pytest.mark.parametrize(("narrow", "expected"), [(6.0, "float32"), (90.0, "bfloat16")])
def test_chosen_dtype_is_kept_with_the_run(
    config: TrainConfig, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, narrow: float, expected: str
) -> None:
    stored = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).to(torch.bfloat16)
    config = replace(config, model=save(tmp_path, stored, tiny_model))
    monkeypatch.setattr(model_dtype, "measure_products", lambda *_: (40.0, narrow))
    pipeline = build_pipeline(config)
    assert pipeline.config == replace(config, layer=1, model_dtype=expected)
    # Elsewhere, the same run takes the same dtype: nothing is measured any more.
    monkeypatch.setattr(model_dtype, "measure_products", lambda *_: pytest.fail("measured again"))
    again = build_pipeline(pipeline.config)
    assert again.config == pipeline.config
    batch = next(pipeline.held_out_batches())
    acts = [p.residual(batch.input_ids, batch.attention_mask) for p in (pipeline, again)]
    assert torch.equal(*acts)
    assert str(acts[0].dtype) == f"torch.{expected}"


def test_template_that_refuses_the_checked_dialogue(config: TrainConfig, tiny_model: Path, tmp_path: Path) -> None:
    model = save(tmp_path, gpt2(4096), tiny_model)
    template = "{% if 'France' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}"
    template += "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    assert build_pipeline(replace(config, model=model)).max_length == 32
