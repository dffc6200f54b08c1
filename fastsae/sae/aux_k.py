"""AuxK: dead features reconstruct what the living ones leave over, so that they find something to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsae.sae.dead_features import DeadFeatures
from fastsae_kernels import AutoencodeSpec

if TYPE_CHECKING:
    from fastsae.sae.base import SparseAutoencoder


def aux_k_loss(sae: SparseAutoencoder, dead: DeadFeatures, x: Tensor, residual: Tensor, dead_mask: Tensor) -> Tensor:
    """`min(n_dead / k_aux, 1) * mean over tokens of |e - e_hat|^2`, with `k_aux = d_in // 2`.

        e     = x - sae_out = -residual, detached
        e_hat = (the k_aux largest positive activations of dead features) @ W_dec

    An autoencoder of the dead features alone, on the op that runs the whole one: its columns are gathered, no tensor of
    tokens x features is made, and the gradient reaches encoder and decoder.

    As SAELens' `calculate_topk_aux_loss`, but for one choice: where a token has fewer than `k_aux` dead features with a
    positive pre-activation, SAELens fills up with negative ones, which the SAE itself can never produce. Here they stay 0,
    as in Gao et al. and dictionary_learning.

    Args:
        sae: Its weights and its rescaling.
        dead: Remembers the ids between calls.
        x: `[..., d_in]` what is to be reconstructed.
        residual: `sae_out - x` of the pass whose error is to be reconstructed.
        dead_mask: `[d_sae]` bool, or zeros and ones.

    Raises:
        TypeError: `dead_mask` is no tensor.
        ValueError: `dead_mask` has the wrong shape, or holds other numbers.

    Source:
        Gao et al. 2024, arXiv:2406.04093, appendix A.2.
    """
    ids = dead.ids(dead_mask, sae.d_shard, sae.device)
    n_dead, k_aux = ids.numel(), max(1, sae.d_in // 2)
    if sae.sharding is not None:
        n_dead = sae.sharding.total(n_dead, sae.device)
    if n_dead == 0:
        return residual.new_zeros((), dtype=sae._wide())
    scale = sae._rescaling(ids)
    squared_error: Tensor = sae._ops.autoencode(
        *sae._encoder_inputs(x, scale, ids),
        torch.zeros(ids.numel(), dtype=sae._wide(), device=sae.device),
        sae._decoder(scale, ids),
        torch.zeros_like(sae.b_dec),
        # with room for all of them there is nothing to choose, and the dense path may take over
        spec=AutoencodeSpec(k=k_aux if n_dead > k_aux else None),
        target=-residual.detach(),
        hint=dead.activity,
    ).squared_error
    return squared_error.mean() * min(n_dead / k_aux, 1.0)
