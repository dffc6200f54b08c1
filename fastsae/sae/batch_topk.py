"""The BatchTopK SAE: k features per token on average in training, one threshold for all at inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsae.fields import Fields
from fastsae.sae.config_file import SavedConfig
from fastsae.sae.outputs import TrainOutput
from fastsae.sae.topk import TopKFamily, family_arguments
from fastsae_kernels import AutoencodeSpec, SparseActs


class FusedBatchTopKSAE(TopKFamily):
    """A BatchTopK SAE whose passes never hold a `[tokens, d_sae]` tensor, forward or backward.

        training:   feature_acts = relu of the k * N largest hidden_pre of the whole batch of N tokens
        inference:  feature_acts = hidden_pre * (hidden_pre > topk_threshold)

    with `hidden_pre` and `sae_out` as in `FusedTopKSAE`. Only `training_forward` chooses by batch. `forward`, `encode` and
    all other methods use the threshold, in `train()` and `eval()` mode alike, so that what a token gives never depends on
    its neighbours. (SAELens' training class chooses by batch there too, until it is saved for inference.)

    `topk_threshold` is a buffer, a float64 scalar whatever the dtype: the moving average of the smallest surviving
    activation, which moves by `topk_threshold_lr` of the way per `training_forward`, from 0, as in SAELens. So it needs some
    hundred steps to settle, and before the first one inference is a plain ReLU, about half of all features active, in
    SAELens and dictionary_learning alike.

    Parameters, state dict and numbers are those of SAELens' `BatchTopKTrainingSAE`. Saved as SAELens saves it for
    inference: as a `jumprelu` SAE with that threshold and decoder norms folded into the encoder. `load` makes of it a
    `FusedBatchTopKSAE` that can train on, `FusedJumpReLUSAE.load` a JumpReLU SAE.

    Args:
        d_in: Width of the activations.
        d_sae: Number of features.
        k: Average number of active features of a token in training, an integer.
        apply_b_dec_to_input: Subtract `b_dec` before the encoder, as all peers do.
        rescale_acts_by_decoder_norm: Choose by `hidden_pre * |W_dec|`, SAELens' default.
        topk_threshold_lr: Weight of the new value in the moving average `topk_threshold`.
        decoder_init_norm: Length of each initial row of `W_dec`; SAELens' default is 0.1.
        dtype: Of the weights.
        device: Where the parameters are made.
        mesh: Processes that share the features; see `fastsae.shard`.

    Raises:
        TypeError: A size or `k` is no integer.
        ValueError: A size or `k` is out of its range.

    Source:
        Bussmann et al. 2024, arXiv:2412.06410.
    """

    architecture: ClassVar[str] = "batchtopk"
    file_architectures: ClassVar[tuple[str, ...]] = ("batchtopk", "jumprelu")
    topk_threshold: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        apply_b_dec_to_input: bool = True,
        rescale_acts_by_decoder_norm: bool = True,
        topk_threshold_lr: float = 0.01,
        decoder_init_norm: float = 1.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        mesh: Any = None,
    ) -> None:
        super().__init__(
            d_in,
            d_sae,
            k,
            apply_b_dec_to_input=apply_b_dec_to_input,
            rescale_acts_by_decoder_norm=rescale_acts_by_decoder_norm,
            decoder_init_norm=decoder_init_norm,
            dtype=dtype,
            device=device,
            mesh=mesh,
        )
        if not 0 < topk_threshold_lr <= 1:
            raise ValueError(f"topk_threshold_lr: expected a number > 0 and <= 1, got {topk_threshold_lr}")
        self.topk_threshold_lr = topk_threshold_lr
        self.register_buffer("topk_threshold", torch.zeros((), dtype=torch.float64, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedBatchTopKSAE:
        before = self.topk_threshold
        super()._apply(fn, recurse)
        if self.topk_threshold.dtype != torch.float64:
            # an average that moves by a hundredth per step stands still once rounded
            self.topk_threshold = before.to(self.topk_threshold.device)
        return self

    def _own_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {"topk_threshold": torch.float64}

    @property
    def k_per_token(self) -> int | None:
        return None

    def gate_threshold(self) -> Tensor:
        # a copy even in fp64: a backward may still wait for it while a training pass moves the buffer
        return self.topk_threshold.to(self._wide()).repeat(self.d_shard)

    def training_forward(
        self, x: Tensor, *, dead_mask: Tensor | None = None, aux_loss_coefficient: float | Tensor = 1.0
    ) -> TrainOutput:
        """One training pass, as `FusedTopKSAE.training_forward`, then a step of `topk_threshold`.

        Args:
            x: `[..., d_in]`; all leading dimensions are the batch.
            dead_mask: `[d_sae]` bool, or zeros and ones, features to revive; see there.
            aux_loss_coefficient: Weight of the auxiliary loss.

        Raises:
            TypeError: `x` is not floating-point, or `dead_mask` no tensor.
            ValueError: A shape is wrong, or `dead_mask` holds other numbers.
        """
        spec = AutoencodeSpec(k=self.k, batch_topk=True)
        x = self._checked(x)
        output = self._autoencode(x, spec, threshold=super().gate_threshold(), target=x)
        assert output.min_active is not None  # the op gives it with batch_topk
        self._move_threshold(output.min_active)
        return self._train_output_with_aux(x, output, dead_mask, aux_loss_coefficient)

    def _encode_training(self, x: Tensor) -> SparseActs:
        return self._encode_sparse(x, self.k, super().gate_threshold(), batch_topk=True)

    @torch.no_grad()
    def _move_threshold(self, min_active: Tensor) -> None:
        """One step towards the smallest active value, on the device; none where nothing is active (+inf)."""
        # a view of one dimension: graphs of torch.compile lose what is written to an fp64 scalar of a CPU (torch 2.13)
        old, new = self.topk_threshold.view(1), min_active.to(torch.float64)
        moved = (1 - self.topk_threshold_lr) * old + self.topk_threshold_lr * new
        old.copy_(torch.where(torch.isfinite(new), moved, old))

    @torch.no_grad()
    def calibrate_threshold_(self, x: Tensor) -> None:
        """Sets `topk_threshold` so that `k` features per token of `x` are active, in place of what the steps have averaged.

        The average starts at 0 and takes some hundred steps; this takes one pass. Where fewer than `k` features per token
        are positive, all of them are active.

        Args:
            x: `[..., d_in]`, activations like those to come; a few thousand tokens are enough.
        """
        values = self._encode_training(x).active().values
        smallest = values.amin(0, keepdim=True) if len(values) else values.new_full((1,), torch.inf)
        if self.sharding is not None:
            smallest = self.sharding.data.smallest_(smallest, "calibration")  # the choice was from the tokens of all
        if torch.isfinite(smallest):
            # the gate is strict, so the smallest value itself must lie above the threshold
            self.topk_threshold.fill_(smallest[0]).mul_(1 - 1e-6)

    @torch.no_grad()
    def fold_activation_scale_(self, scale: float) -> None:
        super().fold_activation_scale_(scale)
        self.topk_threshold.div_(scale)

    def config(self) -> dict[str, Any]:
        own = {"topk_threshold": self.topk_threshold.item(), "topk_threshold_lr": self.topk_threshold_lr}
        return {**super().config(), **own}

    def saelens_options(self) -> dict[str, Any]:
        return {**super().saelens_options(), "topk_threshold_lr": self.topk_threshold_lr}

    @torch.no_grad()
    def to_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        state = self.state_dict()
        del state["topk_threshold"]
        scale = self._rescaling()
        state["W_enc"], state["b_enc"] = self._encoder(scale)
        state["W_dec"], state["threshold"] = self._decoder(scale), self.gate_threshold()
        return {"architecture": "jumprelu"}, state

    @classmethod
    def arguments_from(cls, config: SavedConfig) -> dict[str, Any]:
        """Also reads what SAELens' training class writes: its checkpoints, and its `jumprelu` folders for inference."""
        if config.architecture == cls.architecture:
            saved = config.keys
        elif config.own.values:
            saved = config.own
            saved.number("topk_threshold", default=0.0)
            saved.check_names(
                ["architecture", "k", "rescale_acts_by_decoder_norm", "topk_threshold", "topk_threshold_lr"]
            )
        else:
            saved = Fields(config.metadata, "metadata.").fields("training_architecture_details", default={})
            if not saved.values:
                raise ValueError(
                    "metadata: expected what a batchtopk SAE was trained with, such as k, got nothing of it"
                )
        rate = saved.number("topk_threshold_lr", 0, above=True, default=0.01)
        if rate > 1:
            raise saved.wrong("topk_threshold_lr", "a number > 0 and <= 1")
        return {**family_arguments(saved, config.d_sae, rescale=True), "topk_threshold_lr": rate}

    @classmethod
    def file_shapes(cls, config: SavedConfig) -> dict[str, tuple[int, ...]]:
        own = {"topk_threshold": ()} if config.architecture == cls.architecture else {"threshold": (config.d_sae,)}
        return {**super().file_shapes(config), **own}

    @classmethod
    def state_from(cls, config: SavedConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if "topk_threshold" in tensors:
            return tensors
        state = dict(tensors)
        threshold = state.pop("threshold")
        if not torch.equal(threshold, threshold[:1].expand_as(threshold)):
            raise ValueError("threshold: expected one for all features of a BatchTopK SAE; load it as FusedJumpReLUSAE")
        exact = torch.tensor(config.own.number("topk_threshold", default=0.0), dtype=torch.float64)
        # the tensor holds it rounded, unless somebody has set another one since
        is_same = torch.equal(exact.to(threshold.dtype), threshold[0])
        return {**state, "topk_threshold": exact if is_same else threshold[0].double()}
