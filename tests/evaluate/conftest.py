"""Tiny models of several architectures, made from configs, with a tokenizer that spells ids."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MORE = {
    "Mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2, "output_router_logits": True},
    "Gemma2": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
}


class SpellingTokenizer:
    """Decodes ids as `t12 `."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f"t{i} " for i in ids)


def make_model(family: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **MORE.get(family, {}))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # so that the blocks and the logits matter
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], Any]:
    """Family name to model, each made once."""
    return cache(make_model)


@pytest.fixture(scope="session")
def qwen2(tiny_model) -> Any:
    return tiny_model("Qwen2")


@pytest.fixture
def tokenizer() -> SpellingTokenizer:
    return SpellingTokenizer()
