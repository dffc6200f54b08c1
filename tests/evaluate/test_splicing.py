"""Spliced passes: identity splices, whole passes, and what the check of a model finds."""

import pytest
import torch
import transformers

from fastsae.data.activations import ResidualStream, decoder_layers
from fastsae.data.splicing import SplicedModel
from fastsae.errors import FastsaeError, UsageError

IDS = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(9) < torch.tensor([[9], [5], [1]])


@pytest.mark.parametrize("family", ["Qwen2", "Llama", "Gemma2", "Mixtral"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_splicing_the_clean_activation_changes_nothing(tiny_model, family, layer):
    model = SplicedModel(ResidualStream(tiny_model(family), layer))
    hidden, logits = model.clean(IDS, MASK)
    assert torch.equal(model.residual(IDS, MASK)[MASK], hidden[MASK])
    assert torch.equal(model.spliced(IDS, MASK, hidden), logits)
    assert torch.equal(model.residual.logits(IDS, MASK), logits)  # the skipped blocks are back


@pytest.mark.parametrize("family", ["Qwen2", "Llama", "Gemma2", "Mixtral"])
def test_skipping_blocks_gives_the_logits_of_a_whole_pass(tiny_model, family):
    residual = ResidualStream(tiny_model(family), 1)
    model = SplicedModel(residual)
    hidden, clean = model.clean(IDS, MASK)
    new = hidden + torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    spliced = model.spliced(IDS, MASK, new)
    assert torch.equal(spliced, residual.splice(IDS, MASK, lambda _: new))
    assert not torch.allclose(spliced[MASK], clean[MASK])


def test_blocks_are_restored_after_an_error(qwen2):
    residual = ResidualStream(qwen2, 1)
    model = SplicedModel(residual)
    hidden, logits = model.clean(IDS, MASK)
    with pytest.raises(RuntimeError):
        model.spliced(IDS, MASK, hidden[:, :, :3])
    assert torch.equal(residual.logits(IDS, MASK), logits)


def made(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def gemma4(n_shared):
    config = {"vocab_size": 61, "vocab_size_per_layer_input": 61, "hidden_size": 16, "hidden_size_per_layer_input": 8}
    config |= {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    config |= {"global_head_dim": 8, "sliding_window": 6, "num_hidden_layers": 6, "num_kv_shared_layers": n_shared}
    kinds = ["sliding_attention", "full_attention"] * 3
    return made(transformers.Gemma4TextConfig(**config, layer_types=kinds, initializer_range=0.2))


def zaya():
    config = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 8}
    config |= {"num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts": 4, "router_hidden_size": 8}
    return made(transformers.ZayaConfig(**config, initializer_range=0.2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "skips"),
    [
        # the last blocks take the keys and values of blocks 2 and 3: only before those, or at the end, none are needed
        (lambda: gemma4(2), [True, True, False, False, False, True]),
        (lambda: gemma4(0), [True] * 6),
        (zaya, [True] * 4),  # its router's state leaves a block beside the hidden states, and is handed on with them
    ],
    ids=["keys and values", "none shared", "router state"],
)
def test_blocks_that_hand_on_more_than_the_residual_stream(family, skips, dtype):
    language_model = family().to(dtype)
    for layer, expected in enumerate(skips):
        model = SplicedModel(ResidualStream(language_model, layer))
        hidden, logits = model.clean(IDS, MASK)
        assert model.residual.blocks_can_be_skipped is expected
        assert torch.equal(model.spliced(IDS, MASK, hidden), logits)
        new = hidden + torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        assert torch.equal(model.spliced(IDS, MASK, new), model.residual.splice(IDS, MASK, lambda _, new=new: new))
        assert torch.equal(model.residual.logits(IDS, MASK), logits)


def check(language_model, layer=1, ids=IDS[:1]):
    SplicedModel(ResidualStream(language_model, layer)).check(ids, torch.ones_like(ids))


def test_models_with_several_streams_are_refused():
    config = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 8}
    config |= {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 8}
    config |= {"o_lora_rank": 8, "o_groups": 2, "index_n_heads": 2, "index_head_dim": 8, "hc_mult": 4}
    with pytest.raises(
        UsageError, match=r"'deepseek_v4'.*= \[1, 9, 16\], got \[1, 9, 4, 16\], several streams at once"
    ):
        check(made(transformers.DeepseekV4Config(**config)))
    config = {"vocab_size": 61, "vocab_size_per_layer_input": 61, "hidden_size": 16, "hidden_size_per_layer_input": 8}
    config |= {"intermediate_size": [24] * 4, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 8}
    config |= {"num_key_value_heads": 2, "laurel_rank": 4, "num_kv_shared_layers": 0}
    config |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4}
    with pytest.raises(UsageError, match=r"'gemma3n_text'.*got \[4, 1, 9, 16\], several streams at once"):
        check(made(transformers.Gemma3nTextConfig(**config)))


def test_model_that_reads_in_both_directions_is_refused():
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24
    )
    with pytest.raises(UsageError, match=r"'bert'.*block 1.*depend on the tokens or the padding behind them"):
        check(made(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Mamba", "FalconH1", "Lfm2", "Qwen3Next", "Qwen2Moe"])
@pytest.mark.parametrize("n_tokens", [1, 2, 9, 70])
def test_models_with_a_state_and_experts_pass(family, dtype, n_tokens):
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "state_size": 4}
    sizes |= {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
    sizes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "num_experts": 4}
    sizes |= {
        "num_experts_per_tok": 2,
        "linear_value_head_dim": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    config = getattr(transformers, f"{family}Config")(**sizes)
    ids = torch.randint(3, 61, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    check(made(config).to(dtype), ids=ids)


def test_block_that_runs_again_is_refused(tiny_model):
    class Twice(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden, **options):
            return self.inner(self.inner(hidden, **options), **options)

    language_model = transformers.AutoModelForCausalLM.from_config(tiny_model("Llama").config).eval()
    layers = decoder_layers(language_model)
    layers[2] = Twice(layers[1])
    with pytest.raises(UsageError, match="decoder block 1: it ran 3 times in a pass over the tokens, expected once"):
        check(language_model)
    check(language_model, layer=0)


def test_self_check_leaves_random_numbers_and_hooks_alone(qwen2):
    state = torch.get_rng_state()
    handle = decoder_layers(qwen2)[0].register_forward_hook(lambda *_: torch.rand(1) and None)
    try:
        check(qwen2)
    finally:
        handle.remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(layer._forward_hooks for layer in decoder_layers(qwen2))


def test_block_that_changes_its_input_in_place(tiny_model):
    language_model = transformers.AutoModelForCausalLM.from_config(tiny_model("Llama").config).eval()
    handle = decoder_layers(language_model)[2].register_forward_pre_hook(lambda _, args: (args[0].mul_(2), *args[1:]))
    model = SplicedModel(ResidualStream(language_model, 1))
    hidden, logits = model.clean(IDS, MASK)
    assert torch.equal(hidden[MASK], model.residual(IDS, MASK)[MASK])
    assert torch.equal(model.spliced(IDS, MASK, hidden.clone()), logits)
    handle.remove()


def test_broken_logits_are_found_by_the_check(tiny_model):
    language_model = transformers.AutoModelForCausalLM.from_config(tiny_model("Llama").config).eval()
    with torch.no_grad():
        language_model.model.norm.weight[0] = torch.nan
    with pytest.raises(FastsaeError, match="a later layer is broken"):
        check(language_model)
