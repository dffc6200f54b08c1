"""What the tests of gradients share: SAEs in fp64 of every kind, and the loss of one token, written out densely."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsae.sae import FusedBatchTopKSAE, FusedJumpReLUSAE, FusedReLUSAE, FusedTopKSAE, SparseAutoencoder
from fastsae.sae.token_gradients import SparsityTerm, TokenGradients
from fastsae.sae.topk import TopKFamily
from fastsae_kernels import reference

D_IN, D_SAE = 16, 40
N = 30  # tokens


def _jumprelu(**options: Any) -> Any:
    return FusedJumpReLUSAE(D_IN, D_SAE, bandwidth=0.6, init_threshold=0.3, dtype=torch.float64, **options)


def _topk(cls: Any, **options: Any) -> Any:
    return cls(D_IN, D_SAE, 4, dtype=torch.float64, **options)


KINDS: dict[str, tuple[Callable[[], Any], SparsityTerm]] = {
    "step": (_jumprelu, SparsityTerm(0.3)),
    "quadratic": (_jumprelu, SparsityTerm(0.3, "quadratic", target_l0=3.0)),
    "tanh": (_jumprelu, SparsityTerm(0.3, "tanh", tanh_scale=2.0)),
    "reconstruction alone": (_jumprelu, SparsityTerm()),
    "to the input": (lambda: _jumprelu(ste_to_input=True, apply_b_dec_to_input=True), SparsityTerm(0.3)),
    "log threshold": (lambda: _jumprelu(log_threshold=True), SparsityTerm(0.3)),
    "jumprelu with k": (lambda: _jumprelu(k=14), SparsityTerm(0.3)),
    "relu": (lambda: FusedReLUSAE(D_IN, D_SAE, dtype=torch.float64), SparsityTerm(0.2)),
    "topk": (lambda: _topk(FusedTopKSAE), SparsityTerm()),
    "topk, not rescaled": (
        lambda: _topk(FusedTopKSAE, rescale_acts_by_decoder_norm=False, apply_b_dec_to_input=False),
        SparsityTerm(),
    ),
    "batchtopk": (lambda: _topk(FusedBatchTopKSAE), SparsityTerm()),
}


def make(kind: str) -> tuple[SparseAutoencoder, SparsityTerm]:
    """An SAE with uneven decoder norms and biases; its last feature never fires and is in no window."""
    build, term = KINDS[kind]
    torch.manual_seed(0)
    sae = build()
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(D_SAE, 1).double() + 0.5)
        sae.b_enc.normal_(std=0.3)
        sae.b_dec.normal_(std=0.3)
        sae.b_enc[-1] = -100.0
    return sae, term


def keeps(sae: Any, x: Tensor) -> Tensor:
    """`[N, d_sae]` bool: what the choice by count leaves of the batch; that of a JumpReLU SAE is made in its loss."""
    if not isinstance(sae, TopKFamily):
        return torch.ones(len(x), sae.d_sae, dtype=torch.bool)
    norms = sae.W_dec.norm(dim=1) if sae.rescale_acts_by_decoder_norm else 1
    sae_in = x - sae.b_dec if sae.apply_b_dec_to_input else x
    acts = ((sae_in @ sae.W_enc + sae.b_enc) * norms).relu()
    return reference.topk_keep(acts.detach(), sae.k, isinstance(sae, FusedBatchTopKSAE))


def loss(sae: Any, x: Tensor, keep: Tensor, term: SparsityTerm) -> Tensor:
    """The loss of one token `[1, d_in]`."""
    sae_in = x - sae.b_dec if sae.apply_b_dec_to_input else x
    if isinstance(sae, TopKFamily):
        acts = (sae_in @ sae.W_enc + sae.b_enc).relu() * keep
        return (acts @ sae.W_dec + sae.b_dec - x).square().sum()
    spec = term.spec(sae)
    threshold = sae.threshold if isinstance(sae, FusedJumpReLUSAE) else torch.zeros(sae.d_sae).double()
    out = reference.autoencode(
        sae_in, sae.W_enc, sae.b_enc, threshold, sae.W_dec, sae.b_dec, sae.W_dec.norm(dim=1), spec
    )
    penalty = out.penalty.sum()
    if term.form == "quadratic":
        assert term.target_l0 is not None
        penalty = (penalty - term.target_l0).square() * 2 / term.target_l0
    return (out.sae_out - x).square().sum() + term.coefficient * penalty


def dense_gradients(sae: Any, x: Tensor, term: SparsityTerm) -> dict[str, Tensor]:
    """By parameter the gradient of each token's loss, `[N, ...]`, features first, from autograd."""
    names = [name.removeprefix("log_") for name, _ in sae.named_parameters()]
    parameters, keep = list(sae.parameters()), keeps(sae, x)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for n in range(len(x)):
        grads = torch.autograd.grad(loss(sae, x[n : n + 1], keep[n : n + 1], term), parameters, allow_unused=True)
        for name, parameter, grad in zip(names, parameters, grads, strict=True):
            grad = torch.zeros_like(parameter) if grad is None else grad
            found[name].append(grad.t() if name == "W_enc" else grad)
    return {name: torch.stack(rows) for name, rows in found.items()}


def tokens(n: int = N) -> Tensor:
    """The same activations in every call."""
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1)).double()


def dense_of(sae: Any, gradients: TokenGradients) -> dict[str, Tensor]:
    """The gradients of each token as dense tensors, from their factors."""
    n = len(gradients.x)

    def dense(values: Tensor) -> Tensor:
        return torch.zeros(n, D_SAE).double().index_put_((gradients.tokens, gradients.features), values)

    hidden_pre = dense(gradients.hidden_pre)
    found = {
        "W_enc": hidden_pre[:, :, None] * gradients.x[:, None],
        "W_dec": dense(gradients.acts)[:, :, None] * gradients.error[:, None],
        "b_enc": hidden_pre,
        "b_dec": gradients.b_dec,
    }
    if gradients.along is not None:
        found["W_dec"] += dense(gradients.along)[:, :, None] * (sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True))
    return found if gradients.threshold is None else {**found, "threshold": dense(gradients.threshold)}
