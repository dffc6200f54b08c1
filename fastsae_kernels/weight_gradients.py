"""Weight gradients that are not summed yet: an optimiser sums them row by row, inside its own pass over the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastsae_kernels.gather import gather_sum
from fastsae_kernels.memory import version_of
from fastsae_kernels.types import FeatureMajor

if TYPE_CHECKING:
    from fastsae_kernels.gpu.weight_gradients import GpuShare, RowSums


class _Share(NamedTuple):
    """What one pass adds to the gradient of one weight matrix."""

    entries: FeatureMajor
    weights: Tensor  # [nnz], by feature
    vectors: Tensor  # [N, d]
    version: int | None  # how often `vectors` was written when the pass ended
    dtype: torch.dtype  # of the sums

    def sums(self, rows: slice, first: int, last: int) -> Tensor:
        """`[C, d]`, of the features in `rows`, which own the entries from `first` to `last`."""
        offsets = self.entries.offsets[rows.start : rows.stop + 1] - first
        return gather_sum(offsets, self.entries.tokens[first:last], self.weights[first:last], self.vectors)


class WeightGradients:
    """What the gradients of both weight matrices are sums of, from each backward pass that ran while it was collected.

        grad_W_enc[:, j] = sum over the entries e of feature j of  grad_hidden_pre_e * x[token_e]
        grad_W_dec[j]    = sum over the same entries of            decoded_e * grad_out[token_e]

    with the activations for `decoded`, or what the rows of `grad_out` are to be scaled by times these.

    It holds 12 bytes per entry and keeps the inputs of the passes alive until `clear`.

    Args:
        W_enc: The encoder's parameter.
        W_dec: The decoder's parameter.
    """

    def __init__(self, W_enc: Tensor, W_dec: Tensor) -> None:
        self.matrices = (W_enc, W_dec)
        self.gpu: GpuShare | None = None  # of one pass
        self._shares: tuple[list[_Share], list[_Share]] = ([], [])  # of W_enc, of W_dec
        self._buffer: Tensor | None = None

    def add(
        self,
        entries: FeatureMajor,
        grad_hidden_pre: Tensor | None,
        x: Tensor,
        decoded: Tensor | None,
        grad_out: Tensor,
        dtype: torch.dtype,
    ) -> None:
        """Takes the share of one backward pass, whose sums are formed in at least fp32.

        Args:
            entries: The entries by feature.
            grad_hidden_pre: `[nnz]`; None where the gradient of `W_enc` is not asked for.
            x: `[N, d_in]`.
            decoded: `[nnz]`; None where the gradient of `W_dec` is not asked for.
            grad_out: `[N, d_out]`.
            dtype: The widest of the weights and of x.
        """
        wide = torch.promote_types(dtype, torch.float32)
        for shares, weights, vectors in zip(self._shares, (grad_hidden_pre, decoded), (x, grad_out), strict=True):
            if weights is not None:
                # detached, or the collection would keep the pass's graph alive
                vectors = vectors.detach().contiguous()
                shares.append(_Share(entries, weights, vectors, version_of(vectors), wide))

    def clear(self) -> None:
        """Forgets all passes."""
        for i in range(2):
            self.drop(i)

    def drop(self, i: int) -> None:
        """Forgets the shares of `matrices[i]`."""
        self._shares[i].clear()
        if self.gpu is not None:
            self.gpu = self.gpu.without(i)

    def has(self, i: int) -> bool:
        """Whether there is a share of `matrices[i]`."""
        return bool(self._shares[i]) or self.row_sums(i) is not None

    def row_sums(self, i: int) -> RowSums | None:
        """The share of `matrices[i]` that a pass on a GPU left, as its kernels sum it."""
        return None if self.gpu is None else self.gpu[i]

    def is_unchanged(self) -> bool:
        """Whether no tensor of a pass was written since that pass ended."""
        parts: list[_Share | RowSums] = [*self._shares[0], *self._shares[1]]
        parts += [sums for sums in self.gpu or () if sums is not None]
        return all(version_of(part.vectors) == part.version for part in parts)

    def buffer(self, n: int, like: Tensor) -> Tensor:
        """`[n]` like a tensor in dtype and device, the same memory in each step and whatever that left there."""
        kept = self._buffer
        if kept is None or (kept.numel(), kept.dtype, kept.device) != (n, like.dtype, like.device):
            self._buffer = kept = torch.empty(n, dtype=like.dtype, device=like.device)
        return kept

    def touched(self) -> Tensor:
        """`[d_sae]` bool, which features have an entry in a pass on a CPU."""
        return torch.stack([share.entries.offsets.diff() > 0 for shares in self._shares for share in shares]).any(0)

    def chunks(self, i: int, size: int) -> Iterator[tuple[slice, Tensor]]:
        """`(rows, gradient [C, d])` of `matrices[i]` by feature, for `size` features at a time, from passes on a CPU."""
        # widened for as long as they are summed: PyTorch sums 16-bit rows with 16-bit weights
        shares = [share._replace(vectors=share.vectors.to(share.dtype)) for share in self._shares[i]]
        bounds = [[*s.entries.offsets[:-1:size].tolist(), s.entries.tokens.numel()] for s in shares]
        d_sae = shares[0].entries.offsets.numel() - 1
        for c, start in enumerate(range(0, d_sae, size)):
            rows = slice(start, min(start + size, d_sae))
            first, *others = (share.sums(rows, *b[c : c + 2]) for share, b in zip(shares, bounds, strict=True))
            for other in others:
                first += other
            yield rows, first


class Collector:
    """Where a module's passes look whether an optimiser collects their weight gradients; a module has one for life."""

    def __init__(self) -> None:
        self.into: WeightGradients | None = None

    @contextmanager
    def collecting(self, into: WeightGradients) -> Iterator[None]:
        """Collects from the backward passes inside the `with` block."""
        self.into = into
        try:
            yield
        finally:
            self.into = None

    def of(self, W_enc: Tensor, W_dec: Tensor) -> PassCollector:
        """For a pass with these parameters."""
        return PassCollector(self, W_enc, W_dec)


class PassCollector(NamedTuple):
    """The collector of one pass, and the parameters whose gradients it may collect."""

    collector: Collector
    W_enc: Tensor
    W_dec: Tensor

    def now(self) -> WeightGradients | None:
        """Where the gradients go if somebody collects those of these very parameters now."""
        into = self.collector.into
        is_theirs = into is not None and into.matrices[0] is self.W_enc and into.matrices[1] is self.W_dec
        return into if is_theirs else None
