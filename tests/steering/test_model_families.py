"""Models whose caches, masks or entries differ from the usual: what is edited must not depend on any of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fastsae import Edit, steer

D_IN = 16
SIZES = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": D_IN, "max_position_embeddings": 64}
HEADS = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
WINDOW = {**SIZES, **HEADS, "sliding_window": 4}
CONFIGS: dict[str, Any] = {
    # positions are learned, blocks get their arguments by position
    "gpt2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=D_IN, n_layer=2, n_head=2, n_positions=64),
    # the model calls its decoder, not its body
    "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=32, num_attention_heads=2, word_embed_proj_dim=D_IN),
    # some masks of a static cache, or all of them, are as wide as a window
    "gemma2": lambda: transformers.Gemma2Config(**WINDOW, query_pre_attn_scalar=8),
    "mistral": lambda: transformers.MistralConfig(**WINDOW),
    # a state has no length
    "mamba": lambda: transformers.MambaConfig(vocab_size=64, hidden_size=D_IN, state_size=4, num_hidden_layers=2),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model


def test_every_cache_edits_the_same_tokens(model: Any) -> None:
    ids, mask = torch.randint(3, 64, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    edits = [Edit(direction=torch.randn(D_IN), amount=2.0)]

    def generate(**options: Any) -> Tensor:
        made = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        return torch.stack(made.logits, 1)

    clean = generate()
    chosen = torch.rand(2, 10) < 0.5
    for positions in ("all", "prompt", "generated", chosen):
        with steer(model, None, edits, positions, layer=0):
            cached = generate()
            others = [generate(use_cache=False), generate(cache_implementation="static")]
        for other in others:
            torch.testing.assert_close(cached, other, rtol=1e-4, atol=1e-5)
        difference = (cached - clean).abs().amax((0, 2))
        assert (difference[1:] > 0.01).all()
        assert (difference[0] == 0) == (positions == "generated" if isinstance(positions, str) else False)


def test_a_pass_may_begin_in_any_part(model: Any) -> None:
    ids = torch.randint(3, 64, (1, 5))
    edits = [Edit(direction=torch.randn(D_IN), amount=2.0)]
    parts = {id(part): part for part in (model.base_model, model.get_decoder())}
    with torch.no_grad():
        for part in parts.values():
            clean = part(ids)[0]
            with steer(model, None, edits, torch.arange(5)[None] == 3, layer=0):
                edited = part(ids)[0]
            assert torch.equal(edited[:, :3], clean[:, :3])
            assert not torch.isclose(edited[:, 3], clean[:, 3]).all()
