"""A dictionary that is known: training must find it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae import FusedJumpReLUSAE, FusedSAEAdam
from fastsae.train.initialize import initialize_from_data

N_TRUE, D_IN, ACTIVE = 64, 32, 4
STEPS, LR = 1000, 3e-3


def sums_of(dictionary: Tensor, n_tokens: int, g: torch.Generator) -> Tensor:
    """Each token is the sum of `ACTIVE` entries of the dictionary, weighted by 0.5 to 1.5."""
    chosen = torch.rand(n_tokens, N_TRUE, generator=g).topk(ACTIVE, dim=1).indices
    weights = 0.5 + torch.rand(n_tokens, ACTIVE, generator=g)
    return torch.zeros(n_tokens, N_TRUE).scatter_(1, chosen, weights) @ dictionary


def test_training_recovers_a_planted_dictionary() -> None:
    g = torch.Generator().manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(N_TRUE, D_IN, generator=g), dim=1)
    torch.manual_seed(0)
    sae = FusedJumpReLUSAE(D_IN, 2 * N_TRUE, bandwidth=0.1, init_threshold=0.1)
    initialize_from_data(sae, sums_of(dictionary, 4096, g), "mean", init_l0=16)
    optimizer = FusedSAEAdam(sae, max_grad_norm=1.0, normalize_decoder=True)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LR * min(1, 5 * (1 - step / STEPS))
        coefficient = 0.1 * min(1, 5 * step / STEPS)
        output = sae.training_forward(sums_of(dictionary, 512, g), coefficient, "quadratic", target_l0=ACTIVE)
        optimizer.zero_grad()
        optimizer.backward(output.loss)
        optimizer.step()
    found = (sae.W_dec.detach() @ dictionary.t()).amax(0)
    assert found.mean() >= 0.95, f"mean max cosine {found.mean():.3f}"
    assert output.l0 < 2 * ACTIVE
