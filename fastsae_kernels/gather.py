"""A weighted gather-sum on a CPU, PyTorch's own `embedding_bag`: what decoding and the gradients of the weights are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastsae_kernels.memory import Spare, is_large, zeros

BLOCK_ELEMENTS = 2**19  # the sums of one block take 2 MB, which stay in cache on their way to a large array
LONGEST_SUM = 256  # entries that are added up one by one; more of them would lose digits, so they are added in pieces


def gather_sum(offsets: Tensor, indices: Tensor, weights: Tensor, rows: Tensor, spare: Spare | None = None) -> Tensor:
    """`out[i] = sum of weights[e] * rows[indices[e]]` over the entries e of segment i, `[n_segments, d]`.

    `rows` must be contiguous for speed; accumulates in fp32 for every dtype. A large result lies in the memory of `spare`.
    """
    shape = (offsets.numel() - 1, rows.shape[1])
    weights = weights.to(rows.dtype)
    if indices.numel() == 0:
        return zeros(shape, rows.dtype)
    if not is_large(shape, rows.dtype):
        return _sums(offsets, indices, weights, rows)
    out, ends = (spare.zeros if spare is not None else zeros)(shape, rows.dtype), offsets.numpy()
    used = np.flatnonzero(np.diff(ends))  # the memory of segments without entries is not even touched
    for i in range(0, used.size, size := max(1, BLOCK_ELEMENTS // shape[1])):
        block = used[i : i + size]
        first, last = ends[block[0]], ends[block[-1] + 1]
        starts = torch.from_numpy(np.append(ends[block], last) - first)
        sums = _sums(starts, indices[first:last], weights[first:last], rows)
        if block[-1] - block[0] + 1 == block.size:  # no gaps, and a plain copy takes half the time
            out[block[0] : block[-1] + 1] = sums
        else:
            out.index_copy_(0, torch.from_numpy(block), sums)
    return out


def _sums(offsets: Tensor, indices: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    n_pieces = -(-offsets.diff() // LONGEST_SUM)
    if not (n_pieces > 1).any():
        return _bags(offsets, indices, weights, rows)
    ends = functional.pad(n_pieces.clamp_(min=1).cumsum(0), (1, 0))
    within = torch.arange(int(ends[-1])) - ends[:-1].repeat_interleave(n_pieces)
    starts = offsets[:-1].repeat_interleave(n_pieces) + within * LONGEST_SUM
    wide = rows.float() if rows.element_size() == 2 else rows  # or each piece would be rounded
    pieces = _bags(torch.cat([starts, offsets[-1:]]), indices, weights.to(wide.dtype), wide)
    return _sums(ends, torch.arange(len(pieces)), torch.ones(len(pieces), dtype=wide.dtype), pieces).to(rows.dtype)


def _bags(offsets: Tensor, indices: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    return functional.embedding_bag(
        indices,
        rows,
        offsets.to(indices.dtype),
        mode="sum",
        per_sample_weights=weights,
        include_last_offset=True,
    )
