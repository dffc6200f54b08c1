"""A score over features: value, interval, and what did not count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastsae.evaluate.statistics import percentile_interval, resampled_ratios, wilson


def share(hits: int, total: int) -> dict[str, Any]:
    """A share with Wilson's interval; None where there is nothing to share."""
    interval = wilson(hits, total)
    return {
        "value": hits / total if total else None,
        "interval": None if interval is None else list(interval),
        "hits": hits,
        "of": total,
    }


def mean(values: Sequence[float], seed: int) -> dict[str, Any]:
    """A mean over features, with an interval from features drawn again with replacement; None for too few of them.

    Args:
        values: One per feature.
        seed: Determines the draws.
    """
    column = np.asarray(values, dtype=np.float64).reshape(-1, 1)
    interval = None
    if len(column):
        resampled = resampled_ratios(column, np.ones_like(column), seed=seed)
        interval = percentile_interval(resampled[:, 0], len(column))
    return {
        "value": float(column.mean()) if len(column) else None,
        "interval": None if interval is None else list(interval),
    }
