"""The parts of a peer's update against their plain formulas; none of them needs a peer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae.peers import updates
from fastsae.peers.updates import fused, remove_parallel_, set_unit_norm_


@pytest.fixture(params=[2**18, 40], ids=["one chunk", "chunks"])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "CHUNK_ELEMENTS", request.param)


def matrix(*shape: int, transposed: bool = False) -> Tensor:
    values = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape) + shape[0]))
    return values.t().contiguous().t() if transposed else values


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("added", [None, 1e-2])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_part_along_each_row_is_removed(added: float | None, transposed: bool) -> None:
    rows, grad = matrix(33, 8, transposed=transposed), 3 * matrix(33, 8).flip(0)
    along = rows if added is None else rows / (rows.norm(dim=1, keepdim=True) + added)
    expected = grad - (grad * along).sum(1, keepdim=True) * along
    remove_parallel_(grad, rows, added)
    torch.testing.assert_close(grad, expected)


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_unit_norm(transposed: bool) -> None:
    rows = matrix(33, 8, transposed=transposed)
    rows[4] = 0
    expected = rows / (rows.norm(dim=1, keepdim=True) + torch.finfo(rows.dtype).eps)
    before = rows.requires_grad_()._version
    set_unit_norm_(rows)
    torch.testing.assert_close(rows.detach(), expected)
    assert rows._version == before


def adam(**options: Any) -> torch.optim.Adam:
    weights = [matrix(6, 5), matrix(4, 3, transposed=True), matrix(7)]
    return torch.optim.Adam([weight.requires_grad_() for weight in weights], lr=0.1, **options)


def take_steps(optimizer: torch.optim.Adam, n: int, *, fuses: bool) -> list[Tensor]:
    weights = optimizer.param_groups[0]["params"]
    for i in range(n):
        for weight in weights[:-1] if i == 1 else weights:
            weight.grad = torch.cos(weight.detach() * (i + 1))
        if fuses:
            with fused(optimizer):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"betas": (0.0, 0.9)}, {"amsgrad": True}], ids=str)
def test_fused_steps_are_those_of_the_same_adam(options: dict[str, Any]) -> None:
    plain, ours = adam(**options), adam(**options)
    expected = take_steps(plain, 4, fuses=False)
    for got, wanted in zip(take_steps(ours, 4, fuses=True), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert ours.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    torch.testing.assert_close(ours.state_dict()["state"], plain.state_dict()["state"])
    mixed = adam(**options)
    take_steps(mixed, 2, fuses=True)
    assert all(p._version > 0 for p in mixed.param_groups[0]["params"])


def kinds_of_steps(optimizer: torch.optim.Optimizer, monkeypatch: pytest.MonkeyPatch) -> list[bool | None]:
    seen: list[bool | None] = []
    monkeypatch.setattr(type(optimizer), "step", lambda self: seen.extend(g.get("fused") for g in self.param_groups))
    with fused(optimizer):
        optimizer.step()
    return seen


@pytest.mark.parametrize(
    "options",
    [{"foreach": True}, {"fused": False}, {"maximize": True}, {"lr": torch.tensor(0.1)}],
    ids=str,
)
def test_what_somebody_chose_stays(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(6, 5).requires_grad_()
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.Adam([weight], **options)
    assert kinds_of_steps(optimizer, monkeypatch) == [options.get("fused")]


def test_tensors_that_lie_otherwise_are_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel walks over memory: with a gradient of other strides it would mix up the elements."""
    weight = matrix(6, 5).requires_grad_()
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.Adam([weight])
    optimizer.step()
    moments = optimizer.state[weight]
    assert kinds_of_steps(optimizer, monkeypatch) == [True]
    weight.grad = torch.ones(5, 6, dtype=torch.float64).t()
    assert kinds_of_steps(optimizer, monkeypatch) == [None]
    weight.grad, moments["exp_avg"] = torch.ones_like(weight), moments["exp_avg"].t().contiguous().t()
    assert kinds_of_steps(optimizer, monkeypatch) == [None]


def test_other_optimisers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(torch.optim.Adam):
        pass

    assert kinds_of_steps(Own([matrix(2, 2).requires_grad_()]), monkeypatch) == [None]
