"""What all SAEs of SAELens have, on the fused ops: `encode`, `decode`, `forward`, and a step of training.

Nobody calls `forward` alone: SAELens' own transformer, its evaluations and SAEBench call `encode`, then `decode`. So the
pair is what runs at inference (see `entries`), and `training_forward_pass` in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import SAE, TrainStepInput, TrainStepOutput, mse_loss
from sae_lens.saes.topk_sae import SparseHookPoint
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

import fastsae_kernels as kernels
from fastsae.peers import pair
from fastsae.peers.handle import store_transposed
from fastsae.peers.lazy import Lazy
from fastsae.peers.observers import hook_on, in_transform
from fastsae.peers.saelens_shared import MaybeShared
from fastsae.sae.inference import from_sparse_tensor
from fastsae_kernels import AutoencodeOutput, AutoencodeSpec, Collector, SparseActs
from fastsae_kernels.memory import version_of

HOOK_POINTS = (
    "hook_sae_input hook_sae_acts_pre hook_sae_acts_post hook_sae_recons hook_sae_error hook_sae_output".split()
)
METHODS = (
    "encode decode process_sae_in encode_with_hidden_pre calculate_aux_loss calculate_topk_aux_loss "
    "update_topk_threshold".split()
)
NO_NORMALISATION = (
    "SAE._setup_activation_normalization.<locals>.<lambda>"  # the name of their function that does nothing
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class FusedStepOutput(TrainStepOutput):
    """A training step whose dense tensors are made when they are read, without a gradient but for `sae_out`."""

    sae_out: Any = Lazy()
    feature_acts: Any = Lazy()
    hidden_pre: Any = Lazy()
    feature_counts: Tensor  # [d_sae] int64, tokens on which each feature is active
    l0: Tensor  # [N] int64, active features of each token


class FusedSAE(SAE, MaybeShared):
    """What every SAE of SAELens has: `encode`, `decode` and `forward` on the ops."""

    activation: type = nn.ReLU  # what `activation_fn` must be

    def _gate(self) -> Tensor:
        """`[d_sae]`, >= 0: a feature is active strictly above it."""
        return torch.zeros(len(self.W_dec), dtype=self._wide(), device=self.W_enc.device)

    def _spec(self) -> AutoencodeSpec:
        return AutoencodeSpec()

    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _rescaling(self) -> Tensor | None:
        """`[d_sae]`: what pre-activations are multiplied by for the choice of the largest, and divided by in the decoder.

        In the reconstruction the factor cancels, and so does its gradient.
        """
        if not getattr(self.cfg, "rescale_acts_by_decoder_norm", False):
            return None
        return self.W_dec.detach().to(self._wide()).norm(dim=-1)

    def _why_not(self, x: Any) -> str | None:
        """Why a call on `x` cannot take the ops."""
        if in_transform():
            return "a transform of torch.func is around it"
        for name in HOOK_POINTS:
            hook = getattr(self, name)
            if type(hook) not in (HookPoint, SparseHookPoint, nn.Identity):  # Identity: their `_disable_hooks`
                return f"{name} is not SAELens' own"
            if hook_on(hook):
                return f"a hook is attached to {name}"
        for name in METHODS:
            if name in self.__dict__:
                return f"{name} is replaced on the object"
        if type(self.activation_fn) is not self.activation or hook_on(self.activation_fn):
            return "activation_fn is not the architecture's own"
        if self.hook_z_reshaping_mode:
            return "hook_z is reshaped"
        if self.run_time_activation_norm_fn_in.__qualname__ != NO_NORMALISATION:
            return f"normalize_activations is {self.cfg.normalize_activations!r}"
        if self.W_enc.device.type not in ("cpu", "cuda") or self.W_enc.dtype not in DTYPES:
            return f"the weights are {self.W_enc.dtype} on {self.W_enc.device.type}"
        held = self.cfg.d_sae if self.sharding is None else self.sharding.end - self.sharding.start
        if self.W_enc.shape != (self.cfg.d_in, held) or self.W_dec.shape != self.W_enc.shape[::-1]:
            return "the weights are of other sizes than cfg says"  # as SAEDashboard leaves a few features in place
        if self.W_enc.dtype != self.dtype:
            return "the weights are not of the SAE's dtype"
        fits = isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0 and x.shape[-1] == self.cfg.d_in
        if not fits or x.device != self.W_enc.device:
            return "the input is of another shape, dtype or device"
        return self._why_not_options()

    def _why_not_options(self) -> str | None:
        """Why this architecture cannot, with its options as they are."""
        return None

    def _why_not_now(self) -> str | None:
        """Why this architecture cannot encode outside of a training step, with its parameters as they are."""
        return None

    def _encoder_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the ops encode, `W_enc` and `b_enc`; only together do they give every gradient."""
        x, b_enc = x.to(self.dtype), self.b_enc
        if self.cfg.apply_b_dec_to_input:
            x, b_enc = kernels.subtract_pre_bias(x, self._pre_bias(), self.W_enc, b_enc)
        return x, self.W_enc, b_enc

    def _autoencode(
        self, x: Tensor, spec: AutoencodeSpec, rank_scale: Tensor | None = None, **options: Any
    ) -> AutoencodeOutput:
        (x, W_enc, b_enc), W_dec = self._encoder_inputs(x), self.W_dec
        if self._is_shared and rank_scale is not None:  # whose ops choose by pre-activations as they are
            scale = rank_scale.clamp_min(1e-8)  # a row of zeros stays one
            W_enc, b_enc = (W_enc * scale).to(self.dtype), (b_enc * scale).to(self.dtype)
            W_dec = (W_dec / scale[:, None]).to(self.dtype)
        elif rank_scale is not None:
            options["rank_scale"] = rank_scale
        tensors = (x, W_enc, b_enc, self._gate(), W_dec, self.b_dec)
        output: AutoencodeOutput = self._ops.autoencode(*tensors, spec=spec, hint=self._fastsae.activity, **options)
        return output

    def _list(self, x: Tensor) -> tuple[SparseActs | None, str | None]:
        """The active entries of all tokens, or why there are none."""
        if pair.wants_gradient([x, *self.parameters()]):
            return None, "a gradient is asked for (call it under torch.no_grad())"
        x, W_enc, b_enc = self._encoder_inputs(x)
        scale = self._rescaling()
        if scale is not None:
            W_enc, b_enc = (W_enc * scale).to(self.dtype), (b_enc * scale).to(self.dtype)
        x, gate, spec = x.reshape(-1, self.cfg.d_in), self._gate(), self._spec()
        if not self._is_shared and (len(x) == 0 or (spec.k is None and pair.is_dense(x, W_enc, b_enc, gate))):
            return None, "too many features are active"
        try:
            return self._ops.encode(x, W_enc, b_enc, gate, k=spec.k, batch_topk=spec.batch_topk), None
        except ValueError:  # shapes and options are checked by now
            return None, "the input or a weight is NaN or Inf"

    def encode(self, x: Tensor) -> Tensor:
        if self._is_compiled("encode"):
            return super().encode(x)
        reason, acts = self._why_not(x) or self._why_not_now(), None
        if reason is None and getattr(self.activation_fn, "use_sparse_activations", False):
            reason = "use_sparse_activations"
        if reason is None and not self._fastsae.in_peer:
            acts, reason = self._list(x)
        if not self._is_fused("encode", reason) or acts is None:
            return self._by_peer(super().encode, x)
        return pair.to_dense(acts, (*x.shape[:-1], self.cfg.d_sae), self.dtype, self._fastsae.spare)

    def decode(self, feature_acts: Tensor) -> Tensor:
        if self._is_compiled("decode"):
            return super().decode(feature_acts)
        reason, acts = self._why_not(self.b_dec), None
        if reason is None and pair.wants_gradient([feature_acts, self.W_dec, self.b_dec]):
            reason = "a gradient is asked for (call it under torch.no_grad())"
        if reason is None and not self._fastsae.in_peer:
            acts = pair.entries_of(feature_acts)
            if acts is None and self._is_shared and feature_acts.shape[-1] == self.cfg.d_sae:
                acts = from_sparse_tensor(feature_acts.to_sparse(), self._wide())
            reason = None if acts is not None else "the activations are not encode's own, or were edited"
        if not self._is_fused("decode", reason) or acts is None:
            return self._by_peer(super().decode, feature_acts)
        scale = self._rescaling()
        if scale is not None:
            scale = scale if self.sharding is None else self.sharding.whole("b_enc", scale)
            acts = replace(acts, values=acts.values / scale[acts.indices.long()])
        out: Tensor = self._ops.decode(acts, self.W_dec, self.b_dec).reshape(*feature_acts.shape[:-1], self.cfg.d_in)
        return out.to(torch.promote_types(out.dtype, self.b_dec.dtype))  # under autocast the bias makes it wider

    def forward(self, x: Tensor) -> Tensor:
        if self._is_compiled("forward"):
            return super().forward(x)
        reason, out = self._why_not(x) or self._why_not_now(), None
        if reason is None and not self._fastsae.in_peer:
            out = self._finite(lambda: self._autoencode(x, self._spec(), rank_scale=self._rescaling()).sae_out)
            reason = None if out is not None else "the input or a weight is NaN or Inf"
        if not self._is_fused("forward", reason) or out is None:
            return self._by_peer(super().forward, x)
        out = out.to(torch.promote_types(out.dtype, self.b_dec.dtype))
        return out + (x - out).detach() if self.use_error_term else out

    def _finite(self, run: Callable[[], Any]) -> Any:
        """The result of a pass, or None where it met NaN or Inf, among which no k are the largest."""
        try:
            return run()
        except ValueError:
            if self._spec().k is None:
                raise
            return None

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        self._check_whole("save_model", "a file holds all features")
        return super().save_model(path)

    def load_state_dict(self, *arguments: Any, **keywords: Any) -> Any:
        result = super().load_state_dict(*arguments, **keywords)
        if self._fastsae.options.layout:  # `assign=True` takes tensors as they are
            store_transposed(self, "W_enc")
        return result

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = f"{prefix}W_enc"
        if name in destination and not keep_vars:  # safetensors takes contiguous tensors alone
            destination[name] = destination[name].contiguous()


class FusedTrainingSAE(FusedSAE):
    """`training_forward_pass` in one op, and what `FusedSAEAdam` asks of an SAE."""

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.cfg.d_in

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.cfg.d_sae

    @property
    def collector(self) -> Collector:
        """Where a pass looks whether its weight gradients are collected."""
        return self._fastsae.collector

    def store_by_feature_(self) -> None:
        """Nothing: `accelerate` has stored `W_enc` as it was told to."""

    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        self._check_whole("save_inference_model", "a file holds all features")
        return super().save_inference_model(path)

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_whole("encode_with_hidden_pre", "it is SAELens' own")
        return super().encode_with_hidden_pre(x)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        return self._step_outside_of_graphs(step_input)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the ops gain nothing from it, and what is counted here would compile it again in each step
    def _step_outside_of_graphs(self, step_input: TrainStepInput) -> TrainStepOutput:
        reason, step = self._why_not(step_input.sae_in) or self._why_not_step(step_input), None
        if reason is None and not self._fastsae.in_peer:
            self._check_same_tokens(step_input.sae_in)
            step = self._finite(lambda: self._step(step_input))
            reason = None if step is not None else "the input or a weight is NaN or Inf"
        if not self._is_fused("training_forward_pass", reason) or step is None:
            return self._by_peer(super().training_forward_pass, step_input)
        return step

    def _why_not_step(self, step_input: TrainStepInput) -> str | None:
        mask = step_input.dead_neuron_mask
        if step_input.sae_in.dim() != 2:
            return "the training input is not 2-D"
        if mask is not None and mask.dtype != torch.bool:
            return "dead_neuron_mask is not bool"
        if self._is_shared and mask is not None and mask.shape != (self.cfg.d_sae,):
            return "dead_neuron_mask is not of all features"
        if self.use_error_term:
            return "use_error_term in training"
        return None if self.mse_loss_fn is mse_loss else "mse_loss_fn is replaced on the object"

    def _step(self, step_input: TrainStepInput) -> TrainStepOutput:
        raise NotImplementedError

    def _pass(self, step_input: TrainStepInput, spec: AutoencodeSpec, **options: Any) -> AutoencodeOutput:
        collector = None
        if {"W_enc", "W_dec"} <= self._parameters.keys():  # else their gradients are not the pass's own
            collector = self.collector.of(self.W_enc, self.W_dec)
        x = step_input.sae_in
        return self._autoencode(x, spec, target=x.to(self.dtype), collector=collector, **options)

    def _sae_in(self, x: Tensor) -> Tensor:
        """What the encoder multiplies; each process has the gradient of its own features alone."""
        if self.sharding is None:
            return self.process_sae_in(x)
        x = self.sharding.share(x.to(self.dtype), "x")
        return x - self._pre_bias() if self.cfg.apply_b_dec_to_input else x

    def _output(
        self,
        step_input: TrainStepInput,
        out: AutoencodeOutput,
        losses: dict[str, Tensor],
        rescaling: Tensor | None = None,
    ) -> FusedStepOutput:
        assert out.squared_error is not None
        x = step_input.sae_in
        losses = {"mse_loss": out.squared_error.mean(), **losses}
        again = self._encode_again(x)
        acts: Any = again if out.acts is None else lambda: self._as_theirs(out.acts, rescaling)
        keeps_none = out.acts is None and not self._is_shared
        if keeps_none and (x.device.type == "cpu" or step_input.is_logging_step):
            acts = again()  # no entries were kept, and after the optimiser's step it is too late
        step = FusedStepOutput(
            sae_in=x,
            sae_out=lambda: (x + out.sae_out).to(self.dtype),
            feature_acts=acts,
            hidden_pre=lambda: again(1),
            loss=sum(losses.values()),
            losses=losses,
        )
        step.l0, step.feature_counts = out.l0, out.feature_counts
        if self.sharding is not None:
            step.feature_counts = self.sharding.whole("b_enc", out.feature_counts)
        return step

    @torch.no_grad()
    def _as_theirs(self, acts: SparseActs | None, rescaling: Tensor | None) -> Tensor:
        """Entries as the peer would have returned them."""
        assert acts is not None
        acts = acts.active()
        if rescaling is not None:
            acts = replace(acts, values=acts.values * rescaling.index_select(0, acts.indices))
        if getattr(self.activation_fn, "use_sparse_activations", False):
            at = torch.stack([acts.row_ids(), acts.indices.long()])
            return torch.sparse_coo_tensor(at, acts.values.to(self.dtype), acts.shape, is_coalesced=True)
        return pair.to_dense(acts, acts.shape, self.dtype)

    def _encode_again(self, x: Tensor) -> Callable[..., Tensor]:
        """A function that makes `feature_acts`, or with 1 `hidden_pre`, from the weights of now."""
        versions = [version_of(p) for p in self.parameters()]
        encode = super().encode_with_hidden_pre

        @torch.no_grad()
        def again(which: int = 0) -> Tensor:
            self._check_whole(("feature_acts", "hidden_pre")[which], "it is of all features")
            if [version_of(p) for p in self.parameters()] != versions:
                name = ("feature_acts", "hidden_pre")[which]
                raise RuntimeError(
                    f"{name}: the weights have changed since the step; read it before the optimiser's step, or undo accelerate()"
                )
            return self._by_peer(encode, x)[which]

        return again
