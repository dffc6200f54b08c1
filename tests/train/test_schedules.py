"""Learning rate and sparsity over a run, at the points where their formulas change."""

from __future__ import annotations

import pytest

from fastsae.train.config import TrainConfig
from fastsae.train.schedules import learning_rate, sparsity_share

CONFIG = TrainConfig(
    tokens=100 * 1024, batch_size=1024, lr=2.0, lr_end=0.1, warm_up=0.1, decay=0.2, sparsity_warm_up=0.5
)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.2), (4, 1.0), (9, 2.0), (10, 2.0), (45, 1.1), (79, 0.2008), (80, 0.2), (90, 0.1), (99, 0.01)],
)
def test_learning_rate(step: int, expected: float) -> None:
    assert learning_rate(step, CONFIG) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.02), (24, 0.5), (49, 1.0), (99, 1.0)])
def test_sparsity_share(step: int, expected: float) -> None:
    assert sparsity_share(step, CONFIG) == pytest.approx(expected)


def test_no_warm_up_and_no_decay() -> None:
    config = TrainConfig(tokens=10 * 1024, batch_size=1024, lr=1.0, warm_up=0, decay=0, sparsity_warm_up=0)
    assert learning_rate(0, config) == 1.0
    assert sparsity_share(0, config) == 1.0
    assert learning_rate(9, config) > 0.1
