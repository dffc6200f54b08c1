"""The standard SAE: ReLU with an L1 penalty."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.sae.base import SparseAutoencoder
from fastsae.sae.outputs import TrainOutput


class FusedReLUSAE(SparseAutoencoder):
    """A ReLU SAE with an L1 penalty, on the same ops as `FusedJumpReLUSAE`.

        feature_acts = relu(x @ W_enc + b_enc) ;  sae_out = feature_acts @ W_dec + b_dec

    Parameters, state dict, files and numbers are those of SAELens' `StandardSAE` and `StandardTrainingSAE`.

    Args:
        d_in: Width of the activations.
        d_sae: Number of features.
        k: At most the k largest active features of a token survive; None keeps all.
        apply_b_dec_to_input: Subtract `b_dec` before the encoder.
        decoder_init_norm: Length of each initial row of `W_dec`; SAELens' default is 0.1.
        dtype: Of the weights.
        device: Where the parameters are made.
        mesh: Processes that share the features; see `fastsae.shard`.

    Source:
        Bricken et al. 2023, "Towards Monosemanticity".
    """

    architecture, file_architectures = "standard", ("standard",)

    def gate_threshold(self) -> Tensor:
        return torch.zeros_like(self.b_enc, dtype=self._wide())

    @torch.no_grad()
    def shift_gates_(self, shift: Tensor) -> None:
        """Lets every feature fire only where `hidden_pre` is larger by `shift`, a scalar, than it had to be; in place."""
        self.b_enc.data.sub_(shift.to(self.dtype))  # .data: an earlier pass may still wait for its backward

    def training_forward(
        self, x: Tensor, l1_coefficient: float | Tensor = 1.0, *, scale_by_decoder_norm: bool = True
    ) -> TrainOutput:
        """One training pass.

            mse_loss = mean over tokens of |x - sae_out|^2
            l1_loss  = l1_coefficient * mean over tokens of sum feature_acts * |W_dec|

        Args:
            x: `[..., d_in]`.
            l1_coefficient: Weight of the sparsity term.
            scale_by_decoder_norm: Multiply each activation by its decoder row's norm, as SAELens does; without it a free
                decoder escapes the penalty by growing.
        """
        x, scale = self._checked(x), self.decoder_norms() if scale_by_decoder_norm else None
        output = self._autoencode(x, self._spec("l1"), scale, target=x)
        return self._train_output(x, output, {"l1_loss": l1_coefficient * output.penalty.mean()})
