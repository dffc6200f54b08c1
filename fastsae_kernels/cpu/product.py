"""Products of a chunk of features with all tokens, and which of their elements can be active.

fp32 on a CPU with bf16 units takes a shortcut that stays exact. Write x^ and w^ for x and w rounded to bf16. By
Cauchy-Schwarz

    |x . w - x^ . w^| <= |x - x^| |w| + |x^| |w - w^|

so a bf16 product with that margin added can only admit too many candidates, never miss one. Margin, bias and threshold
ride along as extra columns of the product, hence a candidate is an element whose sign is positive, and rounding never
changes a sign. Candidates are then scored again in fp32. Unlike a statistical margin this bound is rigorous, yet it is
small: at d_in = 768 it is 0.1 standard deviations of random pre-activations, a third more candidates than needed at
0.5 % density (measured). What scores them, `sampled_dot`, is also the product of entries in the backward.
"""

from __future__ import annotations

import os
import warnings
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fastsae_kernels.matmul import by_blas

SCRATCH_ELEMENTS = 2**21  # of a chunk's product or weights: 4 to 8 MB, which stay in a server core's share of L2 and L3
MARGIN_COLUMNS = 4
MIN_ROUNDED_TOKENS = 64  # fewer multiplications per weight do not pay for rounding it
UNDERFLOW = 2.0**-120  # added to the margin: bf16 units flush what is smaller to zero
OVERFLOW = 2.0**120  # of a product; beyond, sums of intermediate terms may reach Inf
WORD = 8  # bytes of mask looked at together
ISAS_WITH_BF16 = ("ALL", "DEFAULT", "BF16", "FP16", "AMX", "AVX10")  # in the names of oneDNN's sets of instructions
NUMPY_THREADS = 4  # one thread of NumPy, whose loops are vectorised where PyTorch's are not, looks as fast as this many
ROUNDED_TOKENS = 512  # whose rounding errors are looked at together


@cache
def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AVX512-BF16 or AMX), and oneDNN, which PyTorch asks, may.

    A limit to older instructions makes such a product 300 times as slow.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    if not any(name in limit for name in ISAS_WITH_BF16):
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def rounds(dtype: torch.dtype) -> bool:
    """Whether products of that dtype are rounded to bf16 for speed, and candidates scored again."""
    return dtype == torch.float32 and has_fast_bf16()


def is_rounded(x: Tensor) -> bool:
    """Whether products with these tokens are rounded."""
    return len(x) >= MIN_ROUNDED_TOKENS and rounds(x.dtype)


def chunk_size(n_tokens: int, d_sae: int, rounded_columns: int = 0) -> int:
    """Features per chunk: as many as stay in cache, product and rounded weights; at least 64 for the product's sake."""
    return max(64, min(d_sae, SCRATCH_ELEMENTS // max(1, n_tokens, rounded_columns)))


def mark_greater(values: Tensor, bound: Tensor, marks: Tensor) -> None:
    """`marks = values > bound`, for tensors of a dtype that NumPy has."""
    # wider numbers come from memory at a rate that a second thread doubles
    if torch.get_num_threads() > (NUMPY_THREADS if values.element_size() == 2 else 1):
        torch.gt(values, bound, out=marks)
    else:
        np.greater(values.numpy(), bound.numpy(), out=marks.numpy())


def nonzero_flat(mask: Tensor) -> Tensor:
    """Indices of the True elements of a contiguous bool vector whose length is a multiple of 8, ascending.

    Eight elements are looked at together: with one hit in a hundred this reads an eighth of what `nonzero` does.
    """
    if torch.get_num_threads() <= NUMPY_THREADS:
        array = mask.numpy().view(np.int64)
        filled = np.flatnonzero(array != 0)
        bits = np.flatnonzero(array[filled].view(np.bool_))
        return torch.from_numpy(filled[bits // WORD] * WORD + bits % WORD)
    words = mask.view(torch.int64)
    found = words.nonzero().squeeze(1)
    hits = words.index_select(0, found).view(torch.bool).nonzero().squeeze(1)
    return found.index_select(0, hits // WORD) * WORD + hits % WORD


def padded_mask(n_elements: int) -> Tensor:
    """A bool buffer for `nonzero_flat` that holds `n_elements`, False beyond them."""
    mask = torch.empty(-(-n_elements // WORD) * WORD, dtype=torch.bool)
    if n_elements < mask.numel():
        mask[n_elements:] = False
    return mask


def row_norms(rows: Tensor) -> Tensor:
    """`[n]` upper bounds of the Euclidean norms in at least fp32; squares below the smallest number are made up for."""
    norms = torch.linalg.vector_norm(rows, dim=1).to(torch.promote_types(rows.dtype, torch.float32))
    if rows.element_size() == 2:  # accumulated in fp32, then rounded
        norms = norms * (1 + 2.0**-7)
    return norms + rows.shape[1] ** 0.5 * 2.0**-62


def round_up(values: Tensor) -> Tensor:
    """bf16 values that are not below the given ones."""
    return (values + values.abs() * 2.0**-7).bfloat16()


def augmented_tokens(x: Tensor, norms: Tensor, columns: int = MARGIN_COLUMNS) -> Tensor:
    """`[N, d_in + columns]` bf16: x^, then what multiplies the columns of `AugmentedWeights`; columns beyond are 0."""
    d_in = x.shape[1]
    rounded = torch.zeros(x.shape[0], d_in + columns, dtype=torch.bfloat16)
    rounded[:, :d_in] = x
    residuals = torch.cat(  # in pieces: the differences of all tokens would be as large as x
        [
            row_norms(x[i : i + ROUNDED_TOKENS] - rounded[i : i + ROUNDED_TOKENS, :d_in])
            for i in range(0, len(x), ROUNDED_TOKENS)
        ]
    )
    # the last term covers the fp32 accumulation of both products, 2 (d + 4) u with u = 2^-24, twice over
    rounded[:, d_in] = round_up(residuals + norms * (d_in + 8) * 2.0**-22)
    rounded[:, d_in + 1] = round_up(norms * (1 + 2.0**-8))
    rounded[:, d_in + 2 : d_in + 4] = 1
    return rounded


class AugmentedWeights:
    """Chunks of weights as rounded products take them, in buffers: fresh memory costs several times what rounding does.

    Args:
        weights: `[d_sae, d_in]`, which chunks are taken of.
        size: Features of the largest chunk.
        columns: Beyond `d_in`; those that `of` leaves alone hold ones.
    """

    def __init__(self, weights: Tensor, size: int, columns: int = MARGIN_COLUMNS) -> None:
        self.d_in = weights.shape[1]
        self.rounded = torch.ones(size, self.d_in + columns, dtype=torch.bfloat16)
        self.rest = None if weights.dtype == torch.bfloat16 else torch.empty(size, self.d_in)

    def of(self, weights: Tensor, norms: Tensor, offset: Tensor, slack: Tensor) -> Tensor:
        """`[C, d_in + columns]` bf16, until the next call: w^, `|w|`, `|w - w^|`, and `offset` with its margin in two."""
        d_in, rounded = self.d_in, self.rounded[: len(weights)]
        rounded[:, :d_in] = weights
        rounded[:, d_in] = round_up(norms * (1 + 2.0**-8))
        if self.rest is None:
            rounded[:, d_in + 1] = 0
        else:
            rest = self.rest[: len(weights)].copy_(rounded[:, :d_in]).sub_(weights)
            rounded[:, d_in + 1] = round_up(row_norms(rest))
        rounded[:, d_in + 2] = offset
        left = offset - rounded[:, d_in + 2].float()
        summation = (offset.abs() + left.abs()) * (d_in + 8) * 2.0**-22
        rounded[:, d_in + 3] = round_up(left + summation + slack + UNDERFLOW)
        return rounded


@cache
def _hear_csr_notice() -> None:
    """PyTorch warns once in a process that CSR tensors are in beta. What is used of them is tested, so it is heard here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), dtype=torch.float32, check_invariants=False)


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
    if features.dtype != wide:  # only those with entries are widened
        used = offsets.diff().nonzero().squeeze(1)
        offsets = torch.cat([offsets[:1], offsets[1:].index_select(0, used)])
        features = features.index_select(0, used)
    shape = (features.shape[0], rows.shape[0])
    _hear_csr_notice()
    pattern = torch.sparse_csr_tensor(offsets.int(), tokens, values, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, features.to(wide), rows.to(wide).t(), beta=0.0).values()


class Product:
    """Chunk products `[C, N]` and the candidates in them.

    Args:
        x: `[N, d_in]`.
        weights: `[d_sae, d_in]`.
        b_enc: `[d_sae]`.
        size: Features of the largest chunk.
    """

    def __init__(self, x: Tensor, weights: Tensor, b_enc: Tensor, size: int) -> None:
        self.x, self.weights, self.b_enc = x, weights, b_enc.to(torch.promote_types(x.dtype, torch.float32))
        self.n_tokens, self.x_t = x.shape[0], x.t()
        self.x_norms = row_norms(x)
        self.x_norm = self.x_norms.max() if self.n_tokens else self.x_norms.new_zeros(())
        rounded = is_rounded(x)
        self.rounded_t = augmented_tokens(x, self.x_norms).t() if rounded else None
        self.augmented = AugmentedWeights(weights, size) if rounded else None
        self.mask = padded_mask(size * self.n_tokens)
        self.buffer = torch.empty(size * self.n_tokens, dtype=torch.bfloat16 if rounded else x.dtype)

    def candidates(self, start: int, stop: int, lower: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """`(features, tokens, hidden_pre)`, each `[n]`, of one chunk, by feature then token; none is below `lower` by much.

        Args:
            start, stop: Features of the chunk.
            lower: `[C]`: elements that lie certainly below it are left out.

        Returns:
            None where a product is NaN or Inf.
        """
        n_features = stop - start
        weights, offset = self.weights[start:stop], self.b_enc[start:stop] - lower
        norms = row_norms(weights)
        safe = min(OVERFLOW, torch.finfo(self.x.dtype).max)  # fp16 ends at 65504
        is_safe = bool(norms.max() * self.x_norm + offset.abs().max() < safe)  # False for NaN too
        if self.rounded_t is not None and not is_safe:  # from here on the plain product, whose range is wider
            self.buffer = torch.empty(self.buffer.numel(), dtype=self.x.dtype)
            self.rounded_t = self.augmented = None
        buffer = self.buffer[: n_features * self.n_tokens].view(n_features, self.n_tokens)
        mask = self.mask[: -(-buffer.numel() // WORD) * WORD]
        mask[buffer.numel() :] = False
        view = mask[: buffer.numel()].view_as(buffer)
        # what rounding the offset, and later product + b_enc - threshold, can shift; survivors are tested exactly
        slack = (offset.abs() + lower.abs()) * 4 * torch.finfo(self.x.dtype).eps
        if self.rounded_t is not None and self.augmented is not None:
            torch.mm(self.augmented.of(weights, norms, offset, slack), self.rounded_t, out=buffer)
            # the sign of a bf16 is the sign of its bits, and integers compare faster
            mark_greater(buffer.view(torch.int16), torch.zeros((), dtype=torch.int16), view)
        else:
            by_blas(weights, self.x_t, buffer)
            if not is_safe and not torch.isfinite(buffer).all():
                return None
            floor = (-offset - slack).to(buffer.dtype)[:, None] + 0.0  # no negative zero
            if buffer.element_size() == 2 and bool((floor >= 0).all()):
                # positive numbers order as their bits do, negative ones are below as integers too
                mark_greater(buffer.view(torch.int16), floor.view(torch.int16), view)
            elif buffer.dtype == torch.bfloat16:  # which NumPy lacks
                torch.gt(buffer, floor, out=view)
            else:
                mark_greater(buffer, floor, view)
        flat = nonzero_flat(mask).numpy()  # for what follows NumPy takes half the time
        rows = flat // self.n_tokens
        tokens = torch.from_numpy((flat - rows * self.n_tokens).astype(np.int32))
        if self.rounded_t is None:
            product = buffer.view(-1).index_select(0, torch.from_numpy(flat)).to(self.b_enc.dtype)
        else:
            offsets = torch.from_numpy(np.searchsorted(rows, np.arange(n_features + 1)))
            product = sampled_dot(offsets, tokens, weights, self.x)
        features = torch.from_numpy(rows + start)
        return features, tokens, product + self.b_enc.index_select(0, features)
