"""Adam for an SAE in one pass over the weights: gradient, projection, moments, update and unit norm, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from fastsae import adam_on_gpu
from fastsae.adam_state import (
    OwedDecay,
    check_arguments,
    check_gradient,
    check_options,
    check_sae,
    check_state_dict,
    portable,
    restore_unit_norm_,
)
from fastsae.errors import UsageError
from fastsae.pending import Collecting, PendingGradients
from fastsae.sae.compute_copies import ComputeCopies, WrittenState, written_state

if TYPE_CHECKING:
    from fastsae.distributed import Sharding
    from fastsae_kernels.gpu.weight_gradients import RowSums

CHUNK_ELEMENTS = 2**19  # rows with so many elements are updated together: four tensors of 2 MB stay in cache
OPTIONS = ("sae", "max_grad_norm", "normalize_decoder", "exp_avg_dtype", "compute_dtype")


class FusedSAEAdam(torch.optim.Adam):
    """Adam with the projection, the clipping and the unit norm of SAE training in the same pass over the weights.

        g_dec  = g_dec - (g_dec . w) w                              normalize_decoder: the part along the row does nothing
        g      = g * min(1, max_grad_norm / (|all g| + 1e-6))       max_grad_norm
        w      = w - lr * m_hat / (sqrt(v_hat) + eps)               m, v: moments of g, as in `torch.optim.Adam`
        w_dec  = w_dec / |w_dec|                                    normalize_decoder

    Same numbers as autograd, `torch.nn.utils.clip_grad_norm_`, `torch.optim.Adam(fused=True)` and an explicit projection and
    normalisation, up to rounding. The state dict is that of `torch.optim.Adam`, and either loads the other's.

    After `loss.backward()` it is an optimiser like any other: it steps from `.grad`. `backward(loss)` in its place saves the
    memory of two gradients of the weights' size, which `step` then sums row by row.

    It stores `W_enc` feature by feature (`sae.store_by_feature_`), as its kernels read it.

    On a GPU one kernel reads each row once: it sums the row's gradient, updates the row, its moments and its 16-bit copy,
    and no step waits for the device. It wants fp32 weights and no `maximize`; otherwise gradients are written out first.

    Args:
        sae: The SAE; its own `dtype` is that of the master weights.
        lr: Learning rate; `param_groups[0]["lr"]` may change between steps.
        betas: Decay rates of the moments. With `betas[0] == 0` a row that no token touched costs nothing, exactly: its update
            is zero, and its second moment catches up on the decay, a power of `betas[1]`, when it is touched or saved. A GPU
            does not write the first moment then, which such an Adam multiplies by 0: `betas[0]` is to stay 0 there.
        eps: Added to the denominator.
        max_grad_norm: Clips the global norm of all gradients; None does not. Exact: on a CPU the gradients are summed first and
            kept, at the price of a buffer of the weights' size, which is used again in each step; on a GPU they are summed
            twice.
        normalize_decoder: Keeps unit-norm decoder rows.
        exp_avg_dtype: Dtype of the first moment of both weight matrices: fp32, or bf16 for half of its memory (rounded to
            nearest). The second stays fp32: in bf16 it would stand still once a step changes it by less than 1 part in 512.
        compute_dtype: bf16 or fp16: keeps copies of both weight matrices in that dtype, which training under autocast to it
            takes instead of casting the weights in each step; None keeps none. After `loss.backward()` the gradients of both
            have passed through that dtype, so that fp16 wants a GradScaler. Change weights under `torch.no_grad()`, not
            through `.data`, whose writes PyTorch does not count: the copies would be out of date in silence.

    Raises:
        UsageError: An argument is of the wrong kind or out of range, or a weight matrix is no plain parameter of the SAE.
        ValueError: lr, betas or eps is out of range, from `torch.optim.Adam`.
    """

    def __init__(
        self,
        sae: Collecting,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        max_grad_norm: float | None = None,
        normalize_decoder: bool = False,
        exp_avg_dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        check_sae(sae)
        check_arguments(max_grad_norm, exp_avg_dtype, compute_dtype)
        sae.store_by_feature_()
        super().__init__(sae.parameters(), lr=lr, betas=betas, eps=eps, fused=True)
        self.sae, self.max_grad_norm, self.normalize_decoder = sae, max_grad_norm, normalize_decoder
        self.exp_avg_dtype, self.compute_dtype = exp_avg_dtype, compute_dtype
        self.matrices: tuple[nn.Parameter, nn.Parameter] = (sae.W_enc, sae.W_dec)
        self._prepare()

    def _prepare(self) -> None:
        """Makes what neither a copy nor a file of the optimiser holds."""
        self._step_supports_amp_scaling = False  # so that a GradScaler unscales `.grad` and decides about the step
        self._pending = PendingGradients(self.sae, self.matrices)
        self._kept: dict[nn.Parameter, Tensor] = {}  # summed gradients, where they are clipped
        self._steps: dict[nn.Parameter, int] = {}  # as in the state, where reading it would wait for a GPU
        self._owed = OwedDecay()
        self._left: dict[nn.Parameter, WrittenState] = {}  # weights whose rows are all as a step leaves them
        self._copies: ComputeCopies | None = None
        if self.compute_dtype is not None:
            self._copies = ComputeCopies(self.matrices, self.compute_dtype)
            self.sae.use_compute_copies(self._copies)

    def __getstate__(self) -> dict[str, Any]:
        self._catch_up()
        own = {name: getattr(self, name) for name in (*OPTIONS, "matrices")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "sae" in state:  # a copy or a file; PyTorch also calls this to load a state dict
            self._prepare()

    def backward(self, loss: Tensor, *, retain_graph: bool | None = None) -> None:
        """Sends a loss back like `loss.backward()`, but leaves the gradients of `W_enc` and `W_dec` to be summed in `step`.

        Where the sparse path ran, `.grad` of both then only says that a gradient is there: reading it raises. So call it for
        every loss of a step, and let nothing but `step` and `zero_grad` come between. The tensors of the pass must not be
        written in place until then. All other parameters have their gradient in `.grad`.

        In a group of several processes, with hooks on the gradient of a weight matrix, and where one is in `.grad` already,
        this is `loss.backward()`.

        Args:
            loss: A scalar.
            retain_graph: As in `torch.Tensor.backward`.

        Raises:
            UsageError: Another optimiser's `backward` came before in the same step.
        """
        self._pending.backward(loss, retain_graph)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients."""
        self._pending.clear()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from `.grad` and from what `backward` collected, which is forgotten then.

        Raises:
            UsageError: An option of `torch.optim.Adam` that this one lacks is set, a gradient is sparse or another optimiser's, a
                CUDA graph is being captured, or a tensor of a pass was written since `backward`. Nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._pending.follow_grads()
        self._follow_state()
        self._check()
        weights = [p for p in self.matrices if p.grad is not None]
        sums = self._row_sums()
        if not sums:
            self._pending.write_row_sums()
        scale = None if self.max_grad_norm is None else self._clip(weights, sums)
        for group in self.param_groups:
            self._update_others(group, scale)
        lazy = self._may_leave_rows(weights)
        # a row that is left alone must be as a step leaves it
        changed = {p for p in weights if lazy and self._left.get(p) != written_state(p)}
        if sums:
            self._update_by_kernel(sums, scale)
        touched = self._pending.touched() if lazy and not sums else None
        for p in weights:
            if p not in sums:
                self._update(p, scale, touched)
        self._finish(weights, changed)
        self._pending.clear()
        return loss

    def _check(self) -> None:
        """Finds what is wrong before anything is changed."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise UsageError("step: expected no CUDA graph to be captured, whose replays would count as one step")
        for group in self.param_groups:
            check_options(group)
            for p in group["params"]:
                check_gradient(p, self.state.get(p))
        self._pending.check()

    @property
    def _chunk(self) -> int:
        """Features that are updated together: few on a CPU, whose cache holds them, all on a GPU."""
        return (
            max(1, CHUNK_ELEMENTS // self.sae.d_in) if self.sae.device.type == "cpu" else max(1, len(self.matrices[1]))
        )

    def _by_feature(self, p: nn.Parameter, tensor: Tensor) -> Tensor:
        """A tensor like the weight matrix `p`, as `[d_sae, d_in]`."""
        return self._pending.by_feature(p, tensor)

    def _row_sums(self) -> dict[nn.Parameter, RowSums]:
        """The collected gradients that the GPU's kernel can sum in its pass over the weights."""
        found = {p: sums for p in self.matrices if (sums := self._pending.row_sums(p)) is not None}
        can_update = found and adam_on_gpu.can_update(list(found), self.param_groups[0], self.sae.d_in)
        return found if can_update else {}

    def _clip(self, weights: list[nn.Parameter], sums: dict[nn.Parameter, RowSums]) -> Tensor:
        """The factor that clips; a CPU keeps the weights' gradients, whose norm is known only when all are summed."""
        sharding: Sharding | None = getattr(self.sae, "sharding", None)
        others = [p for group in self.param_groups for p in group["params"] if not self._is_matrix(p)]
        if sharding is not None and sharding.features.rank > 0:
            others = [p for p in others if p is not getattr(self.sae, "b_dec", None)]  # the first process counts it
        squares = [p.grad.double().square().sum() for p in others if p.grad is not None]
        for p in weights:
            if p in sums:
                norms = adam_on_gpu.row_norms(sums[p], self._by_feature(p, p.detach()), project=self._on_sphere(p))
                squares.append(norms.sum(dtype=torch.float64))
                continue
            if p in self._pending and p not in self._kept:
                self._kept[p] = torch.empty_like(self._by_feature(p, p))
            kept = self._kept[p] if p in self._pending else None
            # one tensor for all chunks: small ones in between would break up the memory that the next chunks could use again
            norms = torch.empty(-(-len(self.matrices[1]) // self._chunk), dtype=torch.float64, device=p.device)
            for i, (rows, grad) in enumerate(self._gradients(p)):
                if kept is not None:
                    kept[rows] = grad
                norms[i] = torch.linalg.vector_norm(grad)
            squares += norms.square().unbind()
        zero = torch.zeros((), dtype=torch.float64, device=self.sae.device)
        square = torch.stack([zero, *squares]).sum()
        if sharding is not None:
            sharding.features.sum_(square, "norm")
        assert self.max_grad_norm is not None
        factor = (self.max_grad_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
        return factor.to(torch.promote_types(self.sae.dtype, torch.float32))

    def _is_matrix(self, p: Tensor) -> bool:
        return any(p is W for W in self.matrices)

    def _gradients(self, p: nn.Parameter) -> Iterator[tuple[slice, Tensor]]:
        """`(rows, gradient [C, d_in])` of a weight matrix by feature, projected."""
        for rows, grad in self._pending.chunks(p, self._chunk):
            w = self._by_feature(p, p)[rows]
            if self._on_sphere(p):
                grad = torch.addcmul(grad, (grad * w).sum(1, keepdim=True), w.to(grad.dtype), value=-1)
            yield rows, grad

    def _update_others(self, group: dict[str, Any], scale: Tensor | None) -> None:
        others = [p for p in group["params"] if p.grad is not None and not self._is_matrix(p)]
        moments = [self._moments(p) for p in others]
        self._adam(
            group,
            [p.detach() for p in others],
            [p.grad if scale is None else p.grad * scale for p in others if p.grad is not None],
            [exp_avg for exp_avg, _ in moments],
            [exp_avg_sq for _, exp_avg_sq in moments],
            [self.state[p]["step"] for p in others],
        )
        for p in others:
            torch.autograd.graph.increment_version(p)  # which PyTorch's own fused Adam does not

    def _on_sphere(self, p: nn.Parameter) -> bool:
        """Whether the rows of a weight matrix have unit norm."""
        return self.normalize_decoder and p is self.matrices[1]

    def _update_by_kernel(self, sums: dict[nn.Parameter, RowSums], scale: Tensor | None) -> None:
        for p, s in sums.items():
            w, exp_avg, exp_avg_sq = (self._by_feature(p, tensor) for tensor in (p.detach(), *self._moments(p)))
            adam_on_gpu.update_rows(
                s, w, exp_avg, exp_avg_sq, self.param_groups[0], on_sphere=self._on_sphere(p), scale=scale,
                step=self._step_of(p) + 1, last_step=self._owed.last_step.get(p), copy=self._copy(p),
            )  # fmt: skip

    def _update(self, p: nn.Parameter, scale: Tensor | None, touched: Tensor | None) -> None:
        """All rows of a weight matrix, or those of the `touched` features (`[d_sae]` bool) alone."""
        copy = self._copy(p)
        for rows, grad in self._kept_gradients(p) if scale is not None and p in self._pending else self._gradients(p):
            whole = [self._by_feature(p, tensor)[rows] for tensor in (p.detach(), *self._moments(p))]
            at = slice(None) if touched is None else touched[rows].nonzero().squeeze(1)
            parts = [matrix[at].contiguous() for matrix in whole]
            if touched is not None:
                parts[2] *= self._owed.factor(self._step_of(p) - self._owed.last_step[p][rows][at], parts[2])
            grad = grad[at] if scale is None else grad[at] * scale
            self._update_rows(p, grad.to(p.dtype).contiguous(), *parts)
            for matrix, part in zip(whole, parts, strict=True):
                if part.data_ptr() != matrix.data_ptr():  # rows of another layout, or some of them, were copied
                    matrix[at] = part
            if copy is not None:
                copy[rows][at] = parts[0].to(copy.dtype)
        if touched is not None:
            self._owed.last_step[p].masked_fill_(touched, self._step_of(p) + 1)

    def _kept_gradients(self, p: nn.Parameter) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.matrices[1]), self._chunk):
            rows = slice(start, start + self._chunk)
            yield rows, self._kept[p][rows]

    def _update_rows(self, p: nn.Parameter, grad: Tensor, w: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        wide = exp_avg.to(w.dtype)  # a copy only where it is narrower
        self._adam(self.param_groups[0], [w], [grad], [wide], [exp_avg_sq], [self.state[p]["step"].clone()])
        if wide is not exp_avg:
            exp_avg.copy_(wide)
        if self._on_sphere(p):
            w /= w.norm(dim=1, keepdim=True).clamp_min(1e-8)

    def _adam(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
    ) -> None:
        """PyTorch's own Adam; counts the steps."""
        adam(
            params, grads, exp_avgs, exp_avg_sqs, [], steps,
            fused=True, amsgrad=False, maximize=group["maximize"], weight_decay=group["weight_decay"],
            lr=group["lr"], eps=group["eps"], beta1=group["betas"][0], beta2=group["betas"][1],
        )  # fmt: skip

    def _may_leave_rows(self, weights: list[nn.Parameter]) -> bool:
        """Whether rows without entries are left alone; if not, all second moments are up to date afterwards."""
        group = self.param_groups[0]
        from_entries = weights and all(p in self._pending for p in weights)
        leaves = from_entries and group["betas"][0] == 0 and group["weight_decay"] == 0
        if not leaves or group["betas"][1] != self._owed.beta2:
            self._catch_up()
        if not leaves:
            return False
        self._owed.beta2 = group["betas"][1]
        for p in weights:
            self._owed.begin(p, self._step_of(p), len(self.matrices[1]))
        return True

    def _catch_up(self) -> None:
        """Does to the moments of untouched rows what the steps since would have done."""
        self._follow_state()
        for p in self._owed.last_step:
            self._owed.pay(p, self._step_of(p), *(self._by_feature(p, moment) for moment in self._moments(p)))
        self._owed.last_step.clear()

    def _finish(self, weights: list[nn.Parameter], changed: set[nn.Parameter]) -> None:
        """Counts the step; weights that were `changed` elsewhere get what a step over every row would have done."""
        for p in weights:
            self._moments(p)  # made here where a process holds no features, and so updates no rows
            self._steps[p] = self._step_of(p) + 1
            self.state[p]["step"] += 1
            if p in changed and self._on_sphere(p):
                restore_unit_norm_(p)
            torch.autograd.graph.increment_version(p)  # neither the kernel nor PyTorch's own fused Adam does
            self._left[p] = written_state(p)
            if self._copies is not None and p not in changed:
                self._copies.record(p)
        if self._copies is not None:
            for p in self.matrices:
                if self._copies.of(p) is None:
                    self._copies.refresh(p)

    def _follow_state(self) -> None:
        """Forgets what is known of a state that was thrown away, as by `optimizer.state.clear()`."""
        for p in self.matrices:
            if not self.state.get(p):
                self._steps.pop(p, None)
                self._owed.last_step.pop(p, None)

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
            zero = torch.zeros((), dtype=p.dtype, device=p.device)  # written to both without a tensor of their size
            state |= self._laid_out(p, zero, zero)
        return state["exp_avg"], state["exp_avg_sq"]

    def _laid_out(self, p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> dict[str, Tensor]:
        """Moments of `p` in its memory layout and their dtypes."""
        is_narrow = self._is_matrix(p) and p.dtype == torch.float32
        first = torch.empty_like(p, dtype=self.exp_avg_dtype if is_narrow else p.dtype).copy_(exp_avg)
        return {"exp_avg": first, "exp_avg_sq": torch.empty_like(p).copy_(exp_avg_sq)}

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Adam`'s, all tensors contiguous, as the weights of a new SAE are."""
        self._catch_up()
        return portable(super().state_dict())

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state dict of this class or of `torch.optim.Adam`.

        Raises:
            UsageError: It is none of an Adam, has an option that this one lacks, or no moments of these shapes. Nothing was
                changed.
        """
        check_state_dict(state_dict, [p for group in self.param_groups for p in group["params"]])
        super().load_state_dict(state_dict)
        self._steps.clear()
        self._owed.last_step.clear()
        self._left.clear()
        for p, state in self.state.items():
            state |= self._laid_out(p, state["exp_avg"], state["exp_avg_sq"])
            state["step"] = state["step"].to(p.device)
        if self._copies is not None:
            for p in self.matrices:
                self._copies.refresh(p)
