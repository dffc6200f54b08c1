"""The strength at which a push is as large as a reader can take: KL of 1 nat at the 95th percentile of the tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastsae.errors import UsageError, shown
from fastsae.steering.doses import Fixed
from fastsae.steering.measures import percentile
from fastsae.steering.rollout import roll_out
from fastsae.steering.twins import NotFiniteError

if TYPE_CHECKING:
    from fastsae.steering.steering import Steering

BRACKET = (0.01, 4096.0)
TARGET = 1.0
TOLERANCE = 0.05
ROLLOUTS = 12
MATCHES = 7
ALIKE, APART = 0.05, 1.25
"""`match` is content within this share of its target, and gives up where it ends more than this factor from it."""
_LONGEST_STEP = math.log(8)


@dataclass(frozen=True)
class Calibration:
    """A strength, and how it was found.

    Attributes:
        alpha: The strength whose texts have the wanted KL; where the KL jumps over that, the largest tried one below.
        p95_kl: The 95th percentile of their tokens' KL(steered || unsteered), in nats.
        tried: Each strength tried with its p95_kl, in order; infinite where the model computed NaN.
        is_close: Whether p95_kl is as near to the target as was asked for.
    """

    alpha: float
    p95_kl: float
    tried: tuple[tuple[float, float], ...]
    is_close: bool


def calibrate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    steering: Steering,
    *,
    target: float = TARGET,
    bracket: tuple[float, float] = BRACKET,
    tolerance: float = TOLERANCE,
    max_new_tokens: int = 32,
    tried: Callable[[], object] = lambda: None,
) -> Calibration:
    """Find the strength alpha at which the 95th percentile over tokens of the KL is `target` nats, on short greedy roll-outs.

    p95_t KL(p_steered(. | x_<t) || p_unsteered(. | x_<t)) = target, both on the text that the steered model writes

    It is found by bisection in log alpha, in at most `ROLLOUTS` roll-outs; the next guess is not the middle but where KL ~
    alpha^2, its expansion for small alpha, puts the target, kept within the inner half of the bracket. A KL that is bounded is
    necessary for a text that holds, and not sufficient; nor does it compare kinds of edits.

    Args:
        model: As for `roll_out`, and so are `tokenizer`, `prompts` and `max_new_tokens`.
        steering: Its scale is set to alpha, so that alpha is in units of the edits' amounts.
        target: The wanted KL, in nats.
        bracket: The smallest and the largest strength.
        tolerance: How far from the target is close, in nats.
        tried: Called after each strength.

    Raises:
        UsageError: Even the largest strength stays below the target, the smallest is above it, or an argument is wrong.

    Source: the idea of equal KL is that of github.com/wassname/isokl_steering_calibration.
    """
    _check(prompts, target, bracket, tolerance)
    search = _Search(target, bracket, tolerance)
    while (alpha := search.next_alpha()) is not None:
        try:
            rollouts = roll_out(model, tokenizer, prompts, steering, Fixed(alpha), max_new_tokens=max_new_tokens)
            found = percentile([kl for rollout in rollouts for kl in rollout.kl]) or 0.0
        except NotFiniteError:
            found = math.inf
        search.note(alpha, found)
        tried()
    return search.result()


def match(kl_at: Callable[[float], float | None], *, target: float, guess: float) -> float | None:
    """Find the number of a dose whose KL is `target`, which may jump where the text changes.

    Args:
        kl_at: Gives the KL of a dose; it may raise `NotFiniteError`, or give None, where a push is too strong.
        target: The wanted KL, in nats.
        guess: The first dose that is tried.

    Returns:
        The dose of `MATCHES` tries that is nearest to the target; None where that is more than `APART` times away.
    """
    aim, tried = math.log(target), list[tuple[float, float]]()
    log_dose = math.log(guess)
    for _ in range(MATCHES):
        try:
            found = kl_at(math.exp(log_dose))
        except NotFiniteError:
            found = None
        if not found or not math.isfinite(found):
            log_dose += _LONGEST_STEP if found == 0 else -_LONGEST_STEP
            continue
        tried.append((log_dose, math.log(found)))
        if abs(tried[-1][1] - aim) <= math.log1p(ALIKE):
            break
        log_dose = _next_dose(tried, aim)
    best = min(tried, key=lambda point: abs(point[1] - aim), default=None)
    return None if best is None or abs(best[1] - aim) > math.log(APART) else math.exp(best[0])


def _next_dose(tried: Sequence[tuple[float, float]], aim: float) -> float:
    """Between a dose below the target and one above it, or from the nearest one as if the KL were proportional to it."""
    below = max((point for point in tried if point[1] < aim), default=None)
    above = min((point for point in tried if point[1] > aim), default=None)
    if below is not None and above is not None and below[0] < above[0]:
        part = (aim - below[1]) / (above[1] - below[1])
        return below[0] + min(max(part, 0.25), 0.75) * (above[0] - below[0])
    dose, kl = min(tried, key=lambda point: abs(point[1] - aim))
    return dose + min(max(aim - kl, -_LONGEST_STEP), _LONGEST_STEP)


class _Search:
    """Bisection in log alpha over a bracket, whose upper end is tried first."""

    def __init__(self, target: float, bracket: tuple[float, float], tolerance: float) -> None:
        self._target, self._tolerance = target, tolerance
        self._low, self._high = bracket
        self._tried: list[tuple[float, float]] = []
        self._below: tuple[float, float] | None = None

    def next_alpha(self) -> float | None:
        """The strength to try; None at the end."""
        if not self._tried:
            return self._high
        alpha, found = self._tried[-1]
        if self._is_close(found) or len(self._tried) == ROLLOUTS:
            return None
        if len(self._tried) == ROLLOUTS - 1 and self._below is None:
            return self._low  # nothing tells yet whether this one is below
        low, high = math.log(self._low), math.log(self._high)
        guess = (low + high) / 2
        if len(self._tried) > 1 and 0 < found < math.inf:
            guess = math.log(alpha) + math.log(self._target / found) / 2
        quarter = (high - low) / 4
        return math.exp(min(max(guess, low + quarter), high - quarter))

    def note(self, alpha: float, p95_kl: float) -> None:
        """Take in what was found.

        Raises:
            UsageError: The target is not reached, or passed by the smallest strength.
        """
        self._tried.append((alpha, p95_kl))
        if self._is_close(p95_kl):
            return
        if p95_kl < self._target:
            if len(self._tried) == 1:
                raise UsageError(
                    f"alpha: even at {alpha:g}, the largest strength, the 95th percentile of the tokens' KL is {p95_kl:.3g} "
                    f"nats, below {self._target:g}: this edit changes next to nothing here. Expected a feature whose push has an "
                    "effect, positions that the texts have, or an alpha given as a number"
                )
            self._low, self._below = alpha, (alpha, p95_kl)
            return
        if alpha <= self._low:
            raise UsageError(
                f"alpha: already at {alpha:g}, the smallest strength, the 95th percentile of the tokens' KL is {p95_kl:.3g} "
                f"nats, above {self._target:g}. Expected edits of a smaller amount, or an alpha given as a number"
            )
        self._high = alpha

    def result(self) -> Calibration:
        is_close = self._is_close(self._tried[-1][1])
        alpha, p95_kl = self._tried[-1] if is_close or self._below is None else self._below
        return Calibration(alpha, p95_kl, tuple(self._tried), is_close)

    def _is_close(self, p95_kl: float) -> bool:
        return abs(p95_kl - self._target) <= self._tolerance


def _check(prompts: Sequence[Sequence[int]], target: float, bracket: tuple[float, float], tolerance: float) -> None:
    if not prompts:
        raise UsageError("prompts: expected at least one, got none")
    for name, value in (("target", target), ("tolerance", tolerance)):
        if not 0 < value < math.inf:
            raise UsageError(f"{name}: expected a positive number of nats, got {shown(value)}")
    low, high = bracket
    if not 0 < low < high < math.inf:
        raise UsageError(f"bracket: expected two strengths 0 < low < high, got {shown(low)} and {shown(high)}")
