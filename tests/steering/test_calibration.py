"""The search for the strength whose KL is 1 nat, on curves that are known and on a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_problem import load_lively

from fastsae import Edit, UsageError, steer
from fastsae.steering import calibration
from fastsae.steering.calibration import MATCHES, ROLLOUTS, Calibration, calibrate, match
from fastsae.steering.doses import Fixed
from fastsae.steering.measures import percentile
from fastsae.steering.rollout import Rollout, roll_out
from fastsae.steering.twins import NotFiniteError


def search(monkeypatch: pytest.MonkeyPatch, curve: Callable[[float], float], **options: Any) -> Calibration:
    """Calibrate where the 95th percentile of the KL at alpha is `curve(alpha)`."""

    def rolled(*arguments: Any, **_options: Any) -> list[Rollout]:
        return [Rollout(kl=[0.0, curve(arguments[4].strength)])]

    monkeypatch.setattr(calibration, "roll_out", rolled)
    steering: Any = None
    return calibrate(None, None, [[1]], steering, **options)


@pytest.mark.parametrize(
    "curve",
    [
        lambda alpha: alpha**2,
        lambda alpha: 1e-6 * alpha**2,
        lambda alpha: 900 * alpha**2,
        lambda alpha: 8 * (1 - math.exp(-((alpha / 40) ** 2))),  # levels off
        lambda alpha: 12 * alpha**3 / (alpha**3 + 30**3),
        lambda alpha: 0.2 * math.log1p(alpha),  # hardly rises
        lambda alpha: max(1e-9, (alpha - 100) / 50),
    ],
)
def test_it_comes_within_the_tolerance(monkeypatch: pytest.MonkeyPatch, curve: Callable[[float], float]) -> None:
    found = search(monkeypatch, curve)
    assert found.is_close
    assert found.p95_kl == curve(found.alpha) == pytest.approx(1.0, abs=0.05)
    assert found.tried[-1] == (found.alpha, found.p95_kl)
    assert len(found.tried) <= ROLLOUTS


def test_where_the_kl_jumps_the_strength_below_the_jump_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    found = search(monkeypatch, lambda alpha: 0.5 if alpha < 77 else 3.0)
    assert not found.is_close
    assert found.p95_kl == 0.5
    assert 70 < found.alpha < 77
    assert len(found.tried) == ROLLOUTS


def test_nan_and_infinity_count_as_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    def curve(alpha: float) -> float:
        if alpha > 1000:
            raise NotFiniteError("NaN")
        return math.inf if alpha > 100 else (alpha / 10) ** 2

    found = search(monkeypatch, curve)
    assert found.alpha == pytest.approx(10, rel=0.03)
    assert found.tried[0] == (4096.0, math.inf)


def test_a_dead_push_is_named_after_one_roll_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []
    with pytest.raises(
        UsageError, match="even at 4096, the largest strength, the 95th percentile of the tokens' KL is 0 nats"
    ):
        search(monkeypatch, lambda alpha: tried.append(alpha) or 0.0)  # type: ignore[func-returns-value]
    assert tried == [4096.0]


def test_a_bracket_above_the_target_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []
    with pytest.raises(UsageError, match=r"already at 0\.01, the smallest strength, .* is 5 nats, above 1"):
        search(monkeypatch, lambda alpha: tried.append(alpha) or 5.0)  # type: ignore[func-returns-value]
    assert len(tried) <= ROLLOUTS
    assert tried[-1] == 0.01


def test_target_bracket_and_tolerance_are_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    found = search(monkeypatch, lambda alpha: alpha**2, target=4.0, bracket=(1.0, 3.0), tolerance=0.001)
    assert found.alpha == pytest.approx(2.0, rel=1e-3)
    assert all(1.0 <= alpha <= 3.0 for alpha, _ in found.tried)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.0}, "target: expected a positive number of nats, got 0.0"),
        ({"tolerance": math.nan}, "tolerance: expected a positive number of nats, got nan"),
        ({"bracket": (0.0, 1.0)}, "bracket: expected two strengths 0 < low < high, got 0.0 and 1.0"),
        ({"bracket": (2.0, 1.0)}, "bracket: expected two strengths 0 < low < high, got 2.0 and 1.0"),
    ],
)
def test_bad_arguments_are_refused(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        search(monkeypatch, lambda alpha: alpha, **options)


def test_no_prompts_are_refused() -> None:
    steering: Any = None
    with pytest.raises(UsageError, match="prompts: expected at least one, got none"):
        calibrate(None, None, [], steering)


def test_on_a_model_the_strength_has_the_kl_that_it_says(tiny_model: Path) -> None:
    model, tokenizer = load_lively(tiny_model)
    prompts = [[5, 9, 200], [17, 4]]
    with steer(model, None, [Edit(direction=torch.randn(16), amount=1.0)], layer=0) as push:
        found = calibrate(model, tokenizer, prompts, push, max_new_tokens=5, tolerance=0.2)
        rollouts = roll_out(model, tokenizer, prompts, push, Fixed(found.alpha), max_new_tokens=5)
    assert percentile([kl for rollout in rollouts for kl in rollout.kl]) == found.p95_kl
    assert found.p95_kl <= 1.2
    assert push.scale == 1.0


@pytest.mark.parametrize("curve", [lambda dose: dose**2, lambda dose: 3 * dose, lambda dose: 5 * (1 - math.exp(-dose / 9)),
                                   lambda dose: dose**2 if dose < 1e4 else math.inf])  # fmt: skip
@pytest.mark.parametrize("guess", [0.05, 1.0, 300.0])
def test_a_dose_of_a_given_kl_is_found(curve: Callable[[float], float], guess: float) -> None:
    asked: list[float] = []

    def kl_at(dose: float) -> float:
        asked.append(dose)
        return curve(dose)

    dose = match(kl_at, target=1.0, guess=guess)
    assert dose in asked
    assert curve(dose) == pytest.approx(1.0, rel=0.25)
    assert len(asked) <= MATCHES


def test_a_kl_that_is_not_to_be_had() -> None:
    assert match(lambda dose: 0.1, target=1.0, guess=1.0) is None
    assert match(lambda dose: 0.1 if dose < 2 else 9.0, target=1.0, guess=1.0) is None  # it jumps
    assert match(lambda dose: None, target=1.0, guess=1.0) is None

    def refused(dose: float) -> float:
        if dose > 1:
            raise NotFiniteError("NaN")
        return dose

    assert match(refused, target=0.9, guess=4.0) == pytest.approx(0.9, rel=0.25)
