"""Packed dialogues have the activations that each has alone, in every family whose models keep them apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsae.data.activations import ResidualStream
from fastsae.data.packing import check_packing
from fastsae.data.sequencing import PackedSequencer
from fastsae.data.stream import ActivationStream
from fastsae.errors import FastsaeError, UsageError

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Llama": {},
    "Gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 6},
    "Gemma3Text": {"query_pre_attn_scalar": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "Mistral": {"sliding_window": 5},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7},
    "Qwen2Moe": EXPERTS,
}  # fmt: skip


def make(family: str, attention: str = "eager", **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES.get(family, {}), **options})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # so that the attention matters
    return model.eval().requires_grad_(False)


class TokenIds:
    """A tokenizer for data that are token ids already."""

    pad_token_id, bos_token = 0, None


def dialogues(n: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 24, (n,), generator=generator).tolist()
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


CASES = [(family, attention) for family in FAMILIES for attention in ("sdpa", "eager")]


@pytest.mark.parametrize(("family", "attention"), [case for case in CASES if case != ("Gemma2", "sdpa")])
def test_packed_activations_are_those_of_single_forwards(
    family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsae.data.sequencing._SHORTEST_ROW", 48)
    residual = ResidualStream(make(family, attention), 2)
    data = dialogues(40)
    sequencer = PackedSequencer(data, range(40), TokenIds(), batch_tokens=150, endless=False)
    stream = ActivationStream(residual, sequencer, drop_first_position=False)
    n_seen = 0
    for piece in stream:
        for index in piece.dialogue_ids.unique().tolist():
            of_it = piece.dialogue_ids == index
            assert piece.token_ids[of_it].tolist() == data[index]
            assert piece.positions[of_it].tolist() == list(range(len(data[index])))
            ids = torch.tensor([data[index]])
            alone = residual(ids, torch.ones_like(ids))[0]
            assert torch.allclose(piece.acts[of_it], alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))
            n_seen += 1
    assert n_seen == 40
    assert stream.counts.padding < 0.1 * stream.counts.computed


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_keep_dialogues_apart_pass(family: str) -> None:
    check_packing(ResidualStream(make(family), 2), *dialogues(2))


def state_space() -> Any:
    config = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, state_size=4)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def state_space_that_mixes_little() -> Any:
    config = transformers.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4)
    torch.manual_seed(5)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def with_distances_for_positions() -> Any:
    config = transformers.BloomConfig(vocab_size=97, hidden_size=16, n_layer=2, n_head=2)
    torch.manual_seed(5)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def with_own_positions() -> Any:
    """Makes its own positions, whatever it is given."""
    model = make("Llama")
    forward = type(model.base_model).forward
    model.base_model.forward = lambda *arguments, position_ids=None, attention_mask=None, **options: forward(
        model.base_model, *arguments, **options
    )
    return model


def that_takes_no_positions() -> Any:
    model = make("Llama")
    forward = type(model.base_model).forward

    def without(*, input_ids: Any, attention_mask: Any, use_cache: bool, return_dict: bool) -> Any:
        return forward(model.base_model, input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model.base_model.forward = without
    return model


@pytest.mark.parametrize(
    "build",
    [
        state_space,
        state_space_that_mixes_little,
        with_distances_for_positions,
        with_own_positions,
        that_takes_no_positions,
    ],
)
def test_a_model_that_mixes_packed_dialogues_is_refused(build: Any) -> None:
    with pytest.raises(
        UsageError, match=r"sequencing: expected a model that keeps packed dialogues apart, got .*take --s"
    ):
        check_packing(ResidualStream(build(), 1), *dialogues(2))


def test_own_messages_and_lack_of_memory_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    residual = ResidualStream(make("Llama"), 1)
    with pytest.raises(FastsaeError, match="outside of the model's embedding"):
        check_packing(residual, [3, 4, 500], [5, 6])

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(ResidualStream, "__call__", fail)
    with pytest.raises(RuntimeError, match="can't allocate"):
        check_packing(residual, [3, 4], [5, 6])
