"""What delphi asks of an SAE: a function from activations to dense latents, whose entries it lists and stores."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from fastsae import FusedBatchTopKSAE, FusedJumpReLUSAE, FusedReLUSAE, FusedTopKSAE, SparseAutoencoder

MAKE = [FusedJumpReLUSAE, FusedReLUSAE, partial(FusedTopKSAE, k=4), partial(FusedBatchTopKSAE, k=4)]


@pytest.mark.parametrize("make", MAKE, ids=["jumprelu", "relu", "topk", "batchtopk"])
def test_its_cache_lists_the_latents_of_encode(make: Any) -> None:
    sae: SparseAutoencoder = make(8, 64)
    x = torch.randn(3, 16, 8)
    with torch.no_grad():
        sae.b_enc.fill_(-0.5)
        latents = sae.encode(x)
    assert latents.shape == (3, 16, 64)
    locations, values = torch.nonzero(latents.abs() > 1e-5), latents[latents.abs() > 1e-5]
    assert 0 < len(locations) < latents.numel() // 2
    selected = torch.isin(locations[:, 2], torch.tensor([3, 5, 8]))  # its filter of latents
    with torch.no_grad():
        few = sae.encode_features(x, [3, 5, 8])
    kept = few.abs() > 1e-5
    assert torch.equal(locations[selected][:, :2], torch.nonzero(kept)[:, :2])
    torch.testing.assert_close(values[selected], few[kept])
    buffer = torch.zeros_like(latents)
    buffer[tuple(locations.T)] = values
    torch.testing.assert_close(sae.decode(buffer), sae(x))
