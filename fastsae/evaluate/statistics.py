"""Intervals, tests and power, in NumPy: what a comparison, or a score, may claim.

Dialogues are the unit of sampling, as the tokens of one dialogue are alike. What a statistic here says therefore covers which
dialogues were held out, and not what another seed of training would have changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from fastsae.evaluate.dialogues import FloatArray

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 10_000
FEWEST_DIALOGUES = 6  # with five, not one of the 32 ways to choose signs is rarer than 5 %
LOWER, HIGHER, NOT_SHOWN = "lower", "higher", "no difference shown"

_CHUNK_ELEMENTS = 2**20  # so many resampled counts are held at once, which take 8 MB in fp64
_NORMAL = NormalDist()


class Interval(NamedTuple):
    """Two limits, both of which belong to the interval."""

    low: float
    high: float


def resampled_ratios(
    numerators: FloatArray, denominators: FloatArray, *, resamples: int = RESAMPLES, seed: int = 0
) -> FloatArray:
    """Ratios of sums over dialogues drawn with replacement, `[resamples, K]`; NaN where a denominator is 0.

    Every column sees the same draws, so that the difference of two columns is a paired one.

    Args:
        numerators: `[n_dialogues, K]`.
        denominators: `[n_dialogues, K]`.
        resamples: How often as many dialogues as there are are drawn.
        seed: Determines the draws, whatever the columns are.
    """
    n, k = numerators.shape
    parts = np.concatenate([numerators, denominators], axis=1)
    ratios = np.full((resamples, k), np.nan)
    for rows, drawn in _chunks(n, resamples, seed):
        bins = drawn + n * np.arange(len(drawn))[:, None]
        counts = np.bincount(bins.ravel(), minlength=drawn.size).reshape(drawn.shape)
        sums = counts.astype(np.float64) @ parts
        np.divide(sums[:, :k], sums[:, k:], out=ratios[rows], where=sums[:, k:] != 0)
    return ratios


def percentile_interval(samples: FloatArray, n_dialogues: int, confidence: float = CONFIDENCE) -> Interval | None:
    """The expanded percentile interval of bootstrap samples, or None for fewer than `FEWEST_DIALOGUES`.

    The plain percentile interval is too short for few dialogues: its spread is that of a variance divided by n and not by
    n - 1, and its tails are those of a normal and not of a t distribution. Both are made good by taking percentiles further
    out (Hesterberg, The American Statistician 69, 2015).

    Args:
        samples: `[resamples]`; NaN where a resample left the statistic undefined.
        n_dialogues: Number of dialogues that the statistic rests on.
        confidence: Share of such intervals that hold the truth.
    """
    samples = samples[~np.isnan(samples)]
    if n_dialogues < FEWEST_DIALOGUES or not samples.size:
        return None
    z = _t_quantile(0.5 + confidence / 2, n_dialogues - 1) * math.sqrt(n_dialogues / (n_dialogues - 1))
    low, high = np.quantile(samples, [_NORMAL.cdf(-z), _NORMAL.cdf(z)])
    return Interval(float(low), float(high))


def sign_flip_p_values(contributions: FloatArray, *, flips: int = RESAMPLES, seed: int = 0) -> FloatArray:
    """Two-sided p-values `[K]` of the hypothesis that the sum of each column is 0 but for chance.

    A column holds what each dialogue contributes to a difference of two arms. If the arms were exchangeable, every dialogue
    could as well have contributed the same with the other sign: the p-value is the share of random choices of signs whose sum
    is at least as far from 0. It is exact where that symmetry holds, for any number of dialogues and any spread of
    their lengths, which the bootstrap's percentiles are not; it holds nearly for many dialogues.

    Args:
        contributions: `[n_dialogues, K]`.
        flips: Random choices of signs. No p-value is below 1 / (flips + 1).
        seed: Determines them.
    """
    observed = np.abs(contributions.sum(0))
    as_far = np.zeros(contributions.shape[1])
    for _, signs in _chunks(len(contributions), flips, seed, high=2):
        sums = np.abs((2.0 * signs - 1) @ contributions)
        as_far += (sums >= observed * (1 - 1e-9)).sum(0)  # rounding must not break ties
    return (as_far + 1) / (flips + 1)


def _chunks(n: int, rows: int, seed: int, high: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
    """Random integers below `high`, or below n, `[rows, n]` in chunks of rows that fit in a few megabytes."""
    generator = np.random.default_rng(seed)
    size = max(1, _CHUNK_ELEMENTS // n)
    for start in range(0, rows, size):
        chunk = slice(start, min(start + size, rows))
        yield chunk, generator.integers(0, high or n, size=(chunk.stop - chunk.start, n))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: rejecting those up to alpha keeps the chance of any false rejection at alpha at most.

    Source: Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    m, largest = len(p_values), 0.0
    adjusted = [0.0] * m
    for rank, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (m - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def wilson(count: int, total: int, confidence: float = CONFIDENCE) -> Interval | None:
    """Wilson's interval for a share, without a correction for continuity; None where `total` is 0.

    Source: Wilson, JASA 22, 1927.
    """
    if not total:
        return None
    z = _NORMAL.inv_cdf(0.5 + confidence / 2)
    share = count / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Interval(0.0 if count == 0 else middle - half, 1.0 if count == total else middle + half)


def newcombe(count_a: int, total_a: int, count_b: int, total_b: int, confidence: float = CONFIDENCE) -> Interval | None:
    """Newcombe's interval for the share of a minus that of b, two independent samples; None where one is empty.

    Source: Newcombe, Statistics in Medicine 17, 1998, p. 873-890, method 10.
    """
    a, b = wilson(count_a, total_a, confidence), wilson(count_b, total_b, confidence)
    if a is None or b is None:
        return None
    share_a, share_b = count_a / total_a, count_b / total_b
    difference = share_a - share_b
    below, above = math.hypot(share_a - a.low, b.high - share_b), math.hypot(a.high - share_a, share_b - b.low)
    return Interval(difference - below, difference + above)


def two_shares_p_value(count_a: int, total_a: int, count_b: int, total_b: int) -> float:
    """Two-sided p-value of the hypothesis that two independent samples have one share: the pooled z test."""
    pooled = (count_a + count_b) / (total_a + total_b)
    error = math.sqrt(pooled * (1 - pooled) * (1 / total_a + 1 / total_b))
    if not error:
        return 1.0
    return math.erfc(abs(count_a / total_a - count_b / total_b) / error / math.sqrt(2))


def standard_error(interval: Interval, confidence: float = CONFIDENCE) -> float:
    """The standard error of a normal estimate with this interval; of two shares of 0 it is not 0, as their variance is."""
    return (interval.high - interval.low) / (2 * _NORMAL.inv_cdf(0.5 + confidence / 2))


def detectable_difference(standard_error: float, alpha: float = 1 - CONFIDENCE, power: float = POWER) -> float:
    """The smallest difference that a two-sided test at `alpha` finds with the given power, for a normal estimate."""
    return (_NORMAL.inv_cdf(1 - alpha / 2) + _NORMAL.inv_cdf(power)) * standard_error


def sample_size_of_shares(share_a: float, share_b: float, alpha: float = 1 - CONFIDENCE, power: float = POWER) -> int:
    """Size of each of two samples with which a two-sided z test tells their shares apart with the given power.

    Raises:
        ValueError: The shares are equal, or one is no share.
    """
    if share_a == share_b or not (0 <= share_a <= 1 and 0 <= share_b <= 1):
        raise ValueError(f"expected two different shares between 0 and 1, got {share_a} and {share_b}")
    pooled = (share_a + share_b) / 2
    by_chance = _NORMAL.inv_cdf(1 - alpha / 2) * math.sqrt(2 * pooled * (1 - pooled))
    by_truth = _NORMAL.inv_cdf(power) * math.sqrt(share_a * (1 - share_a) + share_b * (1 - share_b))
    return math.ceil(((by_chance + by_truth) / (share_a - share_b)) ** 2)


def verdict(
    interval: Interval | None,
    adjusted_p: float | None,
    seeds: Sequence[float],
    reference_seeds: Sequence[float],
    alpha: float = 1 - CONFIDENCE,
) -> tuple[str, str]:
    """What may be said of a difference between two arms, and why no more: `(verdict, reason)`.

    The verdict is `lower` or `higher` only where the interval leaves out 0, Holm rejects, and every seed of one arm lies on the
    same side of every seed of the other. Otherwise it is `no difference shown`, with the first of these that fails.

    Args:
        interval: Interval of arm minus reference. None where there are too few dialogues.
        adjusted_p: Holm's p-value. None where there are too few dialogues.
        seeds: The arm's value for each seed.
        reference_seeds: The reference's.
        alpha: Largest p-value that rejects.
    """
    if interval is None or adjusted_p is None:
        return NOT_SHOWN, "too few dialogues"
    if interval.low <= 0 <= interval.high:
        return NOT_SHOWN, "the interval holds 0"
    if not adjusted_p <= alpha:
        return NOT_SHOWN, "Holm does not reject"
    is_lower = interval.high < 0
    apart = max(seeds) < min(reference_seeds) if is_lower else min(seeds) > max(reference_seeds)
    if not apart:
        return NOT_SHOWN, "the seeds overlap"
    return (LOWER if is_lower else HIGHER), ""


def _t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution by its expansion about the normal's; within 1 % from 5 degrees of freedom on.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    z = _NORMAL.inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))
