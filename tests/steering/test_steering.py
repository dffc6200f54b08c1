"""A steered model: its passes, its generations, and what it is when the block is over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fastsae import Edit, FusedJumpReLUSAE, SparseAutoencoder, UsageError, steer
from fastsae.data.activations import ResidualStream
from fastsae.data.hooks import HOOKS

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
    """The model, which has no hook and no new attribute left when the test is over."""
    before = {name: set(module.__dict__) for name, module in loaded.named_modules()}
    yield loaded
    assert not any(hooks_of(loaded))
    assert {name: set(module.__dict__) for name, module in loaded.named_modules()} == before


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
