"""Adam for an SAE in one pass over the weights: gradient, projection, moments, update and unit norm, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from fastsae.errors import UsageError
from fastsae.sae import SparseAutoencoder
from fastsae_kernels import WeightGradients

CHUNK_ELEMENTS = 2**19  # of the rows that are updated together: four tensors of 2 MB stay in cache


class FusedSAEAdam(torch.optim.Adam):
    """Adam whose pass over `W_enc` and `W_dec` sums their gradients, so that these are never written out as a whole.

        g_dec  = g_dec - (g_dec . w) w                              normalize_decoder: the part along the row does nothing
        g      = g * min(1, max_grad_norm / (|all g| + 1e-6))       max_grad_norm
        w      = w - lr * m_hat / (sqrt(v_hat) + eps)               m, v: moments of g, as in `torch.optim.Adam`
        w_dec  = w_dec / |w_dec|                                    normalize_decoder

    Same numbers as autograd, `torch.nn.utils.clip_grad_norm_`, `torch.optim.Adam(fused=True)` and an explicit projection and
    normalisation, up to rounding. While it lives, `W_enc.grad` and `W_dec.grad` stay None where the sparse path ran on a CPU;
    gradients that come another way (the dense path, a GPU, a compiled graph, an auxiliary loss) are found in `.grad` and
    added. The state dict is that of `torch.optim.Adam`, and either loads the other's.

    Args:
        sae: The SAE; its own `dtype` is that of the master weights.
        lr: Learning rate; `param_groups[0]["lr"]` may change between steps.
        betas: Decay rates of the moments. With `betas[0] == 0` a row that no token touched costs nothing, exactly: its update
            is zero, and its second moment catches up on the decay, a power of `betas[1]`, when it is touched or saved. (The
            first moment, which such an Adam multiplies by 0, keeps an old value there.)
        eps: Added to the denominator.
        max_grad_norm: Clips the global norm of all gradients; None does not. Exact: the gradients are summed first and kept,
            at the price of a buffer of the weights' size, which is used again in each step.
        normalize_decoder: Keeps unit-norm decoder rows.
        exp_avg_dtype: Of the first moment of both weight matrices: fp32, or bf16 for half of its memory (rounded to nearest). The
            second stays fp32: in bf16 it would stand still once a step changes it by less than 1 part in 512.

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
    ) -> None:
        if not isinstance(sae, SparseAutoencoder):
            raise UsageError(f"sae: expected an SAE of fastsae, got {type(sae).__name__}")
        if max_grad_norm is not None and not (math.isfinite(max_grad_norm) and max_grad_norm > 0):
            raise UsageError(f"max_grad_norm: expected None or a number > 0, got {max_grad_norm}")
        if exp_avg_dtype not in (torch.float32, torch.bfloat16):
            raise UsageError(f"exp_avg_dtype: expected torch.float32 or torch.bfloat16, got {exp_avg_dtype}")
        super().__init__(sae.parameters(), lr=lr, betas=betas, eps=eps, fused=True)
        self.sae, self.max_grad_norm, self.normalize_decoder = sae, max_grad_norm, normalize_decoder
        self.exp_avg_dtype = exp_avg_dtype
        self._collected = WeightGradients()
        self._kept: dict[nn.Parameter, Tensor] = {}  # whole gradients, where they are clipped
        self._behind: Tensor | None = None  # [d_sae] steps by which a row's second moment lags, with betas[0] == 0
        sae.collect_weight_gradients(self._collected)

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
        matrices = [self.sae.W_enc, self.sae.W_dec]
        others = [p for p in self.param_groups[0]["params"] if p.grad is not None and all(p is not m for m in matrices)]
        weights = [p for p in matrices if p.requires_grad and (self._collected or p.grad is not None)]
        scale = None if self.max_grad_norm is None else self._clip(others, weights)
        for p in others:
            assert p.grad is not None
            self._adam(p, p.grad if scale is None else p.grad * scale, *self._moments(p))
            self.state[p]["step"] += 1
        self._update(weights, scale)
        self._collected.clear()
        return loss

    @property
    def _chunk(self) -> int:
        """Features that are updated together: few on a CPU, whose cache holds them, all on a GPU."""
        return max(1, CHUNK_ELEMENTS // self.sae.d_in) if self.sae.device.type == "cpu" else self.sae.d_sae

    def _by_feature(self, p: nn.Parameter, tensor: Tensor) -> Tensor:
        """A tensor like the weight matrix `p`, as `[d_sae, d_in]`."""
        return tensor.t() if p is self.sae.W_enc else tensor

    def _clip(self, others: list[nn.Parameter], weights: list[nn.Parameter]) -> Tensor:
        """The factor that clips; keeps the weights' gradients, whose norm is known only when all are summed."""
        squares = [p.grad.double().square().sum() for p in others if p.grad is not None]
        for p in weights:
            self._kept.setdefault(p, torch.empty_like(self._by_feature(p, p)))
        for p, rows, grad in self._gradients(weights):
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

    def _update(self, weights: list[nn.Parameter], scale: Tensor | None) -> None:
        if not weights:
            return
        touched = self._touched(weights)
        for p, rows, grad in self._gradients(weights) if scale is None else self._kept_gradients(weights):
            if scale is not None:
                grad *= scale
            matrices = [self._by_feature(p, tensor)[rows] for tensor in (p.detach(), *self._moments(p))]
            if touched is None:
                self._update_rows(p, grad, *matrices)
            else:
                self._update_touched(p, grad, touched[rows].nonzero().squeeze(1), rows, *matrices)
        for p in weights:
            self.state[p]["step"] += 1
        if touched is not None and self._behind is not None:
            self._behind = torch.where(touched, 0, self._behind + 1)

    def _kept_gradients(self, weights: list[nn.Parameter]) -> Iterator[tuple[nn.Parameter, slice, Tensor]]:
        for p in weights:
            for start in range(0, self.sae.d_sae, self._chunk):
                rows = slice(start, start + self._chunk)
                yield p, rows, self._kept[p][rows]

    def _update_rows(self, p: nn.Parameter, grad: Tensor, w: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        self._adam(p, grad, exp_avg, exp_avg_sq, w)
        if self.normalize_decoder and p is self.sae.W_dec:
            w /= w.norm(dim=1, keepdim=True).clamp_min(1e-8)

    def _update_touched(
        self,
        p: nn.Parameter,
        grad: Tensor,
        at: Tensor,
        rows: slice,
        w: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
    ) -> None:
        """The rows `at` of a chunk alone, after their second moment has caught up."""
        assert self._behind is not None
        decay = self.param_groups[0]["betas"][1] ** self._behind[rows][at].to(w.dtype)
        parts = [w[at], exp_avg[at], exp_avg_sq[at] * decay[:, None]]
        self._update_rows(p, grad[at], *parts)
        for whole, part in zip((w, exp_avg, exp_avg_sq), parts, strict=True):
            whole[at] = part

    def _touched(self, weights: list[nn.Parameter]) -> Tensor | None:
        """`[d_sae]` bool where untouched rows may be left alone; None where all rows are updated."""
        group = self.param_groups[0]
        others = any(p.grad is not None for p in weights) or len(weights) < 2
        if group["betas"][0] != 0 or group["weight_decay"] != 0 or others or not self._collected:
            self._catch_up()
            return None
        if self._behind is None:
            self._behind = torch.zeros(self.sae.d_sae, dtype=torch.int64, device=self.sae.device)
        return self._collected.touched()

    def _catch_up(self) -> None:
        """Applies the decay of the second moments that untouched rows still owe."""
        if self._behind is None:
            return
        decay = self.param_groups[0]["betas"][1] ** self._behind.to(self.sae.W_dec.dtype)
        for p in (self.sae.W_enc, self.sae.W_dec):
            if p in self.state:
                self._by_feature(p, self.state[p]["exp_avg_sq"]).mul_(decay[:, None])
        self._behind = None

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

    def _adam(
        self, p: nn.Parameter, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, w: Tensor | None = None
    ) -> None:
        """PyTorch's own Adam on some rows `w` of `p`, or on all of it; does not count the step."""
        group = self.param_groups[0]
        w = p.detach() if w is None else w
        wide = exp_avg.to(w.dtype)  # a copy only where it is narrower
        adam(
            [w], [grad], [wide], [exp_avg_sq], [], [self.state[p]["step"].clone()],
            fused=True, amsgrad=False, maximize=group["maximize"], weight_decay=group["weight_decay"],
            lr=group["lr"], eps=group["eps"], beta1=group["betas"][0], beta2=group["betas"][1],
        )  # fmt: skip
        if wide is not exp_avg:
            exp_avg.copy_(wide)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Adam`'s."""
        self._catch_up()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state dict of this class or of `torch.optim.Adam`."""
        super().load_state_dict(state_dict)
        self._behind = None
        for p, state in self.state.items():
            state |= self._laid_out(p, state["exp_avg"], state["exp_avg_sq"])
