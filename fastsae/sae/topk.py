"""The TopK SAE, and what it shares with BatchTopK: no threshold to learn, rescaling by decoder norms, AuxK."""

from __future__ import annotations

from abc import ABC
from typing import Any

import torch
from torch import Tensor

from fastsae.fields import Fields
from fastsae.sae.aux_k import aux_k_loss
from fastsae.sae.base import SparseAutoencoder
from fastsae.sae.config_file import SavedConfig
from fastsae.sae.dead_features import DeadFeatures
from fastsae.sae.outputs import TrainOutput
from fastsae_kernels import AutoencodeOutput


class TopKFamily(SparseAutoencoder, ABC):
    """SAEs whose sparsity is a count: the largest pre-activations survive, ReLU'd, and there is no sparsity loss.

    `rescale_acts_by_decoder_norm` multiplies pre-activations by their decoder row's norm before the choice and divides by
    it again in the decoder, so that a feature's rank does not depend on how its scale is split between encoder and
    decoder. The ops never see it: they are given `W_enc * |W_dec|`, `b_enc * |W_dec|` and `W_dec / |W_dec|`, tensors of the
    weights' size, through which the gradient of the norm flows.
    """

    k: int

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        apply_b_dec_to_input: bool = True,
        rescale_acts_by_decoder_norm: bool = True,
        decoder_init_norm: float = 1.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        mesh: Any = None,
    ) -> None:
        if k is None:
            raise TypeError(f"k: expected an integer from 1 to d_sae = {d_sae}, got None")
        super().__init__(
            d_in,
            d_sae,
            k=k,
            apply_b_dec_to_input=apply_b_dec_to_input,
            decoder_init_norm=decoder_init_norm,
            dtype=dtype,
            device=device,
            mesh=mesh,
        )
        self.rescale_acts_by_decoder_norm = rescale_acts_by_decoder_norm
        self._dead = DeadFeatures()

    def gate_threshold(self) -> Tensor:
        return torch.zeros(self.d_shard, dtype=self._wide(), device=self.device)

    def _rescaling(self, ids: Tensor | None = None) -> Tensor | None:
        if not self.rescale_acts_by_decoder_norm:
            return None
        W_dec = self.W_dec if ids is None else self.W_dec.index_select(0, ids)
        return W_dec.to(self._wide()).norm(dim=1).clamp_min(1e-8)  # SAELens' floor: a zero row stays a zero row

    def _train_output_with_aux(
        self, x: Tensor, output: AutoencodeOutput, dead_mask: Tensor | None, aux_loss_coefficient: float | Tensor
    ) -> TrainOutput:
        losses = {}
        if dead_mask is not None:
            loss = aux_k_loss(self, self._dead, x, output.sae_out, dead_mask)
            losses["auxiliary_reconstruction_loss"] = aux_loss_coefficient * loss
        return self._train_output(x, output, losses)

    def _check_shardable(self) -> None:
        """The k largest of a token are found among the features of all processes."""

    def _check_foldable(self) -> None:
        if not self.rescale_acts_by_decoder_norm:  # with it a feature's rank is that of the folded one already
            super()._check_foldable()

    def saelens_options(self) -> dict[str, Any]:
        return {"k": self.k, "rescale_acts_by_decoder_norm": self.rescale_acts_by_decoder_norm}

    def config(self) -> dict[str, Any]:
        return {**super().config(), "rescale_acts_by_decoder_norm": self.rescale_acts_by_decoder_norm}


def family_arguments(saved: Fields, d_sae: int, *, rescale: bool) -> dict[str, Any]:
    """Constructor arguments from SAELens' keys, `rescale` where they do not say.

    Raises:
        ValueError: `k` is missing or out of its range, or a value is of the wrong type.
    """
    k = saved.get("k", None)
    if isinstance(k, float) and k.is_integer():
        saved = Fields({**saved.values, "k": int(k)}, saved.place)  # SAELens' BatchTopK writes 32.0
    return {
        "k": saved.integer("k", 1, d_sae),
        "rescale_acts_by_decoder_norm": saved.boolean("rescale_acts_by_decoder_norm", default=rescale),
    }


class FusedTopKSAE(TopKFamily):
    """A TopK SAE whose passes never hold a `[tokens, d_sae]` tensor, forward or backward.

        hidden_pre   = (x - b_dec) @ W_enc + b_enc                (x alone, without apply_b_dec_to_input)
        hidden_pre   = hidden_pre * |W_dec|                       with rescale_acts_by_decoder_norm
        feature_acts = relu of the k largest hidden_pre of a token; ties go to the lower feature
        sae_out      = feature_acts @ W_dec + b_dec               (W_dec / |W_dec|, with rescale_acts_by_decoder_norm)

    Parameters, state dict, files and numbers are those of SAELens' `TopKSAE` and `TopKTrainingSAE`; the auxiliary
    loss differs in one point (see `fastsae.sae.aux_k.aux_k_loss`).

    Args:
        d_in: Width of the activations.
        d_sae: Number of features.
        k: How many features of a token are active at most; fewer where fewer are positive.
        apply_b_dec_to_input: Subtract `b_dec` before the encoder, as all peers do.
        rescale_acts_by_decoder_norm: Choose by `hidden_pre * |W_dec|`, SAELens' default in training.
        decoder_init_norm: Length of each initial row of `W_dec`; SAELens' default is 0.1.
        dtype: Of the weights.
        device: Where the parameters are made.
        mesh: Processes that share the features; see `fastsae.shard`.

    Raises:
        TypeError: A size or `k` is no integer.
        ValueError: A size or `k` is out of its range.

    Source:
        Gao et al. 2024, arXiv:2406.04093.
    """

    architecture, file_architectures = "topk", ("topk",)

    def encode(self, x: Tensor) -> Tensor:
        return self._encode_all(x)  # a dense top-k would have to sort [N, d_sae]

    def to_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"architecture": self.architecture, **self.config()}, self.state_dict()

    @classmethod
    def arguments_from(cls, config: SavedConfig) -> dict[str, Any]:
        return family_arguments(config.keys, config.d_sae, rescale=False)

    def training_forward(
        self, x: Tensor, *, dead_mask: Tensor | None = None, aux_loss_coefficient: float | Tensor = 1.0
    ) -> TrainOutput:
        """One training pass: reconstruction and, where dead features are given, the AuxK loss that revives them.

            mse_loss                      = mean over tokens of |x - sae_out|^2
            auxiliary_reconstruction_loss = aux_loss_coefficient * min(n_dead / k_aux, 1) * mean of |e - e_hat|^2

        with e the detached residual, and e_hat its reconstruction by the k_aux = d_in // 2 largest dead features.

        Args:
            x: `[..., d_in]`.
            dead_mask: `[d_sae]` bool, or zeros and ones, features to revive. Its ids are looked up once per mask, which
                waits for a GPU, so hand in the same tensor until it changes. Breaks a graph of `torch.compile`.
            aux_loss_coefficient: Weight of the auxiliary loss.

        Raises:
            TypeError: `x` is not floating-point, or `dead_mask` no tensor.
            ValueError: A shape is wrong, or `dead_mask` holds other numbers.
        """
        x = self._checked(x)
        return self._train_output_with_aux(x, self._autoencode(x, target=x), dead_mask, aux_loss_coefficient)
