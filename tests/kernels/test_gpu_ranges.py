"""How many features top-k lists at a time, and how many entries a row must have room for meanwhile."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import needs_kernels

pytestmark = needs_kernels


@pytest.mark.parametrize("growth", [2, 5])
@pytest.mark.parametrize("first", [1, 3, 64, 150, 999])
def test_ranges_cover_every_feature_once(first: int, growth: int) -> None:
    from fastsae_kernels.gpu.topk import feature_ranges

    ranges = list(feature_ranges(first, 150, growth))
    assert [feature for start, end in ranges for feature in range(start, end)] == list(range(150))
    assert ranges[0] == (0, min(first, 150))
    assert all(end in (growth * start, 150) for start, end in ranges[1:])


@pytest.mark.parametrize(
    ("k", "capacity"), [(1, 256), (5, 256), (32, 256), (64, 256), (64, 1024), (600, 2048), (2048, 6144)]
)
def test_growth_leaves_room(k: int, capacity: int) -> None:
    """Simulated: how many of the features up to the end of a range exceed the k-th of those before it."""
    from fastsae_kernels.gpu.row_topk import growth_of

    growth = growth_of(k, capacity)
    assert growth >= 2
    g = torch.Generator().manual_seed(0)
    features = torch.rand(200, growth * capacity, generator=g)
    kth = features[:, :capacity].topk(k).values[:, -1:]
    most = int((features > kth).sum(1).max()) + 1
    assert k < most <= capacity


@pytest.mark.parametrize(
    ("k", "capacity"),
    [(1, 256), (64, 256), (65, 512), (512, 2048), (600, 2048), (683, 2304), (2048, 6144), (9000, 10000)],
)
def test_capacity_of(k: int, capacity: int) -> None:
    from fastsae_kernels.gpu import row_topk

    assert row_topk.capacity_of(k, 10000) == capacity
