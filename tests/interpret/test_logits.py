"""Logits of features against the weights themselves in fp64, for the norms and heads that models have; nearest features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from page_examples import examples
from torch import Tensor, nn

from fastsae.interpret import logits as module
from fastsae.interpret.logits import feature_logits, find_final_norm, nearest_features
from fastsae.interpret.page_data import describe

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 211}
LLAMA = {**SIZES, "hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}


def gpt2(width: int = 16) -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=width, n_layer=2, n_head=2, vocab_size=211))


def llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **options))


def gemma() -> Any:
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**LLAMA))


def olmo() -> Any:
    return transformers.OlmoForCausalLM(transformers.OlmoConfig(**LLAMA))


def neox() -> Any:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES, hidden_size=16, intermediate_size=24))


# the model, the final norm's weight of a model, whether it centres
MODELS = {
    "RMSNorm": (llama, lambda m: m.model.norm.weight, False),
    "RMSNorm, tied head": (lambda: llama(tie_word_embeddings=True), lambda m: m.model.norm.weight, False),
    "a weight stored as its distance from 1": (gemma, lambda m: 1 + m.model.norm.weight, False),
    "LayerNorm with bias": (gpt2, lambda m: m.transformer.ln_f.weight, True),
    "LayerNorm of an odd width": (lambda: gpt2(26), lambda m: m.transformer.ln_f.weight, True),
    "LayerNorm without weight": (olmo, lambda m: torch.ones(16), True),
    "LayerNorm of another name": (neox, lambda m: m.gpt_neox.final_layer_norm.weight, True),
}


def built(name: str) -> tuple[Any, Tensor, bool]:
    """A model with random norms, its final norm's gain in fp64, and whether that norm centres."""
    make, gain, centres = MODELS[name]
    model = make().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.randn_like(parameter))
    return model, gain(model).double(), centres


def reference(W_U: Tensor, gain: Tensor, centres: bool, d: Tensor) -> Tensor:
    d = d.double()
    if centres:
        d = d - d.mean(1, keepdim=True)
    logits = (d * gain) @ W_U.double().t()
    return logits - logits.mean(1, keepdim=True)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_folded_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FEATURES_AT_ONCE", 3)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 50)
    model, gain, centres = built(name)
    directions = torch.randn(7, len(gain))
    W_U = model.get_output_embeddings().weight
    expected = reference(W_U, gain, centres, directions)
    found = feature_logits(model, directions, k=4)
    assert found is not None
    assert len(found) == 7
    for row, one in zip(expected, found, strict=True):
        for values, pairs in ((row.topk(4), one.positive), (row.topk(4, largest=False), one.negative)):
            assert [token for token, _ in pairs] == values.indices.tolist()
            assert [value for _, value in pairs] == pytest.approx(values.values.tolist(), rel=1e-4, abs=1e-5)
        assert sum(one.histogram) == len(W_U)
        assert (one.edges[0], one.edges[-1]) == pytest.approx((one.negative[0][1], one.positive[0][1]))
        inside = ((row >= one.edges[10]) & (row < one.edges[11])).sum()
        assert abs(int(inside) - one.histogram[10]) <= 1  # one may lie on a border


def test_a_model_in_bf16_has_the_gain_of_its_weights() -> None:
    model, gain, _ = built("RMSNorm")
    model = model.to(torch.bfloat16)
    norm = find_final_norm(model, model.get_output_embeddings())
    assert norm is not None
    assert not norm.centres
    torch.testing.assert_close(norm.gain, gain.float(), rtol=0.02, atol=0)


def test_the_direction_that_a_word_reads_raises_it_most() -> None:
    model = llama()
    W_U = model.get_output_embeddings().weight
    W_U.data = nn.functional.normalize(W_U.data)
    found = feature_logits(model, W_U[[5, 17]])
    assert found is not None
    assert [one.positive[0][0] for one in found] == [5, 17]


def test_without_a_head_or_a_known_norm_there_are_none(tiny_model: Path) -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.abs()

    assert feature_logits(transformers.AutoModel.from_pretrained(tiny_model), torch.randn(2, 16)) is None
    model = llama()
    model.model.norm = Square()
    assert feature_logits(model, torch.randn(2, 16)) is None


def test_a_feature_of_zeros_has_logits_of_zero() -> None:
    found = feature_logits(llama(), torch.zeros(1, 16))
    assert found is not None
    assert {value for _, value in found[0].positive + found[0].negative} == {0.0}
    assert sum(found[0].histogram) == 211


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="expected width 16, the model's, got 17"):
        feature_logits(llama(), torch.randn(2, 17))


def test_the_model_is_left_as_it_was() -> None:
    model = llama()
    feature_logits(model, torch.randn(1, 16))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearest_features_are_those_of_the_whole_dictionary(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FEATURES_AT_ONCE", 2)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 30)
    W_dec = (torch.randn(101, 8) * torch.rand(101, 1)).to(dtype)
    W_dec[40] = 0
    unit = nn.functional.normalize(W_dec.double())
    cosines = unit @ unit.t()
    cosines.fill_diagonal_(-2)
    cosines[:, 40] = -2
    features = [3, 100, 40, 0, 3]
    found = nearest_features(W_dec, features, 5)
    assert found[2] == ()
    for feature, neighbours in zip(features, found, strict=True):
        expected = cosines[feature].topk(5)
        if feature != 40:
            assert [n.feature for n in neighbours] == expected.indices.tolist()
            assert [n.cosine for n in neighbours] == pytest.approx(expected.values.tolist(), abs=1e-5)


def test_a_small_dictionary_has_fewer_neighbours() -> None:
    assert [[n.feature for n in row] for row in nearest_features(torch.eye(3), [1])] == [[0, 2]]


def test_features_are_described_by_logits_and_neighbours() -> None:
    model, W_dec = llama(), torch.randn(50, 16)
    found = describe([examples(3), examples(8)], W_dec, model)
    assert [feature.nearest for feature in found] == nearest_features(W_dec, [3, 8])
    assert [feature.logits for feature in found] == feature_logits(model, W_dec[[3, 8]])
    bare = describe([examples(3)], W_dec, model.model)
    assert (bare[0].logits, len(bare[0].nearest)) == (None, 5)
