"""Texts that a steered model writes: the same with every kind of cache, alone and in a padded batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from steered_model import BIRDS, N_NEW, PUSH, generate, logits_of, padded, render

from fastsae import SparseAutoencoder, UsageError, steer
from fastsae.steering.positions import Positions


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
