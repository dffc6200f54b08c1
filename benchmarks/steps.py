"""Training steps around any optimiser and around `FusedSAEAdam`, and how they are compared with fp64 before they are timed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.shapes import BANDWIDTH, DEVICE, Shape, parameters, tokens
from fastsae import FusedJumpReLUSAE, FusedSAEAdam
from fastsae_kernels import reference

MAX_GRAD_NORM = 1.0
CHECKED_TOKENS = {"cpu": 128, "cuda": 256}[DEVICE]
# the fp64 truth of more features, or of more weights, would take longer than all else, or not fit
CHECKED_FEATURES = {"cpu": 2**16, "cuda": 2**17}[DEVICE]
CHECKED_WEIGHTS = {"cpu": 2**24, "cuda": 2**27}[DEVICE]
ROUNDING = 2e-6  # by which rounding may shift an fp32 pre-activation of size 1
SUM_ROUNDING = 2e-6  # a relative error this large comes from adding 4,096 tokens in another order
# the changes of the parameters may differ by this share: Adam's first step is the gradient's sign, however small that is
SIGN_ROUNDING = 1e-3
Step = Callable[[Tensor], Any]
Forward = Callable[[Tensor], Tensor]


class Training(NamedTuple):
    """An SAE that is ready to be trained, or to be run."""

    module: nn.Module
    step: Step  # at inference it returns the reconstruction
    loss: Forward | None = None  # gives the loss of a batch; None at inference
    target: Any = None  # what `fastsae.accelerate` takes, of a peer


Make = Callable[[Shape, torch.dtype], Training]


def make_sae(shape: Shape, dtype: torch.dtype = torch.float32) -> FusedJumpReLUSAE:
    sae = FusedJumpReLUSAE(shape.d_in, shape.d_sae, BANDWIDTH, device=DEVICE)
    sae.load_state_dict(parameters(shape))
    return sae.to(dtype)


def plain_step(
    sae: FusedJumpReLUSAE, forward: Forward, optimizer: torch.optim.Optimizer, clipped: bool = False
) -> Step:
    """Returns a step that finds gradients in `.grad`.

    Where it is `clipped`, the decoder's gradient is projected, all are clipped, and the decoder's rows have unit norm after it.
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


# ---- the comparison


def checked(shape: Shape) -> Shape:
    """The part of a shape that is compared with fp64."""
    d_sae = min(shape.d_sae, CHECKED_FEATURES, CHECKED_WEIGHTS // shape.d_in)
    return replace(shape, n_tokens=min(shape.n_tokens, CHECKED_TOKENS), d_sae=d_sae)


@torch.no_grad()
def clear_tokens(x: Tensor, p: dict[str, Tensor], architecture: str, k: int) -> Tensor:
    """`[N]` bool: which features of the token are active, or in the window, does not hang on rounding.

    Elsewhere two right answers differ by a feature, which outweighs all rounding.
    """
    clear = []
    for rows in x.split(512):
        if architecture == "jumprelu":
            above = (reference.hidden_pre(rows, p["W_enc"], p["b_enc"]) - p["threshold"]).abs()
            nearest = torch.minimum(above, (above - BANDWIDTH / 2).abs()).amin(1)
        else:
            pre = reference.hidden_pre(rows - p["b_dec"], p["W_enc"], p["b_enc"])
            largest = pre.topk(min(k + 1, pre.shape[1])).values.relu()
            nearest = largest[:, k - 1] - largest[:, k] if k < pre.shape[1] else largest[:, k - 1]
        clear.append(nearest > ROUNDING)
    return torch.cat(clear)


def relative_errors(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Error in norm of each tensor, relative to its norm."""
    return {name: ((got[name].double() - tensor).norm() / tensor.norm()).item() for name, tensor in exact.items()}


def results(training: Training, x: Tensor) -> dict[str, Tensor]:
    """Returns what is compared: the loss's gradients and what a step adds to the parameters, or else the reconstruction.

    (A second step would meet features that are active by rounding; tests compare many.)
    """
    if training.loss is None:
        return {"sae_out": training.step(x)}
    named = dict(training.module.named_parameters())
    if DEVICE == "cuda":  # or our first pass would be dense, which is not what is timed
        training.loss(x)
        torch.cuda.synchronize()
    training.loss(x).backward()
    grads = {f"gradient of {name}": p.grad for name, p in named.items() if p.grad is not None}
    training.module.zero_grad()
    before = deepcopy(training.module.state_dict())
    training.step(x)
    return grads | {f"change of {name}": p.detach().double() - before[name].double() for name, p in named.items()}


@lru_cache(1)  # the next would not fit beside it
def truth(make: Make, shape: Shape, architecture: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the tokens none of whose features is active or not by rounding, and what is exact of them."""
    wide = {name: tensor.double() for name, tensor in parameters(shape).items()}
    x = tokens(shape)[clear_tokens(tokens(shape).double(), wide, architecture, round(shape.l0))]
    return x, results(make(shape, torch.float64), x.double())


@lru_cache(2)
def errors_of(make: Make, exact: Make, shape: Shape, architecture: str) -> dict[str, float]:
    """Returns the relative error of each result in fp32, or under autocast, against what `exact` gives in fp64."""
    x, found = truth(exact, shape, architecture)
    return relative_errors(results(make(shape, torch.float32), x), found)


def check(make: Make, shape: Shape, baseline: Make, exact: Make, architecture: str = "jumprelu") -> tuple[float, float]:
    """Returns the worst error against fp64, and what it may be: twice that of the baseline, and rounding.

    Args:
        make: Makes what is compared.
        shape: The shape, of which a part is compared where it is large.
        baseline: Makes the same as one writes it in PyTorch, or as the peer has it, in the dtype of `make`.
        exact: Makes what gives the right numbers when it computes in fp64.
        architecture: "jumprelu" or "topk".
    """
    part = checked(shape)
    limits = {
        name: 2 * error + (SIGN_ROUNDING if name.startswith("change") else SUM_ROUNDING)
        for name, error in errors_of(baseline, exact, part, architecture).items()
    }
    x, found = truth(exact, part, architecture)
    errors = relative_errors(results(make(part, torch.float32), x), found)
    worst = max(errors, key=lambda name: errors[name] / limits[name])
    return errors[worst], limits[worst]
