"""Gradients of each token's own loss: against autograd token by token, and their mean against a training pass."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import needs_kernels
from gradient_problem import KINDS, dense_gradients, dense_of, make, tokens

from fastsae.sae.token_gradients import token_gradients
from fastsae_kernels import use_backend


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_the_gradients_of_autograd(kind: str) -> None:
    sae, term = make(kind)
    expected = dense_gradients(sae, tokens(), term)
    found = dense_of(sae, token_gradients(sae, tokens(), term))
    assert found.keys() == expected.keys()
    for name, of_tokens in expected.items():
        assert of_tokens.abs().max() > 0
        torch.testing.assert_close(found[name], of_tokens, rtol=1e-9, atol=1e-9 * float(of_tokens.abs().max()))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "batchtopk"])
def test_their_mean_is_the_gradient_of_training(kind: str) -> None:
    sae, term = make(kind)
    found = {name: rows.mean(0) for name, rows in dense_of(sae, token_gradients(sae, tokens(), term)).items()}
    if kind == "relu":
        output = sae.training_forward(tokens(), term.coefficient)
    elif kind.startswith("topk"):
        output = sae.training_forward(tokens())
    else:
        output = sae.training_forward(
            tokens(), term.coefficient, term.form, target_l0=term.target_l0, tanh_scale=term.tanh_scale
        )
    output.loss.backward()
    for name, parameter in sae.named_parameters():
        grad = parameter.grad.t() if name == "W_enc" else parameter.grad
        torch.testing.assert_close(found[name.removeprefix("log_")], grad, rtol=1e-6, atol=1e-9)


def test_activations_of_another_width() -> None:
    sae, term = make("step")
    with pytest.raises(ValueError, match="d_in = 16"):
        token_gradients(sae, torch.zeros(3, 4), term)


@pytest.mark.parametrize("kind", ["step", "topk"])
def test_no_tokens(kind: str) -> None:
    sae, term = make(kind)
    gradients = token_gradients(sae, tokens(0), term)
    assert gradients.acts.numel() == gradients.error.numel() == 0


@needs_kernels
@pytest.mark.parametrize("kind", ["step", "batchtopk"])
def test_the_kernels_of_a_gpu_give_the_same_entries_in_the_same_order(kind: str) -> None:
    sae, term = make(kind)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sae, x = sae.to(device, torch.float32), tokens().to(device, torch.float32)
    with use_backend("triton"):
        found = token_gradients(sae, x, term)
    for values, expected in zip(found, token_gradients(sae.cpu(), x.cpu(), term), strict=True):
        if expected is None:
            assert values is None
        else:
            torch.testing.assert_close(values.cpu(), expected, rtol=1e-4, atol=1e-5)
