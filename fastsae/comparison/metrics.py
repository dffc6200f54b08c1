"""The metrics of a comparison: ratios of sums over dialogues."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fastsae.evaluate.dialogues import DialogueSums, FloatArray


@dataclass(frozen=True)
class Metric:
    """A ratio of two sums over dialogues.

    Attributes:
        formula: How it is computed, in the letters of `fastsae.evaluate.dialogues.FIELDS`; i counts dialogues.
        numerator, denominator: Fields and their factors.
        is_per_element: The numerator is divided by `d_in`.
        is_macro: Every dialogue counts the same: the ratio is taken in each dialogue that has tokens of the class, and
            averaged over dialogues. Otherwise every token counts the same.
        is_log2: The metric is log2 of the ratio.
        is_scale_free: It can be compared between the activations of two models.
    """

    formula: str
    numerator: dict[str, float]
    denominator: dict[str, float] = field(default_factory=lambda: {"tokens": 1.0})
    is_per_element: bool = False
    is_macro: bool = False
    is_log2: bool = False
    is_scale_free: bool = False

    def parts(self, sums: DialogueSums, token_class: str) -> tuple[FloatArray, FloatArray]:
        """Numerator and denominator of each dialogue, `[n_dialogues]` each; the metric is the ratio of their sums."""
        above = sum(factor * sums.get(name, token_class) for name, factor in self.numerator.items())
        below = sum(factor * sums.get(name, token_class) for name, factor in self.denominator.items())
        above, below = np.asarray(above), np.asarray(below)
        if self.is_per_element:
            above = above / sums.d_in
        if self.is_macro:
            has_tokens = below != 0
            above = np.divide(above, below, out=np.zeros_like(above), where=has_tokens)
            below = has_tokens.astype(np.float64)
        return above, below

    def of_ratio(self, ratio: FloatArray) -> FloatArray:
        """The metric from the ratio of sums; NaN where it is undefined."""
        if not self.is_log2:
            return ratio
        return np.log2(ratio, out=np.full_like(ratio, np.nan), where=ratio > 0)

    def slope(self, ratio: FloatArray) -> FloatArray:
        """Derivative of `of_ratio`; NaN where it is undefined."""
        if not self.is_log2:
            return np.ones_like(ratio)
        return np.divide(1 / np.log(2), ratio, out=np.full_like(ratio, np.nan), where=ratio > 0)


_ERROR, _TARGETS = {"squared_error": 1.0}, {"targets": 1.0}
METRICS = {
    "mse": Metric("mean over i of squared_error_i / (tokens_i d_in)", _ERROR, is_per_element=True, is_macro=True),
    "mse_log2": Metric("log2 of mse", _ERROR, is_per_element=True, is_macro=True, is_log2=True),
    "mse_micro": Metric("sum squared_error / (d_in sum tokens)", _ERROR, is_per_element=True),
    "mse_micro_log2": Metric("log2 of mse_micro", _ERROR, is_per_element=True, is_log2=True),
    "fvu": Metric("sum squared_error / sum variance", _ERROR, {"variance": 1.0}, is_scale_free=True),
    "l0": Metric("sum l0 / sum tokens", {"l0": 1.0}, is_scale_free=True),
    "ce": Metric("sum ce / sum targets, nats per token", {"ce": 1.0}, _TARGETS),
    "ce_spliced": Metric("sum ce_spliced / sum targets, nats per token", {"ce_spliced": 1.0}, _TARGETS),
    "ce_zero": Metric("sum ce_zero / sum targets, nats per token", {"ce_zero": 1.0}, _TARGETS),
    "delta_loss_percent": Metric(
        "100 (sum ce_spliced - sum ce) / sum ce", {"ce_spliced": 100.0, "ce": -100.0}, {"ce": 1.0}
    ),
    "recovered": Metric(
        "(sum ce_zero - sum ce_spliced) / (sum ce_zero - sum ce)",
        {"ce_zero": 1.0, "ce_spliced": -1.0},
        {"ce_zero": 1.0, "ce": -1.0},
    ),
    "kl": Metric("sum kl / sum targets, nats per token", {"kl": 1.0}, _TARGETS),
}
"""The metrics, under the names of `metrics.json`. The FAST paper's MSE is `mse` of the classes with sinks, its tables
print `mse_log2`."""


def saebench_metrics(sums: DialogueSums, n_dead: int, n_features: int) -> dict[str, dict[str, float | None]]:
    """The figures of one SAE that SAEBench's core evaluation has, under its names and by its definitions.

    Attention sinks are left out. SAEBench's `mse` is the squared error of a whole activation and not of an element, and every
    token counts the same.

    Args:
        sums: The SAE's sums.
        n_dead: Features that fired on no held-out token.
        n_features: All features.
    """

    def ratio(above: str, below: str) -> float | None:
        denominator = sums.get(below, "all").sum()
        return float(sums.get(above, "all").sum() / denominator) if denominator else None

    fvu = ratio("squared_error", "variance")
    score = METRICS["recovered"].parts(sums, "all")
    gap = score[1].sum()
    return {
        "model_behavior_preservation": {"kl_div_with_sae": ratio("kl", "targets")},
        "model_performance_preservation": {
            "ce_loss_score": float(score[0].sum() / gap) if gap else None,
            "ce_loss_with_ablation": ratio("ce_zero", "targets"),
            "ce_loss_with_sae": ratio("ce_spliced", "targets"),
            "ce_loss_without_sae": ratio("ce", "targets"),
        },
        "reconstruction_quality": {
            "explained_variance": None if fvu is None else 1 - fvu,
            "mse": ratio("squared_error", "tokens"),
        },
        "sparsity": {"l0": ratio("l0", "tokens")},
        "misc_metrics": {"frac_alive": 1 - n_dead / n_features},
    }
