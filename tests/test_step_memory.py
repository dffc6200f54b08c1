"""A whole training step holds less than a twentieth of the dense `[N, d_sae]` tensor beside the residual that it returns."""

from __future__ import annotations

import gc
import tracemalloc

import torch
from meter import Meter

from fastsae import FusedJumpReLUSAE, FusedSAEAdam


def test_less_than_5_percent_of_the_dense_tensor() -> None:
    n_tokens, d_in, d_sae, l0 = 4096, 768, 16384, 78
    sae, x = FusedJumpReLUSAE(d_in, d_sae, bandwidth=0.05), torch.randn(n_tokens, d_in)
    with torch.no_grad():
        sae.W_enc.copy_(torch.nn.functional.normalize(torch.randn(d_in, d_sae), dim=0))
        sae.threshold.fill_(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - l0 / d_sae)))
    optimizer = FusedSAEAdam(sae, lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        optimizer.backward(sae.training_forward(x, 0.01).loss)
        optimizer.step()

    step()
    gc.collect()
    tracemalloc.start()
    with Meter() as meter:
        step()
    tracemalloc.stop()
    residual = x.numel() * 4
    dense = n_tokens * d_sae * 4
    print(f"{(meter.peak - residual) / dense:.2%} of the dense tensor")  # noqa: T201
    assert 0.01 * dense < meter.peak - residual < 0.05 * dense
