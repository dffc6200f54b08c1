"""Reading and replacing the residual stream, on small models of four architectures made from configs."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from fastsae.data.activations import (
    ResidualStream,
    check_layer,
    check_vocabulary,
    decoder_layers,
    position_limit,
)
from fastsae.errors import FastsaeError, UsageError

N_LAYERS = 3
COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "qwen2": transformers.Qwen2Config(**COMMON),
    "llama": transformers.LlamaConfig(**COMMON),
    "gemma2": transformers.Gemma2Config(**COMMON, head_dim=8, sliding_window=6),
    # As many experts as layers: the lists of experts must not be taken for the list of blocks.
    "mixtral": transformers.MixtralConfig(**COMMON, num_local_experts=N_LAYERS, num_experts_per_tok=2),
    "gpt2": transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=N_LAYERS, n_head=4, n_positions=64),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval().requires_grad_(False)


@pytest.fixture
def qwen():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS["qwen2"]).eval().requires_grad_(False)


def batch(lengths=(11, 5, 1)):
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randint(0, 97, mask.shape, generator=generator) * mask, mask


def count_calls(modules):
    calls = [0] * len(modules)

    def hook(i):
        def count(*_):
            calls[i] += 1

        return count

    return calls, [module.register_forward_hook(hook(i)) for i, module in enumerate(modules)]


def test_layers_are_the_blocks_in_order(model):
    layers = decoder_layers(model)
    assert len(layers) == N_LAYERS
    assert all(any("attn" in name or "attention" in name for name, _ in layer.named_children()) for layer in layers)


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_equals_hidden_states_of_transformers(model, layer):
    ids, mask = batch()
    stream = ResidualStream(model, layer)
    hooks = len(stream.block._forward_hooks)
    acts = stream(ids, mask)
    assert len(stream.block._forward_hooks) == hooks
    assert acts.shape == (*ids.shape, stream.d_in) == (3, 11, 32)
    assert not acts.requires_grad
    # transformers gives the last block's output behind the final norm, so that one is taken from the norm's input.
    inputs = []
    norm = next(module for name, module in model.base_model.named_children() if name in ("norm", "ln_f"))
    handle = norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    states = model(ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    expected = inputs[0] if layer == N_LAYERS - 1 else states[layer + 1]
    torch.testing.assert_close(acts[mask], expected[mask], rtol=0, atol=0)


def test_padding_changes_nothing(model):
    ids, mask = batch()
    stream = ResidualStream(model, 1)
    padded = stream(ids, mask)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        alone = stream(ids[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(padded[row, :length], alone[0], rtol=0, atol=1e-5)
    other = torch.where(mask, ids, 50)
    torch.testing.assert_close(stream(other, mask)[mask], padded[mask], rtol=0, atol=1e-5)


def test_later_layers_and_the_head_are_not_computed(model):
    calls, handles = count_calls([*decoder_layers(model), model.get_output_embeddings()])
    ResidualStream(model, 1)(*batch())
    for handle in handles:
        handle.remove()
    # The hook of block 1 that stops the forward pass comes after the counting one.
    assert calls == [1, 1, 0, 0]


def test_splice(model):
    ids, mask = batch()
    stream = ResidualStream(model, 1)
    clean = stream.logits(ids, mask)
    assert clean.shape == (3, 11, 97)
    torch.testing.assert_close(clean, model(ids, attention_mask=mask.long()).logits, rtol=0, atol=1e-6)
    seen = []
    same = stream.splice(ids, mask, lambda hidden: seen.append(hidden) or hidden.clone())
    torch.testing.assert_close(same, clean, rtol=0, atol=0)
    torch.testing.assert_close(seen[0][mask], stream(ids, mask)[mask], rtol=0, atol=0)
    # Replacing all of block 1's output by zeros is to compute block 2 and the rest from zeros.
    zeroed = stream.splice(ids, mask, lambda hidden: torch.zeros_like(hidden, dtype=torch.float64))
    rows = zeroed[mask]
    assert (rows - clean[mask]).abs().max() > 1e-3
    torch.testing.assert_close(rows, rows[:1].expand_as(rows), rtol=0, atol=1e-5)
    torch.testing.assert_close(stream.logits(ids, mask), clean, rtol=0, atol=0)


def test_hooks_are_removed_after_an_error(qwen):
    def fail(hidden):
        raise RuntimeError("in replace")

    stream = ResidualStream(qwen, 0)
    with pytest.raises(RuntimeError, match="in replace"):
        stream.splice(*batch(), fail)
    assert not stream.block._forward_hooks


class Wrapped(nn.Module):
    """A block, with its input unpacked from a tuple or its output packed into one, or both."""

    def __init__(self, inner, pack):
        super().__init__()
        self.inner, self.pack = inner, pack
        self.attention_type = getattr(inner, "attention_type", "full_attention")

    def forward(self, hidden, *args, **kwargs):
        output = self.inner(hidden[0] if isinstance(hidden, tuple) else hidden, *args, **kwargs)
        # Blocks return the hidden states alone in newer transformers, and first in a tuple in older ones.
        return (output[0] if isinstance(output, tuple) else output, "extra") if self.pack else output


def test_blocks_that_return_tuples(qwen):
    ids, mask = batch()
    plain = ResidualStream(qwen, 1)
    acts, zeroed = plain(ids, mask), plain.splice(ids, mask, torch.zeros_like)
    layers = decoder_layers(qwen)
    layers[1], layers[2] = Wrapped(layers[1], pack=True), Wrapped(layers[2], pack=False)
    wrapped = ResidualStream(qwen, 1)
    torch.testing.assert_close(wrapped(ids, mask), acts, rtol=0, atol=0)
    torch.testing.assert_close(wrapped.splice(ids, mask, torch.zeros_like), zeroed, rtol=0, atol=0)


@pytest.mark.parametrize("layer", [-1, N_LAYERS, 99])
def test_layer_out_of_range(qwen, layer):
    for use in (check_layer, ResidualStream):
        with pytest.raises(UsageError, match=rf"layer: expected 0 to 2 \(the model has 3 layers\), got {layer}"):
            use(qwen, layer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite(qwen, value):
    def spoil(_module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[0, 3, 5] = value

    ids, mask = batch((4, 4))
    decoder_layers(qwen)[1].register_forward_hook(spoil)
    with pytest.raises(FastsaeError, match=r"layer 1: the activations of 12.5 % of the tokens.*--model-dtype float32"):
        ResidualStream(qwen, 1)(ids, mask)
    mask[0, 3] = False  # on padding it does no harm
    assert ResidualStream(qwen, 1)(ids, mask)[mask].isfinite().all()


def test_images_in_front_of_the_language_model_are_passed_over():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(N_LAYERS))

    class Both(nn.Module):
        config = transformers.LlamaConfig(**COMMON)

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Identity() for _ in range(N_LAYERS))
            self.language_model = Text()

        def get_decoder(self):
            return self.language_model

    both = Both()
    assert decoder_layers(both) is both.language_model.layers
    both.language_model.layers = both.layers = None
    with pytest.raises(FastsaeError, match="expected a ModuleList of 3 decoder blocks"):
        decoder_layers(both)


def test_blocks_that_return_lists(qwen):
    class Listed(Wrapped):
        def forward(self, *args, **kwargs):
            return [super().forward(*args, **kwargs)[0], None]

    ids, mask = batch()
    acts = ResidualStream(qwen, 1)(ids, mask)
    layers = decoder_layers(qwen)
    layers[1], layers[2] = Listed(layers[1], pack=True), Wrapped(layers[2], pack=False)
    layers[2].forward = lambda hidden, *_args, **_kwargs: hidden[0]
    assert torch.equal(ResidualStream(qwen, 1)(ids, mask), acts)
    zeroed = ResidualStream(qwen, 1).splice(ids, mask, torch.zeros_like)
    assert torch.equal(zeroed, qwen.lm_head(qwen.model.norm(torch.zeros_like(acts))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda hidden: torch.stack([hidden, hidden]),
            r"= \[3, 11, 32\], got \[2, 3, 11, 32\], several streams at once",
        ),
        (lambda hidden: torch.stack([hidden, hidden], 2), r"got \[3, 11, 2, 32\], several streams at once"),
        (lambda hidden: hidden.transpose(0, 1), r"got \[11, 3, 32\]"),
        (lambda hidden: hidden[..., :16], r"got \[3, 11, 16\]"),
        (lambda hidden: {"hidden_states": hidden}, "its decoder blocks return dict, expected a tensor"),
    ],
)
def test_blocks_without_one_residual_stream(qwen, change, message):
    decoder_layers(qwen)[1].register_forward_hook(lambda _module, _args, output: change(output))
    stream = ResidualStream(qwen, 1)
    with pytest.raises(UsageError, match=r"model: models of type 'qwen2' \(Qwen2ForCausalLM\) are not.*" + message):
        stream(*batch())
    assert len(stream.block._forward_hooks) == 1


def test_model_without_a_list_of_blocks(qwen):
    qwen.config = copy.deepcopy(qwen.config)
    qwen.config.num_hidden_layers = 4
    with pytest.raises(UsageError, match=r"model: .* expected a ModuleList of 4 decoder blocks, found none"):
        ResidualStream(qwen, 1)


def test_ids_outside_of_the_embedding(model):
    ids, mask = batch()
    stream = ResidualStream(model, 1)
    padded = torch.where(mask, ids, 97)  # a pad token for which the embedding has no row
    assert torch.equal(stream(padded, mask)[mask], stream(ids, mask)[mask])
    assert torch.equal(stream.logits(padded, mask)[mask], stream.logits(ids, mask)[mask])
    padded[1, 2] = 98
    with pytest.raises(FastsaeError, match=r"token id 98 is outside of the model's embedding, which has 97 rows"):
        stream(padded, mask)


def test_out_of_memory_says_what_to_do(qwen, monkeypatch):
    def fail(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decoder_layers(qwen)[0], "forward", fail)
    with pytest.raises(FastsaeError, match=r"ran out of memory on 3 dialogues of up to 11 tokens.*--forward-tokens"):
        ResidualStream(qwen, 1)(*batch())


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (CONFIGS["gpt2"], 64),
        (CONFIGS["llama"], 64),
        (transformers.LlamaConfig(**{**COMMON, "max_position_embeddings": 4096}, rope_parameters=YARN), 16384),
        (transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=3, n_head=4), None),
        (transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3), None),
        (transformers.MptConfig(vocab_size=97, d_model=32, n_layers=3, n_heads=4, max_seq_len=48), 48),
    ],
)
def test_position_limit(config, limit):
    with torch.device("meta"):
        assert position_limit(AutoModelForCausalLM.from_config(config)) == limit


def test_tokenizer_of_another_model_is_refused(qwen):
    class Tokenizer:
        def __init__(self, n_words, added):
            self.vocabulary = {f"t{i}": i for i in range(n_words)} | {f"<a{i}>": i for i in added}
            self.added_tokens_decoder = dict.fromkeys(added)

        def get_vocab(self):
            return self.vocabulary

    check_vocabulary(qwen, Tokenizer(97, []))
    check_vocabulary(qwen, Tokenizer(97, [97, 98]))  # such tokens need not be used
    with pytest.raises(
        UsageError, match=r"model: expected token ids below 97.* has ids up to 98; the tokenizer belongs"
    ):
        check_vocabulary(qwen, Tokenizer(99, [200]))
