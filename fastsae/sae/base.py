"""The shared base of the sparse autoencoders: parameters, initialisation, and the ops that run them."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastsae_kernels as kernels
from fastsae.sae.compute_copies import ComputeCopies
from fastsae.sae.inference import (
    FeatureWeights,
    TopActivations,
    check_feature_ids,
    check_integer,
    columns,
    from_sparse_tensor,
    top_activations,
)
from fastsae.sae.outputs import TrainOutput, fraction_of_variance_unexplained
from fastsae.sae.shared_features import SharedFeatures
from fastsae.sae.storage import StoredModule
from fastsae_kernels import ActivityHint, AutoencodeOutput, AutoencodeSpec, Collector, SparseActs, reference
from fastsae_kernels.memory import version_of
from fastsae_kernels.weight_gradients import PassCollector


class SparseAutoencoder(SharedFeatures, StoredModule, ABC):
    """Encoder, gate and decoder with SAELens' parameter names; a subclass says what the gate and the penalty are.

    All parameters of a new module are contiguous, as every module's. The kernels read `W_enc` fastest where it is stored
    feature by feature: `store_by_feature_` does that, and `FusedSAEAdam` calls it.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        k: int | None = None,
        apply_b_dec_to_input: bool = False,
        decoder_init_norm: float = 1.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        mesh: Any = None,
    ) -> None:
        super().__init__()
        if not 0 < decoder_init_norm < math.inf:
            raise ValueError(f"decoder_init_norm: expected a finite number > 0, got {decoder_init_norm}")
        self.d_in, self.d_sae = check_integer("d_in", d_in), check_integer("d_sae", d_sae)
        self.k = None if k is None else check_integer("k", k, self.d_sae)
        self.apply_b_dec_to_input, self.decoder_init_norm = apply_b_dec_to_input, decoder_init_norm
        self.metadata: dict[str, Any] = {}
        d_shard = self._share_over(mesh)
        self._activity = ActivityHint()
        self.collector = Collector()
        self._compute_copies: weakref.ref[ComputeCopies] | None = None  # lives as long as its optimiser
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.W_enc = nn.Parameter(torch.empty(d_in, d_shard, **factory))
        self.b_enc = nn.Parameter(torch.zeros(d_shard, **factory))
        self.W_dec = nn.Parameter(torch.empty(d_shard, d_in, **factory))
        self.b_dec = nn.Parameter(torch.zeros(d_in, **factory))
        self.reset_parameters()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compute_copies": None}  # a copy is no optimiser's

    def use_compute_copies(self, copies: ComputeCopies) -> None:
        """Takes an optimiser's 16-bit copies of the weights instead of casting them, for as long as `copies` lives."""
        self._compute_copies = weakref.ref(copies)

    def _for_products(self, W: Tensor) -> Tensor:
        copies = self._compute_copies() if self._compute_copies else None
        return W if copies is None else copies.take(W)

    def reset_parameters(self) -> None:
        """Draws `W_dec` Kaiming-uniform with rows of `decoder_init_norm`, `W_enc` as its transpose, and biases of 0."""
        with torch.no_grad():
            self._draw_decoder_()
            self.normalize_decoder_()
            self.W_dec.mul_(self.decoder_init_norm)
            self.W_enc.copy_(self.W_dec.t())
            self.b_enc.zero_()
            self.b_dec.zero_()

    @torch.no_grad()
    def store_by_feature_(self) -> None:
        """Stores `W_enc` as `[d_sae, d_in]` in memory and views it as `[d_in, d_sae]`; shape, values and parameter stay."""
        self.W_enc.data = self.W_enc.data.t().contiguous().t()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = f"{prefix}W_enc"
        if name in destination and not keep_vars:  # safetensors, for one, takes contiguous tensors alone
            destination[name] = destination[name].contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        weights = state_dict.get(f"{prefix}W_enc", self.W_enc)
        for name, dtype in self._own_dtypes(weights.dtype).items():
            key = f"{prefix}{name}"
            if key in state_dict:  # `assign=True` takes tensors as they are
                state_dict[key] = state_dict[key].to(dtype)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; `threshold` is float32 whatever it is."""
        return self.W_enc.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.W_enc.device

    def _own_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """By name, the dtypes of the tensors that do not follow the weights, where those have the given one."""
        return {}

    def _wide(self) -> torch.dtype:
        """What gates, norms and losses are computed in: float32, and float64 where the weights are."""
        return torch.promote_types(self.dtype, torch.float32)

    @abstractmethod
    def gate_threshold(self) -> Tensor:
        """`[d_sae]` float32, >= 0: a feature is active strictly above it."""

    @property
    def k_per_token(self) -> int | None:
        """At most this many features of a token are active at inference; None where each feature's gate decides alone."""
        return self.k

    def _spec(self, penalty: Any = "l0") -> AutoencodeSpec:
        return AutoencodeSpec(k=self.k_per_token, penalty=penalty)

    def _rescaling(self, ids: Tensor | None = None) -> Tensor | None:
        """`[d_sae]` factor between a feature's pre-activation and what gate and top-k see; None for 1."""
        return None

    def _encoder(self, scale: Tensor | None, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`W_enc` and `b_enc` as the ops take them, of the features `ids` alone where given."""
        W_enc: Tensor = self.W_enc
        b_enc: Tensor = self.b_enc
        if ids is not None:
            W_enc, b_enc = W_enc.t().index_select(0, ids).t(), b_enc.index_select(0, ids)
        if scale is None:
            return W_enc, b_enc
        return (W_enc * scale).to(self.dtype), (b_enc * scale).to(self.dtype)

    def _decoder(self, scale: Tensor | None, ids: Tensor | None = None) -> Tensor:
        """`W_dec` as the ops take it, of the features `ids` alone where given."""
        W_dec = self.W_dec if ids is None else self.W_dec.index_select(0, ids)
        return self._for_products(W_dec) if scale is None else (W_dec / scale[:, None]).to(self.dtype)

    def _checked(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() == 0 or x.shape[-1] != self.d_in:
            raise ValueError(f"x: expected last dimension d_in = {self.d_in}, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
        return x.to(self.dtype)

    def _sae_in(self, x: Tensor) -> Tensor:
        return x - self.b_dec if self.apply_b_dec_to_input else x

    def _encoder_inputs(
        self, x: Tensor, scale: Tensor | None, ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the ops encode, `W_enc` and `b_enc`; only together do they give every gradient."""
        W_enc, b_enc = self._encoder(scale, ids)
        if self.apply_b_dec_to_input:
            x, b_enc = kernels.subtract_pre_bias(x, self._pre_bias(), W_enc, b_enc)
        return x, self._for_products(W_enc), b_enc  # the bias took the weight itself, in its own dtype

    def _autoencode(
        self,
        x: Tensor,
        spec: AutoencodeSpec | None = None,
        feature_scale: Tensor | None = None,
        threshold: Tensor | None = None,
        target: Tensor | None = None,
    ) -> AutoencodeOutput:
        """One pass over a checked x. In training x is the target too, and the first output is the residual."""
        scale = self._rescaling()
        output: AutoencodeOutput = self._ops.autoencode(
            *self._encoder_inputs(x, scale),
            self.gate_threshold() if threshold is None else threshold,
            self._decoder(scale),
            self.b_dec,
            spec=spec or self._spec(),
            target=target,
            feature_scale=feature_scale,
            hint=self._activity,
            # the gradient of a rescaled weight is not that of the parameter
            collector=self._pass_collector() if scale is None else None,
        )
        return output

    @abstractmethod
    def training_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> TrainOutput:
        """One training pass over `x`, `[..., d_in]`: reconstruction, and the losses of the architecture, whose weights follow."""

    def _pass_collector(self) -> PassCollector | None:
        """None where a weight is computed from others, as by a parametrization: its gradient goes on to them."""
        W_enc, W_dec = (self._parameters.get(name) for name in ("W_enc", "W_dec"))
        return None if W_enc is None or W_dec is None else self.collector.of(W_enc, W_dec)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructs `x`, `[..., d_in]`; differentiable. While activity is sparse it allocates no `[N, d_sae]` tensor.

        Raises:
            ValueError: The last dimension of `x` is not `d_in`.
            TypeError: `x` is not floating-point.
        """
        return self._autoencode(self._checked(x)).sae_out

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations as a dense tensor, `[..., d_sae]`; differentiable. Allocates what it returns."""
        return self._encode_all(x) if self._is_shared else self._encode_dense(x)

    def _encode_all(self, x: Tensor) -> Tensor:
        """`[..., d_sae]`, the active features made dense."""
        return self.encode_sparse(x).to_dense().reshape(*x.shape[:-1], self.d_sae).to(self.dtype)

    def _encode_dense(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        spec, threshold = self._spec(), self.gate_threshold()
        acts = reference.encode(
            self._sae_in(self._checked(x)),
            *self._encoder(self._rescaling(ids), ids),
            threshold if ids is None else threshold.index_select(0, ids),
            bandwidth=spec.bandwidth,
            k=spec.k,
            ste_to_input=spec.ste_to_input,
        )
        return acts.to(self.dtype)

    def encode_sparse(self, x: Tensor) -> SparseActs:
        """The active features of each token, without a dense tensor; leading dimensions are flattened.

        Differentiable in `.values`, but for the threshold, whose estimate needs inactive entries too.
        """
        return self._encode_sparse(x, self.k_per_token)

    def _encode_sparse(
        self, x: Tensor, k: int | None, threshold: Tensor | None = None, *, batch_topk: bool = False
    ) -> SparseActs:
        x, W_enc, b_enc = self._encoder_inputs(self._checked(x), self._rescaling())
        threshold = self.gate_threshold() if threshold is None else threshold
        acts: SparseActs = self._ops.encode(
            x.reshape(-1, self.d_in), W_enc, b_enc, threshold, k=k, batch_topk=batch_topk
        )
        return acts

    def encode_topk(self, x: Tensor, k: int) -> TopActivations:
        """The `k` largest activations of each token and their features, without a dense tensor.

        Like `encode(x).topk(k)`, but sorted, and exact about ties: equal values go to the lower feature. Where fewer than
        `k` features of a token are active, value 0 and feature 0 fill the rest. Differentiable in `values`, but for the
        threshold.

        Args:
            x: `[..., d_in]`.
            k: How many, from 1 to `d_sae`.

        Returns:
            `values` `[..., k]` fp32 (fp64 for an fp64 module) and `indices` `[..., k]` int64.

        Raises:
            TypeError: `k` is no integer, or `x` not floating-point.
            ValueError: `k` is out of range, or the last dimension of `x` is not `d_in`.
        """
        k = check_integer("k", k, self.d_sae)
        acts = self._encode_sparse(x, min(k, self.k_per_token or k))
        values, indices = top_activations(acts, k)
        shape = (*x.shape[:-1], k)
        return TopActivations(values.reshape(shape), indices.reshape(shape))

    def encode_features(self, x: Tensor, feature_ids: Sequence[int] | Tensor) -> Tensor:
        """Activations of some features, `[..., n_ids]`: `encode(x)[..., feature_ids]`, ids in any order, repeats allowed.

        Costs a product with those columns alone where each feature has its own gate. With a `k` per token a feature's
        activation depends on all others: then the sparse encode runs and the features are picked from its entries, and a
        threshold gets no gradient.

        Args:
            x: `[..., d_in]`.
            feature_ids: `[n_ids]` integers from 0 to `d_sae - 1`.

        Raises:
            TypeError: `feature_ids` are no integers, or `x` is not floating-point.
            ValueError: An id is out of range, or the last dimension of `x` is not `d_in`.
        """
        ids = check_feature_ids(feature_ids, self.d_sae, self.device)
        if self.k_per_token is None and not self._is_shared:
            return self._encode_dense(x, ids)
        acts = columns(self.encode_sparse(x), ids)
        return acts.reshape(*x.shape[:-1], ids.numel()).to(self.dtype)

    def feature_weights(self, feature_ids: Sequence[int] | Tensor) -> FeatureWeights:
        """The weights of some features, in any order; raises as `encode_features` does."""
        ids = check_feature_ids(feature_ids, self.d_sae, self.device)
        if self._is_shared:
            raise ValueError("feature_weights: expected an SAE whose features one process holds; save it, and load it")
        scale, threshold = self._rescaling(ids), self.gate_threshold().index_select(0, ids)
        return FeatureWeights(*self._encoder(scale, ids), threshold, self._decoder(scale, ids))

    def decode(self, acts: Tensor | SparseActs) -> Tensor:
        """The reconstruction from dense `[..., d_sae]` or sparse activations, `[..., d_in]`, of `SparseActs` `[N, d_in]`.

        A sparse tensor of PyTorch, of any number of dimensions, is not made dense.

        Raises:
            TypeError: `acts` is neither a tensor nor `SparseActs`, or a sparse tensor with dense dimensions.
            ValueError: Its last dimension is not `d_sae`.
        """
        W_dec = self._decoder(self._rescaling())
        if isinstance(acts, SparseActs):
            return self._decode_sparse(acts, W_dec)
        if not isinstance(acts, Tensor):
            raise TypeError(f"acts: expected a torch.Tensor or SparseActs, got {type(acts).__name__}")
        if acts.dim() == 0 or acts.shape[-1] != self.d_sae:
            raise ValueError(f"acts: expected last dimension d_sae = {self.d_sae}, got shape {tuple(acts.shape)}")
        if acts.layout is not torch.strided:
            sae_out = self._decode_sparse(from_sparse_tensor(acts, self._wide()), W_dec)
            return sae_out.reshape(*acts.shape[:-1], self.d_in)
        if self._is_shared:
            return self.decode(acts.to_sparse())
        return reference.decode(acts.to(self.dtype), W_dec, self.b_dec)

    def _decode_sparse(self, acts: SparseActs, W_dec: Tensor) -> Tensor:
        sae_out: Tensor = self._ops.decode(acts, W_dec, self.b_dec)
        return sae_out

    def _train_output(self, x: Tensor, output: AutoencodeOutput, losses: dict[str, Tensor]) -> TrainOutput:
        per_token = output.squared_error
        assert per_token is not None
        losses = {"mse_loss": per_token.mean(), **losses}
        with torch.no_grad():
            fvu = fraction_of_variance_unexplained(per_token, x.reshape(-1, self.d_in), self._wide())
        return TrainOutput(
            target=x,
            residual=output.sae_out,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
            l0=output.l0.float().mean(),
            fvu=fvu,
            feature_counts=output.feature_counts,
            sparse_acts=output.acts,
            encode_again=self._encode_again(x),
        )

    def _encode_again(self, x: Tensor) -> Callable[[], SparseActs]:
        version, device_type = version_of(self.W_enc), self.device.type
        autocast, autocast_dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

        def encode() -> SparseActs:
            if version_of(self.W_enc) != version:
                raise RuntimeError(
                    "acts: the weights have changed since this pass; read `acts` before the optimiser's step"
                )
            with torch.no_grad(), torch.autocast(device_type, autocast_dtype, autocast):
                return self._encode_training(x.detach())

        return encode

    def _encode_training(self, x: Tensor) -> SparseActs:
        """The active features that a training pass over `x` has."""
        return self.encode_sparse(x)

    def decoder_norms(self) -> Tensor:
        """`[d_sae]` fp32 (fp64 for an fp64 module), differentiable: length of each feature's direction."""
        return self.W_dec.to(self._wide()).norm(dim=1)

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Gives each row of `W_dec` unit norm, in place; activations are not compensated."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8))

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:  # noqa: N802 - SAELens' name
        """Moves the length of each row of `W_dec` into the encoder, in place: unit rows, and the same reconstruction.

        Activations are then multiplied by that length; so is a threshold, but not the bandwidth of its gradient.

        Raises:
            NotImplementedError: The `k` largest activations would become others, or a parametrization computes a weight.
        """
        if not {"W_enc", "b_enc", "W_dec"} <= self._parameters.keys():
            raise NotImplementedError(
                "fold_W_dec_norm: expected weights that are parameters; remove the parametrization"
            )
        self._check_foldable()
        norms = self._foldable_norms()
        self.W_dec.div_(norms[:, None])
        self.W_enc.mul_(norms)
        self.b_enc.mul_(norms)

    def _foldable_norms(self) -> Tensor:
        """`[d_sae]` as `decoder_norms`, but never 0: a row of zeros stays one."""
        return self.decoder_norms().clamp_min(1e-8)

    def _check_foldable(self) -> None:
        if self.k is not None:
            raise NotImplementedError(
                "fold_W_dec_norm: the k largest activations of a token would become others, because folding multiplies "
                "each by its decoder row's norm"
            )

    @torch.no_grad()
    def fold_activation_scale_(self, scale: float) -> None:
        """Rewrites an SAE trained on `scale * x` as the equal one on `x`: everything in activation units is divided by `scale`.

        sae'(x) = sae(scale * x) / scale        W unchanged; b_enc, b_dec, threshold, bandwidth /= scale
        """
        self.b_enc.div_(scale)
        self.b_dec.div_(scale)
