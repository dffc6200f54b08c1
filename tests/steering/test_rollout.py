"""Generation with an unsteered model beside it: tokens, KL, surprise, ends, pieces, and refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_in import Push
from torch import Tensor

from fastsae.data.language_model import load_model
from fastsae.errors import UsageError
from fastsae.steering.doses import Decay, Dose, Fixed, KLCap
from fastsae.steering.rollout import Rollout, end_tokens, roll_out
from fastsae.steering.twins import NotFiniteError, divergence

PROMPTS = [[5, 9, 200, 31], [17, 4], [301, 302, 303, 304, 305, 306, 307]]


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    """The tiny model with larger weights, so that its distributions are no flat ones, and without tokens that end a text."""
    model, tokenizer = load_model(str(tiny_model))
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    return model, tokenizer


@pytest.fixture
def push(loaded: tuple[Any, Any]) -> Iterator[Push]:
    torch.manual_seed(2)
    push = Push(loaded[0], torch.randn(16))
    yield push
    push.remove()


@pytest.fixture
def passes(loaded: tuple[Any, Any]) -> Iterator[list[int]]:
    """A list that grows with each pass over the model, by the number of columns of that pass."""
    found: list[int] = []

    def count(_module: Any, _args: Any, options: dict[str, Any]) -> None:
        found.append(options["input_ids"].shape[1])

    handle = loaded[0].register_forward_pre_hook(count, with_kwargs=True)
    yield found
    handle.remove()


class Steps:
    """A controller that takes given strengths in turn, the same in all rows."""

    def __init__(self, *strengths: float) -> None:
        self.strengths = strengths

    def begin(self, n_rows: int) -> Dose:
        strengths = iter(self.strengths)

        class Given(Dose):
            def advance(self, acts: Tensor) -> None:
                self.scale = torch.full([n_rows], next(strengths))

        return Given(torch.full([n_rows], next(strengths)))


def check_against_slow(model: Any, push: Push, prompt: list[int], rollout: Rollout) -> None:
    """KL and surprise in double, by a pass over the whole row for each token, with each token's own strength."""
    for step, token in enumerate(rollout.token_ids):
        ids = torch.tensor([prompt + rollout.token_ids[:step]])
        by_column = torch.tensor([rollout.strengths[0]] * len(prompt) + rollout.strengths[1 : step + 1])
        push.by_column = by_column
        steered = model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
        push.by_column = None
        with push.paused():
            unsteered = model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
        kl = (steered.exp() * (steered - unsteered)).sum()
        assert rollout.kl[step] == pytest.approx(kl.item(), rel=1e-3, abs=1e-5)
        assert rollout.surprise[step] == pytest.approx(-unsteered[token].item(), rel=1e-3, abs=1e-5)
        assert token == steered.argmax()


def test_without_steering_it_writes_what_generate_writes(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    for prompt, rollout in zip(PROMPTS, roll_out(model, tokenizer, PROMPTS, None, max_new_tokens=12), strict=True):
        written = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert rollout.token_ids == written.tolist()
        assert rollout.kl == rollout.strengths == rollout.acts == [0.0] * 12
        assert not rollout.ended


@pytest.mark.parametrize(
    "controller", [None, Decay(3.0), KLCap(0.1), Steps(*[0.0, 0.0, 1.0, 0.0, -2.0, 0.0, 0.0, 0.0])]
)
def test_kl_and_surprise_equal_a_slow_computation_in_double(
    loaded: tuple[Any, Any], push: Push, controller: Any
) -> None:
    model, tokenizer = loaded
    rollouts = roll_out(model, tokenizer, PROMPTS, push, controller, max_new_tokens=8)
    assert max(max(rollout.kl) for rollout in rollouts) > 0.05
    for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
        check_against_slow(model, push, prompt, rollout)


def test_scale_0_writes_the_unsteered_text_and_never_runs_a_second_model(
    loaded: tuple[Any, Any], push: Push, passes: list[int]
) -> None:
    model, tokenizer = loaded
    with push.paused():
        plain = roll_out(model, tokenizer, PROMPTS, None, max_new_tokens=6)
    assert len(passes) == 6
    rollouts = roll_out(model, tokenizer, PROMPTS, push, Fixed(0.0), max_new_tokens=6)
    assert len(passes) == 12
    for one, other in zip(rollouts, plain, strict=True):
        assert one.token_ids == other.token_ids
        assert one.surprise == other.surprise
        assert one.kl == [0.0] * 6


def test_the_caches_are_used(loaded: tuple[Any, Any], push: Push, passes: list[int]) -> None:
    model, tokenizer = loaded
    roll_out(model, tokenizer, PROMPTS, push, max_new_tokens=4)
    assert passes == [7, 7, 1, 1, 1, 1, 1, 1]


def test_a_row_at_scale_0_beside_a_pushed_one_has_no_kl(loaded: tuple[Any, Any], push: Push) -> None:
    model, tokenizer = loaded

    class Rowwise:
        def begin(self, n_rows: int) -> Dose:
            return Dose(torch.tensor([0.0, 1.0, 0.0]))

    rollouts = roll_out(model, tokenizer, PROMPTS, push, Rowwise(), max_new_tokens=5)
    assert rollouts[0].kl == rollouts[2].kl == [0.0] * 5
    assert min(rollouts[1].kl) > 0


@pytest.mark.parametrize("controller", [None, Decay(3.0), KLCap(0.1)])
def test_a_batch_equals_single_rows(loaded: tuple[Any, Any], push: Push, controller: Any) -> None:
    model, tokenizer = loaded
    together = roll_out(model, tokenizer, PROMPTS, push, controller, max_new_tokens=8)
    for prompt, row in zip(PROMPTS, together, strict=True):
        (alone,) = roll_out(model, tokenizer, [prompt], push, controller, max_new_tokens=8)
        assert row.token_ids == alone.token_ids
        for name in ("kl", "surprise", "strengths", "acts"):
            assert getattr(row, name) == pytest.approx(getattr(alone, name), rel=1e-3, abs=1e-4), name


def test_sampling_follows_its_seed(loaded: tuple[Any, Any], push: Push) -> None:
    model, tokenizer = loaded

    def sample(seed: int, temperature: float = 1.0) -> list[list[int]]:
        rollouts = roll_out(model, tokenizer, PROMPTS, push, max_new_tokens=8, temperature=temperature, seed=seed)
        return [rollout.token_ids for rollout in rollouts]

    state = torch.get_rng_state()
    assert sample(3) == sample(3) != sample(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(3, 1e-300) == sample(0, 0.0)  # so cold that only the likeliest is left


def test_samples_have_the_steered_distribution(loaded: tuple[Any, Any], push: Push) -> None:
    model, tokenizer = loaded
    rollouts = roll_out(model, tokenizer, [PROMPTS[0]] * 400, push, max_new_tokens=1, temperature=0.7, seed=0)
    expected = (model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.7).softmax(-1)
    drawn = torch.bincount(torch.tensor([rollout.token_ids[0] for rollout in rollouts]), minlength=len(expected)) / 400
    likeliest = expected.topk(5).indices
    assert (drawn[likeliest] - expected[likeliest]).abs().max() < 0.08


def test_rows_end_at_any_end_token_and_no_longer_count(loaded: tuple[Any, Any], push: Push) -> None:
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


def test_the_scale_is_as_before_also_after_an_error(loaded: tuple[Any, Any], push: Push) -> None:
    model, tokenizer = loaded
    push.scale = 0.25
    roll_out(model, tokenizer, PROMPTS, push, Fixed(3.0), max_new_tokens=2)
    assert push.scale == 0.25

    def fail(_row: int, _piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        roll_out(model, tokenizer, PROMPTS, push, Fixed(3.0), max_new_tokens=20, on_token=fail)
    assert push.scale == 0.25


def test_a_push_that_makes_nan_is_named(loaded: tuple[Any, Any], push: Push) -> None:
    model, tokenizer = loaded
    with pytest.raises(NotFiniteError, match="computed NaN in float32: take lower strengths"):
        roll_out(model, tokenizer, PROMPTS, push, Fixed(3e38), max_new_tokens=2)


def test_no_prompts_give_no_texts(loaded: tuple[Any, Any], push: Push) -> None:
    assert roll_out(*loaded, [], push, max_new_tokens=2) == []


def test_divergence_of_words_that_cannot_come() -> None:
    certain, even = torch.tensor([0.0, -math.inf]), torch.tensor([0.5, 0.5]).log()
    assert divergence(certain, even) == pytest.approx(math.log(2))
    assert divergence(certain, certain) == 0
    assert divergence(even, certain) == math.inf


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": [[5], []]}, "prompts: expected a list of token ids for each, got an empty one"),
        ({"prompts": ["Hello"]}, "prompts: expected a list of token ids for each, got 'Hello'"),
        ({"prompts": [[5, 100_000]]}, r"prompts: expected token ids from 0 to [\d,]+, got 100,000"),
        ({"prompts": [[5, -1]]}, r"prompts: expected token ids from 0 to [\d,]+, got -1"),
        ({"prompts": [[5, 1.5]]}, r"prompts: expected token ids from 0 to [\d,]+, got 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number of at least 1, got 0"),
        ({"max_new_tokens": True}, "max_new_tokens: expected a whole number of at least 1, got true"),
        (
            {"max_new_tokens": 506},
            "max_new_tokens: expected at most 505, as the longest prompt has 7 tokens and the model takes",
        ),
        ({"temperature": -0.5}, "temperature: expected 0 or a positive number, got -0.5"),
        ({"temperature": math.nan}, "temperature: expected 0 or a positive number, got nan"),
        ({"seed": -1}, "seed: expected a whole number of at least 0, got -1"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(
    loaded: tuple[Any, Any], push: Push, changed: dict[str, Any], message: str
) -> None:
    options: dict[str, Any] = {"prompts": PROMPTS, "max_new_tokens": 4, **changed}
    with pytest.raises(UsageError, match=message):
        roll_out(*loaded, options.pop("prompts"), push, **options)
    assert push.passes == 0


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
