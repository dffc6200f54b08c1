"""Sparse encode on a CPU: one pass over feature chunks that stay in cache, no `[N, d_sae]` tensor.

Each chunk of features is multiplied with all tokens (`W_enc` feature-major: `[C, d_in] @ [d_in, N]`) into a small
buffer, and only the entries above `threshold - bandwidth / 2` leave it (`product.py`). Chunks come out feature-major, which
is the order the backward walks; a stable sort by token then gives the CSR order that decode walks (`entries.py`).

The k largest of a token are found with a bound that rises as features are seen (`topk.py`), those of a batch likewise.
Few tokens, and narrow features, take whole products and no chunks (`small.py`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastsae_kernels.activity import sampled_share
from fastsae_kernels.cpu import product
from fastsae_kernels.cpu.entries import BatchTopK, Entries, RowTopK, stack_rows
from fastsae_kernels.cpu.small import MAX_ELEMENTS, encode_small
from fastsae_kernels.cpu.topk import encode_topk
from fastsae_kernels.types import AutoencodeSpec, SparseActs

SAMPLE = (1024, 256)  # tokens and features that guess a batch's bound, at a hundredth of the whole product's cost or so
SAMPLED_MARGIN = 3  # features fire unequally often, so that a sample may hold more or fewer than its share
MIN_BLOCK_TOKENS = 256  # of a product that has all features; fewer read the weights too often


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    spec: AutoencodeSpec,
    max_entries: int | None = None,
) -> SparseActs | None:
    """Entries above `threshold - bandwidth / 2`, with value 0 where inactive, values in fp32 (fp64 for fp64 inputs).

    Returns None, and the caller takes the dense path, once there are more than `max_entries` of them, or where NaN or
    Inf makes a bound meaningless.

    Args:
        x: `[N, d_in]`.
        W_enc: `[d_in, d_sae]`; fastest when stored feature-major.
        b_enc: `[d_sae]`.
        threshold: `[d_sae]` fp32, >= 0.
        spec: Bandwidth and top-k; without a bandwidth active entries alone are listed.
        max_entries: Give up beyond this many entries (the dense path is then faster); never with `k`.
    """
    n_tokens, d_sae = x.shape[0], W_enc.shape[1]
    bandwidth, k, batch_topk = spec.bandwidth, spec.k, spec.batch_topk
    wide = torch.promote_types(x.dtype, torch.float32)
    threshold = threshold.to(wide)
    if max_entries is not None and _is_dense(x, W_enc, b_enc, threshold - bandwidth / 2, max_entries):
        return None
    if n_tokens * d_sae <= MAX_ELEMENTS:
        return encode_small(
            x, W_enc, b_enc, threshold, bandwidth=bandwidth, k=k, batch_topk=batch_topk, max_entries=max_entries
        )
    W_enc = W_enc.t().contiguous().t()  # a copy where it is stored otherwise: each chunk is read several times
    if not torch.isfinite(b_enc).all():  # joins the comparisons, not the products: NaN would pass for inactive
        return None
    if k is not None and bandwidth == 0 and not batch_topk:
        return encode_topk(x, W_enc, b_enc, threshold, k)
    if batch_topk:
        assert k is not None
        return _encode_batch_topk(x, W_enc, b_enc, threshold, k)
    block = MAX_ELEMENTS // d_sae
    if k is None and block >= MIN_BLOCK_TOKENS and not product.rounds(x.dtype):
        parts = [
            encode_small(rows, W_enc, b_enc, threshold, bandwidth=bandwidth, k=None, batch_topk=False)
            for rows in x.split(block)
        ]
        acts = stack_rows(parts)
        return None if acts is None or (max_entries is not None and acts.values.numel() > max_entries) else acts
    return _encode_threshold(x, W_enc, b_enc, threshold, bandwidth, k, max_entries)


def _is_dense(x: Tensor, W_enc: Tensor, b_enc: Tensor, lower: Tensor, max_entries: int) -> bool:
    """Whether a sample lets expect more entries than that: to list most of them before giving up would be in vain."""
    return sampled_share(x, W_enc, b_enc, lower) * len(x) * len(lower) > max_entries


def _encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
    k: int | None,
    max_entries: int | None,
) -> SparseActs | None:
    n_tokens, d_sae = x.shape[0], W_enc.shape[1]
    size = product.chunk_size(n_tokens, d_sae, x.shape[1] if product.is_rounded(x) else 0)
    chunks = product.Product(x, W_enc.t(), b_enc, size)
    entries = Entries(n_tokens, d_sae) if k is None else RowTopK(n_tokens, d_sae, k)
    for start in range(0, d_sae, size):
        stop = min(start + size, d_sae)
        candidates = chunks.candidates(start, stop, threshold[start:stop] - bandwidth / 2)
        if candidates is None:
            return None
        features, tokens, hidden_pre = candidates
        gates = threshold.index_select(0, features)
        listed = active = hidden_pre > gates
        if bandwidth > 0:
            listed = active | ((hidden_pre - gates).abs() < bandwidth / 2)
            hidden_pre = torch.where(active, hidden_pre, 0)
        entries.append_listed(listed, features, tokens, hidden_pre)
        # gives up where the features seen so far have more than their share of the limit, and more than a quarter of it: a
        # few features say little about the rest
        if max_entries is not None and entries.count > max_entries * max(stop / d_sae, 0.25):
            return None
    del chunks, candidates  # their buffers are as large as what sorting the entries takes
    return entries.finish()


def _encode_batch_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k: int) -> SparseActs | None:
    """The bound of the batch joins the thresholds, chunk by chunk.

    A sample guesses it at first. The guess is proved where as many entries reach it as survive, and dropped where not.
    """
    entries = BatchTopK(len(x), W_enc.shape[1], k * len(x))
    guess = entries.bound = _guessed_bound(x, W_enc, b_enc, threshold, k)
    is_finite = _list_above_bound(x, W_enc, b_enc, threshold, k, entries)
    if is_finite and guess > 0 and entries.count < entries.n_kept:
        entries = BatchTopK(len(x), W_enc.shape[1], k * len(x))
        is_finite = _list_above_bound(x, W_enc, b_enc, threshold, k, entries)
    return entries.finish() if is_finite else None


def _guessed_bound(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k: int) -> float:
    """What about `SAMPLED_MARGIN` times as many entries reach as survive, by a sample; 0 where that is no help."""
    n_tokens, d_sae = x.shape[0], W_enc.shape[1]
    every_token, every_feature = max(1, n_tokens // SAMPLE[0]), d_sae // SAMPLE[1]
    if every_feature < SAMPLED_MARGIN:
        return 0.0
    gates, biases = threshold[::every_feature], b_enc[::every_feature]
    hidden_pre = torch.mm(x[::every_token], W_enc[:, ::every_feature]).to(gates.dtype).add_(biases)
    acts = torch.where(hidden_pre > gates, hidden_pre, 0).flatten().numpy()
    at = acts.size - int(SAMPLED_MARGIN * k * acts.size / d_sae) - 1
    return 0.0 if at < 0 else float(np.partition(acts, at)[at])


def _list_above_bound(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k: int, entries: BatchTopK) -> bool:
    """Lists what reaches the bound, which rises; False where a product is not finite."""
    n_tokens, d_sae = x.shape[0], W_enc.shape[1]
    size = product.chunk_size(n_tokens, d_sae, x.shape[1] if product.is_rounded(x) else 0)
    chunks = product.Product(x, W_enc.t(), b_enc, size)
    start = 0
    while start < d_sae:
        # without a bound half of a chunk may be active
        stop = min(start + (size if entries.bound else min(size, max(64, 2 * k))), d_sae)
        # what equals the bound is a candidate too, and may have the lower token
        candidates = chunks.candidates(start, stop, threshold[start:stop].clamp_min(entries.bound))
        if candidates is None:
            return False
        features, tokens, hidden_pre = candidates
        listed = (hidden_pre > threshold.index_select(0, features)) & (hidden_pre >= entries.bound)
        entries.append_listed(listed, features, tokens, hidden_pre)
        start = stop
    return True
