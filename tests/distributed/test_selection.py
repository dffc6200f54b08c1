"""Which numbers are the largest where several processes hold them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run
from torch import Tensor, distributed

from fastsae.distributed import Group
from fastsae.distributed.selection import among_largest

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this PyTorch has no gloo"
)
STARTS = (0, 4, 4, 9)  # of the columns of each process: one has none
MOST = (3, 7, 9)


def tied_numbers() -> Tensor:
    return torch.randint(-2, 2, (40, 9), generator=torch.Generator().manual_seed(3)).float()


def chosen() -> list[Tensor]:
    rank = distributed.get_rank()
    own = tied_numbers()[:, STARTS[rank] : STARTS[rank + 1]]
    return [among_largest(own, k, Group(distributed.group.WORLD)) for k in MOST]


def test_the_largest_of_any_sign_with_ties(tmp_path: Path) -> None:
    ranks = run(chosen, 3, tmp_path)
    for i, k in enumerate(MOST):
        order = tied_numbers().sort(dim=1, descending=True, stable=True).indices[:, :k]
        want = torch.zeros(40, 9, dtype=torch.bool).scatter(1, order, value=True)
        assert torch.equal(torch.cat([rank[i] for rank in ranks], dim=1), want)
