"""Loading a language model: folders, GGUF files, what is wrong with them, and the dtype that suits the machine."""

import json
import sys

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fastsae.data.activations import ResidualStream
from fastsae.data.language_model import load_model
from fastsae.errors import FastsaeError, UsageError

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=6),
    "gpt2": transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64),
}


@pytest.fixture
def folder(tmp_path):
    AutoModelForCausalLM.from_config(FAMILIES["llama"]).save_pretrained(tmp_path / "model")
    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(97)}, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16)],
)
def test_load_model_from_a_folder(folder, dtype, expected):
    model, tokenizer = load_model(str(folder), dtype=dtype)
    assert model.dtype == expected
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer("t5 t7")["input_ids"] == [5, 7]
    assert ResidualStream(model, 1)(torch.tensor([[5, 7]]), torch.ones(1, 2)).dtype == expected


def test_bad_arguments_of_load_model(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (
        (str(tmp_path / "empty"), "found a folder without config.json"),
        (str(tmp_path / "absent"), "found no folder"),
        ("./absent", "found no folder"),
    ):
        with pytest.raises(UsageError, match=message):
            load_model(name)
    for dtype in ("float31", "int8", torch.int64, "nn"):
        with pytest.raises(UsageError, match="model dtype: expected float32"):
            load_model(str(folder), dtype=dtype)
    with pytest.raises(UsageError, match="device: expected 'cpu'"):
        load_model(str(folder), device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="finds no CUDA device"):
            load_model(str(folder), device="cuda")


def test_damaged_model_folders(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(FastsaeError, match=r"could not be loaded.*interrupted") as caught:
        load_model(str(folder))
    assert not isinstance(caught.value, UsageError)
    weights.unlink()
    with pytest.raises(FastsaeError, match="could not be loaded"):
        load_model(str(folder))
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "unheard-of"}))
    with pytest.raises(UsageError, match="no causal language model that this version of transformers knows"):
        load_model(str(folder))
    config.write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UsageError, match="no causal language model"):
        load_model(str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_without_tokenizer(tmp_path, family):
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has no tokenizer that transformers can load"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (OSError("We couldn't connect to 'https://hub' to load the files"), FastsaeError, "could not be reached"),
        (
            OSError("a/b is not a local folder and is not a valid model identifier listed"),
            UsageError,
            "neither a local",
        ),
        (OSError("You are trying to access a gated repo."), UsageError, "gated model needs `hf auth login`"),
        (OSError(28, "No space left on device"), FastsaeError, r"No space left on device.*free disk space"),
    ],
)
def test_hub_failures_say_what_to_do(monkeypatch, failure, error, message):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(FastsaeError, match=message) as caught:
        load_model("a/b")
    assert type(caught.value) is error


def test_transformers_missing(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FastsaeError, match=r"pip install fastsae-kernels\[train\]"):
        load_model(str(folder))
