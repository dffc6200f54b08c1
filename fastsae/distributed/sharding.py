"""An SAE whose features are held by several processes: the ops of the kernels, each over the features of one process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import fastsae_kernels as kernels
from fastsae.distributed.exchange import residual_of, shared, start_sum, summed
from fastsae.distributed.groups import Pending
from fastsae.distributed.mesh import Groups
from fastsae.distributed.parts import bounds, own_part
from fastsae.distributed.selection import among_batch_topk, among_topk
from fastsae.errors import UsageError
from fastsae_kernels import ActivityHint, AutoencodeOutput, AutoencodeSpec, SparseActs
from fastsae_kernels.weight_gradients import PassCollector

BUCKET_BYTES = 2**24  # Gradients are sent in pieces of this size.
FEATURE_DIMS = {"W_enc": 1, "b_enc": 0, "threshold": 0, "log_threshold": 0, "W_dec": 0}
"""The dimension of the features of those parameters that have one; the processes divide them along it."""


class Sharding:
    """Which features of an SAE this process holds, and the ops that compute with the features of all processes.

    Process `r` of the `P` processes that share the features holds those from `start` to `end`, as `torch.chunk` divides them:
    `ceil(d_sae / P)` each; the last processes have fewer, or none.

        sae_out[n] = b_dec + sum over processes of feature_acts[n, own] @ W_dec[own]

    So a pass sends one row of the reconstruction for each token, and no gradient of a weight.

    Args:
        d_sae: Number of features of the whole SAE.
        groups: The groups of this process.
        reduce_dtype: The number format in which processes send each other parts of a reconstruction, float32 or bfloat16.
        n_chunks: The number of chunks of a batch; the reconstruction of one is summed while the next is computed.

    Raises:
        UsageError: `reduce_dtype` is another number format, or `n_chunks` is no whole number >= 1.
    """

    def __init__(
        self,
        d_sae: int,
        groups: Groups,
        *,
        reduce_dtype: torch.dtype = torch.float32,
        n_chunks: int = 1,
    ) -> None:
        if reduce_dtype not in (torch.float32, torch.bfloat16):
            raise UsageError(f"reduce_dtype: expected torch.float32 or torch.bfloat16, got {reduce_dtype}")
        if not isinstance(n_chunks, int) or n_chunks < 1:
            raise UsageError(f"overlap_chunks: expected a whole number >= 1, got {n_chunks!r}")
        self.d_sae, (self.features, self.data, self.world) = d_sae, groups
        self.reduce_dtype, self.n_chunks = reduce_dtype, n_chunks
        self.start, self.end = bounds(d_sae, self.features.size, self.features.rank)

    def __deepcopy__(self, _: dict[int, Any]) -> Sharding:
        return self  # a copy of an SAE works with the same processes

    def share(self, tensor: Tensor, name: str = "b_dec") -> Tensor:
        """A tensor that every process holds whole, for a product with this process's features; its gradient is summed."""
        return shared(tensor, self.features, name)

    def sum_of_parts(self, part: Tensor) -> Tensor:
        """The sum over the processes of the losses of their own features."""
        return summed(part, self.features, "penalty")

    @property
    def is_shared(self) -> bool:
        """Whether other processes hold some of the features."""
        return self.features.size > 1

    def own_part(self, name: str, whole: Tensor) -> Tensor:
        """The part of a tensor, by its parameter's name, that this process holds; a view."""
        return own_part(whole, FEATURE_DIMS.get(name), self.features)

    @torch.no_grad()
    def part_of_first(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a tensor that every process has: where they differ, that of the first one with this part."""
        first = self.data if name in FEATURE_DIMS else self.world
        return first.broadcast_(self.own_part(name, whole).clone(memory_format=torch.contiguous_format), "weights")

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole of a tensor, by its parameter's name, in every process."""
        if name not in FEATURE_DIMS:
            return part
        dim, n_processes = FEATURE_DIMS[name], self.features.size
        ends = [bounds(self.d_sae, n_processes, rank) for rank in range(n_processes)]
        widths = [end - start for start, end in ends]
        rows = self.features.gather_rows(part.detach().movedim(dim, 0).contiguous(), widths, "weights")
        return rows.movedim(0, dim).contiguous()

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[Tensor], n_tokens: int) -> None:
        """Replaces gradients of means over this process's tokens by those of the mean over the tokens of all, in place.

            grad = sum over processes of n_tokens * grad / sum over processes of n_tokens

        The gradients are sent in pieces of 16 MB, all of which are under way at once.

        Args:
            parameters: The parameters; those without a gradient are left out, which are the same ones in every process.
            n_tokens: The number of tokens that this process's loss was the mean of; with 0 its gradients count as 0.
        """
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.data.size == 1 or not grads:
            return
        n_all = int(self.data.sum_(torch.tensor([n_tokens], device=grads[0].device), "counts"))
        pending = []
        for grad in grads:
            # a matrix that is stored by feature is contiguous as its transpose
            flat = (grad if grad.is_contiguous() else grad.t()).view(-1)
            if n_tokens:
                flat.mul_(n_tokens / n_all)
            else:
                flat.zero_()  # the mean over no tokens is NaN
            pending += [self.data.start_sum_(piece, "gradients") for piece in flat.split(BUCKET_BYTES // flat.itemsize)]
        for piece in pending:
            piece.wait()

    @torch.no_grad()
    def clip_grad_norm_(self, named_parameters: Iterable[tuple[str, Tensor]], max_norm: float) -> Tensor:
        """As `torch.nn.utils.clip_grad_norm_`, by the norm of the gradients of all features; returns that norm.

        Args:
            named_parameters: The parameters of the SAE; those without a gradient are left out, which are the same ones in every
                process.
            max_norm: The largest norm that is left as it is.
        """
        grads = [(name, p.grad) for name, p in named_parameters if p.grad is not None]
        # the first process counts those that all have
        own = [grad for name, grad in grads if name in FEATURE_DIMS or self.features.rank == 0]
        squares = [torch.linalg.vector_norm(grad, dtype=torch.float64).square() for grad in own]
        zero = torch.zeros((), dtype=torch.float64, device=grads[0][1].device if grads else None)
        norm = self.features.sum_(torch.stack([zero, *squares]).sum(), "norm").sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for _, grad in grads:
            grad.mul_(scale.to(grad.dtype))
        return norm

    def mean_over_data(self, values: Tensor, n_tokens: int) -> Tensor:
        """Means `[n]` over this process's tokens, as means over those of all processes."""
        if self.data.size == 1:
            return values
        sums = torch.cat([values * n_tokens if n_tokens else torch.zeros_like(values), values.new_full((1,), n_tokens)])
        sums = self.data.sum_(sums.double(), "means")
        return (sums[:-1] / sums[-1]).to(values.dtype)

    def total(self, n: int, device: torch.device) -> int:
        """The sum of a number over the processes that share the features."""
        return int(self.features.sum_(torch.tensor([n], device=device), "counts"))

    def autoencode(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        threshold: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        *,
        spec: AutoencodeSpec,
        target: Tensor | None = None,
        feature_scale: Tensor | None = None,
        hint: ActivityHint | None = None,
        collector: PassCollector | None = None,
    ) -> AutoencodeOutput:
        """`fastsae_kernels.autoencode` of the whole SAE, with the same result in every process.

        Only `feature_counts` differ, which are those of this process's features. `acts` is None. BatchTopK chooses among the
        activations of the tokens of all processes.
        """
        weights = (W_enc, b_enc, threshold, W_dec)
        if self.features.size == 1 and not (spec.batch_topk and self.data.size > 1):
            return kernels.autoencode(
                x,
                *weights,
                b_dec,
                spec=spec,
                target=target,
                feature_scale=feature_scale,
                hint=hint,
                collector=collector,
            )
        rows = self.share(x.reshape(-1, x.shape[-1]), "x")
        targets = None if target is None else target.reshape(-1, W_dec.shape[1])
        size = max(1, len(rows) if spec.batch_topk else -(-len(rows) // self.n_chunks))
        begun = []
        for chunk in rows.split(size):
            local = self._local(chunk, weights, spec, feature_scale, hint, collector)
            begun.append((local, *self._start(local, spec)))
        of_chunks = [None] * len(begun) if targets is None else targets.split(size)
        chunks = [self._finish(*sums, b_dec, of_chunk) for sums, of_chunk in zip(begun, of_chunks, strict=True)]
        return _joined(chunks, x.shape[:-1])

    def _local(
        self,
        x: Tensor,
        weights: tuple[Tensor, Tensor, Tensor, Tensor],
        spec: AutoencodeSpec,
        feature_scale: Tensor | None,
        hint: ActivityHint | None,
        collector: PassCollector | None,
    ) -> AutoencodeOutput:
        """The pass with this process's features alone, without `b_dec`."""
        W_enc, b_enc, threshold, W_dec = weights
        if spec.k is None and len(W_dec):
            zero = W_dec.new_zeros(W_dec.shape[1])
            return kernels.autoencode(
                x, *weights, zero, spec=spec, feature_scale=feature_scale, hint=hint, collector=collector
            )
        acts, smallest = self._chosen(x, W_enc, b_enc, threshold, spec.k, spec.batch_topk)
        out = kernels.decode(acts, W_dec) if len(W_dec) and len(x) else _zeros(x, weights)
        counts, l0 = torch.bincount(acts.indices, minlength=len(W_dec)), acts.l0()
        return AutoencodeOutput(out, l0.to(threshold.dtype), l0, counts, None, smallest)

    def _start(self, local: AutoencodeOutput, spec: AutoencodeSpec) -> tuple[Pending, Pending]:
        """Starts the sums of the reconstruction, and of penalty and L0, which are one number where L0 is the penalty."""
        out = start_sum(local.sae_out, self.features, self.reduce_dtype, "reconstruction")
        penalty = local.penalty.detach()
        counts = penalty.clone() if spec.penalty == "l0" else torch.stack([penalty, local.l0.to(penalty.dtype)])
        return out, self.features.start_sum_(counts, "penalty")

    def _finish(
        self, local: AutoencodeOutput, out: Pending, counts: Pending, b_dec: Tensor, target: Tensor | None
    ) -> AutoencodeOutput:
        """The result of all processes, once the sums are there."""
        sums = counts.wait()
        penalty, l0 = sums if sums.dim() == 2 else (sums, sums)
        nothing = local.sae_out.new_zeros(()).expand_as(local.sae_out)
        rows, squared_error = residual_of(local.sae_out, b_dec, nothing if target is None else target, out)
        return local._replace(
            sae_out=rows,
            penalty=summed(local.penalty, self.features, "penalty", Pending(penalty)),
            l0=l0.round().long(),
            squared_error=None if target is None else squared_error,
            acts=None,
        )

    def encode(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        threshold: Tensor,
        *,
        k: int | None = None,
        batch_topk: bool = False,
    ) -> SparseActs:
        """The active features of each token in all processes, under their numbers in the whole SAE.

        Differentiable only where one process holds all features.
        """
        if not self.is_shared and not batch_topk:
            return kernels.encode(x, W_enc, b_enc, threshold, k=k)
        with torch.no_grad():
            return self._gathered(self._chosen(x, W_enc, b_enc, threshold, k, batch_topk)[0])

    def decode(self, acts: SparseActs, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        """The reconstruction from activations under their numbers in the whole SAE.

        Differentiable only where one process holds all features.
        """
        if not self.is_shared:
            return kernels.decode(acts, W_dec, b_dec)
        own = acts.packed()
        own = own.select((own.indices >= self.start) & (own.indices < self.end))
        own = SparseActs(own.row_offsets, own.indices - self.start, own.values, (own.shape[0], len(W_dec)))
        with torch.no_grad():
            out = kernels.decode(own, W_dec) if len(W_dec) else W_dec.new_zeros(acts.shape[0], W_dec.shape[1])
            whole = start_sum(out, self.features, torch.float32, "reconstruction").wait()
            return (whole + b_dec).to(out.dtype)

    def _chosen(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k: int | None, batch_topk: bool
    ) -> tuple[SparseActs, Tensor | None]:
        """This process's part of the active features, packed, and the smallest value in a choice from the batch."""
        width, n_tokens = W_enc.shape[1], len(x)
        budget = 0
        if k is not None and batch_topk:
            n_all = self.data.sum_(torch.tensor([n_tokens], device=x.device), "counts")
            budget = k * int(n_all)
        most = k if not batch_topk or k is None else -(-budget // max(1, n_tokens))
        if width and n_tokens:
            most = None if most is None else min(most, width)
            acts = kernels.encode(x, W_enc, b_enc, threshold, k=most, batch_topk=batch_topk).packed()
        else:
            acts = _no_entries(n_tokens, width, threshold)
        if k is None:
            return acts, None
        if not batch_topk:
            return acts.select(among_topk(acts, k, self.features)), None
        kept, smallest = among_batch_topk(acts, budget, self.features, self.data, self.world)
        return acts.select(kept), smallest

    def _gathered(self, acts: SparseActs) -> SparseActs:
        """The entries of all processes, by token, then feature."""
        group = self.features
        acts = acts.packed()
        if group.size == 1:
            return acts
        n_entries = group.gather(torch.tensor([len(acts.values)], device=acts.device), "entries").flatten().tolist()
        counts = group.gather(acts.row_offsets.diff().long(), "entries")
        values = group.gather_rows(acts.values, n_entries, "entries")
        indices = group.gather_rows(acts.indices + self.start, n_entries, "entries")
        # each process's entries are sorted by token: a stable sort by token puts processes, and so features, in order
        n_tokens = acts.shape[0]
        tokens = torch.arange(n_tokens, device=acts.device).repeat(group.size).repeat_interleave(counts.flatten())
        order = tokens.argsort(stable=True)
        row_offsets = torch.nn.functional.pad(counts.sum(0).cumsum(0), (1, 0)).to(acts.row_offsets.dtype)
        return SparseActs(row_offsets, indices[order], values[order], (n_tokens, self.d_sae))


def _zeros(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """`[N, d_out]` zeros without features or tokens, through which the backward pass still takes part in every exchange."""
    device_type = x.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
    nothing = torch.stack([tensor[:0].sum().to(dtype) for tensor in (*weights, x)]).sum()
    return nothing + x.new_zeros(len(x), weights[3].shape[1], dtype=dtype)


def _no_entries(n_tokens: int, width: int, like: Tensor) -> SparseActs:
    offsets, indices = (torch.zeros(n, dtype=torch.int32, device=like.device) for n in (n_tokens + 1, 0))
    return SparseActs(offsets, indices, like.new_zeros(0), (n_tokens, width))


def _joined(chunks: list[AutoencodeOutput], leading: torch.Size) -> AutoencodeOutput:
    """The outputs of the chunks of a batch as one, with its leading dimensions."""
    first = chunks[0]
    counts = torch.stack([chunk.feature_counts for chunk in chunks]).sum(0) if len(chunks) > 1 else first.feature_counts

    def joined(name: str) -> Tensor | None:
        found = [getattr(chunk, name) for chunk in chunks]
        if found[0] is None:
            return None
        rows = torch.cat(found) if len(found) > 1 else found[0]
        return rows.reshape(*leading, *rows.shape[1:])

    fields: Any = {name: joined(name) for name in ("sae_out", "penalty", "l0", "squared_error")}
    return first._replace(**fields, feature_counts=counts)
