"""Weight gradients that are not summed yet: an optimiser sums them row by row, inside its own pass over the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastsae_kernels.cpu.decode import gather_sum
from fastsae_kernels.sparse_acts import FeatureMajor

if TYPE_CHECKING:
    from fastsae_kernels.gpu.weight_gradients import GpuShare


class _Pass(NamedTuple):
    entries: FeatureMajor  # of one pass
    grad_hidden_pre: Tensor  # [nnz], by feature
    x: Tensor  # [N, d_in]
    decoded: Tensor  # [nnz], by feature
    grad_out: Tensor  # [N, d_out]


class WeightGradients:
    """Collects from each backward pass what the gradients of both weight matrices are sums of.

        grad_W_enc[:, j] = sum over the entries e of feature j of  grad_hidden_pre_e * x[token_e]
        grad_W_dec[j]    = sum over the same entries of            decoded_e * grad_out[token_e]

    with the activations for `decoded`, or what the rows of `grad_out` are to be scaled by times these.

    Keeps 12 bytes per entry and the passes' inputs alive until `clear`. Passes that find no sparse entries (the dense path),
    run inside a compiled graph, or on a GPU after a first one leave their gradients in `.grad`, as without it.
    """

    def __init__(self) -> None:
        self._passes: list[_Pass] = []
        self.gpu: GpuShare | None = None  # of one pass
        self._buffer: Tensor | None = None

    def add(self, entries: FeatureMajor, grad_hidden_pre: Tensor, x: Tensor, decoded: Tensor, grad_out: Tensor) -> None:
        """Takes the share of one backward pass."""
        # detached, or the collector would keep the pass's graph alive
        self._passes.append(_Pass(entries, grad_hidden_pre, x.detach().contiguous(), decoded, grad_out.detach()))

    def clear(self) -> None:
        """Forgets all passes."""
        self._passes.clear()
        self.gpu = None

    def buffer(self, n: int, like: Tensor) -> Tensor:
        """`[n]` like a tensor in dtype and device, the same memory in each step and whatever that left there."""
        kept = self._buffer
        if kept is None or (kept.numel(), kept.dtype, kept.device) != (n, like.dtype, like.device):
            self._buffer = kept = torch.empty(n, dtype=like.dtype, device=like.device)
        return kept

    def __bool__(self) -> bool:
        return bool(self._passes)

    def touched(self) -> Tensor:
        """`[d_sae]` bool, which features have an entry."""
        return torch.stack([p.entries.offsets.diff() > 0 for p in self._passes]).any(0)

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """`(rows, grad_W_enc.T[rows], grad_W_dec[rows])` for `size` features at a time, in the dtypes of the passes."""
        d_sae = self._passes[0].entries.offsets.numel() - 1
        bounds = [[*p.entries.offsets[:-1:size].tolist(), p.entries.tokens.numel()] for p in self._passes]
        for i, start in enumerate(range(0, d_sae, size)):
            rows = slice(start, min(start + size, d_sae))
            sums: list[Tensor] = []
            for p, (first, last) in zip(self._passes, [b[i : i + 2] for b in bounds], strict=True):
                offsets = p.entries.offsets[rows.start : rows.stop + 1] - first
                tokens = p.entries.tokens[first:last]
                shares = (
                    gather_sum(offsets, tokens, p.grad_hidden_pre[first:last], p.x),
                    gather_sum(offsets, tokens, p.decoded[first:last], p.grad_out),
                )
                sums = (
                    list(shares) if not sums else [total.add_(share) for total, share in zip(sums, shares, strict=True)]
                )
            yield rows, sums[0], sums[1]
