"""Sparse encode on a CPU: one pass over feature chunks that stay in cache, no `[N, d_sae]` tensor.

Each chunk of features is multiplied with all tokens (`W_enc` feature-major: `[C, d_in] @ [d_in, N]`) into a small
buffer, and only the entries above `threshold - bandwidth / 2` leave it. Chunks come out feature-major, which is the order
the backward walks; a stable sort by token then gives the CSR order that decode walks.

fp32 on a CPU with bf16 units takes a shortcut that stays exact. Write x^ and w^ for x and w rounded to bf16. By
Cauchy-Schwarz

    |x . w - x^ . w^| <= |x - x^| |w| + |x^| |w - w^|

so a bf16 product with that margin added can only admit too many candidates, never miss one. Margin, bias and threshold
ride along as extra columns of the product, hence a candidate is an element whose sign is positive, and rounding never
changes a sign. Candidates are then scored again in fp32. Unlike a statistical margin this bound is rigorous, yet it is
small: at d_in = 768 it is 0.1 standard deviations of random pre-activations, a third more candidates than needed at
0.5 % density (measured).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae_kernels.sparse_acts import FeatureMajor, SparseActs, topk_mask

SCRATCH_ELEMENTS = 2**21  # of a chunk's product: 4 to 8 MB, which stays in a server core's share of L2 and L3
RESCORE_MARGIN_COLUMNS = 4
RESCORE_MIN_ELEMENTS = 2**14  # of a chunk's product; below, the second score costs more than the faster product saves
PRUNE_SLACK = 2**16  # entries beyond 8 k per token before the top k of each are taken
UNDERFLOW = 2.0**-120  # added to the margin: bf16 units flush what is smaller to zero
OVERFLOW = 2.0**120  # of a product; beyond, sums of intermediate terms may reach Inf
WORD = 8  # bytes of mask looked at together


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AVX512-BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def chunk_size(n_tokens: int, d_sae: int) -> int:
    """Features per chunk: as many as keep the product in cache, at least 64 so that the product stays efficient."""
    return max(64, min(d_sae, SCRATCH_ELEMENTS // max(1, n_tokens)))


def nonzero_flat(mask: Tensor) -> Tensor:
    """Indices of the True elements of a contiguous bool vector whose length is a multiple of 8, ascending.

    Looks at eight elements at once: with one hit in a hundred this reads an eighth of what `nonzero` does.
    """
    words = mask.view(torch.int64).nonzero().squeeze(1)
    hits = mask.view(-1, WORD)[words].nonzero()
    return words[hits[:, 0]] * WORD + hits[:, 1]


def row_norms(rows: Tensor) -> Tensor:
    """`[n]` upper bounds of the Euclidean norms in at least fp32; squares below the smallest number are made up for."""
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
    return norms + rows.shape[1] ** 0.5 * 2.0**-62


class _Product:
    """Chunk products and the candidates in them; `hidden_pre` of a candidate is exact to the input dtype."""

    def __init__(self, x: Tensor, weights: Tensor, b_enc: Tensor, lower: Tensor, size: int) -> None:
        self.x, self.weights, self.b_enc, self.lower = x, weights, b_enc, lower
        self.n_tokens, self.x_t = x.shape[0], x.t()
        self.x_norms = row_norms(x)
        self.x_norm = self.x_norms.max() if self.n_tokens else self.x_norms.new_zeros(())
        self.rescore = x.dtype == torch.float32 and has_fast_bf16() and size * x.shape[0] >= RESCORE_MIN_ELEMENTS
        self.mask = torch.zeros(-(-size * self.n_tokens // WORD) * WORD, dtype=torch.bool)
        dtype = torch.bfloat16 if self.rescore else x.dtype
        self.buffer = torch.empty(size * self.n_tokens, dtype=dtype)
        self.rounded_t = self._augmented_tokens().t() if self.rescore else None

    def _augmented_tokens(self) -> Tensor:
        x, d_in = self.x, self.x.shape[1]
        rounded = torch.empty(self.n_tokens, d_in + RESCORE_MARGIN_COLUMNS, dtype=torch.bfloat16)
        rounded[:, :d_in] = x
        norm = self.x_norms
        # the last term covers the fp32 accumulation of both products, 2 (d + 4) u with u = 2^-24, twice over
        rounded[:, d_in] = _round_up(row_norms(x - rounded[:, :d_in]) + norm * (d_in + 8) * 2.0**-22)
        rounded[:, d_in + 1] = _round_up(norm * (1 + 2.0**-8))
        rounded[:, d_in + 2 :] = 1
        return rounded

    def _augmented_weights(self, weights: Tensor, norms: Tensor, offset: Tensor, slack: Tensor) -> Tensor:
        d_in = weights.shape[1]
        rounded = torch.empty(weights.shape[0], d_in + RESCORE_MARGIN_COLUMNS, dtype=torch.bfloat16)
        rounded[:, :d_in] = weights
        rounded[:, d_in] = _round_up(norms * (1 + 2.0**-8))
        rounded[:, d_in + 1] = _round_up(row_norms(weights - rounded[:, :d_in]))
        rounded[:, d_in + 2] = offset
        rest = offset - rounded[:, d_in + 2].float()
        summation = (offset.abs() + rest.abs()) * (d_in + 8) * 2.0**-22
        rounded[:, d_in + 3] = _round_up(rest + summation + slack + UNDERFLOW)
        return rounded

    def candidates(self, start: int, stop: int, limit: int | None) -> tuple[Tensor, Tensor, Tensor] | None:
        """`(offsets [C + 1], tokens [n], hidden_pre [n])` of one chunk, by feature then token.

        None where there are more than `limit`, or where a product is NaN or Inf.
        """
        n_features = stop - start
        weights, offset = self.weights[start:stop], self.b_enc[start:stop] - self.lower[start:stop]
        norms = row_norms(weights)
        is_safe = bool(norms.max() * self.x_norm + offset.abs().max() < OVERFLOW)  # False for NaN too
        if self.rounded_t is not None and not is_safe:  # from here on the plain product, whose range is wider
            self.buffer = torch.empty(self.buffer.numel(), dtype=self.x.dtype)
            self.rounded_t = None
        buffer = self.buffer[: n_features * self.n_tokens].view(n_features, self.n_tokens)
        mask = self.mask[: -(-buffer.numel() // WORD) * WORD]
        mask[buffer.numel() :] = False
        view = mask[: buffer.numel()].view_as(buffer)
        # what rounding the offset, and later product + b_enc - threshold, can shift; survivors are tested exactly
        slack = (offset.abs() + self.lower[start:stop].abs()) * 4 * torch.finfo(self.x.dtype).eps
        if self.rounded_t is not None:
            torch.mm(self._augmented_weights(weights, norms, offset, slack), self.rounded_t, out=buffer)
            # the sign of a bf16 is the sign of its bits, and integers compare faster
            torch.gt(buffer.view(torch.int16), 0, out=view)
        else:
            torch.mm(weights, self.x_t, out=buffer)
            if not is_safe and not torch.isfinite(buffer).all():
                return None
            torch.gt(buffer, (-offset - slack).to(buffer.dtype)[:, None], out=view)
        if limit is not None and int(torch.count_nonzero(mask)) > limit:
            return None  # before their indices, 16 bytes each, are written out
        flat = nonzero_flat(mask)
        offsets = torch.searchsorted(flat, torch.arange(n_features + 1) * self.n_tokens)
        features = torch.arange(n_features).repeat_interleave(offsets.diff(), output_size=flat.numel())
        tokens = (flat - features * self.n_tokens).int()
        if self.rounded_t is not None:
            product = sampled_dot(offsets, tokens, weights, self.x)
        else:
            product = buffer.view(-1)[flat].to(self.b_enc.dtype)
        return offsets, tokens, product + self.b_enc[start:stop][features]


def _round_up(values: Tensor) -> Tensor:
    """bf16 values that are not below the given ones."""
    return (values + values.abs() * 2.0**-7).bfloat16()


def sampled_dot(offsets: Tensor, tokens: Tensor, features: Tensor, rows: Tensor) -> Tensor:
    """`out[e] = features[j(e)] . rows[tokens[e]]` in fp32 (fp64 for fp64 rows), for entries in feature-major order.

    Args:
        offsets: `[C + 1]`; feature j owns the entries `offsets[j] .. offsets[j + 1]`.
        tokens: `[n]` int32.
        features: `[C, d]`.
        rows: `[N, d]`.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    values = torch.zeros(tokens.numel(), dtype=wide)
    if tokens.numel() == 0:
        return values
    shape = (features.shape[0], rows.shape[0])
    pattern = torch.sparse_csr_tensor(offsets.int(), tokens, values, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, features.to(wide), rows.to(wide).t(), beta=0.0).values()


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    *,
    bandwidth: float = 0.0,
    k: int | None = None,
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
        bandwidth: Width of the straight-through window; 0 lists active entries only.
        k: At most the k largest active entries of a row survive.
        max_entries: Give up beyond this many entries (the dense path is then faster); never with `k`.
    """
    n_tokens, d_sae = x.shape[0], W_enc.shape[1]
    size = chunk_size(n_tokens, d_sae)
    wide = torch.promote_types(x.dtype, torch.float32)
    threshold, b_enc = threshold.to(wide), b_enc.to(wide)
    product = _Product(x, W_enc.t(), b_enc, threshold - bandwidth / 2, size)
    entries = _Entries(n_tokens, k)
    for start in range(0, d_sae, size):
        stop = min(start + size, d_sae)
        # a chunk four times as dense as the limit: activity is dense, or this chunk is odd and the dense path exact too
        limit = None if max_entries is None else int(max_entries * min(1.0, 4 * (stop - start) / d_sae))
        candidates = product.candidates(start, stop, limit)
        if candidates is None:
            return None
        offsets, tokens, hidden_pre = candidates
        features = torch.arange(start, stop).repeat_interleave(offsets.diff(), output_size=tokens.numel())
        theta = threshold[features]
        active = hidden_pre > theta
        keep = active if bandwidth == 0 else active | ((hidden_pre - theta).abs() < bandwidth / 2)
        entries.append(features[keep].int(), tokens[keep], torch.where(active, hidden_pre, 0)[keep])
        # the share seen so far stands for the rest only once it is well above the limit
        if max_entries is not None and entries.count > max_entries * max(stop / d_sae, 0.25):
            return None
    return entries.finish(d_sae)


class _Entries:
    """Entries in feature-major order, pruned to the top k of each row whenever they pile up."""

    def __init__(self, n_tokens: int, k: int | None) -> None:
        self.n_tokens, self.k, self.count = n_tokens, k, 0
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.prune_at = 0 if k is None else 8 * n_tokens * k + PRUNE_SLACK
        self.truncated = torch.zeros(n_tokens, dtype=torch.bool)  # rows that have lost active entries

    def append(self, features: Tensor, tokens: Tensor, values: Tensor) -> None:
        self.parts.append((features, tokens, values))
        self.count += tokens.numel()
        if self.k is not None and self.count > self.prune_at:
            self._prune(self.k)
            self.prune_at = max(self.prune_at, 2 * self.count)

    def _merge(self) -> tuple[Tensor, Tensor, Tensor]:
        if len(self.parts) > 1:
            features, tokens, values = zip(*self.parts, strict=True)
            self.parts = [(torch.cat(features), torch.cat(tokens), torch.cat(values))]
        return self.parts[0]

    def _prune(self, k: int) -> None:
        features, tokens, values = self._merge()
        rows, order = torch.sort(tokens, stable=True)
        keep = torch.empty(tokens.numel(), dtype=torch.bool)
        keep[order] = topk_mask(rows.long(), values[order], row_offsets_of(rows, self.n_tokens), k)
        self.truncated[tokens[(values > 0) & ~keep].long()] = True
        # a row cut by an earlier call holds k active entries by now and looks whole to topk_mask
        keep &= (values > 0) | ~self.truncated[tokens.long()]
        self.parts = [(features[keep], tokens[keep], values[keep])]
        self.count = int(keep.sum())

    def finish(self, d_sae: int) -> SparseActs:
        if self.k is not None:
            self._prune(self.k)
        features, tokens, values = self._merge()
        offsets = row_offsets_of(features, d_sae)
        rows, order = torch.sort(tokens, stable=True)
        return SparseActs(
            row_offsets=row_offsets_of(rows, self.n_tokens),
            indices=features[order],
            values=values[order],
            shape=(self.n_tokens, d_sae),
            feature_major=FeatureMajor(offsets, tokens, values),
        )


def row_offsets_of(sorted_rows: Tensor, n_rows: int) -> Tensor:
    """`[n_rows + 1]` int32 offsets of ascending row numbers."""
    return torch.searchsorted(sorted_rows, torch.arange(n_rows + 1, dtype=sorted_rows.dtype), out_int32=True)
