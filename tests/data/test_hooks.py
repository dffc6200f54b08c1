"""The places in a block: equal to hooks written by hand, spliced rightly, and refused where a model has none of them."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from fastsae.data.activations import ResidualStream, decoder_layers, read_layers
from fastsae.data.hooks import HOOKS, Place, place_of
from fastsae.data.splicing import SplicedModel
from fastsae.errors import UsageError

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
# the modules whose outputs are added to the residual stream, written down from the models' code
ADDED = {
    "Llama": ("self_attn", "mlp"),
    "Qwen2": ("self_attn", "mlp"),
    "Gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "Gemma3Text": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "Olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "Glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
    "Mixtral": ("self_attn", "mlp"),
    "GptOss": ("self_attn", "mlp"),  # its experts return a tuple
    "GPT2": ("attn", "mlp"),
    "GPTNeoX": ("attention", "mlp"),  # attention and MLP side by side
    "Falcon": ("self_attention", "mlp"),  # which adds the one to the other in place
    "Granite": ("self_attn", "mlp"),
}
MORE = {
    "Gemma2": {"head_dim": 8, "sliding_window": 6},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 6},
    "Glm4": {"head_dim": 8},
    "Mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
    "Granite": {"residual_multiplier": 0.22},
}
IDS = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(1))
MASK = torch.arange(11) < torch.tensor([[11], [5], [1]])


def made(family):
    torch.manual_seed(0)
    sizes = GPT2 if family == "GPT2" else {**SIZES, **MORE.get(family, {})}
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that attention and MLP matter
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=ADDED)
def model(request):
    language_model = made(request.param)
    language_model.added = ADDED[request.param]
    return language_model


def read_by_hand(model, layer):
    """The activations at each place, by hooks on the modules that are written down above."""
    block, found = decoder_layers(model)[layer], {}

    def keep(name):
        def on_output(_module, _args, output):
            found[name] = (output if isinstance(output, torch.Tensor) else output[0]).clone()

        return on_output

    def before(_module, args, options):
        found["resid_pre"] = (args[0] if args else options["hidden_states"]).clone()

    attention, mlp = (getattr(block, name) for name in model.added)
    handles = [block.register_forward_pre_hook(before, with_kwargs=True)]
    for name, module in (("attn_out", attention), ("mlp_out", mlp), ("resid_post", block)):
        handles.append(module.register_forward_hook(keep(name)))
    logits = model(input_ids=IDS, attention_mask=MASK.long(), use_cache=False).logits
    for handle in handles:
        handle.remove()
    return found, logits


@pytest.mark.parametrize("layer", [0, 2])
def test_the_activations_are_those_of_hooks_written_by_hand(model, layer):
    expected, _ = read_by_hand(model, layer)
    places = [ResidualStream(model, layer, hook) for hook in HOOKS]
    for place, together in zip(places, read_layers(places, IDS, MASK), strict=True):
        alone = place(IDS, MASK)
        assert alone.shape == (*IDS.shape, place.d_in)
        assert torch.equal(alone[MASK], expected[place.place.hook][MASK])
        assert torch.equal(together[MASK], expected[place.place.hook][MASK])


def test_the_stream_before_a_block_is_the_one_after_the_block_before(model):
    before, after = ResidualStream(model, 2, "resid_pre"), ResidualStream(model, 1)
    assert torch.equal(before(IDS, MASK)[MASK], after(IDS, MASK)[MASK])
    assert before.place.as_output == after.place
    assert Place(0, "resid_pre").as_output == Place(0, "resid_pre")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_perfect_reconstruction_leaves_the_logits_as_they_are(model, layer, hook):
    spliced = SplicedModel(ResidualStream(model, layer, hook))
    hidden, logits = spliced.clean(IDS, MASK)
    expected, own = read_by_hand(model, layer)
    assert torch.equal(logits, own)
    assert torch.equal(hidden[MASK], expected[hook][MASK])
    assert torch.equal(spliced.spliced(IDS, MASK, hidden), logits)
    assert spliced.residual.blocks_can_be_skipped is (layer > 0 or hook == "resid_post")
    assert torch.equal(read_by_hand(model, layer)[1], logits)  # nothing stays hooked or skipped


@pytest.mark.parametrize("hook", ["attn_out", "mlp_out"])
@pytest.mark.parametrize("layer", [0, 2])
def test_zeros_in_the_place_ablate_that_module(model, layer, hook):
    spliced = SplicedModel(ResidualStream(model, layer, hook))
    hidden, logits = spliced.clean(IDS, MASK)
    module = getattr(decoder_layers(model)[layer], model.added[hook == "mlp_out"])

    def ablate(_module, _args, output):
        return torch.zeros_like(output) if isinstance(output, torch.Tensor) else (output[0] * 0, *output[1:])

    handle = module.register_forward_hook(ablate)
    ablated = model(input_ids=IDS, attention_mask=MASK.long(), use_cache=False).logits
    handle.remove()
    zeros = spliced.spliced(IDS, MASK, torch.zeros_like(hidden))
    assert torch.equal(zeros[MASK], ablated[MASK])
    assert not torch.allclose(zeros[MASK], logits[MASK])


def test_a_spliced_pass_skips_the_blocks_before_the_place(model):
    for hook in HOOKS:
        spliced = SplicedModel(ResidualStream(model, 2, hook))
        hidden, _ = spliced.clean(IDS, MASK)
        calls = []
        first = decoder_layers(model)[0]
        handle = next(first.children()).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        spliced.spliced(IDS, MASK, hidden)
        handle.remove()
        assert calls == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_check_passes_in_narrow_dtypes(dtype):
    language_model = made("Gemma2").to(dtype)
    for hook in HOOKS:
        SplicedModel(ResidualStream(language_model, 1, hook)).check(IDS[:1], MASK[:1])


def test_a_model_whose_modules_add_the_stream_themselves_is_refused():
    config = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=3, n_head=4)
    bloom = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for hook in ("resid_pre", "resid_post"):
        SplicedModel(ResidualStream(bloom, 1, hook)).check(IDS[:1], MASK[:1])
    for hook in ("attn_out", "mlp_out"):
        with pytest.raises(UsageError, match=rf"^hook: expected for {hook} .*BloomForCausalLM.*take resid_post"):
            SplicedModel(ResidualStream(bloom, 1, hook)).check(IDS[:1], MASK[:1])


def test_a_block_without_the_module_names_those_it_has():
    config = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, state_size=4)
    mamba = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UsageError, match=r"^hook: expected for attn_out .* self_attn or .* found norm, mixer in Mamba"):
        ResidualStream(mamba, 1, "attn_out")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("blocks.3.hook_mlp_out", (3, "mlp_out")),
        ("blocks.12.hook_resid_pre", (12, "resid_pre")),
        ("model.layers.3", (3, "resid_post")),
        ("transformer.h.0.attn", (0, "attn_out")),
        ("gpt_neox.layers.5.mlp", (5, "mlp_out")),
        ("model.layers.3.post_feedforward_layernorm", (3, "mlp_out")),
        ("model.layers.3.post_attention_layernorm", None),  # behind the attention, or before the MLP
        ("blocks.3.attn.hook_z", None),
        ("blocks.3.hook_resid_mid", None),
        ("hook_embed", None),
        (None, None),
    ],
)
def test_names_of_places(name, place):
    assert place_of({"hook_name": name}) == place


def test_own_metadata_say_more_than_the_name():
    known = {"hook_layer": 3, "hook": "attn_out", "hook_name": "model.layers.3.post_attention_layernorm"}
    assert place_of(known) == Place(3, "attn_out")
