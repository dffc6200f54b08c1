"""An SAE trained once by `torch.optim.Adam` and once by ours, in whichever way a scenario likes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae import FusedJumpReLUSAE, FusedSAEAdam, UsageError

D_IN, D_SAE, N = 16, 128, 48


State = dict[str, Tensor]


def fresh(init_threshold: float = 2.0) -> FusedJumpReLUSAE:
    torch.manual_seed(0)
    return FusedJumpReLUSAE(D_IN, D_SAE, bandwidth=0.3, init_threshold=init_threshold)


def batch(seed: int) -> Tensor:
    return torch.randn(N, D_IN, generator=torch.Generator().manual_seed(seed))


def adam(sae: FusedJumpReLUSAE, **options: Any) -> torch.optim.Adam:
    return torch.optim.Adam(sae.parameters(), **{"lr": 1e-2, **options})


def fused(sae: FusedJumpReLUSAE, **options: Any) -> FusedSAEAdam:
    return FusedSAEAdam(sae, **{"lr": 1e-2, **options})


def weights(sae: FusedJumpReLUSAE) -> State:
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


@contextlib.contextmanager
def refused(sae: FusedJumpReLUSAE, match: str) -> Iterator[None]:
    """Expects one error in the block, and the weights as they were."""
    before = weights(sae)
    with pytest.raises(UsageError, match=match):
        yield
    assert all(torch.equal(before[name], p) for name, p in sae.named_parameters())


def loss_of(sae: FusedJumpReLUSAE, x: Tensor) -> Tensor:
    return sae.training_forward(x).loss


def by_itself(optimizer: Any, loss: Tensor) -> None:
    loss.backward()


def explicitly(optimizer: Any, loss: Tensor) -> None:
    getattr(optimizer, "backward", Tensor.backward)(loss)


Make = Callable[..., Any]


SendBack = Callable[[Any, Tensor], None]


both_ways = pytest.mark.parametrize("send_back", [by_itself, explicitly])


class Run:
    """An SAE and its optimiser; a scenario trains them, once with `torch.optim.Adam` and once with ours.

    Args:
        make: Makes the optimiser of an SAE.
        send_back: Sends a loss back.
        options: The optimiser's options.
    """

    def __init__(self, make: Make, send_back: SendBack, **options: Any) -> None:
        self.make, self.send_back = make, send_back
        self.sae = fresh()
        self.optimizer = make(self.sae, **options)
        self.others: State = {}  # what is compared beside the weights

    def send(self, seed: int) -> None:
        self.send_back(self.optimizer, loss_of(self.sae, batch(seed)))

    def step(self, seed: int) -> None:
        self.optimizer.zero_grad()
        self.send(seed)
        self.optimizer.step()


def assert_same_as_adam(scenario: Callable[[Run], object], send_back: SendBack = by_itself, **options: Any) -> None:
    runs = [Run(make, send_back, **options) for make in (adam, fused)]
    for run in runs:
        scenario(run)
    want, got = ({**weights(run.sae), **run.others} for run in runs)
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
