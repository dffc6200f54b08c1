"""16-bit copies of the weights: taken where autocast would cast, never stale, and gradients reach the weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastsae import FusedReLUSAE
from fastsae.sae.compute_copies import ComputeCopies


def make() -> tuple[FusedReLUSAE, ComputeCopies]:
    sae = FusedReLUSAE(6, 10)
    return sae, ComputeCopies([sae.W_enc, sae.W_dec], torch.bfloat16)


def is_copy(copies: ComputeCopies, p: nn.Parameter, dtype: torch.dtype = torch.bfloat16) -> bool:
    with torch.autocast("cpu", dtype):
        taken = copies.take(p)
    assert torch.equal(taken.to(copies.dtype), p.to(copies.dtype))
    return taken is not p


def test_taken_where_autocast_would_cast() -> None:
    sae, copies = make()
    for p in (sae.W_enc, sae.W_dec):
        assert is_copy(copies, p)
        assert not is_copy(copies, p, torch.float16)
        assert copies.take(p) is p
        taken = copies.of(p)
        assert taken is not None
        assert taken.stride() == p.stride()
    assert not is_copy(copies, sae.b_enc)
    derived = sae.W_dec * 2
    with torch.autocast("cpu", torch.bfloat16):
        assert copies.take(derived) is derived


def test_gradients_reach_the_weight_as_through_a_cast() -> None:
    sae, copies = make()
    x, grads = torch.randn(4, 6), []
    for take in (copies.take, lambda W: W):
        with torch.autocast("cpu", torch.bfloat16):
            (x @ take(sae.W_enc)).square().sum().backward()
        grads.append(sae.W_enc.grad)
        sae.W_enc.grad = None
    assert torch.equal(*grads)
    assert grads[0].dtype == torch.float32


class LeavesNoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, W: Tensor) -> Tensor:
        return W.sum()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> None:
        return None


def test_a_gradient_that_was_left_elsewhere_stays_none() -> None:
    sae, copies = make()
    with torch.autocast("cpu", torch.bfloat16):
        LeavesNoGradient.apply(copies.take(sae.W_dec)).backward()
    assert sae.W_dec.grad is None


@pytest.mark.parametrize(
    "change",
    [
        lambda sae: sae.normalize_decoder_(),
        lambda sae: sae.load_state_dict({**sae.state_dict(), "W_dec": torch.ones(10, 6)}),
        lambda sae: setattr(sae.W_dec, "data", torch.ones(10, 6)),
        lambda sae: sae.load_state_dict({**sae.state_dict(), "W_dec": torch.ones(10, 6)}, assign=True),
        lambda sae: sae.reset_parameters(),
    ],
    ids=["in place", "loaded", "other memory", "other parameter", "drawn again"],
)
def test_never_stale(change: Callable[[FusedReLUSAE], object]) -> None:
    sae, copies = make()
    change(sae)
    assert not is_copy(copies, sae.W_dec)
    if copies.of(sae.W_enc) is not None:
        assert is_copy(copies, sae.W_enc)


def test_a_backward_after_the_copy_was_written_again_is_refused() -> None:
    sae, copies = make()
    x = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = x @ copies.take(sae.W_enc)
    copies.to_write(sae.W_enc)
    copies.record(sae.W_enc)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
