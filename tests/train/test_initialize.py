"""What an SAE takes from the data before its first step."""

from __future__ import annotations

import pytest
import torch

from fastsae import FastsaeError, FusedJumpReLUSAE
from fastsae.train.initialize import activation_scale, geometric_median, initialize_from_data


def test_scale_gives_a_mean_norm_of_sqrt_d_in() -> None:
    acts = torch.randn(1000, 9) * 7 + 3
    scaled = acts * activation_scale(acts)
    assert scaled.norm(dim=1).mean().item() == pytest.approx(3, rel=1e-5)


def test_activations_whose_norm_overflows_are_refused() -> None:
    assert activation_scale(torch.full((4, 9), 1e18)) == pytest.approx(1e-18)
    with pytest.raises(FastsaeError, match=r"too large to train on: single ones are 1\.0e\+30"):
        activation_scale(torch.full((4, 9), -1e30))


def test_geometric_median_of_points_with_a_known_one() -> None:
    # by symmetry the centre of a cross; the mean of the first four is pulled away by the far fifth point
    points = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    assert geometric_median(points + 5).tolist() == pytest.approx([5, 5], abs=1e-4)
    outlier = torch.cat([points.repeat(10, 1), torch.tensor([[1000.0, 0]])])
    assert geometric_median(outlier).norm() < 0.1
    assert outlier.mean(0).norm() > 20


@pytest.mark.parametrize("subtract", [False, True])
def test_initial_l0_is_as_asked(subtract: bool) -> None:
    torch.manual_seed(0)
    acts = torch.randn(4000, 16) @ torch.randn(16, 16) + 2
    sae = FusedJumpReLUSAE(16, 512, apply_b_dec_to_input=subtract)
    initialize_from_data(sae, acts, "geometric_median", init_l0=20)
    assert sae.encode_sparse(acts).l0().float().mean().item() == pytest.approx(20, rel=0.1)
    torch.testing.assert_close(sae.b_dec.detach(), geometric_median(acts))
