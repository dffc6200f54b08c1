"""sparsify: `SparseCoder.forward` on the fused ops, for SAEs, transcoders and skip transcoders."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from sparsify.sparse_coder import ForwardOutput, SparseCoder
from sparsify.trainer import Trainer
from torch import Tensor

import fastsae_kernels as kernels
from fastsae.errors import UsageError
from fastsae.peers.handle import Accelerated, Handle
from fastsae.peers.observers import hook_on, in_transform
from fastsae.peers.updates import remove_parallel_, set_unit_norm_
from fastsae_kernels import AutoencodeOutput, AutoencodeSpec, SparseActs

FEW_POSITIVES = (
    "fewer positive latents than k: the peer sends gradient to zeros that it chose, and counts them as fired"
)


class FusedSparseCoder(SparseCoder, Accelerated):
    """`SparseCoder` with `forward` in one op; what it returns as `latent_acts` carries no gradient.

    The decoder's norm and its gradient's projection are theirs, in fewer passes over memory.
    """

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        dead_mask: Tensor | None = None,
        total_variance: Tensor | None = None,
    ) -> ForwardOutput:
        if torch.compiler.is_compiling():
            return super().forward(x, y, dead_mask=dead_mask, total_variance=total_variance)
        reason, output = self._why_not(x, y, dead_mask), None
        if reason is None:
            try:
                with self._autocast(x):
                    output = self._forward(x.to(self.dtype), x if y is None else y, dead_mask, total_variance)
            except ValueError:  # shapes and options are checked by now
                reason = "the input or a weight is NaN or Inf"
        if not self._is_fused("forward", reason) or output is None:
            return self._by_peer(super().forward, x, y, dead_mask=dead_mask, total_variance=total_variance)
        return output

    def set_decoder_norm_to_unit_norm(self) -> None:
        assert self.W_dec is not None
        set_unit_norm_(self.W_dec)

    def remove_gradient_parallel_to_decoder_directions(self) -> None:
        assert self.W_dec is not None
        assert self.W_dec.grad is not None
        remove_parallel_(self.W_dec.grad, self.W_dec, None)

    def _why_not(self, x: Tensor, y: Tensor | None, dead_mask: Tensor | None) -> str | None:
        if in_transform():
            return "a transform of torch.func is around it"
        if self.cfg.activation != "topk":
            return f"activation is {self.cfg.activation!r}"
        if self.cfg.multi_topk:
            return "multi_topk"
        if self.W_dec is None:
            return "there is no decoder"
        if not 1 <= self.cfg.k <= self.num_latents:
            return "k is no number of latents"
        if any(name in self.__dict__ for name in ("encode", "decode")):
            return "a method is replaced on the object"
        if hook_on(self.encoder):
            return "a hook is attached to the encoder"
        weight = self.encoder.weight
        if x.dim() != 2 or x.shape[1] != self.d_in or x.device != weight.device:
            return "the input is of another shape or device"
        if not x.is_floating_point() or torch.promote_types(x.dtype, weight.dtype) != weight.dtype:
            return "the input is of a wider dtype than the weights"
        if y is not None and y.shape != (len(x), self.W_dec.shape[1]):
            return "the target is of another shape"
        return None if dead_mask is None or dead_mask.dtype == torch.bool else "dead_mask is not bool"

    def _autocast(self, x: Tensor) -> AbstractContextManager[object]:
        """Theirs: bf16 on a GPU that has it, fp32 elsewhere."""
        if not x.is_cuda:
            return nullcontext()
        return torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_bf16_supported())

    def _forward(self, x: Tensor, y: Tensor, dead_mask: Tensor | None, total_variance: Tensor | None) -> ForwardOutput:
        target = y
        if self.W_skip is not None:
            target = y - x @ self.W_skip.mT
        out = self._pass(x, target)
        residual = out.sae_out  # sae_out - y
        if total_variance is None:
            total_variance = (y - y.mean(0)).pow(2).sum()
        aux_k_loss = residual.new_zeros(())
        if dead_mask is not None:
            aux_k_loss = self._aux_k_loss(x, -residual.detach(), dead_mask) / total_variance
        assert out.squared_error is not None
        latent_acts, latent_indices = self._latents(x, out)
        self._fastsae.tally.count_rows(FEW_POSITIVES, (out.l0 < self.cfg.k).sum())
        return ForwardOutput(
            sae_out=residual + y,
            latent_acts=latent_acts,
            latent_indices=latent_indices,
            fvu=out.squared_error.sum() / total_variance,
            auxk_loss=aux_k_loss,
            multi_topk_fvu=residual.new_zeros(()),
        )

    def _inputs(self, x: Tensor, latents: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the ops encode, `W_enc` and `b_enc`, of some latents alone where given."""
        W_enc, b_enc = self.encoder.weight, self.encoder.bias
        if latents is not None:
            W_enc, b_enc = W_enc.index_select(0, latents), b_enc.index_select(0, latents)
        if not self.cfg.transcode:
            x, b_enc = kernels.subtract_pre_bias(x, self.b_dec, W_enc.t(), b_enc)
        return x, W_enc.t(), b_enc

    def _gate(self, n: int) -> Tensor:
        dtype = torch.promote_types(self.dtype, torch.float32)
        return torch.zeros(n, dtype=dtype, device=self.device)

    def _pass(self, x: Tensor, target: Tensor) -> AutoencodeOutput:
        return kernels.autoencode(
            *self._inputs(x),
            self._gate(self.num_latents),
            self.W_dec,
            self.b_dec,
            spec=AutoencodeSpec(k=self.cfg.k),
            target=target,
            hint=self._fastsae.activity,
        )

    def _aux_k_loss(self, x: Tensor, residual: Tensor, dead_mask: Tensor) -> Tensor:
        """The squared error of the dead latents' reconstruction of `residual`; the encoder learns of it with `fix_auxk` alone."""
        dead = dead_mask.nonzero().squeeze(1)
        k_aux = residual.shape[1] // 2
        if len(dead) == 0 or k_aux == 0:
            return residual.new_zeros(())
        inputs = self._inputs(x, dead)
        if not self._fastsae.options.fix_auxk:
            inputs = tuple(tensor.detach() for tensor in inputs)  # type: ignore[assignment]
        out = kernels.autoencode(
            *inputs,
            self._gate(len(dead)),
            self.W_dec.index_select(0, dead),
            torch.zeros_like(self.b_dec),
            spec=AutoencodeSpec(k=k_aux if len(dead) > k_aux else None),
            target=residual,
            hint=self._fastsae.dead_activity,
        )
        assert out.squared_error is not None
        return min(len(dead) / k_aux, 1.0) * out.squared_error.sum()

    @torch.no_grad()
    def _latents(self, x: Tensor, out: AutoencodeOutput) -> tuple[Tensor, Tensor]:
        """`latent_acts` and `latent_indices`, `[N, k]`."""
        acts = out.acts
        if acts is None:
            acts = kernels.encode(*self._inputs(x), self._gate(self.num_latents), k=self.cfg.k)
        return fixed_k(acts.packed(), self.cfg.k)


def fixed_k(acts: SparseActs, k: int) -> tuple[Tensor, Tensor]:
    """Values and features of each token's at most k entries, `[N, k]`.

    A token with fewer repeats its own first feature with value 0, so that no other seems to have fired; one without any has
    feature 0.
    """
    n_tokens, rows, features = acts.shape[0], acts.row_ids(), acts.indices.long()
    slots = torch.arange(len(rows), device=acts.device) - acts.row_offsets.long()[rows]
    values = acts.values.new_zeros(n_tokens, k)
    indices = features.new_zeros(n_tokens)
    indices[rows[slots == 0]] = features[slots == 0]
    indices = indices[:, None].repeat(1, k)
    values[rows, slots], indices[rows, slots] = acts.values.detach(), features
    return values, indices


def accelerate(obj: Any, handle: Handle) -> None:
    """`fastsae.accelerate` for an object of sparsify."""
    if handle.options.optimizer:
        raise UsageError("optimizer: expected False for sparsify, whose optimisers are not torch's Adam alone")
    if isinstance(obj, Trainer):
        for coder in obj.saes.values():
            accelerate(coder, handle)
        return
    if not isinstance(obj, SparseCoder):
        raise UsageError(f"obj: expected a SparseCoder or a Trainer of sparsify, got {type(obj).__qualname__}")
    name = f"{type(obj).__qualname__} of sparsify"
    if isinstance(obj, Accelerated):
        handle.left_alone.append(f"{name}: it is accelerated already")
    elif type(obj) is not SparseCoder:
        handle.left_alone.append(f"{name}: no class that accelerate() knows")
    else:
        handle.swap(obj, FusedSparseCoder)
        mode = "also reaches the encoder" if handle.options.fix_auxk else "leaves the encoder alone, as theirs"
        handle.changes.append(f"{name}; the AuxK loss {mode}")
