"""What the tests of the TopK family share: weights with uneven decoder norms, and a training pass written out densely."""

from __future__ import annotations

from typing import Any

import torch

from fastsae import FusedBatchTopKSAE, FusedTopKSAE
from fastsae_kernels import reference

D_IN, D_SAE = 12, 40
CLASSES = [FusedTopKSAE, FusedBatchTopKSAE]


def randomised(cls: Any, k: int = 4, **options: Any) -> Any:
    torch.manual_seed(0)
    sae = cls(D_IN, D_SAE, k, **options)
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_dec):
            parameter.normal_(std=0.3)
        sae.W_dec.mul_(torch.rand(D_SAE, 1).to(sae.W_dec) + 0.5)
    if cls is FusedBatchTopKSAE:
        sae.topk_threshold.fill_(0.4)
    return sae


def dense_pass(sae: Any, x: torch.Tensor, dead: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Activations, reconstruction and losses of a training pass, written out densely."""
    norms = sae.W_dec.norm(dim=1) if sae.rescale_acts_by_decoder_norm else torch.ones_like(sae.b_enc)
    x = x.reshape(-1, D_IN)
    sae_in = x - sae.b_dec if sae.apply_b_dec_to_input else x
    hidden_pre = (sae_in @ sae.W_enc + sae.b_enc) * norms
    acts = hidden_pre.relu()
    acts = acts * reference.topk_keep(acts.detach(), sae.k, isinstance(sae, FusedBatchTopKSAE))
    sae_out = (acts / norms) @ sae.W_dec + sae.b_dec
    losses = {"mse_loss": (sae_out - x).square().sum(-1).mean()}
    if dead is not None:
        k_aux = D_IN // 2
        dead_acts = hidden_pre.relu() * dead
        dead_acts = dead_acts * reference.topk_keep(dead_acts.detach(), k_aux)
        residual = (x - sae_out).detach()
        error = ((dead_acts / norms) @ sae.W_dec - residual).square().sum(-1).mean()
        losses["auxiliary_reconstruction_loss"] = 0.3 * min(int(dead.sum()) / k_aux, 1) * error
    return {"acts": acts, "sae_out": sae_out, "loss": torch.stack(list(losses.values())).sum(), **losses}
