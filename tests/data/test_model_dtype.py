"""Which dtype a language model runs in: the fastest that holds every stored weight and fits in memory."""

import logging

import pytest
import torch
import transformers

from fastsae.data import model_dtype
from fastsae.data.language_model import load_model
from fastsae.data.model_dtype import choose_dtype, count_weights, measure_products, stored_dtype

CONFIG = transformers.LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
CPU = torch.device("cpu")


@pytest.fixture
def rates(monkeypatch):
    """Sets what the measurement finds; counts how often it is asked."""
    calls = []

    def set_rates(wide, narrow):
        def measured(_config, dtype):
            calls.append(dtype)
            return wide, narrow

        monkeypatch.setattr(model_dtype, "measure_products", measured)
        return calls

    return set_rates


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("wide", "narrow", "stays"),
    [(40, 6, False), (40, 40, False), (40, 47, False), (40, 49, True), (90, 190, True)],
)
def test_half_precision_stays_where_it_is_clearly_faster(rates, caplog, stored, wide, narrow, stays):
    rates(wide, narrow)
    with caplog.at_level(logging.INFO):
        chosen = choose_dtype(CONFIG, stored, 1000, CPU)
    assert chosen == (stored if stays else torch.float32)
    name, other = str(chosen).removeprefix("torch."), str(stored).removeprefix("torch.")
    assert caplog.messages == [
        f"the language model runs in {name}: it is stored in {other}, and a core computes {wide} GFLOP/s in float32 and "
        f"{narrow} in {other}"
    ]


def test_nothing_is_measured_where_there_is_no_choice(rates):
    calls = rates(40, 6)
    assert choose_dtype(CONFIG, torch.float32, 1000, CPU) == torch.float32
    assert choose_dtype(CONFIG, torch.float64, 1000, CPU) == torch.float64  # float32 would lose digits
    assert choose_dtype(CONFIG, None, 1000, CPU) is None
    assert choose_dtype(CONFIG, torch.bfloat16, 1000, torch.device("cuda")) == torch.bfloat16
    quantised = transformers.LlamaConfig()
    quantised.quantization_config = {"quant_method": "fp8"}
    assert choose_dtype(quantised, torch.bfloat16, 1000, CPU) == torch.bfloat16
    assert calls == []


def test_float32_must_fit_in_memory(rates, monkeypatch, caplog):
    calls = rates(40, 6)
    monkeypatch.setattr(model_dtype, "free_memory", lambda device: 8_000_000)
    with caplog.at_level(logging.INFO):
        assert choose_dtype(CONFIG, torch.bfloat16, 1_000_001, CPU) == torch.bfloat16
    assert calls == []
    assert "as stored: in float32 its weights would take 0.0 GB of the 0.0 GB of free memory" in caplog.text
    assert choose_dtype(CONFIG, torch.bfloat16, 1_000_000, CPU) == torch.float32  # half of the memory
    monkeypatch.setattr(model_dtype, "free_memory", lambda device: None)
    assert choose_dtype(CONFIG, torch.bfloat16, 10**12, CPU) == torch.float32


def test_measurement_leaves_threads_and_random_numbers_alone():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    wide, narrow = measure_products(CONFIG, torch.bfloat16)
    assert wide > 0
    assert narrow > 0
    assert torch.get_num_threads() == threads
    n_weights = count_weights(CONFIG)
    assert torch.equal(torch.get_rng_state(), state)
    assert n_weights == sum(p.numel() for p in transformers.LlamaForCausalLM(CONFIG).parameters())
    assert count_weights(transformers.ViTConfig()) == 0


@pytest.mark.parametrize("written", ["bfloat16", torch.bfloat16])
def test_stored_dtype_of_a_configuration(written):
    assert stored_dtype(transformers.LlamaConfig(dtype=written)) == torch.bfloat16
    assert stored_dtype(transformers.LlamaConfig()) is None


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(("narrow", "expected"), [(6, torch.float32), (90, torch.bfloat16)])
def test_loading_takes_the_chosen_dtype(rates, tmp_path, tiny_model, named, narrow, expected):
    rates(40, narrow)
    model, tokenizer = load_model(str(tiny_model))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if not named:  # then the weights themselves tell
        text = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(text.replace('"dtype": "bfloat16",', ""))
        assert stored_dtype(transformers.AutoConfig.from_pretrained(tmp_path)) is None
    loaded = load_model(str(tmp_path))[0]
    assert loaded.dtype == expected
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].to(expected))
    assert load_model(str(tmp_path), "bfloat16")[0].dtype == torch.bfloat16
