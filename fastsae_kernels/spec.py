"""What one autoencoder pass computes, apart from its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

Penalty = Literal["l0", "l1", "tanh"]


@dataclass(frozen=True)
class AutoencodeSpec:
    """Options of `autoencode`; hashable, so that kernels specialise on it.

    Args:
        bandwidth: Width of the straight-through window around the threshold, in activation units; 0 means no window
            (a plain ReLU or a frozen threshold).
        k: At most the `k` largest active features of a token survive; None keeps every active one.
        batch_topk: `k` is an average: the `k * N` largest active entries of the whole batch survive (BatchTopK).
        penalty: The sparsity term per token: `l0` counts active features (straight-through gradient), `l1` sums
            `feature_acts * feature_scale`, `tanh` sums `tanh(tanh_scale * feature_acts * feature_scale)`.
        tanh_scale: Slope of the `tanh` penalty.
        ste_to_input: Let the straight-through estimate reach the encoder and the input too, not the threshold alone
            (Anthropic, January 2025).

    Raises:
        ValueError: A field is out of its range.
    """

    bandwidth: float = 0.0
    k: int | None = None
    batch_topk: bool = False
    penalty: Penalty = "l0"
    tanh_scale: float = 4.0
    ste_to_input: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.bandwidth < math.inf:  # a graph may hold a symbol here, which math.isfinite refuses
            raise ValueError(f"bandwidth: expected a finite number >= 0, got {self.bandwidth}")
        if self.k is not None and (not isinstance(self.k, Integral) or self.k < 1):
            raise ValueError(f"k: expected None or an integer >= 1, got {self.k!r}")
        if self.batch_topk and self.k is None:
            raise ValueError("k: expected an integer >= 1 with batch_topk, got None")
        if self.batch_topk and self.bandwidth:
            raise ValueError(
                f"bandwidth: expected 0 with batch_topk, whose threshold is not trained, got {self.bandwidth}"
            )
        if self.penalty not in get_args(Penalty):
            raise ValueError(f"penalty: expected one of {', '.join(get_args(Penalty))}, got {self.penalty!r}")
        if not 0 < self.tanh_scale < math.inf:
            raise ValueError(f"tanh_scale: expected a finite number > 0, got {self.tanh_scale}")
