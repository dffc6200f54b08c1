"""From the sums of each dialogue to what `compare.json` says of arms and of their differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fastsae.comparison.metrics import METRICS, Metric
from fastsae.comparison.result import Difference, Value, Values
from fastsae.errors import FastsaeError
from fastsae.evaluate.dialogues import CLASSES, DialogueSums, FloatArray
from fastsae.evaluate.statistics import (
    CONFIDENCE,
    RESAMPLES,
    Interval,
    detectable_difference,
    holm,
    newcombe,
    percentile_interval,
    resampled_ratios,
    sign_flip_p_values,
    standard_error,
    two_shares_p_value,
    verdict,
    wilson,
)

Arms = Mapping[str, Sequence[DialogueSums]]
Dead = Mapping[str, Sequence[tuple[int, int]]]

FEATURES, DEAD = "features", "dead_share"  # stand where other metrics have the class of tokens and the name
TESTED = (
    ("all", "fvu"),
    ("special", "fvu"),
    ("user", "fvu"),
    ("assistant", "fvu"),
    ("template", "fvu"),
    ("all", "mse_log2"),
    ("special", "mse_log2"),
    ("sinks", "mse_log2"),
    ("all_with_sinks", "mse_log2"),
    ("special_with_sinks", "mse_log2"),
    ("all", "delta_loss_percent"),
    ("assistant", "delta_loss_percent"),
    ("all", "kl"),
    (FEATURES, DEAD),
)
"""Class and metric of the hypotheses of each pair of arms. With all pairs they are the one family that Holm corrects."""
NOT_TESTED = (("all", "l0"), ("special", "l0"))
"""Differences that have an interval and no verdict: L0 is set, and not found."""


class _Statistic:
    """One metric of one class of tokens, in every SAE of every arm.

    Attributes:
        samples: Arm to its bootstrap samples, averaged over its seeds.
        values: Arm to its value, None where it is undefined.
    """

    def __init__(self, metric: Metric, token_class: str, arms: Arms) -> None:
        self.metric = metric
        self.parts = {arm: [metric.parts(sums, token_class) for sums in seeds] for arm, seeds in arms.items()}
        self.numerators, self.denominators = (
            np.stack([parts[i] for seeds in self.parts.values() for parts in seeds], axis=1) for i in (0, 1)
        )
        self.n_dialogues = int((self.denominators != 0).any(1).sum())
        self.samples: dict[str, FloatArray] = {}
        self.values: dict[str, Value | None] = {}

    def take(self, ratios: FloatArray) -> None:
        """Makes samples and values of the resampled ratios `[resamples, n_saes]`."""
        resampled, start = self.metric.of_ratio(ratios), 0
        for arm, parts in self.parts.items():
            self.samples[arm] = resampled[:, start : start + len(parts)].mean(1)
            start += len(parts)
            self.values[arm] = self._value(arm)

    def _value(self, arm: str) -> Value | None:
        seeds = self.metric.of_ratio(self._ratios(arm)).tolist()
        if not np.isfinite(seeds).all():
            return None
        low, high = percentile_interval(self.samples[arm], self.n_dialogues) or (None, None)
        return {"value": float(np.mean(seeds)), "low": low, "high": high, "seeds": seeds}

    def contributions(self, arm: str, reference: str) -> FloatArray:
        """What each dialogue adds to the difference of two arms, `[n_dialogues]`, to first order where both are alike.

        Where the denominators are those of the data, as they are between SAEs of one model, exchanging the arms in one dialogue
        exchanges the sign of what it adds, and nothing else.
        """
        common = np.nanmean(np.concatenate([self._ratios(arm), self._ratios(reference)]))
        return self._linear(arm, common) - self._linear(reference, common)

    def _ratios(self, arm: str) -> FloatArray:
        sums = np.array([[above.sum(), below.sum()] for above, below in self.parts[arm]])
        return np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] != 0)

    def _linear(self, arm: str, ratio: float) -> FloatArray:
        slope = self.metric.slope(np.array([ratio]))
        terms = [slope * (above - ratio * below) / below.sum() for above, below in self.parts[arm]]
        return np.mean(terms, axis=0)


def analyse(
    arms: Arms, pairs: Sequence[tuple[str, str]], dead: Dead, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Values, list[Difference]]:
    """The metrics of every arm with their intervals, and the differences of the pairs of arms with their verdicts.

    Intervals are paired bootstrap intervals over dialogues: the same dialogues are drawn for all arms, and the seeds of an arm
    are averaged. They say how much another choice of held-out dialogues would change the figure of these SAEs. They do not
    cover training: how much another seed changes it is what `seeds` shows.

    Args:
        arms: Name to the sums of its SAEs, one for each seed.
        pairs: Arm and reference; a pair with an arm that is not in `arms` is left out. Metrics that depend on the model's scale
            are left out where the activations of two arms are not those of one model.
        dead: Name to the number of features that never fired, and of all features, of each of its SAEs.
        resamples: How often dialogues are drawn, and signs chosen.
        seed: Determines them.

    Returns:
        Class of tokens to metric to arm to value (None where it is undefined), and a row for each difference. The share of
        dead features stands under the class `features`, with Wilson's and Newcombe's intervals.

    Raises:
        FastsaeError: There are no arms, or an arm has no SAE, or the arms were not measured on the same dialogues.
    """
    _check(arms)
    shown = [pair for pair in pairs if pair[0] in arms and pair[1] in arms]
    values: Values = {}
    rows: list[Difference] = []
    for token_class in CLASSES:
        statistics = {name: _Statistic(metric, token_class, arms) for name, metric in METRICS.items()}
        above = np.concatenate([statistic.numerators for statistic in statistics.values()], axis=1)
        below = np.concatenate([statistic.denominators for statistic in statistics.values()], axis=1)
        ratios = resampled_ratios(above, below, resamples=resamples, seed=seed)
        for statistic, of_one in zip(statistics.values(), np.split(ratios, len(statistics), axis=1), strict=True):
            statistic.take(of_one)
        values[token_class] = {name: statistic.values for name, statistic in statistics.items()}
        rows += _differences(statistics, token_class, arms, shown, resamples, seed)
    shares = {arm: _dead_share(dead[arm]) for arm in arms}
    values[FEATURES] = {DEAD: {**shares}}
    rows += [_dead_difference(dead, shares, *pair) for pair in shown]
    order = [*TESTED, *NOT_TESTED]
    rows.sort(key=lambda row: order.index((row["class"], row["metric"])))
    _judge(rows)
    return values, rows


def _check(arms: Arms) -> None:
    if not arms or not all(arms.values()):
        raise FastsaeError("compare: expected at least one arm, and of each arm at least one SAE")
    first = next(iter(arms))
    lengths = arms[first][0].get("tokens", "all_with_sinks")
    for arm, seeds in arms.items():
        if not all(np.array_equal(sums.get("tokens", "all_with_sinks"), lengths) for sums in seeds):
            raise FastsaeError(
                f"compare: expected every arm to be measured on the same held-out dialogues, but those of {arm!r} are not those "
                f"of {first!r}"
            )


def _of_one_model(arms: Arms, arm: str, reference: str) -> bool:
    """Whether the activations of two arms are one model's, by how much they vary in each dialogue."""
    a, b = (arms[name][0].get("variance", "all_with_sinks") for name in (arm, reference))
    return np.allclose(a, b, rtol=0.05)  # in bfloat16 a model's numbers depend a little on the batch


def _differences(
    statistics: Mapping[str, _Statistic],
    token_class: str,
    arms: Arms,
    pairs: Sequence[tuple[str, str]],
    resamples: int,
    seed: int,
) -> list[Difference]:
    """The differences in one class of tokens, still without what needs the whole family."""
    rows: list[Difference] = []
    columns: list[FloatArray] = []
    for of_class, name in (*TESTED, *NOT_TESTED):
        if of_class != token_class:
            continue
        statistic = statistics[name]
        for arm, reference in pairs:
            value, other = statistic.values[arm], statistic.values[reference]
            if value is None or other is None:
                continue
            if not statistic.metric.is_scale_free and not _of_one_model(arms, arm, reference):
                continue
            samples = statistic.samples[arm] - statistic.samples[reference]
            interval = percentile_interval(samples, statistic.n_dialogues)
            error = float(np.nanstd(samples)) if interval is not None else None
            rows.append(_row(token_class, name, (arm, reference), (value, other), interval, error))
            columns.append(statistic.contributions(arm, reference))
    if rows:
        p_values = sign_flip_p_values(np.stack(columns, axis=1), flips=resamples, seed=seed)
        for row, p in zip(rows, p_values.tolist(), strict=True):
            if row["low"] is not None and _is_tested(row):
                row["p"] = p
    return rows


def _is_tested(row: Difference) -> bool:
    return (row["class"], row["metric"]) not in NOT_TESTED


def _dead_share(counts: Sequence[tuple[int, int]]) -> Value:
    n_dead, n = (sum(numbers) for numbers in zip(*counts, strict=True))
    low, high = wilson(n_dead, n) or (None, None)
    return {"value": n_dead / n, "low": low, "high": high, "seeds": [dead / total for dead, total in counts]}


def _dead_difference(dead: Dead, shares: Mapping[str, Value], arm: str, reference: str) -> Difference:
    counts = [sum(numbers) for name in (arm, reference) for numbers in zip(*dead[name], strict=True)]
    interval = newcombe(*counts)
    error = standard_error(interval) if interval is not None else None
    row = _row(FEATURES, DEAD, (arm, reference), (shares[arm], shares[reference]), interval, error)
    row["p"] = two_shares_p_value(*counts)
    return row


def _row(
    token_class: str,
    metric: str,
    pair: tuple[str, str],
    values: tuple[Value, Value],
    interval: Interval | None,
    error: float | None,
) -> Difference:
    return {
        "class": token_class,
        "metric": metric,
        "arm": pair[0],
        "reference": pair[1],
        "difference": values[0]["value"] - values[1]["value"],
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
        "seeds": values[0]["seeds"],
        "reference_seeds": values[1]["seeds"],
        "p": None,
        "p_holm": None,
        "verdict": None,
        "reason": "",
        "standard_error": error,
        "detectable": None,
    }


def _judge(rows: Sequence[Difference]) -> None:
    """Fills in what needs the whole family: Holm's p-values, the verdicts, and what could have been detected."""
    family = [row for row in rows if _is_tested(row)]
    found = [row for row in family if row["p"] is not None]
    for row, p in zip(found, holm([row["p"] for row in found if row["p"] is not None]), strict=True):
        row["p_holm"] = p
        if row["standard_error"] is not None:
            row["detectable"] = detectable_difference(row["standard_error"], (1 - CONFIDENCE) / len(found))
    for row in family:
        limits = None if row["low"] is None or row["high"] is None else Interval(row["low"], row["high"])
        row["verdict"], row["reason"] = verdict(limits, row["p_holm"], row["seeds"], row["reference_seeds"])
