"""A steered model: its passes, its generations, and what it is when the block is over."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastsae
from fastsae import Edit, FusedJumpReLUSAE, FusedTopKSAE, SparseAutoencoder, UsageError, steer
from fastsae.data.activations import ResidualStream
from fastsae.data.hooks import HOOKS
from fastsae.steering.positions import Positions

D_IN, N_NEW = 16, 6
BIRDS = {"role": "user", "content": "Name three birds that live near the sea."}
PROMPTS = [
    [{"role": "user", "content": "What is a river?"}],
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello! How are you?"}, BIRDS],
]


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    model.generation_config.eos_token_id = None  # no row ends by itself
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(4)  # so that tokens heed each other, and a token edited by mistake shows
    return model


@pytest.fixture
def model(loaded: Any) -> Iterator[Any]:
    """The model, whose hooks and methods are its own again when the test is over."""
    yield loaded
    assert not any(hooks_of(loaded))
    assert "generate" not in loaded.__dict__


def hooks_of(model: Any) -> Iterator[Any]:
    for module in model.modules():
        yield from (*module._forward_hooks.values(), *module._forward_pre_hooks.values())


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def sae() -> SparseAutoencoder:
    sae = FusedJumpReLUSAE(D_IN, 64, init_threshold=0.01)
    sae.metadata = {"hook_name": "blocks.0.hook_resid_post"}
    with torch.no_grad():
        sae.b_dec.normal_(std=0.1)
        sae.W_enc.mul_(3)
    return sae


PUSH = [Edit(3, "add", 5.0), Edit(9, "clamp", 7.0)]


def render(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


@pytest.fixture
def prompts(tokenizer: Any) -> list[list[int]]:
    return [render(tokenizer, messages) for messages in PROMPTS]


def padded(prompts: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), longest), 5), torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        columns = slice(longest - len(prompt), None) if side == "left" else slice(0, len(prompt))
        ids[row, columns], mask[row, columns] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=N_NEW,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def logits_of(generated: Any) -> Tensor:
    return torch.stack(generated.logits, 1)


def test_a_pass_has_the_sum_of_the_deltas(model: Any, sae: SparseAutoencoder, prompts: list[list[int]]) -> None:
    inputs = padded(prompts[:1])
    residual = ResidualStream(model, 0)
    with torch.no_grad():
        clean = residual(**inputs)
        acts = sae.encode(clean)[..., 9]
        expected = clean + 5 * sae.W_dec[3] + (7 - acts)[..., None] * sae.W_dec[9]
        with steer(model, sae, PUSH) as steering:
            torch.testing.assert_close(residual(**inputs), expected)
            wanted = sae.encode(clean)[0, -1, [3, 9]]
            torch.testing.assert_close(steering.feature_acts, wanted[None])
            steering.scale = 0.25
            torch.testing.assert_close(residual(**inputs), clean + 0.25 * (expected - clean))
        assert torch.equal(residual(**inputs), clean)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_place_is_edited(model: Any, sae: SparseAutoencoder, prompts: list[list[int]], hook: str) -> None:
    inputs = padded(prompts[:1])
    residual = ResidualStream(model, 1, hook)
    clean = residual(**inputs)
    with steer(model, sae, [Edit(3, "add", 2.0)], layer=1, hook=hook):
        torch.testing.assert_close(residual(**inputs), clean + 2 * sae.W_dec[3].detach())


@pytest.mark.parametrize("edits", [[Edit(3, "add", 0.0), Edit(4, "scale", 1.0)], PUSH])
@pytest.mark.parametrize("scale", [0, 0.0, torch.zeros(2)])
def test_nothing_changes_to_the_bit_where_the_dose_is_zero(
    model: Any, sae: SparseAutoencoder, prompts: list[list[int]], edits: list[Edit], scale: Any
) -> None:
    inputs = padded(prompts)
    clean, logits = generate(model, inputs), model(**inputs).logits
    with steer(model, sae, edits) as steering:
        if edits is PUSH:
            steering.scale = scale
        assert torch.equal(model(**inputs).logits, logits)
        again = generate(model, inputs)
    assert torch.equal(again.sequences, clean.sequences)
    assert torch.equal(logits_of(again), logits_of(clean))


def test_zeros_keep_their_sign_where_the_dose_is_zero(model: Any, sae: SparseAutoencoder) -> None:
    residual, ids = ResidualStream(model, 0), torch.ones(2, 4, dtype=torch.long)
    with residual.changed(lambda hidden: torch.full_like(hidden, -0.0)), steer(model, sae, PUSH) as steering:
        steering.scale = torch.tensor([0.0, 1.0])
        got = residual(ids, torch.ones_like(ids))
    assert got[0].signbit().all()
    assert got[1].any()


def test_rows_have_doses_of_their_own(model: Any, sae: SparseAutoencoder, prompts: list[list[int]]) -> None:
    inputs = padded(prompts)
    clean = model(**inputs).logits
    with steer(model, sae, PUSH):
        whole = model(**inputs).logits
    with steer(model, sae, PUSH) as steering:
        steering.scale = torch.tensor([0.0, 1.0])
        mixed = model(**inputs).logits
        assert torch.equal(mixed[0], clean[0])
        torch.testing.assert_close(mixed[1], whole[1])
        steering.scale = torch.ones(3)
        with pytest.raises(UsageError, match="scale: expected one number for each of 2 rows"):
            model(**inputs)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "special", "assistant", "mask"])
@pytest.mark.parametrize("n_rows", [1, 2])
def test_generation_with_a_cache_is_that_without(
    model: Any, sae: SparseAutoencoder, tokenizer: Any, prompts: list[list[int]], positions: str, n_rows: int
) -> None:
    inputs = padded(prompts[-n_rows:])
    chosen: Any = positions
    if positions == "mask":
        chosen = torch.rand(n_rows, inputs["input_ids"].shape[1] + 3) < 0.5
    with steer(model, sae, PUSH, chosen, tokenizer=tokenizer):
        cached = generate(model, inputs)
        uncached = generate(model, inputs, use_cache=False)
        chunked = generate(model, inputs, prefill_chunk_size=inputs["input_ids"].shape[1] - 1)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(logits_of(cached), logits_of(uncached))
    torch.testing.assert_close(logits_of(cached), logits_of(chunked))
    assert not torch.allclose(logits_of(cached), logits_of(generate(model, inputs)), atol=1e-4)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "special", "assistant", "mask"])
def test_a_batch_with_padding_is_its_single_rows(
    model: Any, sae: SparseAutoencoder, tokenizer: Any, prompts: list[list[int]], positions: str
) -> None:
    mask = torch.rand(2, 40) < 0.5
    for side in ("left", "right"):
        with steer(model, sae, PUSH, mask if positions == "mask" else positions, tokenizer=tokenizer) as steering:
            both = model(**padded(prompts, side)).logits
            acts = steering.feature_acts
            generated = logits_of(generate(model, padded(prompts))) if side == "left" else None
        for row, prompt in enumerate(prompts):
            alone = mask[row : row + 1] if positions == "mask" else positions
            with steer(model, sae, PUSH, alone, tokenizer=tokenizer) as steering:
                single = model(**padded([prompt])).logits[0]
                columns = slice(-len(prompt), None) if side == "left" else slice(0, len(prompt))
                torch.testing.assert_close(both[row, columns], single)
                torch.testing.assert_close(acts[row], steering.feature_acts[0])
                if generated is not None:
                    torch.testing.assert_close(generated[row], logits_of(generate(model, padded([prompt])))[0])


def test_generated_tokens_are_edited_from_the_first_on(
    model: Any, sae: SparseAutoencoder, prompts: list[list[int]]
) -> None:
    """By hand, as a loop over passes does it: with a cache, without one, and entered behind the prompt."""
    text = torch.tensor([prompts[0] + [7, 9, 11]])
    n = len(prompts[0])
    with torch.no_grad():
        clean = model(text).logits
        with steer(model, sae, PUSH, torch.arange(n + 3)[None] >= n):
            expected = model(text).logits[0, n:]
        with steer(model, sae, PUSH, "generated"):
            cache = model(text[:, :n]).past_key_values
            steps = [model(text[:, t : t + 1], past_key_values=cache).logits[0, -1] for t in range(n, n + 3)]
            torch.testing.assert_close(torch.stack(steps), expected)
            steps = [model(text[:, :t], use_cache=False).logits[0] for t in range(n, n + 4)]
            torch.testing.assert_close(steps[0], clean[0, :n])
            torch.testing.assert_close(steps[3][n:], expected)
        cache = model(text[:, :n]).past_key_values
        with steer(model, sae, PUSH, "generated"):
            steps = [model(text[:, t : t + 1], past_key_values=cache).logits[0, -1] for t in range(n, n + 3)]
        torch.testing.assert_close(torch.stack(steps), expected)
    assert not torch.allclose(expected, clean[0, n:], atol=1e-3)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "special", "assistant"])
def test_other_ways_to_generate_agree(
    model: Any, sae: SparseAutoencoder, tokenizer: Any, prompts: list[list[int]], positions: str
) -> None:
    inputs, one = padded(prompts), padded(prompts[1:])
    with steer(model, sae, PUSH, positions, tokenizer=tokenizer):
        plain, single = logits_of(generate(model, inputs)), generate(model, one)
        static = generate(model, inputs, cache_implementation="static")
        torch.testing.assert_close(logits_of(static), plain)
        assisted = generate(model, one, prompt_lookup_num_tokens=3)
        assert torch.equal(assisted.sequences, single.sequences)


@pytest.mark.parametrize("positions", ["all", "special", "assistant"])
def test_a_conversation_goes_on_with_its_cache(
    model: Any, sae: SparseAutoencoder, tokenizer: Any, prompts: list[list[int]], positions: str
) -> None:
    cache, clean_cache = (transformers.DynamicCache(config=model.config) for _ in range(2))
    clean = generate(model, padded(prompts[1:]), past_key_values=clean_cache).sequences[0].tolist()
    n_cached = clean_cache.get_seq_length()
    end = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    with steer(model, sae, PUSH, positions, tokenizer=tokenizer):
        first = generate(model, padded(prompts[1:]), past_key_values=cache).sequences[0].tolist()
        text = padded([first + end + render(tokenizer, [BIRDS])])
        after = logits_of(generate(model, text, past_key_values=cache))
        torch.testing.assert_close(after, logits_of(generate(model, text)))
    # the cache was filled before the block: what is in it stays as it is
    text = padded([clean + end + render(tokenizer, [BIRDS])])
    ids = text["input_ids"]
    tracker = Positions(positions, tokenizer)
    region = tracker.advance(ids, 0, None)
    chosen = torch.ones_like(ids).bool() if region.chosen is None else region.chosen
    chosen = chosen & (torch.arange(ids.shape[1]) >= n_cached)
    assert chosen.any() or positions == "assistant"
    with torch.no_grad(), steer(model, sae, PUSH, chosen):
        expected = model(ids).logits[:, -1]
    with steer(model, sae, PUSH, positions, tokenizer=tokenizer):
        after = logits_of(generate(model, text, past_key_values=clean_cache))[:, 0]
    torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_beams_are_edited_like_single_texts(
    model: Any, sae: SparseAutoencoder, prompts: list[list[int]], positions: str
) -> None:
    inputs = padded(prompts)
    with steer(model, sae, PUSH, positions):
        cached = model.generate(**inputs, max_new_tokens=N_NEW, num_beams=3, do_sample=False, pad_token_id=0)
        uncached = model.generate(
            **inputs, max_new_tokens=N_NEW, num_beams=3, do_sample=False, pad_token_id=0, use_cache=False
        )
    assert torch.equal(cached, uncached)


def test_a_beam_search_is_refused_where_words_count(
    model: Any, sae: SparseAutoencoder, tokenizer: Any, prompts: list[list[int]]
) -> None:
    config = transformers.GenerationConfig(num_beams=2, max_new_tokens=2, pad_token_id=0)
    with (
        steer(model, sae, PUSH, "special", tokenizer=tokenizer),
        pytest.raises(UsageError, match="with a beam search, whose rows change places, got 'special'"),
    ):
        model.generate(**padded(prompts), generation_config=config)


def test_several_texts_of_one_prompt(
    model: Any, sae: SparseAutoencoder, tokenizer: Any, prompts: list[list[int]]
) -> None:
    options = {"max_new_tokens": 3, "do_sample": True, "num_return_sequences": 2, "pad_token_id": 0}
    for positions in ("generated", "special"):
        runs = []
        for use_cache in (True, False):
            torch.manual_seed(1)
            with steer(model, sae, PUSH, positions, tokenizer=tokenizer):
                runs.append(model.generate(**padded(prompts), **options, use_cache=use_cache))
        assert torch.equal(*runs)
        assert len(runs[0]) == 4


def test_embeddings_are_taken_where_no_ids_are_needed(
    model: Any, sae: SparseAutoencoder, tokenizer: Any, prompts: list[list[int]]
) -> None:
    inputs = padded(prompts)
    embeds = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    embeds["attention_mask"] = inputs["attention_mask"]
    for positions in ("all", "prompt", "generated", torch.rand(2, 40) < 0.5):
        with steer(model, sae, PUSH, positions):
            torch.testing.assert_close(logits_of(generate(model, embeds)), logits_of(generate(model, inputs)))
    with (
        steer(model, sae, PUSH, "special", tokenizer=tokenizer),
        pytest.raises(UsageError, match="positions: expected the ids of all tokens for 'special', got inputs_embeds"),
    ):
        generate(model, embeds)


def test_paused_passes_are_neither_edited_nor_counted(
    model: Any, sae: SparseAutoencoder, prompts: list[list[int]]
) -> None:
    inputs, text = padded(prompts[:1]), torch.tensor([prompts[0]])
    other = torch.tensor([prompts[1]])
    clean, clean_texts = model(**inputs).logits, generate(model, inputs).sequences
    with steer(model, sae, PUSH, "generated") as steering, torch.no_grad():
        expected = logits_of(generate(model, inputs))
        cache = model(text).past_key_values
        with steering.paused():
            assert torch.equal(model(**inputs).logits, clean)
            assert torch.equal(generate(model, inputs).sequences, clean_texts)
            beside = model(other).past_key_values
        acts = steering.feature_acts
        for t in range(N_NEW - 1):
            with steering.paused():
                model(torch.tensor([[3]]), past_key_values=beside)
            assert steering.feature_acts is acts or t
            token = expected[:, t].argmax(-1, keepdim=True)
            torch.testing.assert_close(model(token, past_key_values=cache).logits[:, -1], expected[:, t + 1])


def test_acts_are_those_before_the_edit(model: Any, sae: SparseAutoencoder, prompts: list[list[int]]) -> None:
    inputs = padded(prompts)
    clean = ResidualStream(model, 0)(**inputs)
    wanted = sae.encode(clean)[:, -1, [3, 9]]
    edits = [Edit(direction=torch.ones(D_IN), amount=9.0), *PUSH]
    with steer(model, sae, edits) as steering:
        assert steering.feature_acts is None
        for scale in (1.0, 0, torch.tensor([0.0, 2.0])):
            steering.scale = scale
            model(**inputs)
            assert steering.feature_acts is not None
            torch.testing.assert_close(steering.feature_acts[:, 1:], wanted)
            assert not steering.feature_acts[:, 0].any()
    with steer(model, sae, PUSH) as steering, ResidualStream(model, 0).changed(Tensor.zero_), torch.no_grad():
        steering.scale = 0
        model(inputs["input_ids"][1:])  # a later hook writes where this one has read
        torch.testing.assert_close(steering.feature_acts, wanted[1:])
    with steer(model, None, [Edit(direction=torch.ones(D_IN))], layer=0) as steering:
        model(**inputs)
        assert torch.equal(steering.feature_acts, torch.zeros(2, 1))


def test_acts_of_a_short_row_outlast_the_chunks_of_a_long_one(
    model: Any, sae: SparseAutoencoder, prompts: list[list[int]]
) -> None:
    inputs, n = padded(prompts, "right"), len(prompts[0])
    with steer(model, sae, PUSH) as steering, torch.no_grad():
        model(**inputs)
        wanted = steering.feature_acts
        cache = transformers.DynamicCache(config=model.config)
        for start, stop in ((0, n + 1), (n + 1, inputs["input_ids"].shape[1])):
            mask = inputs["attention_mask"][:, :stop]
            model(inputs["input_ids"][:, start:stop], attention_mask=mask, past_key_values=cache)
        torch.testing.assert_close(steering.feature_acts, wanted)


def test_blocks_nest_in_order(model: Any, sae: SparseAutoencoder, prompts: list[list[int]]) -> None:
    inputs = padded(prompts[:1])
    other = FusedTopKSAE(D_IN, 32, 4)
    clean = ResidualStream(model, 1)(**inputs)
    reads = [ResidualStream(model, layer) for layer in (0, 1)]
    with torch.no_grad(), steer(model, sae, [Edit(3, "add", 5.0)]):
        outer, outer_1 = (read(**inputs) for read in reads)
        with steer(model, sae, [Edit(9, "clamp", 7.0)]):
            expected = outer + (7 - sae.encode(outer)[..., 9])[..., None] * sae.W_dec[9]
            torch.testing.assert_close(reads[0](**inputs), expected)
        with steer(model, other, [Edit(2, "clamp", 3.0)], layer=1):
            row = other.W_dec[2] / other.W_dec[2].norm()
            expected = outer_1 + (3 - other.encode(outer_1)[..., 2])[..., None] * row
            torch.testing.assert_close(reads[1](**inputs), expected)
        assert torch.equal(reads[1](**inputs), outer_1)
    assert torch.equal(reads[1](**inputs), clean)


def test_nothing_is_left_behind_by_errors(model: Any, sae: SparseAutoencoder, prompts: list[list[int]]) -> None:
    inputs = padded(prompts)
    clean = model(**inputs).logits

    class StopError(Exception):
        pass

    def stop(*_: Any) -> Tensor:
        raise StopError

    def leave(edits: list[Edit], in_generate: bool) -> None:
        with steer(model, sae, edits):
            if in_generate:
                model.generate(**inputs, max_new_tokens=3, logits_processor=[stop])
            raise StopError

    for edits, in_generate in ((PUSH, False), (PUSH, True), ([Edit(64)], False)):
        with pytest.raises((StopError, UsageError)):
            leave(edits, in_generate)
        assert not any(hooks_of(model))
        assert "generate" not in model.__dict__
        assert torch.equal(model(**inputs).logits, clean)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_steered_and_is_what_it_was_afterwards(
    loaded: Any, sae: SparseAutoencoder, prompts: list[list[int]], backend: str
) -> None:
    inputs = padded(prompts[:1])
    compiled = torch.compile(loaded, backend=backend)
    with torch.no_grad():
        clean = compiled(**inputs).logits
        with steer(loaded, sae, PUSH, "generated"):
            expected = logits_of(generate(loaded, inputs))
        for model in (compiled, loaded):  # whichever of them the block is given
            with steer(model, sae, PUSH):
                steered = compiled(**inputs).logits
            with steer(loaded, sae, PUSH):
                torch.testing.assert_close(steered, loaded(**inputs).logits)
            with steer(model, sae, PUSH, "generated"):
                torch.testing.assert_close(logits_of(generate(compiled, inputs)), expected)
            assert torch.equal(compiled(**inputs).logits, clean)
    in_place = copy.deepcopy(loaded)
    in_place.compile(backend=backend)
    with torch.no_grad():
        assert torch.equal(in_place(**inputs).logits, clean)
        with steer(in_place, sae, PUSH):
            torch.testing.assert_close(in_place(**inputs).logits, steered)
        assert torch.equal(in_place(**inputs).logits, clean)
    fresh = torch.compile(loaded, backend=backend, dynamic=False)  # first called inside of a block
    torch.compiler.reset()
    with torch.no_grad():
        with steer(fresh, sae, PUSH):
            torch.testing.assert_close(fresh(**inputs).logits, steered)
        torch.testing.assert_close(fresh(**inputs).logits, clean)


def test_bf16_states_are_rounded_once(model: Any, sae: SparseAutoencoder, prompts: list[list[int]]) -> None:
    inputs = padded(prompts[:1])
    model.to(torch.bfloat16)
    try:
        residual = ResidualStream(model, 0)
        clean = residual(**inputs)
        acts = sae.encode(clean.float())[..., 9]
        exact = clean.float() + 5 * sae.W_dec[3] + (7 - acts)[..., None] * sae.W_dec[9]
        with steer(model, sae, PUSH) as steering:
            got = residual(**inputs)
            assert got.dtype == torch.bfloat16
            assert (got == exact.bfloat16()).float().mean() > 0.99  # a sum in another order may round the other way
            with torch.autocast("cpu", torch.bfloat16):
                assert (residual(**inputs) == exact.bfloat16()).float().mean() > 0.99
            steering.scale = torch.zeros(1)
            assert torch.equal(residual(**inputs), clean)
    finally:
        model.to(torch.float32)


def test_inference_mode_and_gradients(model: Any, sae: SparseAutoencoder, prompts: list[list[int]]) -> None:
    inputs = padded(prompts[:1])
    with steer(model, sae, PUSH) as steering:
        expected = model(**inputs).logits
        with torch.inference_mode():
            torch.testing.assert_close(model(**inputs).logits, expected)
        embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embeds).logits.sum().backward()
        assert embeds.grad is not None
        assert embeds.grad.any()
        assert sae.W_dec.grad is None
        assert steering.feature_acts is not None
        assert not steering.feature_acts.requires_grad
    model.zero_grad(set_to_none=True)


def test_saes_of_other_libraries_are_taken(
    model: Any, tmp_path: Path, sae: SparseAutoencoder, prompts: list[list[int]]
) -> None:
    from fastsae.peers import formats

    topk = FusedTopKSAE(D_IN, 32, 4, rescale_acts_by_decoder_norm=False)
    topk.metadata = {"hook_name": "blocks.1.hook_resid_post"}
    with torch.no_grad():
        topk.b_dec.normal_()
        topk.normalize_decoder_()
    topk.save(tmp_path / "ours")
    formats.write(formats.read(tmp_path / "ours"), tmp_path / "theirs", "sparsify")
    theirs = SparseAutoencoder.load(tmp_path / "theirs")
    inputs, edits = padded(prompts), [Edit(2, "clamp", 3.0), Edit(5, "add", 1.0)]
    with steer(model, topk, edits):
        expected = model(**inputs).logits
    with steer(model, theirs, edits, layer=1):
        torch.testing.assert_close(model(**inputs).logits, expected)


def test_the_context_ends_with_one_message(model: Any, sae: SparseAutoencoder) -> None:
    limit = model.config.max_position_embeddings
    text = torch.full((1, limit - 2), 7)
    message = rf"generation: expected at most {limit} tokens, the context of the model, .* got {limit + 1}"
    with steer(model, sae, PUSH), torch.no_grad():
        assert model.generate(text, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] == limit + 1
        with pytest.raises(UsageError, match=message):
            model.generate(text, max_new_tokens=5, do_sample=False, pad_token_id=0)
        cache = model(text).past_key_values
        model(text[:, :2], past_key_values=cache)
        with pytest.raises(UsageError, match=message):
            model(text[:, :1], past_key_values=cache)
        assert torch.isfinite(model(text).logits).all()  # the block goes on
        padded_text = {"input_ids": torch.full((1, limit + 3), 7), "attention_mask": torch.ones(1, limit + 3)}
        padded_text["attention_mask"][:, :3] = 0
        model(**padded_text, position_ids=padded_text["attention_mask"].long().cumsum(1).sub(1).clamp(min=0))


def test_arguments_that_do_not_fit_are_refused(model: Any, sae: SparseAutoencoder, tokenizer: Any) -> None:
    with (
        pytest.raises(
            UsageError, match="model: expected a language model of transformers, a decoder alone, got Linear"
        ),
        steer(torch.nn.Linear(2, 2), sae, PUSH),
    ):
        pass
    homeless = FusedJumpReLUSAE(D_IN, 8)
    wide = FusedJumpReLUSAE(D_IN + 1, 8)
    direction = [Edit(direction=torch.ones(D_IN))]
    for arguments, options, message in (
        ((homeless, PUSH[:1]), {}, "layer: expected the layer to steer, because the SAE names no place"),
        ((None, direction), {}, "layer: expected the layer to steer"),
        ((sae, PUSH), {"layer": 2}, "layer: expected 0 to 1"),
        ((sae, PUSH), {"layer": "1"}, "layer: expected an integer, got '1'"),
        ((sae, PUSH), {"hook": "resid_mid"}, "hook: expected one of resid_pre, .* got 'resid_mid'"),
        ((wide, PUSH[:1]), {"layer": 0}, "sae: expected the width of the model's residual stream, 16, got 17"),
        ((sae, [Edit(64)]), {}, "feature: expected 0 to 63"),
        ((sae, PUSH, "sometimes"), {}, "positions: expected one of all"),
        ((sae, PUSH, "special"), {}, "tokenizer: expected the model's"),
    ):
        with pytest.raises(UsageError, match=message), steer(model, *arguments, **options):
            pass
    with steer(model, sae, PUSH, hook="mlp_out") as steering:
        for scale in (float("nan"), "1", True, torch.ones(1, 1), torch.ones(2) > 0, None):
            with pytest.raises(UsageError, match="scale: expected a"):
                steering.scale = scale  # type: ignore[assignment]
        with pytest.raises(UsageError, match="model: expected a pass of the whole model"):
            model.model.layers[0].mlp(torch.zeros(1, 3, D_IN))
        with pytest.raises(UsageError, match=r"input_ids: expected a tensor \[B, T\]"):
            model.model()


def test_the_function_and_the_package_have_names_of_their_own() -> None:
    import fastsae.steering.steering as module
    from fastsae.steering import edits

    assert fastsae.steer is module.steer is fastsae.steering.steer
    assert fastsae.Edit is edits.Edit
