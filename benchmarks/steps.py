"""Training steps as one writes them: around any optimiser, and around `FusedSAEAdam`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.shapes import BANDWIDTH, DEVICE, Shape, parameters
from fastsae import FusedJumpReLUSAE, FusedSAEAdam

MAX_GRAD_NORM = 1.0
Step = Callable[[Tensor], None]
Forward = Callable[[Tensor], Tensor]


def make_sae(shape: Shape) -> FusedJumpReLUSAE:
    sae = FusedJumpReLUSAE(shape.d_in, shape.d_sae, BANDWIDTH, device=DEVICE)
    sae.load_state_dict({name: tensor.detach() for name, tensor in parameters(shape).items()})
    return sae


def plain_step(
    sae: FusedJumpReLUSAE, forward: Forward, optimizer: torch.optim.Optimizer, clipped: bool = False
) -> Step:
    """Returns a step that finds gradients in `.grad`.

    Args:
        sae: The SAE that it trains.
        forward: Returns the loss.
        optimizer: The optimiser of its parameters.
        clipped: Whether the decoder's gradient is projected, all are clipped, and the decoder's rows have unit norm after it.
    """

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        forward(x).backward()
        if clipped:
            assert sae.W_dec.grad is not None
            with torch.no_grad():
                sae.W_dec.grad -= (sae.W_dec.grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
            torch.nn.utils.clip_grad_norm_(sae.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        if clipped:
            sae.normalize_decoder_()

    return step


def fused_step(forward: Forward, optimizer: FusedSAEAdam) -> Step:
    """Returns a step whose optimiser sums the weight gradients itself."""

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        optimizer.backward(forward(x))
        optimizer.step()

    return step
