"""The JumpReLU SAE: a learned threshold per feature, an L0 penalty with straight-through gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastsae.fields import Fields
from fastsae.sae.base import SparseAutoencoder
from fastsae.sae.config_file import SavedConfig
from fastsae.sae.dead_features import checked_mask
from fastsae.sae.outputs import TrainOutput
from fastsae_kernels import AutoencodeSpec
from fastsae_kernels.pre_act import pre_act_loss

Sparsity = Literal["step", "quadratic", "tanh"]


class FusedJumpReLUSAE(SparseAutoencoder):
    """A JumpReLU SAE whose passes never hold a `[tokens, d_sae]` tensor, forward or backward.

        hidden_pre   = x @ W_enc + b_enc                          (x - b_dec, with apply_b_dec_to_input)
        feature_acts = hidden_pre * (hidden_pre > threshold)      then the k largest of a token, if k is given
        sae_out      = feature_acts @ W_dec + b_dec

    Parameters, state dict, files and numbers are those of SAELens' `JumpReLUSAE` and `JumpReLUTrainingSAE`.

    Args:
        d_in: Width of the activations.
        d_sae: Number of features.
        bandwidth: Width of the straight-through window, in activation units.
        init_threshold: Initial threshold of every feature, in activation units.
        k: At most the k largest active features of a token survive; None is exact JumpReLU.
        apply_b_dec_to_input: Subtract `b_dec` before the encoder.
        ste_to_input: Let the straight-through estimate reach encoder and input (Anthropic, January 2025).
        log_threshold: Train `log_threshold` instead of `threshold`, its logarithm, whose gradient is threshold times that of
            the threshold; `sae.threshold` is then computed, and saved as such. Adam moves it far slower: prefer the raw one.
        decoder_init_norm: Length of each initial row of `W_dec`; SAELens' default is 0.1.
        dtype: Of the weights; `threshold` stays float32.
        device: Where the parameters are made.
        mesh: Processes that share the features; see `fastsae.shard`.

    Raises:
        TypeError: A size or `k` is no integer.
        ValueError: A size, `k`, `bandwidth`, `init_threshold` or `decoder_init_norm` is out of its range.

    Source:
        Rajamanoharan et al. 2024, arXiv:2407.14435.
    """

    architecture, file_architectures = "jumprelu", ("jumprelu",)

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        bandwidth: float = 0.05,
        init_threshold: float = 0.01,
        k: int | None = None,
        apply_b_dec_to_input: bool = False,
        ste_to_input: bool = False,
        log_threshold: bool = False,
        decoder_init_norm: float = 1.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        mesh: Any = None,
    ) -> None:
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
        if not 0 < bandwidth < math.inf:
            raise ValueError(f"bandwidth: expected a finite number > 0, got {bandwidth}")
        if not 0 <= init_threshold < math.inf:
            raise ValueError(f"init_threshold: expected a finite number >= 0, got {init_threshold}")
        if log_threshold and init_threshold == 0:
            raise ValueError(f"init_threshold: expected a number > 0 with log_threshold, got {init_threshold}")
        self.bandwidth, self.init_threshold, self.ste_to_input = bandwidth, init_threshold, ste_to_input
        threshold = torch.full((self.d_shard,), float(init_threshold), dtype=self._wide(), device=device)
        if log_threshold:
            self.log_threshold = nn.Parameter(threshold.log())
        else:
            self.threshold = nn.Parameter(threshold)

    def __getattr__(self, name: str) -> Any:
        if name == "threshold" and "log_threshold" in self._parameters:
            return self.log_threshold.exp()
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedJumpReLUSAE:
        parameter = self._parameters.get("log_threshold", self._parameters.get("threshold"))
        assert parameter is not None
        before, grad = parameter.data, parameter.grad
        super()._apply(fn, recurse)
        if parameter.dtype != self._wide():
            # a bf16 threshold stops learning: its steps are smaller than its rounding (SAELens #728)
            like: dict[str, Any] = {"device": parameter.device, "dtype": self._wide()}
            parameter.grad = None
            parameter.data = before.to(**like)
            parameter.grad = None if grad is None else grad.to(**like)
        return self

    def _own_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return dict.fromkeys(("threshold", "log_threshold"), torch.promote_types(dtype, torch.float32))

    def gate_threshold(self) -> Tensor:
        return self.threshold.clamp(min=0)

    def _spec(self, penalty: Any = "l0", tanh_scale: float = 4.0) -> AutoencodeSpec:
        # without a gradient the window's inactive entries would be listed for nothing
        bandwidth = self.bandwidth if torch.is_grad_enabled() else 0.0
        return AutoencodeSpec(
            bandwidth=bandwidth,
            k=self.k_per_token,
            penalty=penalty,
            tanh_scale=tanh_scale,
            ste_to_input=self.ste_to_input,
        )

    def training_forward(
        self,
        x: Tensor,
        l0_coefficient: float | Tensor = 1.0,
        sparsity: Sparsity = "step",
        *,
        target_l0: float | None = None,
        tanh_scale: float = 4.0,
        dead_mask: Tensor | None = None,
        pre_act_loss_coefficient: float = 3e-6,
    ) -> TrainOutput:
        """One training pass: reconstruction, sparsity and, where dead features are given, the pre-activation loss.

            mse_loss     = mean over tokens of |x - sae_out|^2
            l0_loss      = l0_coefficient * mean of  L0                                   "step"
                                                     2 / target_l0 * (L0 - target_l0)^2   "quadratic"
                                                     sum tanh(tanh_scale acts |W_dec|)    "tanh"
            pre_act_loss = pre_act_loss_coefficient * mean of sum over dead relu(threshold - hidden_pre) |W_dec|

        The same terms, reductions and gradients as SAELens' `JumpReLUTrainingSAE.training_forward_pass`.

        Args:
            x: `[..., d_in]`.
            l0_coefficient: Weight of the sparsity term.
            sparsity: Its form.
            target_l0: For `quadratic`: active features per token to aim at.
            tanh_scale: For `tanh`: how steeply an activation counts, SAELens' `jumprelu_tanh_scale`.
            dead_mask: `[d_sae]` bool, or zeros and ones, features to pull back towards firing.
            pre_act_loss_coefficient: Weight of that pull.

        Raises:
            ValueError: `sparsity` is unknown, `target_l0` is missing or not positive, `tanh_scale` not positive, or
                `dead_mask` holds other numbers, or a shape is wrong.
            TypeError: `x` is not floating-point, or `dead_mask` no tensor.
        """
        if sparsity not in get_args(Sparsity):
            raise ValueError(f"sparsity: expected one of {', '.join(get_args(Sparsity))}, got {sparsity!r}")
        if sparsity == "quadratic" and not (target_l0 is not None and target_l0 > 0):
            raise ValueError(f"target_l0: expected a number > 0 with sparsity='quadratic', got {target_l0}")
        if not 0 < tanh_scale < math.inf:
            raise ValueError(f"tanh_scale: expected a finite number > 0, got {tanh_scale}")
        x = self._checked(x)
        self.threshold.data.clamp_(min=0)  # .data: an earlier pass may still wait for its backward
        if sparsity == "tanh":
            output = self._autoencode(x, self._spec("tanh", tanh_scale), self.decoder_norms(), target=x)
        else:
            output = self._autoencode(x, target=x)
        penalty = output.penalty
        if sparsity == "quadratic":
            assert target_l0 is not None
            penalty = (penalty - target_l0).square() * (2 / target_l0)
        losses = {"l0_loss": l0_coefficient * penalty.mean()}
        if dead_mask is not None:
            losses["pre_act_loss"] = pre_act_loss_coefficient * self._pre_act_loss(x, dead_mask)
        return self._train_output(x, output, losses)

    def _pre_act_loss(self, x: Tensor, dead_mask: Tensor) -> Tensor:
        dead = checked_mask(dead_mask, self.d_shard)
        pre_bias = self._pre_bias()
        x = x if self.sharding is None else self.sharding.share(x, "x")
        sae_in = (x - pre_bias if self.apply_b_dec_to_input else x).reshape(-1, self.d_in)
        loss = pre_act_loss(sae_in, self.W_enc, self.b_enc, self.threshold, self.decoder_norms(), dead)
        if self.sharding is None:
            return loss
        # a process without dead features takes part in the exchange of the gradient too
        return self.sharding.sum_of_parts(loss + pre_bias[:0].sum() + x[:0].sum())

    @torch.no_grad()
    def shift_gates_(self, shift: Tensor) -> None:
        """Lets every feature fire only where `hidden_pre` is larger by `shift`, a scalar, than it had to be; in place.

        The thresholds move, and what would take one below 0 moves its feature's bias instead.
        """
        shifted = self.threshold.detach() + shift
        # .data: an earlier pass may still wait for its backward
        self.b_enc.data.sub_(shifted.clamp(max=0).to(self.dtype))
        shifted.clamp_(min=0)
        if "log_threshold" in self._parameters:
            smallest = torch.finfo(shifted.dtype).tiny  # the logarithm of 0 could never rise again
            self.log_threshold.data.copy_(shifted.clamp(min=smallest).log())
        else:
            self.threshold.data.copy_(shifted)

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:  # noqa: N802 - SAELens' name
        norms = self._foldable_norms()
        super().fold_W_dec_norm()
        if "log_threshold" in self._parameters:
            self.log_threshold.add_(norms.log())
        else:
            self.threshold.mul_(norms)

    @torch.no_grad()
    def fold_activation_scale_(self, scale: float) -> None:
        super().fold_activation_scale_(scale)
        if "log_threshold" in self._parameters:
            self.log_threshold.sub_(math.log(scale))
        else:
            self.threshold.div_(scale)
        self.bandwidth, self.init_threshold = self.bandwidth / scale, self.init_threshold / scale

    def config(self) -> dict[str, Any]:
        return {
            **super().config(),
            "bandwidth": self.bandwidth,
            "init_threshold": self.init_threshold,
            "ste_to_input": self.ste_to_input,
            "log_threshold": "log_threshold" in self._parameters,
        }

    def saelens_options(self) -> dict[str, Any]:
        return {f"jumprelu_{name}": getattr(self, name) for name in ("bandwidth", "init_threshold", "ste_to_input")}

    def to_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        keys, state = super().to_files()
        if "log_threshold" in state:
            state["threshold"] = state.pop("log_threshold").exp()
        return keys, state

    @classmethod
    def arguments_from(cls, config: SavedConfig) -> dict[str, Any]:
        own = config.own
        names = "architecture k bandwidth init_threshold ste_to_input log_threshold"
        own.check_names(names.split())
        theirs = config.keys  # a checkpoint of SAELens' training class; of another folder SAELens keeps its options so:
        if "jumprelu_bandwidth" not in theirs:
            theirs = Fields(config.metadata, "metadata.").fields("training_architecture_details", default={})
        arguments = {
            "k": own.integer("k", 1, config.d_sae, default=None),
            "bandwidth": own.number(
                "bandwidth", 0, above=True, default=theirs.number("jumprelu_bandwidth", 0, above=True, default=0.05)
            ),
            "log_threshold": own.boolean("log_threshold", default=False),
            "ste_to_input": own.boolean("ste_to_input", default=theirs.boolean("jumprelu_ste_to_input", default=False)),
        }
        lowest: dict[str, Any] = {"low": 0, "above": arguments["log_threshold"]}
        initial = theirs.number("jumprelu_init_threshold", 0, default=0.01)
        return {**arguments, "init_threshold": own.number("init_threshold", default=initial, **lowest)}

    @classmethod
    def file_shapes(cls, config: SavedConfig) -> dict[str, tuple[int, ...]]:
        return {**super().file_shapes(config), "threshold": (config.d_sae,)}

    @classmethod
    def state_from(cls, config: SavedConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not config.own.boolean("log_threshold", default=False):
            return tensors
        state = dict(tensors)
        threshold = state.pop("threshold")
        if (threshold < 0).any():
            raise ValueError("threshold: expected numbers >= 0, whose logarithm is trained, got a negative one")
        return {**state, "log_threshold": threshold.log()}
