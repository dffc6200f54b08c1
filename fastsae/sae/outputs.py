"""What a training pass returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae_kernels import SparseActs

# how many elements the rows have whose squares are summed together: on a CPU they stay in cache, on a GPU they are
# enough to fill it and still few beside the batch
VARIANCE_ELEMENTS = {"cpu": 2**18, "cuda": 2**22}


def fraction_of_variance_unexplained(squared_error: Tensor, x: Tensor, wide: torch.dtype) -> Tensor:
    """`sum |x_n - sae_out_n|^2 / sum |x_n - mean x|^2` over the rows of `x` `[N, d]`, in the dtype `wide`.

    NaN where the rows are all the same but for rounding: they have no variance to explain.
    """
    elements = VARIANCE_ELEMENTS.get(x.device.type, VARIANCE_ELEMENTS["cuda"])
    # a graph is better served by one expression, of which it makes one loop
    size = max(1, len(x) if torch.compiler.is_compiling() else elements // x.shape[1])
    mean = x.mean(0, dtype=wide)
    variance = torch.stack([(rows - mean).square().sum() for rows in x.split(size)]).sum()
    rounding = (16 * torch.finfo(wide).eps) ** 2 * len(x) * mean.square().sum()
    return torch.where(variance > rounding, squared_error.sum() / variance, torch.nan)


@dataclass
class TrainOutput:
    """One training pass; call `loss.backward()`.

    Args:
        target: `[..., d_in]`, what was to be reconstructed.
        residual: `[..., d_in]`, `sae_out - target` in the dtype of the products; differentiable.
        loss: Scalar, the sum of `losses`.
        losses: Each term by name: `mse_loss` (squared error summed over d_in, mean over tokens), then `l0_loss` or `l1_loss`,
            and where dead features were given `pre_act_loss` or, of the TopK family, `auxiliary_reconstruction_loss`.
        l0: Scalar, mean number of active features per token.
        fvu: Scalar, fraction of the batch's variance left unexplained, `sum |x - sae_out|^2 / sum |x - mean x|^2`; NaN where the
            batch has none.
        feature_counts: `[d_sae]` int64, tokens of the batch on which each feature is active.
        encode_again: Recomputes the activations; set where the dense path ran and kept none.
    """

    target: Tensor
    residual: Tensor
    loss: Tensor
    losses: dict[str, Tensor]
    l0: Tensor
    fvu: Tensor
    feature_counts: Tensor
    sparse_acts: SparseActs | None
    encode_again: Callable[[], SparseActs]

    @property
    def sae_out(self) -> Tensor:
        """`[..., d_in]` reconstruction in the dtype of the products, differentiable; the pass keeps the residual alone."""
        return (self.target + self.residual).to(self.residual.dtype)

    @property
    def acts(self) -> SparseActs:
        """Activations of the flattened tokens, without gradient; active entries only.

        While activity is dense, and on a GPU, the pass keeps none and this encodes again, so read it before the
        optimiser's step.

        Raises:
            RuntimeError: The weights have changed since the pass.
        """
        if self.sparse_acts is None:
            self.sparse_acts = self.encode_again()
        return self.sparse_acts.active()
