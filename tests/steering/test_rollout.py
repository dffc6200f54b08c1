"""Generation with an unsteered model beside it: tokens, KL, surprise, ends, pieces, and refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rollout_problem import PROMPTS, PUSH, load_lively, make_sae

from fastsae import UsageError, steer
from fastsae.steering.doses import Fixed
from fastsae.steering.rollout import end_tokens, roll_out
from fastsae.steering.steering import Steering


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    return load_lively(tiny_model)


@pytest.fixture
def push(loaded: tuple[Any, Any]) -> Iterator[Steering]:
    with steer(loaded[0], make_sae(), PUSH, layer=0) as push:
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


def test_without_steering_it_writes_what_generate_writes(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    for prompt, rollout in zip(PROMPTS, roll_out(model, tokenizer, PROMPTS, None, max_new_tokens=12), strict=True):
        written = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert rollout.token_ids == written.tolist()
        assert rollout.kl == rollout.strengths == rollout.acts == [0.0] * 12
        assert not rollout.ended


def test_sampling_follows_its_seed(loaded: tuple[Any, Any], push: Steering) -> None:
    model, tokenizer = loaded

    def sample(seed: int, temperature: float = 1.0) -> list[list[int]]:
        rollouts = roll_out(model, tokenizer, PROMPTS, push, max_new_tokens=8, temperature=temperature, seed=seed)
        return [rollout.token_ids for rollout in rollouts]

    state = torch.get_rng_state()
    assert sample(3) == sample(3) != sample(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(3, 1e-300) == sample(0, 0.0)  # so cold that only the likeliest is left


def test_samples_have_the_steered_distribution(loaded: tuple[Any, Any], push: Steering) -> None:
    model, tokenizer = loaded
    rollouts = roll_out(model, tokenizer, [PROMPTS[0]] * 400, push, max_new_tokens=1, temperature=0.7, seed=0)
    push.scale = 1.0
    expected = (model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.7).softmax(-1)
    drawn = torch.bincount(torch.tensor([rollout.token_ids[0] for rollout in rollouts]), minlength=len(expected)) / 400
    likeliest = expected.topk(5).indices
    assert (drawn[likeliest] - expected[likeliest]).abs().max() < 0.08


def test_rows_end_at_any_end_token_and_no_longer_count(loaded: tuple[Any, Any], push: Steering) -> None:
    model, tokenizer = loaded
    free = roll_out(model, tokenizer, PROMPTS, push, max_new_tokens=8)
    ends = [free[0].token_ids[3], free[1].token_ids[5]]
    model.generation_config.eos_token_id = ends
    try:
        rollouts = roll_out(model, tokenizer, PROMPTS, push, max_new_tokens=8)
    finally:
        model.generation_config.eos_token_id = None
    for before, after in zip(free, rollouts, strict=True):
        stop = next((i + 1 for i, token in enumerate(before.token_ids) if token in ends), 8)
        assert after.ended == (before.token_ids[stop - 1] in ends)
        assert after.token_ids == before.token_ids[:stop]
        for name in ("kl", "surprise", "strengths", "acts", "pieces"):
            assert len(getattr(after, name)) == stop
        assert after.text == tokenizer.decode(after.token_ids[: stop - after.ended], clean_up_tokenization_spaces=False)


def test_it_stops_when_all_rows_have_ended(loaded: tuple[Any, Any], passes: list[int]) -> None:
    model, tokenizer = loaded
    first = {rollout.token_ids[0] for rollout in roll_out(model, tokenizer, PROMPTS, None, max_new_tokens=1)}
    passes.clear()
    model.generation_config.eos_token_id = sorted(first)
    try:
        rollouts = roll_out(model, tokenizer, PROMPTS, None, max_new_tokens=50)
    finally:
        model.generation_config.eos_token_id = None
    assert len(passes) == 1
    assert all(rollout.ended and rollout.text == "" and rollout.pieces == [""] for rollout in rollouts)


@pytest.mark.parametrize(
    ("config", "tokenizer", "expected"),
    [(None, None, []), (3, None, [3]), ([3, 4], 5, [3, 4, 5]), (None, 0, [0])],
)
def test_end_tokens(config: Any, tokenizer: Any, expected: list[int]) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=config))
    assert sorted(end_tokens(model, SimpleNamespace(eos_token_id=tokenizer))) == expected


def test_pieces_are_streamed_when_they_have_whole_characters(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    text = "so 🙂🙂 é 天"
    written = tokenizer.encode(text, add_special_tokens=False)
    assert len(written) > len(text)  # characters of several tokens
    said: list[tuple[int, str]] = []
    with Scripted(model, written):
        (rollout,) = roll_out(
            model, tokenizer, [[5]], None, max_new_tokens=len(written), on_token=lambda *piece: said.append(piece)
        )
    assert rollout.token_ids == written
    assert rollout.text == text == "".join(rollout.pieces)
    assert said == [(0, piece) for piece in rollout.pieces if piece]
    assert max(len(piece) for piece in rollout.pieces) < len(text)


def test_half_a_character_at_the_end_is_said_at_last(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    written = tokenizer.encode("a🙂", add_special_tokens=False)[:-1]
    said: list[str] = []
    with Scripted(model, written):
        (rollout,) = roll_out(
            model, tokenizer, [[5]], None, max_new_tokens=len(written), on_token=lambda _, piece: said.append(piece)
        )
    assert rollout.text == "".join(said) == tokenizer.decode(written)
    assert rollout.text.endswith("\ufffd")


class SpaceEater:
    """A tokenizer that leaves out a space at the beginning, as those of SentencePiece do, and has an id without a text."""

    eos_token_id = None
    words = (" so", " it", "", " goes")

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.words[i] for i in ids).removeprefix(" ")


def test_spaces_between_words_stay_where_a_tokenizer_leaves_out_the_first(loaded: tuple[Any, Any]) -> None:
    with Scripted(loaded[0], [0, 1, 2, 3, 2]):
        (rollout,) = roll_out(loaded[0], SpaceEater(), [[5]], None, max_new_tokens=5)
    assert rollout.pieces == ["so", " it", "", " goes", ""]


class Scripted:
    """While this lasts the model writes given tokens."""

    def __init__(self, model: Any, tokens: list[int]) -> None:
        self._model, self._tokens = model, iter(tokens)

    def __enter__(self) -> None:
        def write(_module: Any, _args: Any, output: Any) -> Any:
            output.logits[:, -1, next(self._tokens)] = 1e4
            return output

        self._handle = self._model.register_forward_hook(write)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def test_the_scale_is_as_before_also_after_an_error(loaded: tuple[Any, Any], push: Steering) -> None:
    model, tokenizer = loaded
    push.scale = 0.25
    roll_out(model, tokenizer, PROMPTS, push, Fixed(3.0), max_new_tokens=2)
    assert push.scale == 0.25

    def fail(_row: int, _piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        roll_out(model, tokenizer, PROMPTS, push, Fixed(3.0), max_new_tokens=20, on_token=fail)
    assert push.scale == 0.25


def test_prompts_may_be_tensors(loaded: tuple[Any, Any]) -> None:
    tensors: Any = [torch.tensor(prompt) for prompt in PROMPTS]
    found = roll_out(*loaded, tensors, None, max_new_tokens=3)
    assert found == roll_out(*loaded, PROMPTS, None, max_new_tokens=3)


def test_no_prompts_give_no_texts(loaded: tuple[Any, Any], push: Steering) -> None:
    assert roll_out(*loaded, [], push, max_new_tokens=2) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": [[5], []]}, "prompts: expected a list of token ids for each, got an empty one"),
        ({"prompts": ["Hello"]}, "prompts: expected a list of token ids for each, got 'Hello'"),
        ({"prompts": [[5, 100_000]]}, r"prompts: expected token ids from 0 to [\d,]+, got 100,000"),
        ({"prompts": [[5, -1]]}, r"prompts: expected token ids from 0 to [\d,]+, got -1"),
        ({"prompts": [[5, 1.5]]}, r"prompts: expected token ids from 0 to [\d,]+, got 1.5"),
        ({"max_new_tokens": 0}, r"max_new_tokens: expected a whole number of at least 1 and below 2\^63, got 0"),
        ({"max_new_tokens": True}, r"max_new_tokens: expected a whole number of at least 1 and below 2\^63, got true"),
        (
            {"max_new_tokens": 506},
            "max_new_tokens: expected at most 505, as the longest prompt has 7 tokens and the model takes",
        ),
        ({"temperature": -0.5}, "temperature: expected 0 or a positive number, got -0.5"),
        ({"temperature": math.nan}, "temperature: expected 0 or a positive number, got nan"),
        ({"seed": 2**63}, "seed: expected a whole number of"),
        ({"seed": -1}, r"seed: expected a whole number of at least 0 and below 2\^63, got -1"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(
    loaded: tuple[Any, Any], push: Steering, passes: list[int], changed: dict[str, Any], message: str
) -> None:
    options: dict[str, Any] = {"prompts": PROMPTS, "max_new_tokens": 4, **changed}
    with pytest.raises(UsageError, match=message):
        roll_out(*loaded, options.pop("prompts"), push, **options)
    assert passes == []


def test_a_model_in_training_mode_is_refused(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    model.train()
    try:
        with pytest.raises(UsageError, match="expected one in eval mode"):
            roll_out(model, tokenizer, PROMPTS, None, max_new_tokens=2)
    finally:
        model.eval()


def test_the_context_can_be_filled_to_the_last_token(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    (rollout,) = roll_out(model, tokenizer, [[5] * 508], None, max_new_tokens=4)
    assert len(rollout.token_ids) == 4
