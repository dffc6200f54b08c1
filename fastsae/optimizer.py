"""Adam for an SAE in one pass over the weights: gradient, projection, moments, update and unit norm, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from fastsae.errors import UsageError
from fastsae.sae import SparseAutoencoder
from fastsae.sae.compute_copies import ComputeCopies, WrittenState, written_state
from fastsae_kernels import WeightGradients

if TYPE_CHECKING:
    from fastsae_kernels.gpu.weight_gradients import RowSums

CHUNK_ELEMENTS = 2**18  # of the rows that are updated together: four tensors of 1 MB stay in cache


class FusedSAEAdam(torch.optim.Adam):
    """Adam whose pass over `W_enc` and `W_dec` sums their gradients, so that these are never written out as a whole.

        g_dec  = g_dec - (g_dec . w) w                              normalize_decoder: the part along the row does nothing
        g      = g * min(1, max_grad_norm / (|all g| + 1e-6))       max_grad_norm
        w      = w - lr * m_hat / (sqrt(v_hat) + eps)               m, v: moments of g, as in `torch.optim.Adam`
        w_dec  = w_dec / |w_dec|                                    normalize_decoder

    Same numbers as autograd, `torch.nn.utils.clip_grad_norm_`, `torch.optim.Adam(fused=True)` and an explicit projection and
    normalisation, up to rounding. While it lives, `W_enc.grad` and `W_dec.grad` stay None where the sparse path ran, on a GPU
    for the first pass of a step; gradients that come another way (further passes on a GPU, the dense path, a compiled graph,
    an auxiliary loss) are found in `.grad` and added. The state dict is that of `torch.optim.Adam`, and either loads the
    other's.

    On a GPU one kernel visits each row once: it sums the row's gradient, updates the row, its moments and its 16-bit copy,
    and no step waits for the device. It wants fp32 weights and no `maximize`; otherwise gradients are written out first.

    Args:
        sae: The SAE; its own `dtype` is that of the master weights.
        lr: Learning rate; `param_groups[0]["lr"]` may change between steps.
        betas: Decay rates of the moments. With `betas[0] == 0` a row that no token touched costs nothing, exactly: its update
            is zero, and its second moment catches up on the decay, a power of `betas[1]`, when it is touched or saved. (The
            first moment, which such an Adam multiplies by 0, keeps an old value there.)
        eps: Added to the denominator.
        max_grad_norm: Clips the global norm of all gradients; None does not. Exact: on a CPU the gradients are summed first and
            kept, at the price of a buffer of the weights' size, which is used again in each step; on a GPU they are summed
            twice.
        normalize_decoder: Keeps unit-norm decoder rows.
        exp_avg_dtype: Of the first moment of both weight matrices: fp32, or bf16 for half of its memory (rounded to nearest). The
            second stays fp32: in bf16 it would stand still once a step changes it by less than 1 part in 512.
        compute_dtype: bf16 or fp16: keeps copies of both weight matrices in that dtype, which training under autocast to it
            takes instead of casting the weights in each step; None keeps none.

    Raises:
        UsageError: An argument is of the wrong kind or out of range.
        ValueError: lr, betas or eps is out of range, from `torch.optim.Adam`.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        max_grad_norm: float | None = None,
        normalize_decoder: bool = False,
        exp_avg_dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(sae, SparseAutoencoder):
            raise UsageError(f"sae: expected an SAE of fastsae, got {type(sae).__name__}")
        if max_grad_norm is not None and not (math.isfinite(max_grad_norm) and max_grad_norm > 0):
            raise UsageError(f"max_grad_norm: expected None or a number > 0, got {max_grad_norm}")
        if exp_avg_dtype not in (torch.float32, torch.bfloat16):
            raise UsageError(f"exp_avg_dtype: expected torch.float32 or torch.bfloat16, got {exp_avg_dtype}")
        if compute_dtype not in (None, torch.bfloat16, torch.float16):
            raise UsageError(f"compute_dtype: expected None, torch.bfloat16 or torch.float16, got {compute_dtype}")
        super().__init__(sae.parameters(), lr=lr, betas=betas, eps=eps, fused=True)
        self.sae, self.max_grad_norm, self.normalize_decoder = sae, max_grad_norm, normalize_decoder
        self.exp_avg_dtype = exp_avg_dtype
        self._collected = WeightGradients()
        self._kept: dict[nn.Parameter, Tensor] = {}  # whole gradients, where they are clipped
        self._steps: dict[nn.Parameter, int] = {}  # as in the state, where reading it would wait for a GPU
        # [d_sae] int32, with betas[0] == 0: the step to which each row's second moment has decayed
        self._last_step: dict[nn.Parameter, Tensor] = {}
        self._left: dict[nn.Parameter, WrittenState] = {}  # weights whose rows are all as a step leaves them
        sae.collect_weight_gradients(self._collected)
        self._copies: ComputeCopies | None = None
        if compute_dtype is not None:
            self._copies = ComputeCopies(self._matrices, compute_dtype)
            sae.use_compute_copies(self._copies)

    @property
    def _matrices(self) -> list[nn.Parameter]:
        return [self.sae.W_enc, self.sae.W_dec]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises UsageError: all parameters of the SAE are in the one group that it is made with."""
        if self.param_groups:
            raise UsageError(
                "param_group: expected none beside the SAE's own; give other parameters their own optimiser"
            )
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients."""
        super().zero_grad(set_to_none)
        self._collected.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; what was collected for it is forgotten, as `.grad` is not."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        others = [p for p in self.param_groups[0]["params"] if p.grad is not None and p not in set(self._matrices)]
        collected = bool(self._collected) or self._collected.gpu is not None
        weights = [p for p in self._matrices if p.requires_grad and (collected or p.grad is not None)]
        sums = self._row_sums(weights)
        scale = None if self.max_grad_norm is None else self._clip(others, weights, sums)
        self._update_others(others, scale)
        lazy = self._may_leave_rows(weights, sums)
        # a row that is left alone must be as a step leaves it
        changed = {p for p in weights if lazy and self._left.get(p) != written_state(p)}
        if sums:
            self._update_by_kernel(sums, scale)
        else:
            self._update(weights, scale, self._collected.touched() if lazy else None)
        self._finish(weights, changed)
        self._collected.clear()
        return loss

    @property
    def _chunk(self) -> int:
        """Features that are updated together: few on a CPU, whose cache holds them, all on a GPU."""
        return max(1, CHUNK_ELEMENTS // self.sae.d_in) if self.sae.device.type == "cpu" else self.sae.d_sae

    def _by_feature(self, p: nn.Parameter, tensor: Tensor) -> Tensor:
        """A tensor like the weight matrix `p`, as `[d_sae, d_in]`."""
        return tensor.t() if p is self.sae.W_enc else tensor

    def _row_sums(self, weights: list[nn.Parameter]) -> dict[nn.Parameter, RowSums]:
        """What a GPU pass left, if the kernel can take it; else nothing, after writing it out to `.grad`."""
        share = self._collected.gpu
        if share is None:
            return {}
        sums = {p: s for p, s in zip(self._matrices, share, strict=True) if any(p is w for w in weights)}
        if self._kernel_can_update(weights):
            return {p: s if p.grad is None else s.plus(self._by_feature(p, p.grad)) for p, s in sums.items()}
        self._collected.gpu = None
        for p, s in sums.items():
            grad = self._by_feature(p, s.dense()).to(p.dtype)
            p.grad = grad if p.grad is None else p.grad + grad
        return {}

    def _kernel_can_update(self, weights: list[nn.Parameter]) -> bool:
        from fastsae_kernels.gpu.adam import MAX_DEPTH  # Triton is optional: it is here where its kernels ran

        group = self.param_groups[0]
        plain = not group["maximize"] and group["weight_decay"] == 0 and not isinstance(group["lr"], Tensor)
        fits = all(p.dtype == torch.float32 for p in weights) and self.sae.d_in <= MAX_DEPTH
        return plain and fits and not self._collected

    def _clip(
        self, others: list[nn.Parameter], weights: list[nn.Parameter], sums: dict[nn.Parameter, RowSums]
    ) -> Tensor:
        """The factor that clips; a CPU keeps the weights' gradients, whose norm is known only when all are summed."""
        squares = [p.grad.double().square().sum() for p in others if p.grad is not None]
        for p, s in sums.items():
            squares.append(self._row_norms(p, s).sum(dtype=torch.float64))
        for p in [] if sums else weights:
            self._kept.setdefault(p, torch.empty_like(self._by_feature(p, p)))
        for p, rows, grad in [] if sums else self._gradients(weights):
            self._kept[p][rows] = grad
            squares.append(torch.linalg.vector_norm(grad).double().square())
        norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
        assert self.max_grad_norm is not None
        return (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0).to(self.sae.b_dec.dtype)

    def _gradients(self, weights: list[nn.Parameter]) -> Iterator[tuple[nn.Parameter, slice, Tensor]]:
        """`(weight matrix, rows, gradient [C, d])`, projected; what was collected and what is in `.grad`."""
        sae = self.sae
        if self._collected:
            chunks: Iterator[tuple[slice, Tensor | None, Tensor | None]] = self._collected.chunks(self._chunk)
        else:
            chunks = ((slice(start, start + self._chunk), None, None) for start in range(0, sae.d_sae, self._chunk))
        for rows, *sums in chunks:
            for p, total in zip([sae.W_enc, sae.W_dec], sums, strict=True):
                if not any(p is w for w in weights):
                    continue
                w = self._by_feature(p, p)[rows]
                extra = None if p.grad is None else self._by_feature(p, p.grad)[rows]
                if total is None:
                    assert extra is not None
                    grad = extra.contiguous()
                else:
                    grad = total.to(w.dtype) if extra is None else total + extra
                if self.normalize_decoder and p is sae.W_dec:
                    grad.addcmul_((grad * w).sum(1, keepdim=True), w, value=-1)
                yield p, rows, grad

    def _update_others(self, others: list[nn.Parameter], scale: Tensor | None) -> None:
        grads = [p.grad if scale is None else p.grad * scale for p in others if p.grad is not None]
        moments = [self._moments(p) for p in others]
        self._adam(
            [p.detach() for p in others],
            grads,
            [exp_avg for exp_avg, _ in moments],
            [exp_avg_sq for _, exp_avg_sq in moments],
            [self.state[p]["step"] for p in others],
        )
        for p in others:
            torch.autograd.graph.increment_version(p)  # which PyTorch's own fused Adam does not

    def _row_norms(self, p: nn.Parameter, s: RowSums) -> Tensor:
        from fastsae_kernels.gpu.adam import grad_norms

        return grad_norms(
            s.by_feature, s.weights, s.vectors, self._by_feature(p, p.detach()),
            extra=s.extra, extra_flag=s.extra_flag, project=self.normalize_decoder and p is self.sae.W_dec,
        )  # fmt: skip

    def _update_by_kernel(self, sums: dict[nn.Parameter, RowSums], scale: Tensor | None) -> None:
        from fastsae_kernels.gpu.adam import adam_rows

        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        for p, s in sums.items():
            exp_avg, exp_avg_sq = (self._by_feature(p, moment) for moment in self._moments(p))
            on_sphere = self.normalize_decoder and p is self.sae.W_dec
            adam_rows(
                s.by_feature, s.weights, s.vectors, self._by_feature(p, p.detach()), exp_avg if beta1 else None, exp_avg_sq,
                lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"], step=self._step_of(p) + 1,
                extra=s.extra, extra_flag=s.extra_flag, project=on_sphere, unit_norm=on_sphere, scale=scale,
                last_step=self._last_step.get(p), copy=self._copy(p),
            )  # fmt: skip

    def _update(self, weights: list[nn.Parameter], scale: Tensor | None, touched: Tensor | None) -> None:
        """All rows, or those of the `touched` features (`[d_sae]` bool) alone."""
        if not weights:
            return
        for p, rows, grad in self._gradients(weights) if scale is None else self._kept_gradients(weights):
            if scale is not None:
                grad *= scale
            whole = [self._by_feature(p, tensor)[rows] for tensor in (p.detach(), *self._moments(p))]
            at = slice(None) if touched is None else touched[rows].nonzero().squeeze(1)
            parts = [matrix[at] for matrix in whole]
            if touched is not None:
                parts[2] *= self._decay(self._step_of(p) - self._last_step[p][rows][at], parts[2])
            self._update_rows(p, grad[at], *parts)
            if touched is not None:
                for matrix, part in zip(whole, parts, strict=True):
                    matrix[at] = part
            copy = self._copy(p)
            if copy is not None:
                copy[rows][at] = parts[0].to(copy.dtype)
        if touched is not None:
            for p in weights:
                self._last_step[p].masked_fill_(touched, self._step_of(p) + 1)

    def _kept_gradients(self, weights: list[nn.Parameter]) -> Iterator[tuple[nn.Parameter, slice, Tensor]]:
        for p in weights:
            for start in range(0, self.sae.d_sae, self._chunk):
                rows = slice(start, start + self._chunk)
                yield p, rows, self._kept[p][rows]

    def _update_rows(self, p: nn.Parameter, grad: Tensor, w: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        wide = exp_avg.to(w.dtype)  # a copy only where it is narrower
        self._adam([w], [grad], [wide], [exp_avg_sq], [self.state[p]["step"].clone()])
        if wide is not exp_avg:
            exp_avg.copy_(wide)
        if self.normalize_decoder and p is self.sae.W_dec:
            w /= w.norm(dim=1, keepdim=True).clamp_min(1e-8)

    def _adam(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
    ) -> None:
        """PyTorch's own Adam; counts the steps."""
        group = self.param_groups[0]
        adam(
            params, grads, exp_avgs, exp_avg_sqs, [], steps,
            fused=True, amsgrad=False, maximize=group["maximize"], weight_decay=group["weight_decay"],
            lr=group["lr"], eps=group["eps"], beta1=group["betas"][0], beta2=group["betas"][1],
        )  # fmt: skip

    def _may_leave_rows(self, weights: list[nn.Parameter], sums: dict[nn.Parameter, RowSums]) -> bool:
        """Whether rows without entries are left alone; if not, all second moments are up to date afterwards."""
        group = self.param_groups[0]
        from_entries = sums or (self._collected and all(p.grad is None for p in weights))
        if not from_entries or group["betas"][0] != 0 or group["weight_decay"] != 0:
            self._catch_up()
            return False
        for p in weights:
            if p not in self._last_step:
                self._last_step[p] = torch.full((self.sae.d_sae,), self._step_of(p), dtype=torch.int32, device=p.device)
        return True

    def _decay(self, steps: Tensor, like: Tensor) -> Tensor:
        """`[C, 1]`: what so many steps without a gradient leave of the rows of a second moment."""
        return (self.param_groups[0]["betas"][1] ** steps.double()).to(like.dtype)[:, None]

    def _catch_up(self) -> None:
        """Applies the decay of the second moments that untouched rows still owe."""
        for p, last_step in self._last_step.items():
            exp_avg_sq = self._by_feature(p, self.state[p]["exp_avg_sq"])
            exp_avg_sq *= self._decay(self._step_of(p) - last_step, exp_avg_sq)
        self._last_step.clear()

    def _finish(self, weights: list[nn.Parameter], changed: set[nn.Parameter]) -> None:
        """Counts the step; weights that were `changed` elsewhere get what a step that visits every row would have done."""
        for p in weights:
            self._steps[p] = self._step_of(p) + 1
            self.state[p]["step"] += 1
            if p in changed and self.normalize_decoder and p is self.sae.W_dec:
                self._normalize_decoder()
            torch.autograd.graph.increment_version(p)  # neither the kernel nor PyTorch's own fused Adam does
            self._left[p] = written_state(p)
            if self._copies is not None and p not in changed:
                self._copies.record(p)
        if self._copies is not None:
            for p in self._matrices:
                if self._copies.of(p) is None:
                    self._copies.refresh(p)

    def _normalize_decoder(self) -> None:
        """Gives every row unit norm; one that has it stays as it is, bit for bit."""
        norm = self.sae.W_dec.norm(dim=1, keepdim=True)
        has_unit_norm = (norm - 1).abs() <= 16 * torch.finfo(norm.dtype).eps
        self.sae.W_dec.div_(torch.where(has_unit_norm, 1.0, norm.clamp_min(1e-8)))

    def _copy(self, p: nn.Parameter) -> Tensor | None:
        """`[d_sae, d_in]`, the copy of a weight, to be written."""
        return None if self._copies is None else self._by_feature(p, self._copies.to_write(p))

    def _step_of(self, p: nn.Parameter) -> int:
        """How many steps a weight has made."""
        if p not in self._steps:
            self._steps[p] = int(self.state[p]["step"]) if self.state[p] else 0  # after loading; waits for a GPU, once
        return self._steps[p]

    def _moments(self, p: nn.Parameter) -> tuple[Tensor, Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state |= self._laid_out(p, torch.zeros_like(p), torch.zeros_like(p))
        return state["exp_avg"], state["exp_avg_sq"]

    def _laid_out(self, p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> dict[str, Tensor]:
        """Moments of `p` in its memory layout and their dtypes."""
        is_narrow = p.dim() == 2 and p.dtype == torch.float32
        first = torch.empty_like(p, dtype=self.exp_avg_dtype if is_narrow else p.dtype).copy_(exp_avg)
        return {"exp_avg": first, "exp_avg_sq": torch.empty_like(p).copy_(exp_avg_sq)}

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Adam`'s."""
        self._catch_up()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state dict of this class or of `torch.optim.Adam`."""
        super().load_state_dict(state_dict)
        self._steps.clear()
        self._last_step.clear()
        self._left.clear()
        for p, state in self.state.items():
            state |= self._laid_out(p, state["exp_avg"], state["exp_avg_sq"])
        if self._copies is not None:
            for p in self._matrices:
                self._copies.refresh(p)
