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


def test_a_config_of_another_size_than_the_weights_is_named(folder):
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": 64, "intermediate_size": 96}))
    with pytest.raises(FastsaeError, match=r"model '.*': expected weights of the sizes .* \[\S+ 64\], got \[\S+ 32\]"):
        load_model(str(folder))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_models_with_an_encoder_are_refused(folder, kind):
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(
        UsageError, match=rf"model '.*': expected a causal language model.*'{kind}', which has an encoder"
    ):
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
        (
            ImportError("TimmModel requires timm. `pip install timm`"),
            FastsaeError,
            "needs a package.*`pip install timm`",
        ),
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


def test_code_of_a_model_is_not_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own-model", "auto_map": classes}))
    with pytest.raises(UsageError, match=r"needs Python code that comes with its model, which fastsae does not run"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A random Llama with the tokenizer of the embedded model as a GGUF file, and the same model in memory."""
    gguf = pytest.importorskip("gguf", reason="needs the package gguf, which reads and writes GGUF files")
    pytest.importorskip("accelerate", reason="transformers needs the package accelerate to read GGUF files")
    from fastsae.data import demo

    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.model_path())
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, "vocab_size": len(tokenizer)}, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    path = tmp_path_factory.mktemp("gguf") / "tiny.GGUF"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    write_tokenizer(writer, tokenizer, json.loads((demo.model_path() / "tokenizer.json").read_text()))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2], 0)
        if heads:  # llama.cpp stores the two halves of a rotated pair side by side
            tensor = tensor.reshape(heads, 2, -1, config.hidden_size).swapaxes(1, 2).reshape(tensor.shape)
        if name != "lm_head.weight":
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model, tokenizer


def write_tokenizer(writer, tokenizer, file):
    vocabulary = tokenizer.get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([3 if index in tokenizer.added_tokens_decoder else 1 for index in range(len(tokenizer))])
    merges = file["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def test_gguf_file(gguf_file, capfd):
    path, expected, its_tokenizer = gguf_file
    model, tokenizer = load_model(str(path))
    assert "%" not in capfd.readouterr().err  # no progress bar that was not asked for
    assert model.dtype == torch.float32
    dialogue = [{"role": "user", "content": "What is  x=1?"}, {"role": "assistant", "content": "A name."}]
    ids = tokenizer.apply_chat_template(dialogue, return_dict=True, return_tensors="pt")["input_ids"]
    assert torch.equal(
        ids, its_tokenizer.apply_chat_template(dialogue, return_dict=True, return_tensors="pt").input_ids
    )
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_bad_gguf_files(gguf_file, tmp_path, monkeypatch):
    path = tmp_path / "other.gguf"
    with pytest.raises(UsageError, match="there is no such file"):
        load_model(str(path))
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(UsageError, match="found a file that is not GGUF"):
        load_model(str(path))
    path.write_bytes(gguf_file[0].read_bytes()[:3000])
    with pytest.raises(FastsaeError, match="could not be loaded"):
        load_model(str(path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FastsaeError, match=r"needs gguf and accelerate: pip install fastsae-kernels\[gguf\]"):
        load_model(str(path))
