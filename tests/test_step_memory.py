"""A whole training step holds less than a twentieth of the dense `[N, d_sae]` tensor beside the residual that it returns."""

from __future__ import annotations

import gc
import tracemalloc

from meter import Meter

from benchmarks.shapes import BANDWIDTH, CPU_SHAPES, HEADLINE, parameters, tokens
from fastsae import FusedJumpReLUSAE, FusedSAEAdam


def test_less_than_5_percent_of_the_dense_tensor() -> None:
    shape = CPU_SHAPES[HEADLINE]
    sae = FusedJumpReLUSAE(shape.d_in, shape.d_sae, BANDWIDTH)
    sae.load_state_dict({name: tensor.detach() for name, tensor in parameters(shape).items()})
    optimizer, x = FusedSAEAdam(sae, lr=1e-6), tokens(shape)

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
    dense = shape.n_tokens * shape.d_sae * 4
    print(f"{(meter.peak - residual) / dense:.2%} of the dense tensor")  # noqa: T201
    assert 0.01 * dense < meter.peak - residual < 0.05 * dense
