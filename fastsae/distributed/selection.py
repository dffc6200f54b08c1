"""TopK and BatchTopK where several processes share the features: which activations are the largest of all."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.distributed.groups import Group
from fastsae_kernels import SparseActs

RADIX_BITS = 16  # One sum of a histogram over the processes finds so many bits of a value.
BINS = 2**RADIX_BITS  # The histogram has a bin for each of their values.


def n_candidates(k: int, n_processes: int) -> int:
    """How many values of a token each process sends at first: twice its even part of the `k` largest."""
    return min(k, -(-2 * k // n_processes))


def among_topk(acts: SparseActs, k: int, features: Group) -> Tensor:
    """`[nnz]` bool: which of this process's entries are among the `k` largest of their token; ties go to the lower feature.

    Each process sends the values of its `2 k / P` largest entries of a token. For a few tokens one process may hold more of the
    `k` largest than that. All processes find the same such tokens, and send the rest of their values too, so that the choice is
    exact.

    Args:
        acts: The `k` largest of this process's features for each token, packed.
        k: How many survive.
        features: The processes that share the features.
    """
    values = acts.values.detach()
    rows, starts = acts.row_ids(), acts.row_offsets.long()
    padded = values.new_zeros(acts.shape[0], k)
    padded[rows, torch.arange(len(values), device=values.device) - starts[rows]] = values
    padded = padded.sort(dim=1, descending=True).values
    sent = n_candidates(k, features.size)
    found = features.gather(padded[:, :sent].contiguous(), "candidates")
    cutoff = _kth_largest(found, k)
    last = found[:, :, -1]
    may_have_more = ((last >= cutoff.t()) & (last > 0)).any(0).nonzero().squeeze(1)
    if sent < k and len(may_have_more):
        rest = features.gather(padded[may_have_more, sent:].contiguous(), "candidates")
        found = torch.nn.functional.pad(found, (0, k - sent))
        found[:, may_have_more, sent:] = rest
        cutoff[may_have_more] = _kth_largest(found[:, may_have_more], k)
    room = k - (found > cutoff).sum((0, 2)) - (found[: features.rank] == cutoff).sum((0, 2))
    limit = cutoff[rows, 0]
    ties = values == limit
    before = torch.nn.functional.pad(ties.cumsum(0), (1, 0))
    place = before[:-1] - before[starts[:-1]][rows]  # among the ties of its row
    return (values > limit) | (ties & (place < room[rows]))


def _kth_largest(found: Tensor, k: int) -> Tensor:
    """`[N, 1]`, the k-th largest of `[P, N, q]` values of each token; 0 where there are no `k`."""
    by_token = found.permute(1, 0, 2).flatten(1)
    if by_token.shape[1] < k:
        return by_token.new_zeros(len(by_token), 1)
    return by_token.topk(k, dim=1).values[:, -1:]


def among_batch_topk(
    acts: SparseActs, budget: int, features: Group, data: Group, world: Group
) -> tuple[Tensor, Tensor]:
    """`[nnz]` bool, which of this process's entries are among the `budget` largest of the whole batch, and the smallest of them.

    Ties go to the lower token, then the lower feature. The value of the last survivor is found bit by bit: the histogram of
    the 16 highest bits of all values, summed over the processes, shows the 16 highest bits of the last survivor; then the
    histogram of the next 16 bits, of the values that begin with these, shows the next ones. This works because positive
    floating-point numbers are in the order of their bits, read as integers.

    Args:
        acts: This process's entries, packed, at least those that can survive.
        budget: How many survive in all.
        features: The processes that share the features.
        data: The processes that hold the same features, and see different tokens.
        world: All processes.
    """
    values = acts.values.detach()
    keys = values.view(torch.int32 if values.element_size() == 4 else torch.int64)
    known, left, n_ties = torch.zeros((), dtype=torch.int64, device=values.device), budget, 0
    of_prefix = torch.ones_like(values, dtype=torch.bool)
    top = keys.element_size() * 8 - RADIX_BITS
    for shift in range(top, -1, -RADIX_BITS):
        digits = (keys >> shift) & (BINS - 1)
        counts = torch.bincount(digits[of_prefix], minlength=BINS).int()
        counts = world.sum_(counts, "histogram").long()
        if shift == top and int(counts.sum()) <= left:  # all survive
            smallest = values.amin(0, keepdim=True) if len(values) else values.new_full((1,), torch.inf)
            return of_prefix, world.smallest_(smallest, "histogram")[0]
        above = counts.flip(0).cumsum(0).flip(0) - counts  # how many values have a larger digit
        digit = int((above < left).nonzero()[0])
        left, n_ties = left - int(above[digit]), int(counts[digit])
        known = (known << RADIX_BITS) + digit
        of_prefix &= digits == digit
    cutoff = known.to(keys.dtype).view(values.dtype)
    if left < n_ties:
        of_prefix &= _first_ties(acts, of_prefix, left, features, data)
    return (values > cutoff) | of_prefix, cutoff


def _first_ties(acts: SparseActs, ties: Tensor, most: int, features: Group, data: Group) -> Tensor:
    """`[nnz]` bool: which of the entries that tie are the first `most` by token, then feature."""
    rows = acts.row_ids()
    of_row = torch.bincount(rows[ties], minlength=acts.shape[0])
    by_process = features.gather(of_row, "candidates")
    of_batch = data.gather(by_process.sum().reshape(1), "candidates")
    in_row = by_process.sum(0)
    before_row = in_row.cumsum(0) - in_row + of_batch[: data.rank].sum()
    before = ties.cumsum(0) - ties.long()
    own_before = of_row.cumsum(0) - of_row
    place = before - own_before[rows] + (before_row + by_process[: features.rank].sum(0))[rows]
    return place < most


def among_largest(values: Tensor, k: int, features: Group) -> Tensor:
    """`[N, n]` bool: which of this process's numbers, of any sign, are among the `k` largest of their row; ties go to the first.

    Args:
        values: `[N, n]`, of this process's features.
        k: How many survive, where all processes together have as many.
        features: The processes, in the order of their features.
    """
    sent = min(
        k, max(features.gather(torch.tensor([values.shape[1]], device=values.device), "counts").flatten().tolist())
    )
    own = values.sort(dim=1, descending=True, stable=True)
    candidates = values.new_full((len(values), sent), -torch.inf)
    candidates[:, : values.shape[1]] = own.values[:, :sent]
    found = features.gather(candidates, "candidates")
    cutoff = _kth_largest(found, k)
    room = k - (found > cutoff).sum((0, 2)) - (found[: features.rank] == cutoff).sum((0, 2))
    ties = values == cutoff
    return (values > cutoff) | (ties & (ties.cumsum(1) <= room[:, None]))
