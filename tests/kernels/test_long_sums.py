"""Sums of thousands of terms: no further from fp64 than twice what dense PyTorch in the same dtype is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastsae_kernels as kernels
from fastsae_kernels import AutoencodeSpec, reference
from fastsae_kernels.backend import BackendName as Backend


def problem(n_tokens: int, d_in: int, d_sae: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    W_enc = draw(d_in, d_sae) / d_in**0.5
    return [draw(n_tokens, d_in), W_enc, 0.1 * draw(d_sae), torch.zeros(d_sae), draw(d_sae, d_in), torch.zeros(d_in)]


@pytest.mark.parametrize("penalty", ["l1", "tanh"])
@pytest.mark.parametrize(
    ("n_tokens", "d_in", "d_sae", "k"),
    [(1, 16, 20_000, 10_000), (8, 16, 8_192, 4_096), (64, 16, 16_384, None)],
    ids=str,
)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_penalties(n_tokens: int, d_in: int, d_sae: int, k: int | None, penalty: str, scaled: bool) -> None:
    tensors = problem(n_tokens, d_in, d_sae)
    if k is None:
        tensors[2] = tensors[2] - 1.0
    scale = torch.rand(d_sae, generator=torch.Generator().manual_seed(1)) if scaled else None
    spec = AutoencodeSpec(k=k, penalty=penalty)  # type: ignore[arg-type]
    found = kernels.autoencode(*tensors, spec=spec, feature_scale=scale).penalty.double()

    def dense(dtype: torch.dtype) -> Tensor:
        wide = [tensor.to(dtype) for tensor in tensors]
        return reference.autoencode(*wide, None if scale is None else scale.to(dtype), spec)[1].double()

    truth = dense(torch.float64)
    ours, eager = ((value - truth).abs().max().item() for value in (found, dense(torch.float32)))
    assert ours <= 2 * eager + 1e-6 * truth.abs().max().item()


@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_gradients_of_a_feature_that_every_token_has(backend: Backend) -> None:
    """One feature of many is active on all 8,192 tokens, with terms of one sign."""
    n_tokens, d_in, d_sae = 8_192, 64, 512
    tensors = problem(n_tokens, d_in, d_sae)
    tensors[0] = tensors[0].abs() + 1.0
    tensors[2] = torch.full((d_sae,), -50.0)
    tensors[2][7] = 50.0
    spec = AutoencodeSpec(bandwidth=200.0, ste_to_input=True)
    grad_out = torch.rand(n_tokens, d_in, generator=torch.Generator().manual_seed(2))

    def grads(dtype: torch.dtype, with_reference: bool) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        with kernels.use_backend(backend):
            if with_reference:
                sae_out, penalty, _ = reference.autoencode(*leaves, None, spec)
            else:
                output = kernels.autoencode(*leaves, spec=spec)
                sae_out, penalty = output.sae_out, output.penalty
            found = torch.autograd.grad([sae_out, penalty], leaves, [grad_out.to(dtype), torch.ones_like(penalty)])
        return [grad.double() for grad in found]

    truth, eager, ours = grads(torch.float64, True), grads(torch.float32, True), grads(torch.float32, False)
    for name, want, a, b in zip(
        ("x", "W_enc", "b_enc", "threshold", "W_dec", "b_dec"), truth, ours, eager, strict=True
    ):
        errors = [(value - want).abs().max().item() for value in (a, b)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * want.abs().max().item(), f"{name}: {errors}"


@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_weight_gradients_in_bf16_are_rounded_once(backend: Backend) -> None:
    """4,096 ones: added up in bf16 they would stop at 256."""
    n_tokens, d_in, d_sae = 4_096, 16, 256
    x = torch.ones(n_tokens, d_in, dtype=torch.bfloat16)
    W_enc, b_enc = torch.zeros(d_in, d_sae, dtype=torch.bfloat16), torch.full((d_sae,), -1.0, dtype=torch.bfloat16)
    b_enc[7] = 1.0
    W_dec = torch.ones(d_sae, d_in, dtype=torch.bfloat16)
    leaves = [W_enc.requires_grad_(), W_dec.requires_grad_()]
    with kernels.use_backend(backend):
        output = kernels.autoencode(
            x, W_enc, b_enc, torch.zeros(d_sae), W_dec, torch.zeros(d_in, dtype=torch.bfloat16), spec=AutoencodeSpec()
        )
        grads = torch.autograd.grad(output.sae_out.sum(), leaves)
    assert grads[0].dtype == torch.bfloat16
    assert (grads[0][:, 7] == n_tokens * d_in).all()
    assert (grads[1][7] == n_tokens).all()
