"""The fraction of variance unexplained: a number where there is variance, NaN where rounding alone makes some."""

from __future__ import annotations

import pytest
import torch
from meter import Meter

from fastsae import FusedJumpReLUSAE
from fastsae.sae.outputs import fraction_of_variance_unexplained


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


def test_a_gpu_makes_no_wide_copy_of_the_batch() -> None:
    """Added up on tensors without data: less than 5 % of a dense tensor in bf16, and less than half of the batch in fp32."""
    n_tokens, d_in, d_sae = 8192, 2304, 65536
    x = torch.empty(n_tokens, d_in, dtype=torch.bfloat16, device="meta")
    error = torch.empty(n_tokens, device="meta")
    with Meter() as meter:
        fraction_of_variance_unexplained(error, x, torch.float32)
    assert 0 < meter.peak < min(0.05 * n_tokens * d_sae * 2, 0.5 * n_tokens * d_in * 4)
