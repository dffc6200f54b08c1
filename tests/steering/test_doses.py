"""Controllers of the strength, against their formulas and in closed loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae.errors import UsageError
from fastsae.steering.doses import CLOSE, TRIES, Controller, Decay, Fixed, KLCap, SetPoint, Strengths

EVERY_ROW_LIVES = torch.ones(1, dtype=torch.bool)


def run(controller: Controller, n_steps: int, acts: Callable[[float], float] = lambda _: 0.0) -> list[float]:
    """The strengths of one row, whose feature answers to each with `acts(strength)`."""
    strengths = controller.begin(1)
    found = []
    for _ in range(n_steps):
        found.append(strengths.scale.item())
        strengths.advance(torch.tensor([acts(found[-1])]))
    return found


def settle(
    strengths: Strengths, kl: Callable[[Tensor], Tensor], live: Tensor | None = None
) -> tuple[Tensor, Tensor, int]:
    """Make passes until one is accepted: its scale, its KL, and how many there were."""
    for tries in range(1, TRIES + 1):
        scale = strengths.scale
        found = kl(scale)
        if strengths.accepts(found, torch.ones(len(scale), dtype=torch.bool) if live is None else live):
            return scale, found, tries
    raise AssertionError(f"not accepted after {TRIES} tries")


def test_fixed_and_decay_follow_their_formulas() -> None:
    assert run(Fixed(-3.0), 3) == [-3.0] * 3
    assert run(Decay(2.0, 8.0), 5) == pytest.approx([8 * 2 ** (-t / 2) for t in range(5)])
    assert run(Decay(1e-300), 3) == [1.0, 0.0, 0.0]


def test_others_take_every_pass() -> None:
    for controller in (Fixed(), Decay(3.0), SetPoint(1.0)):
        assert controller.begin(1).accepts(torch.tensor([1e9]), EVERY_ROW_LIVES)


@pytest.mark.parametrize("strength", [1.0, 30.0, -30.0])
@pytest.mark.parametrize(
    "curve",
    [
        lambda s: s**2,
        lambda s: 5 * (1 - torch.exp(-(s**2))),  # levels off
        lambda s: s**4,
        lambda s: 0.3 + s**2,  # the steered past alone costs something
        lambda s: s,
    ],
)
def test_the_cap_finds_the_largest_strength_of_each_row(curve: Callable[[Tensor], Tensor], strength: float) -> None:
    """Rows differ in how much they feel: the last two do not reach the budget at all."""
    felt = torch.tensor([30.0, 3.0, 1.5, 0.1, 0.0])
    strengths = KLCap(0.5, strength).begin(5)
    for step in range(3):  # the first row takes more tries than one token allows: the next begins where they ended
        scale, kl, _ = settle(strengths, lambda scale: curve(felt * (scale / strength)))
        assert (kl <= 0.5).all()
        assert ((kl >= 0.5 * (1 - 2 * CLOSE)) | (scale == strength))[0 if step else 1 :].all()
        assert (scale[3:] == strength).all()
        strengths.advance(torch.zeros(5))


def test_the_cap_never_takes_what_was_seen_to_exceed_the_budget() -> None:
    """Curves that jump, and that do not rise with the strength."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        heights = torch.rand(4, 12, generator=generator) * torch.rand(4, 1, generator=generator) * 3

        def jagged(scale: Tensor, heights: Tensor = heights) -> Tensor:
            return heights.gather(1, (scale * 11).long()[:, None])[:, 0]

        strengths = KLCap(0.5).begin(4)
        for _ in range(3):
            scale, kl, _ = settle(strengths, jagged)
            assert ((kl <= 0.5) | (scale == 0)).all()
            assert ((scale >= 0) & (scale <= 1)).all()
            strengths.advance(torch.zeros(4))


def test_the_cap_takes_0_where_even_0_exceeds_the_budget_and_comes_back_when_it_does_not() -> None:
    strengths = KLCap(0.5, 4.0).begin(1)
    for most in (TRIES, 2, 2):  # a token that begins with next to nothing tries only 0 beside it
        scale, _, tries = settle(strengths, lambda scale: 2 + scale)
        assert scale.item() == 0.0
        assert tries <= most
        strengths.advance(torch.zeros(1))
    assert 0 < strengths.scale.item() < 0.1
    for _ in range(3):
        scale, _, _ = settle(strengths, lambda scale: 0.4 + scale / 1000)
        strengths.advance(torch.zeros(1))
    assert scale.item() == 4.0


def test_the_cap_comes_down_from_nan_and_infinity() -> None:
    for wrong in (math.nan, math.inf):
        scale, kl, _ = settle(KLCap(0.5).begin(1), lambda scale: torch.where(scale > 0.2, wrong, scale))  # noqa: B023
        assert 0 < scale.item() <= 0.2
        assert kl.item() <= 0.5


def test_the_cap_tries_once_where_the_whole_strength_holds_or_rows_have_ended() -> None:
    assert settle(KLCap(0.5).begin(2), torch.zeros_like)[2] == 1
    ended = torch.tensor([True, False])
    assert settle(KLCap(0.5).begin(2), lambda _: torch.tensor([0.1, 9.0]), ended)[2] == 1


def test_gain_1_is_a_clamp_that_comes_one_step_late() -> None:
    found = run(SetPoint(3.0, maximum=10.0), 4, lambda _: 1.25)
    assert found == [3.0, 1.75, 1.75, 1.75]


def test_the_strength_stays_between_0_and_the_maximum() -> None:
    assert run(SetPoint(3.0), 3, lambda _: 50.0) == [3.0, 0.0, 0.0]
    assert run(SetPoint(3.0, gain=9.0), 2, lambda _: 0.0) == [6.0, 6.0]
    assert run(SetPoint(3.0, gain=9.0, maximum=5.0), 2, lambda _: 0.0) == [5.0, 5.0]


def test_huge_gains_and_targets_stay_numbers() -> None:
    largest = torch.finfo(torch.float32).max
    assert run(SetPoint(3e38, gain=3e38, integral=3e38), 3) == [largest] * 3
    assert run(SetPoint(1.0, gain=3e38, integral=3e38, maximum=5.0), 4, lambda _: 1e30) == [5.0, 0.0, 0.0, 0.0]


def test_a_gain_alone_leaves_an_error_that_the_integral_removes() -> None:
    def answer(strength: float) -> float:
        return 0.3 * strength  # another feature holds this one down

    assert answer(run(SetPoint(3.0, gain=1.0, maximum=50.0), 60, answer)[-1]) < 1.0
    assert answer(run(SetPoint(3.0, 1.0, 0.5, 50.0), 60, answer)[-1]) == pytest.approx(3.0, rel=0.01)


def test_the_integral_does_not_wind_up() -> None:
    strengths = SetPoint(1.0, gain=0.0, integral=1.0, maximum=2.0).begin(2)
    for _ in range(100):
        strengths.advance(torch.tensor([0.0, 5.0]))  # the first row never answers, the second is far above its target
    assert strengths.scale.tolist() == [2.0, 0.0]
    strengths.advance(torch.tensor([1.5, 0.5]))
    assert strengths.scale.tolist() == [1.5, 0.5]  # at once, and not after a hundred steps


def test_controllers_begin_anew_for_each_roll_out() -> None:
    for controller in (Decay(1.0), SetPoint(1.0, 0.5, 0.5), KLCap(0.1)):
        assert run(controller, 4) == run(controller, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fixed(math.nan), "strength: expected a finite number, got nan"),
        (lambda: Fixed(1e39), "strength: expected a finite number"),
        (lambda: Fixed(True), "strength: expected a finite number, got true"),
        (lambda: Fixed("3"), "strength: expected a finite number, got '3'"),  # type: ignore[arg-type]
        (lambda: Decay(0.0), "half_life: expected a positive number of tokens, got 0.0"),
        (lambda: Decay(math.inf), "half_life: expected a positive number of tokens, got inf"),
        (lambda: KLCap(-1.0), "budget: expected a positive number of nats, got -1.0"),
        (lambda: KLCap(1.0, math.inf), "strength: expected a finite number, got inf"),
        (lambda: SetPoint(0.0), "target: expected a positive activation, got 0.0"),
        (lambda: SetPoint(1.0, gain=-1.0), "gain: expected 0 or a positive number, got -1.0"),
        (lambda: SetPoint(1.0, integral=math.nan), "integral: expected a finite number, got nan"),
        (lambda: SetPoint(1.0, maximum=0.0), "maximum: expected a positive strength, got 0.0"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
