"""The fraction of variance unexplained: a number where there is variance, NaN where rounding alone makes some."""

from __future__ import annotations

import pytest
import torch

from fastsae import FusedJumpReLUSAE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(1, 12),
        torch.zeros(20, 12),
        torch.full((1000, 12), 0.1),
        torch.randn(12).expand(3333, 12) * 1e4,
        torch.randn(12).expand(2, 12) * 1e-6,
    ],
    ids=["one token", "zeros", "constant", "equal and large", "equal and small"],
)
def test_rows_without_variance_have_no_fvu(x: torch.Tensor, dtype: torch.dtype) -> None:
    assert FusedJumpReLUSAE(12, 40, dtype=dtype).training_forward(x.to(dtype)).fvu.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_rows_with_variance_have_it(dtype: torch.dtype, offset: float) -> None:
    x = torch.randn(500, 12, dtype=dtype) * 0.1 + offset  # far from the origin as activations can be
    sae = FusedJumpReLUSAE(12, 40, dtype=dtype)
    output = sae.training_forward(x)
    residual = (output.sae_out - x).double()
    expected = residual.square().sum() / (x.double() - x.double().mean(0)).square().sum()
    torch.testing.assert_close(output.fvu.double(), expected, rtol=1e-4, atol=0)
