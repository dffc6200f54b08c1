"""How strong the push is at each step: controllers of the scale that multiplies the edits of a Steering.

A controller says how strengths are chosen; the Strengths that it begins hold what was seen of one roll-out, row by row. The scale
multiplies the edits' own amounts: with an edit "add" of amount 1 it is alpha itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastsae.errors import UsageError, shown

CLOSE = 0.1
"""KLCap is content with a strength whose KL lies at most this share of the budget below it."""
TRIES = 6
"""So many passes KLCap makes at most for one token."""
EDGE = 1 / 8
"""KLCap's guess between two strengths keeps this share of their logarithmic distance from either."""
FAR = 1 / 32
"""KLCap goes down to this share of a strength whose KL is infinite."""
LEAST = 1 / 1024
"""KLCap tries no smaller share of the strength than this, but 0."""

_LARGEST = torch.finfo(torch.float32).max


class Strengths:
    """The strengths of one roll-out; here a constant one.

    Attributes:
        scale: The strength [B] of the coming pass.
        tries_again: Whether a pass may be made again with another strength.
    """

    tries_again = False

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def accepts(self, kl: Tensor, live: Tensor) -> bool:
        """Whether the pass with `scale` counts; where it does not, `scale` is then what to try instead.

        Args:
            kl: KL(steered || unsteered) [B] of the next token's distribution after this pass.
            live: Whether each row [B] has not ended yet.
        """
        return True

    def advance(self, acts: Tensor) -> None:
        """Set `scale` for the next pass.

        Args:
            acts: The feature's activation [B] before its edit, at the last token of the pass that counted.
        """


class Controller(Protocol):
    """How strengths are chosen."""

    def begin(self, n_rows: int) -> Strengths:
        """Return the strengths of a new roll-out of so many rows."""


@dataclass(frozen=True)
class Fixed:
    """The same strength at every step: s_t = strength.

    Args:
        strength: The scale of the edits; it may be negative.

    Raises:
        UsageError: The strength is no finite number.

    Source: arXiv:2506.07691, section 6.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        _check_finite("strength", self.strength)

    def begin(self, n_rows: int) -> Strengths:
        return Strengths(torch.full([n_rows], float(self.strength)))


@dataclass(frozen=True)
class Decay:
    """A push that fades: s_t = strength * 2^(-t / half_life), t = 0 for the pass over the prompt.

    Args:
        half_life: The number of tokens after which the strength is half of what it was.
        strength: The strength of the first pass; it may be negative.

    Raises:
        UsageError: An argument is no finite number, or half_life is not positive.

    Source: arXiv:2510.01246 observes that steering by a constant strength degenerates into repetition.
    """

    half_life: float
    strength: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("half_life", self.half_life, "a positive number of tokens")
        _check_finite("strength", self.strength)

    def begin(self, n_rows: int) -> Strengths:
        return _Decaying(self, n_rows)


@dataclass(frozen=True)
class KLCap:
    """At each step the largest strength that keeps the next token's distribution near the unsteered model's.

    s_t = max { s between 0 and strength : KL(steered || unsteered) of the next token <= budget }

    The unsteered model reads the same tokens, and none of its own was edited. What earlier steps pushed stays in the steered
    cache, so the KL may exceed the budget at s = 0 too: then s_t = 0. The strength is found by trying,
    first that of the token before: the next guess is where KL ~ s^2, its expansion for small s, puts the budget, or a power law
    between a strength that holds and one that does not. A try is accepted `CLOSE` to the budget. At most `TRIES` passes are made,
    of which the last takes the largest strength that was seen to hold, or 0. KL need not rise with s: "largest" is local.

    Args:
        budget: The largest KL, in nats.
        strength: The strength that is not exceeded; where it is negative, strengths lie between it and 0.

    Raises:
        UsageError: An argument is no finite number, or the budget is not positive.

    Source: a relative of dynamic activation composition, arXiv:2406.17563, which makes the strength the KL itself.
    """

    budget: float
    strength: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("budget", self.budget, "a positive number of nats")
        _check_finite("strength", self.strength)

    def begin(self, n_rows: int) -> Strengths:
        return _Capped(self, n_rows)


@dataclass(frozen=True)
class SetPoint:
    """A strength that brings the feature's own activation to a target.

    e_t = target - f(h_t), f before the edit; s_{t+1} = clip(gain * e_t + integral * sum_{i <= t} e_i, 0, maximum)

    The first pass, before which nothing was measured, takes f = 0 and adds nothing to the sum. The sum is held where
    integral * sum lies between 0 and maximum, so that it does not wind up while the strength is at a limit. With gain 1 and
    integral 0 this is the clamp to the target, one step late: a clamp knows f(h_t) when it edits h_t, and is the deadbeat limit.
    A proportional gain alone leaves an error that stays; the integral removes it. Edits are of mode "add" and amount 1.

    Args:
        target: The activation that is aimed at.
        gain: Strength per unit of the error.
        integral: Strength per unit of the summed error.
        maximum: The largest strength; None is twice the target.

    Raises:
        UsageError: An argument is no finite number, target or maximum is not positive, or gain or integral is negative.

    Source: control by the error in arXiv:2510.04309 (over layers) and arXiv:2606.18790 (over tokens, on an SAE).
    """

    target: float
    gain: float = 1.0
    integral: float = 0.0
    maximum: float | None = None

    def __post_init__(self) -> None:
        _check_positive("target", self.target, "a positive activation")
        for name, value in (("gain", self.gain), ("integral", self.integral)):
            _check_finite(name, value)
            if value < 0:
                raise UsageError(f"{name}: expected 0 or a positive number, got {shown(value)}")
        if self.maximum is not None:
            _check_positive("maximum", self.maximum, "a positive strength")

    def begin(self, n_rows: int) -> Strengths:
        return _Controlled(self, n_rows)


class _Decaying(Strengths):
    def __init__(self, decay: Decay, n_rows: int) -> None:
        super().__init__(torch.full([n_rows], float(decay.strength)))
        self._decay = decay
        self._step = 0

    def advance(self, acts: Tensor) -> None:
        self._step += 1
        strength = self._decay.strength * 2 ** (-self._step / self._decay.half_life)
        self.scale = torch.full_like(self.scale, strength)


class _Capped(Strengths):
    """Tries shares [B] of the strength. Each step has a bracket: `_holds` is the largest share that held, 0 where none was seen,
    and `_fails` the smallest that did not, infinite where none was seen.
    """

    tries_again = True

    def __init__(self, cap: KLCap, n_rows: int) -> None:
        self._cap = cap
        self._begin_step(torch.ones(n_rows))

    def _begin_step(self, share: Tensor) -> None:
        self._holds, self._kl_holds = torch.zeros_like(share), torch.zeros_like(share)
        self._fails, self._kl_fails = torch.full_like(share, math.inf), torch.full_like(share, math.inf)
        self._tries = 0
        self._try(share)

    def _try(self, share: Tensor) -> None:
        self._share = share
        self.scale = self._cap.strength * share

    def accepts(self, kl: Tensor, live: Tensor) -> bool:
        self._tries += 1
        kl = torch.where(kl.isnan(), math.inf, kl)  # a push so strong that the model computes NaN
        held = kl <= self._cap.budget
        self._holds, self._kl_holds = torch.where(held, self._share, self._holds), torch.where(held, kl, self._kl_holds)
        self._fails, self._kl_fails = torch.where(held, self._fails, self._share), torch.where(held, self._kl_fails, kl)
        close = held & ((self._share == 1) | (kl >= (1 - CLOSE) * self._cap.budget))
        done = close | (self._share == 0) | ~live
        if bool(done.all()) or self._tries == TRIES:
            return True
        retry = torch.where(self._fails <= LEAST, 0, self._guess().clamp(min=LEAST))
        self._try(torch.where(done, self._share, self._holds if self._tries == TRIES - 1 else retry))
        return False

    def _guess(self) -> Tensor:
        aim = (1 - CLOSE / 2) * self._cap.budget
        up = self._holds * (aim / self._kl_holds).sqrt().clamp(min=2)  # past pushes alone may cost something
        down = self._fails * torch.where(self._kl_fails.isinf(), FAR, (aim / self._kl_fails).sqrt()).clamp(max=0.5)
        down = down / 2 ** (self._tries - 1)  # the KL levels off where it is large, and the true step down is longer
        lower, upper = self._holds.log(), self._fails.log()
        part = (math.log(aim) - self._kl_holds.log()) / (self._kl_fails.log() - self._kl_holds.log())
        part = torch.where((self._kl_holds > 0) & self._kl_fails.isfinite(), part.clamp(EDGE, 1 - EDGE), 0.5)
        between = (lower + part * (upper - lower)).exp()
        return torch.where(self._fails.isinf(), up.clamp(max=1), torch.where(self._holds > 0, between, down))

    def advance(self, acts: Tensor) -> None:
        last = torch.where(self._holds > 0, self._holds, self._fails)
        self._begin_step(last.clamp(LEAST, 1))


class _Controlled(Strengths):
    def __init__(self, point: SetPoint, n_rows: int) -> None:
        self._point = point
        self._maximum = min(2 * point.target, _LARGEST) if point.maximum is None else point.maximum
        self._pushed = torch.zeros(n_rows)  # integral * the sum of errors
        super().__init__(torch.full([n_rows], float(min(point.gain * point.target, self._maximum))))

    def advance(self, acts: Tensor) -> None:
        error = self._point.target - acts
        self._pushed = self._clip(self._pushed + self._point.integral * error)
        self.scale = self._clip(self._point.gain * error + self._pushed)

    def _clip(self, strength: Tensor) -> Tensor:
        return strength.clamp(0, self._maximum)


def _check_finite(name: str, value: float, expected: str = "a finite number") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
        raise UsageError(f"{name}: expected {expected}, got {shown(value)}")


def _check_positive(name: str, value: float, expected: str) -> None:
    _check_finite(name, value, expected)
    if value <= 0:
        raise UsageError(f"{name}: expected {expected}, got {shown(value)}")
