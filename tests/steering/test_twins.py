"""The steered model beside the unsteered one: KL, surprise and activations against passes over whole rows in double."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rollout_problem import AMOUNT, FEATURE, PROMPTS, PUSH, Slow, Steps, enliven, load_lively, make_sae
from torch import Tensor, nn

from fastsae import Edit, FusedJumpReLUSAE, UsageError, steer
from fastsae.steering.doses import Decay, Fixed, KLCap, SetPoint, Strengths
from fastsae.steering.rollout import roll_out
from fastsae.steering.steering import Steering
from fastsae.steering.twins import NotFiniteError, divergence

SMALL = {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GATED = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 1}
WINDOW = {**GATED, "head_dim": 8, "sliding_window": 4}
MODELS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=400, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
        )
    ),  # learnt positions
    "bloom": lambda: transformers.BloomForCausalLM(transformers.BloomConfig(**SMALL)),  # takes no position ids
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**WINDOW)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**WINDOW)),  # every other layer a window
}


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    return load_lively(tiny_model)


@pytest.fixture(scope="module")
def sae() -> FusedJumpReLUSAE:
    return make_sae()


@pytest.fixture
def push(loaded: tuple[Any, Any], sae: FusedJumpReLUSAE) -> Iterator[Steering]:
    with steer(loaded[0], sae, PUSH, layer=0) as push:
        yield push


@pytest.fixture
def passes(loaded: tuple[Any, Any]) -> Iterator[list[int]]:
    """A list that grows with each pass over the model, by the number of columns of that pass."""
    found: list[int] = []

    def count(_module: Any, _args: Any, options: dict[str, Any]) -> None:
        found.append(options["input_ids"].shape[1])

    handle = loaded[0].register_forward_pre_hook(count, with_kwargs=True)
    yield found
    handle.remove()


@pytest.mark.parametrize(
    "controller",
    [None, Decay(3.0), KLCap(0.1), SetPoint(3.0, 0.3, 0.1), Steps(0.0, 0.0, 1.0, 0.0, -2.0, 0.0, 0.0, 0.0)],
    ids=["none", "decay", "kl_cap", "set_point", "steps"],
)
def test_kl_and_surprise_equal_a_slow_computation_in_double(
    loaded: tuple[Any, Any], sae: FusedJumpReLUSAE, controller: Any
) -> None:
    with steer(loaded[0], sae, PUSH, layer=0) as push:
        rollouts = roll_out(*loaded, PROMPTS, push, controller, max_new_tokens=8)
    assert max(max(rollout.kl) for rollout in rollouts) > 0.05
    assert max(max(rollout.acts) for rollout in rollouts) > 0.1
    slow = Slow(loaded[0], sae)
    for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
        slow.check(prompt, rollout)


@pytest.mark.parametrize("name", MODELS)
def test_models_with_other_positions_and_caches(loaded: tuple[Any, Any], sae: FusedJumpReLUSAE, name: str) -> None:
    model = enliven(MODELS[name]())
    with steer(model, sae, PUSH, layer=0) as push:
        rollouts = roll_out(model, loaded[1], PROMPTS, push, KLCap(0.1), max_new_tokens=8)
    assert any(0 < strength < 1 for rollout in rollouts for strength in rollout.strengths)
    slow = Slow(model, sae)
    for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
        slow.check(prompt, rollout)


@pytest.mark.parametrize("positions", ["prompt", "generated"])
def test_positions_are_those_of_the_prompt_and_of_what_is_written(
    loaded: tuple[Any, Any], sae: FusedJumpReLUSAE, positions: str
) -> None:
    with steer(loaded[0], sae, PUSH, positions, layer=0) as push:
        rollouts = roll_out(*loaded, PROMPTS, push, KLCap(0.1), max_new_tokens=6)
    slow = Slow(loaded[0], sae)
    for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
        edited = range(len(prompt)) if positions == "prompt" else range(len(prompt), 100)
        slow.check(prompt, rollout, edited.__contains__)


class Twice:
    """A controller that makes each pass twice."""

    def begin(self, n_rows: int) -> Strengths:
        class Again(Strengths):
            tries_again = True
            accepted = True

            def accepts(self, kl: Tensor, live: Tensor) -> bool:
                self.accepted = not self.accepted
                return self.accepted

        return Again(torch.ones(n_rows))


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "special", "assistant"])
def test_a_pass_that_is_made_again_leaves_no_trace(
    loaded: tuple[Any, Any], sae: FusedJumpReLUSAE, passes: list[int], positions: str
) -> None:
    model, tokenizer = loaded
    questions = ["What is a river?", "Name three birds that live near the sea."]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": one}], add_generation_prompt=True, return_dict=False)
        for one in questions
    ]
    with steer(model, sae, PUSH, positions, layer=0, tokenizer=tokenizer) as push:
        once = roll_out(model, tokenizer, prompts, push, Fixed(), max_new_tokens=6)
        assert max(max(rollout.kl) for rollout in once) > 0
        assert roll_out(model, tokenizer, prompts, push, Twice(), max_new_tokens=6) == once
    assert len(passes) == 12 + 18


def test_scale_0_writes_the_unsteered_text_and_never_runs_a_second_model(
    loaded: tuple[Any, Any], push: Steering, passes: list[int]
) -> None:
    with push.paused():
        plain = roll_out(*loaded, PROMPTS, None, max_new_tokens=6)
    assert len(passes) == 6
    rollouts = roll_out(*loaded, PROMPTS, push, Fixed(0.0), max_new_tokens=6)
    assert len(passes) == 12
    for one, other in zip(rollouts, plain, strict=True):
        assert one.token_ids == other.token_ids
        assert one.surprise == other.surprise
        assert one.kl == [0.0] * 6
    assert max(max(rollout.acts) for rollout in rollouts) > 0


def test_the_caches_are_used(loaded: tuple[Any, Any], push: Steering, passes: list[int]) -> None:
    roll_out(*loaded, PROMPTS, push, max_new_tokens=4)
    assert passes == [7, 7, 1, 1, 1, 1, 1, 1]


def test_a_row_at_scale_0_beside_a_pushed_one_has_no_kl(loaded: tuple[Any, Any], push: Steering) -> None:
    class Rowwise:
        def begin(self, n_rows: int) -> Strengths:
            return Strengths(torch.tensor([0.0, 1.0, 0.0]))

    rollouts = roll_out(*loaded, PROMPTS, push, Rowwise(), max_new_tokens=5)
    assert rollouts[0].kl == rollouts[2].kl == [0.0] * 5
    assert min(rollouts[1].kl) > 0


@pytest.mark.parametrize(
    "controller",
    [None, Decay(3.0), KLCap(0.1), SetPoint(3.0, 0.3, 0.1)],
    ids=["none", "decay", "kl_cap", "set_point"],
)
def test_a_batch_equals_single_rows(loaded: tuple[Any, Any], push: Steering, controller: Any) -> None:
    together = roll_out(*loaded, PROMPTS, push, controller, max_new_tokens=8)
    for prompt, row in zip(PROMPTS, together, strict=True):
        (alone,) = roll_out(*loaded, [prompt], push, controller, max_new_tokens=8)
        assert row.token_ids == alone.token_ids
        for name in ("kl", "surprise", "strengths", "acts"):
            assert getattr(row, name) == pytest.approx(getattr(alone, name), rel=1e-3, abs=1e-4), name


def test_the_cap_keeps_the_kl_of_a_model_within_its_budget(loaded: tuple[Any, Any], push: Steering) -> None:
    free = roll_out(*loaded, PROMPTS, push, max_new_tokens=8)
    assert max(max(rollout.kl) for rollout in free) > 0.2
    capped = roll_out(*loaded, PROMPTS, push, KLCap(0.05), max_new_tokens=8)
    for rollout in capped:
        assert all(kl <= 0.05 or strength == 0 for kl, strength in zip(rollout.kl, rollout.strengths, strict=True))
        assert all(0 <= strength <= 1 for strength in rollout.strengths)
        assert any(0 < strength < 1 for strength in rollout.strengths)


def test_the_set_point_holds_the_feature_nearer_to_its_target(loaded: tuple[Any, Any], sae: FusedJumpReLUSAE) -> None:
    """The activation before the edit hardly answers at the edited layer, so the strength is what is left to the target."""
    with steer(loaded[0], sae, [Edit(FEATURE, "add", 1.0)], layer=0) as push:
        rollouts = roll_out(*loaded, PROMPTS, push, SetPoint(AMOUNT, maximum=100.0), max_new_tokens=8)
    for rollout in rollouts:
        for acts, strength in zip(rollout.acts, rollout.strengths[1:], strict=False):
            assert strength == pytest.approx(max(AMOUNT - acts, 0), abs=1e-5)


def test_a_model_of_bf16_keeps_its_dtype_and_has_a_kl_in_fp32(tiny_model: Path, sae: FusedJumpReLUSAE) -> None:
    model, tokenizer = load_model_of_bf16(tiny_model)
    with steer(model, sae, PUSH, layer=0) as push:
        rollouts = roll_out(model, tokenizer, PROMPTS, push, KLCap(0.1), max_new_tokens=6)
    values = [kl for rollout in rollouts for kl in rollout.kl]
    assert all(torch.tensor(kl).bfloat16().item() != kl for kl in values if kl > 0)
    assert all(0 <= kl < 1 for kl in values)


def load_model_of_bf16(folder: Path) -> tuple[Any, Any]:
    model, tokenizer = load_lively(folder)
    return model.to(torch.bfloat16), tokenizer


class Wrapped(nn.Module):
    """A wrapper as that of PEFT, whose forward names nothing that it passes on."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.wrapped, self.config, self.generation_config = model, model.config, model.generation_config
        self.eval()

    def get_base_model(self) -> Any:
        return self.wrapped

    def get_input_embeddings(self) -> Any:
        return self.wrapped.get_input_embeddings()

    def forward(self, **options: Any) -> Any:
        return self.wrapped(**options)


@pytest.mark.parametrize("wrap", [Wrapped, torch.compile], ids=["peft", "compile"])
def test_a_wrapper_loses_neither_cache_nor_positions(
    loaded: tuple[Any, Any], push: Steering, passes: list[int], wrap: Any
) -> None:
    plain = roll_out(*loaded, PROMPTS, push, max_new_tokens=5)
    assert roll_out(wrap(loaded[0]), loaded[1], PROMPTS, push, max_new_tokens=5) == plain
    assert len(passes) == 20
    assert sum(passes) == 4 * 7 + 16


class NoCache(transformers.Qwen2ForCausalLM):  # type: ignore[misc]
    """A model whose cache is of a kind that nobody knows."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **_: Any) -> Any:
        return super().forward(input_ids, attention_mask, position_ids, use_cache=False)


@pytest.fixture
def cacheless(tiny_model: Path) -> Any:
    return enliven(NoCache.from_pretrained(tiny_model))


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_a_model_without_a_cache_passes_over_whole_rows(
    loaded: tuple[Any, Any], sae: FusedJumpReLUSAE, cacheless: Any, positions: str
) -> None:
    model, tokenizer = loaded
    prompts = [PROMPTS[0], PROMPTS[0][::-1]]
    with steer(model, sae, PUSH, positions, layer=0) as push:
        expected = roll_out(model, tokenizer, prompts, push, max_new_tokens=6)
    with steer(cacheless, sae, PUSH, positions, layer=0) as push:
        found = roll_out(cacheless, tokenizer, prompts, push, max_new_tokens=6)
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.kl == pytest.approx(other.kl, rel=1e-3, abs=1e-5)
        assert one.acts == pytest.approx(other.acts, rel=1e-3, abs=1e-5)


def test_a_model_without_a_cache_refuses_what_would_come_out_wrong(
    loaded: tuple[Any, Any], sae: FusedJumpReLUSAE, cacheless: Any
) -> None:
    with steer(cacheless, sae, PUSH, layer=0) as push:
        with pytest.raises(UsageError, match="prompts: expected prompts of one length, or one at a time"):
            roll_out(cacheless, loaded[1], PROMPTS, push, max_new_tokens=6)
        with pytest.raises(UsageError, match="controller: expected one strength for all tokens"):
            roll_out(cacheless, loaded[1], PROMPTS[:1], push, Decay(3.0), max_new_tokens=6)


def test_a_push_that_makes_nan_is_named(loaded: tuple[Any, Any], push: Steering) -> None:
    with pytest.raises(NotFiniteError, match="computed NaN in float32: take lower strengths"):
        roll_out(*loaded, PROMPTS, push, Fixed(3e38), max_new_tokens=2)


def test_divergence_of_words_that_cannot_come() -> None:
    certain, even = torch.tensor([0.0, -math.inf]), torch.tensor([0.5, 0.5]).log()
    assert divergence(certain, even) == pytest.approx(math.log(2))
    assert divergence(certain, certain) == 0
    assert divergence(even, certain) == math.inf
