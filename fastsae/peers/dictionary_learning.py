"""dictionary_learning: the losses of its trainers, and its dictionaries' `encode` and `decode`, on the fused ops.

Trainers keep their optimiser; `update` computes what theirs does, in fewer passes over memory. `trainSAE` makes its trainers
from classes, so that a class is accelerated by a subclass, to be put into the configuration in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from dictionary_learning.dictionary import Dictionary, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer, geometric_median
from dictionary_learning.trainers.trainer import SAETrainer
from torch import Tensor, nn

import fastsae_kernels as kernels
from fastsae.errors import UsageError
from fastsae.peers import pair
from fastsae.peers.handle import Accelerated, Handle, store_transposed
from fastsae.peers.observers import hook_on, in_transform
from fastsae.peers.pair import finite, smallest_of_rows
from fastsae.peers.updates import fused, remove_parallel_, set_unit_norm_
from fastsae_kernels import AutoencodeOutput, AutoencodeSpec, SparseActs

FEW_POSITIVES = "fewer positive activations than k: the peer counts zeros that it chose as fired"
CHUNK = 1024  # features whose pre-activations are formed at a time where a pass kept no entries


def why_not_module(ae: Any, known: type) -> str | None:
    """Why the dictionary `ae`, which is to be of the class `known` or its fast one, cannot take the ops."""
    if in_transform():
        return "a transform of torch.func is around it"
    if type(ae) not in (known, FAST[known]):
        return f"the dictionary is a {type(ae).__qualname__}"
    if any(hook_on(module) for module in (ae, *ae.children())):
        return "a hook is attached to the dictionary"
    if any(name in ae.__dict__ for name in ("encode", "decode", "forward")):
        return "a method of the dictionary is replaced on the object"
    return None


def matrices(ae: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`W_enc`, `b_enc` and `W_dec` of a dictionary as the ops take them."""
    if isinstance(ae, JumpReluAutoEncoder):
        return ae.W_enc, ae.b_enc, ae.W_dec
    return ae.encoder.weight.t(), ae.encoder.bias, ae.decoder.weight.t()


def open_gate(b_enc: Tensor) -> Tensor:
    """Thresholds of 0: every positive activation counts."""
    return b_enc.new_zeros(b_enc.shape, dtype=torch.promote_types(b_enc.dtype, torch.float32))


class FusedDictionary(Dictionary, Accelerated):
    """The pair of `encode` and `decode`, where no gradient is asked for."""

    known: type

    def _spec_and_gate(self, use_threshold: bool) -> tuple[AutoencodeSpec, Tensor]:
        """What `encode` selects by."""
        raise NotImplementedError

    def _list(self, x: Tensor, use_threshold: bool) -> tuple[SparseActs | None, str | None]:
        """The active entries of all tokens, or why there are none."""
        reason = why_not_module(self, self.known)
        if reason is None and pair.wants_gradient([x, *self.parameters()]):
            reason = "a gradient is asked for (call it under torch.no_grad())"
        if reason is not None:
            return None, reason
        (spec, gate), (W_enc, b_enc, _) = self._spec_and_gate(use_threshold), matrices(self)
        if x.dim() == 0 or x.shape[-1] != W_enc.shape[0] or x.dtype != W_enc.dtype or x.device != W_enc.device:
            return None, "the input is of another shape, dtype or device"
        if spec.batch_topk and x.dim() != 2:
            return None, "a batch that is not 2-D"
        if getattr(self, "apply_b_dec_to_input", True):
            x = x - self.b_dec
        x = x.reshape(-1, x.shape[-1])
        if len(x) == 0 or (spec.k is None and pair.is_dense(x, W_enc, b_enc, gate)):
            return None, "too many features are active"
        try:
            return kernels.encode(x, W_enc, b_enc, gate, k=spec.k, batch_topk=spec.batch_topk), None
        except ValueError:  # shapes and options are checked by now
            return None, "the input or a weight is NaN or Inf"

    def _encode(self, x: Tensor, use_threshold: bool, by_peer: Callable[[], Any]) -> Any:
        acts, reason = (None, None) if self._fastsae.in_peer else self._list(x, use_threshold)
        if not self._is_fused("encode", reason) or acts is None:
            return self._by_peer(by_peer)
        return pair.to_dense(acts, (*x.shape[:-1], self.dict_size), x.dtype, self._fastsae.spare)

    def decode(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().decode(x)
        reason, acts = why_not_module(self, self.known), None
        if reason is None and pair.wants_gradient([x, *self.parameters()]):
            reason = "a gradient is asked for (call it under torch.no_grad())"
        if reason is None and not self._fastsae.in_peer:
            acts = pair.entries_of(x)
            reason = None if acts is not None else "the activations are not encode's own, or were edited"
        if not self._is_fused("decode", reason) or acts is None:
            return self._by_peer(super().decode, x)
        out = kernels.decode(acts, matrices(self)[2], self.b_dec)
        return out.reshape(*x.shape[:-1], self.activation_dim)


class _TopKDictionary(FusedDictionary):
    def _spec_and_gate(self, use_threshold: bool) -> tuple[AutoencodeSpec, Tensor]:
        gate = open_gate(matrices(self)[1])
        if use_threshold:  # below 0 before it was ever set: then every positive activation counts
            return AutoencodeSpec(), gate + self.threshold.detach().clamp(min=0)
        return AutoencodeSpec(k=int(self.k), batch_topk=self.known is BatchTopKSAE), gate


class FusedAutoEncoderTopK(_TopKDictionary, AutoEncoderTopK):
    """`AutoEncoderTopK` on the fused ops."""

    known = AutoEncoderTopK

    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        if return_topk or torch.compiler.is_compiling():  # which wants the dense pre-activations too
            return super().encode(x, return_topk, use_threshold)
        return self._encode(x, use_threshold, lambda: super(_TopKDictionary, self).encode(x, False, use_threshold))


class FusedBatchTopKSAE(_TopKDictionary, BatchTopKSAE):
    """`BatchTopKSAE` on the fused ops."""

    known = BatchTopKSAE

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        if return_active or torch.compiler.is_compiling():
            return super().encode(x, return_active, use_threshold)
        return self._encode(x, use_threshold, lambda: super(_TopKDictionary, self).encode(x, False, use_threshold))


class FusedJumpReluAutoEncoder(FusedDictionary, JumpReluAutoEncoder):
    """`JumpReluAutoEncoder` on the fused ops."""

    known = JumpReluAutoEncoder

    def _spec_and_gate(self, use_threshold: bool) -> tuple[AutoencodeSpec, Tensor]:
        # theirs has a ReLU behind the gate
        return AutoencodeSpec(), open_gate(self.b_enc) + self.threshold.detach().clamp(min=0)

    def encode(self, x: Tensor, output_pre_jump: bool = False) -> Any:
        if output_pre_jump or torch.compiler.is_compiling():
            return super().encode(x, output_pre_jump)
        return self._encode(x, True, lambda: super(FusedDictionary, self).encode(x, False))


class FusedTrainer(SAETrainer, Accelerated):
    """`loss` in one op, and `update` around it."""

    known: type  # the class that the dictionary must have

    def _update(self, step: int, x: Tensor, decoder: nn.Parameter, by_feature: Callable[[Tensor], Tensor]) -> float:
        """Their `update`: a step whose decoder's gradient has no part along the decoder, which has unit norm afterwards.

        Args:
            step: Its number.
            x: The activations.
            decoder: The decoder's weights.
            by_feature: Turns a tensor like them into `[d_sae, d_in]`.
        """
        loss = self.loss(x.to(self.device), step=step)
        loss.backward()
        assert decoder.grad is not None
        remove_parallel_(by_feature(decoder.grad), by_feature(decoder), 1e-6)
        nn.utils.clip_grad_norm_(self.ae.parameters(), 1.0)
        with fused(self.optimizer):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        set_unit_norm_(by_feature(decoder))
        return loss.item()

    def _why_not_loss(self, x: Any, logging: bool) -> str | None:
        if logging:
            return "logging wants the dense activations"
        methods = ("get_auxiliary_loss", "update_threshold")
        if any(name in self.__dict__ for name in methods):
            return "a method is replaced on the object"
        reason = why_not_module(self.ae, self.known)
        if reason is not None:
            return reason
        W_enc, _, _ = matrices(self.ae)
        fits = x.dim() == 2 and x.shape[1] == W_enc.shape[0] and x.device == W_enc.device
        if not fits or torch.promote_types(x.dtype, W_enc.dtype) != W_enc.dtype:
            return "the input is of another shape, dtype or device"
        return None

    def _count_firing(self, n_tokens: int, feature_counts: Tensor) -> None:
        self.num_tokens_since_fired += n_tokens
        self.num_tokens_since_fired[feature_counts > 0] = 0

    def _move_threshold(self, smallest: Tensor) -> None:
        """The running threshold of a dictionary, which is below 0 until it has seen one."""
        ae, beta = self.ae, self.threshold_beta
        before = ae.threshold
        ae.threshold = torch.where(before < 0, smallest.float(), beta * before + (1 - beta) * smallest.float()).float()


class _TopKTrainers(FusedTrainer):
    """What the trainers of TopK and BatchTopK share."""

    def _pass(self, x: Tensor, *, batch_topk: bool) -> AutoencodeOutput:
        ae = self.ae
        W_enc, b_enc, W_dec = matrices(ae)
        x = x.to(W_enc.dtype)
        inputs, bias = kernels.subtract_pre_bias(x, ae.b_dec, W_enc, b_enc)
        spec = AutoencodeSpec(k=int(ae.k), batch_topk=batch_topk)
        arguments = (inputs, W_enc, bias, open_gate(b_enc), W_dec, ae.b_dec)
        return kernels.autoencode(*arguments, spec=spec, target=x, hint=self._fastsae.activity)

    def _aux_k_loss(self, x: Tensor, residual: Tensor) -> Tensor:
        """The dead features' reconstruction of `residual`, over the variance of that; their encoder is trained by it."""
        dead = (self.num_tokens_since_fired >= self.dead_feature_threshold).nonzero().squeeze(1)
        self.dead_features = len(dead)
        if len(dead) == 0:
            self.pre_norm_auxk_loss: Any = -1
            return residual.new_zeros(())
        W_enc, b_enc, W_dec = matrices(self.ae)
        W_enc, b_enc = W_enc.t().index_select(0, dead).t(), b_enc.index_select(0, dead)
        inputs, bias = kernels.subtract_pre_bias(x.to(W_enc.dtype), self.ae.b_dec, W_enc, b_enc)
        out = kernels.autoencode(
            inputs,
            W_enc,
            bias,
            open_gate(bias),
            W_dec.index_select(0, dead),
            torch.zeros_like(self.ae.b_dec),
            spec=AutoencodeSpec(k=self.top_k_aux if len(dead) > self.top_k_aux else None),
            target=residual,
            hint=self._fastsae.dead_activity,
        )
        assert out.squared_error is not None
        self.pre_norm_auxk_loss = loss = out.squared_error.mean()
        variance = (residual - residual.mean(0)).float().pow(2).sum(-1).mean()
        return (loss / variance).nan_to_num(0.0)


class FusedTopKTrainer(TopKTrainer, _TopKTrainers):
    """`TopKTrainer` on the fused ops."""

    known = AutoEncoderTopK

    def update(self, step: int, x: Tensor) -> float:
        if step == 0:
            self.ae.b_dec.data = geometric_median(x).to(self.ae.b_dec.dtype)
        return self._update(step, x, self.ae.decoder.weight, Tensor.t)

    def loss(self, x: Tensor, step: Any = None, logging: bool = False) -> Any:
        reason, out = self._why_not_loss(x, logging), None
        if reason is None:
            out, reason = finite(lambda: self._pass(x, batch_topk=False))
        if not self._is_fused("loss", reason) or out is None:
            return self._by_peer(super().loss, x, step, logging)
        assert out.squared_error is not None
        k = int(self.ae.k)
        if step > self.threshold_start_step:
            self._move_threshold(smallest_of_rows(out.acts or _listed(self.ae, x, k)).mean())
        self.effective_l0 = k
        self._fastsae.tally.count_rows(FEW_POSITIVES, (out.l0 < k).sum())
        self._count_firing(len(x), out.feature_counts)
        loss = out.squared_error.mean()
        return loss + self.auxk_alpha * self._aux_k_loss(x, -out.sae_out.detach()) if self.auxk_alpha > 0 else loss


class FusedBatchTopKTrainer(BatchTopKTrainer, _TopKTrainers):
    """`BatchTopKTrainer` on the fused ops."""

    known = BatchTopKSAE

    def update(self, step: int, x: Tensor) -> float:
        if step == 0:
            self.ae.b_dec.data = self.geometric_median(x).to(self.ae.b_dec.dtype)
        return self._update(step, x, self.ae.decoder.weight, Tensor.t)

    def loss(self, x: Tensor, step: Any = None, logging: bool = False) -> Any:
        reason, out = self._why_not_loss(x, logging), None
        if reason is None:
            out, reason = finite(lambda: self._pass(x, batch_topk=True))
        if not self._is_fused("loss", reason) or out is None:
            return self._by_peer(super().loss, x, step, logging)
        assert out.squared_error is not None
        assert out.min_active is not None
        if step > self.threshold_start_step:
            smallest = out.min_active
            self._move_threshold(torch.where(torch.isfinite(smallest), smallest, 0.0))
        self.effective_l0 = self.k
        self._count_firing(len(x), out.feature_counts)
        return out.squared_error.mean() + self.auxk_alpha * self._aux_k_loss(x, -out.sae_out.detach())


class FusedJumpReluTrainer(JumpReluTrainer, FusedTrainer):
    """`JumpReluTrainer` on the fused ops.

    Their penalty's straight-through estimate looks at the activations, ours at the pre-activations: an inactive feature, whose
    activation is 0, counts if 0 lies in the window, whatever its pre-activation. So the op's own penalty gets no gradient, and
    theirs is made of counts.
    """

    known = JumpReluAutoEncoder

    def update(self, step: int, x: Tensor) -> float:
        return self._update(step, x, self.ae.W_dec, Tensor.detach)

    def loss(self, x: Tensor, step: int, logging: bool = False, **ignored: Any) -> Any:
        reason = self._why_not_loss(x, logging)
        if reason is None and bool((self.ae.threshold < 0).any()):
            reason = "a threshold is below 0"
        if not self._is_fused("loss", reason):
            return self._by_peer(super().loss, x, step, logging, **ignored)
        ae = self.ae
        x = x.to(ae.W_enc.dtype)
        threshold = ae.threshold.to(torch.promote_types(x.dtype, torch.float32))
        out = kernels.autoencode(
            x,
            *(ae.W_enc, ae.b_enc, threshold, ae.W_dec, ae.b_dec),
            spec=AutoencodeSpec(bandwidth=self.bandwidth),
            target=x,
            hint=self._fastsae.activity,
        )
        assert out.squared_error is not None
        self._count_firing(len(x), out.feature_counts)
        self.dead_features = (self.num_tokens_since_fired > self.dead_feature_threshold).sum().item()
        l0 = self._mean_l0(x, threshold, out)
        sparsity = self.sparsity_coefficient * ((l0 / self.target_l0) - 1).pow(2) * self.sparsity_warmup_fn(step)
        return out.squared_error.mean() + sparsity

    def _mean_l0(self, x: Tensor, threshold: Tensor, out: AutoencodeOutput) -> Tensor:
        """The mean L0, with their gradient for the thresholds: `-(number of activations in the window) / bandwidth / N`."""
        with torch.no_grad():
            zero_counts = threshold / self.bandwidth < 0.5
            inactive = (len(x) - out.feature_counts) * zero_counts
            slope = -(self._in_upper_half(x, threshold, out.acts) + inactive) / (self.bandwidth * len(x))
            value = out.feature_counts.sum().to(threshold.dtype) / len(x)
        return value + (slope * (threshold - threshold.detach())).sum()  # the sum is 0

    def _in_upper_half(self, x: Tensor, threshold: Tensor, acts: SparseActs | None) -> Tensor:
        """`[d_sae]`: active entries of each feature that lie in the window."""
        if acts is not None:
            features = acts.indices.long()
            inside = (acts.values > 0) & ((acts.values - threshold[features]) / self.bandwidth < 0.5)
            return torch.zeros_like(threshold).index_add_(0, features, inside.to(threshold.dtype))
        counts = torch.zeros_like(threshold)
        for ids in torch.arange(len(threshold), device=x.device).split(CHUNK):
            part = slice(int(ids[0]), int(ids[-1]) + 1)
            hidden_pre, gate = x @ self.ae.W_enc[:, part] + self.ae.b_enc[part], threshold[part]
            counts[part] = ((hidden_pre > gate) & ((hidden_pre - gate) / self.bandwidth < 0.5)).sum(0)
        return counts


@torch.no_grad()
def _listed(ae: Any, x: Tensor, k: int) -> SparseActs:
    """The entries of a pass that kept none."""
    W_enc, b_enc, _ = matrices(ae)
    return kernels.encode(x.to(W_enc.dtype) - ae.b_dec, W_enc, b_enc, open_gate(b_enc), k=k)


FAST: dict[type, type] = {
    AutoEncoderTopK: FusedAutoEncoderTopK,
    BatchTopKSAE: FusedBatchTopKSAE,
    JumpReluAutoEncoder: FusedJumpReluAutoEncoder,
    TopKTrainer: FusedTopKTrainer,
    BatchTopKTrainer: FusedBatchTopKTrainer,
    JumpReluTrainer: FusedJumpReluTrainer,
}


def accelerate(obj: Any, handle: Handle) -> None:
    """`fastsae.accelerate` for an object, or a class, of dictionary_learning."""
    if handle.options.optimizer:
        raise UsageError(
            "optimizer: expected False for dictionary-learning, whose trainers read the decoder's gradient"
        )
    cls = obj if isinstance(obj, type) else type(obj)
    name = f"{cls.__qualname__} of dictionary-learning"
    fast = FAST.get(cls)
    if issubclass(cls, Accelerated):
        handle.left_alone.append(f"{name}: it is accelerated already")
    elif fast is None:
        handle.left_alone.append(f"{name}: no class that accelerate() knows")
    elif isinstance(obj, type):
        handle.accelerated = handle.subclass(fast, lambda made: store_transposed(*_decoder(made)))
        handle.changes.append(f"{name}, as handle.accelerated")
    else:
        handle.swap(obj, fast)
        stored = handle.store_transposed(*_decoder(obj), lambda: [obj.optimizer] if hasattr(obj, "optimizer") else [])
        handle.changes.append(name + (", with its matrix stored feature by feature" if stored else ""))


def _decoder(obj: Any) -> tuple[nn.Module, str]:
    """The module and the name of the one matrix that they store otherwise than the ops read it fastest."""
    ae = getattr(obj, "ae", obj)
    return (ae.decoder, "weight") if hasattr(ae, "decoder") else (ae, "W_enc")
