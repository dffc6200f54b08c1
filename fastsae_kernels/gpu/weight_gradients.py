"""What a GPU pass leaves of its weight gradients: the entries that `adam` sums while it updates each row.

    grad_W[j] = sum over the entries e of feature j of  weight_e * vector[token_e]   + extra[j]

    W_enc.T:  weight_e = grad_hidden_pre_e                  vector = x
    W_dec:    weight_e = value_e * row_scale[token_e]       vector = grad_out

Letters: `S` features, `D` the row's length. Rows that outgrew their capacity have no entries; their share is dense, `extra`,
in a buffer that is made once and used again in each step. How many they are is known on the device alone, so who zeroes,
adds to or reads the buffer looks there first: a step without such rows moves no byte of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import on_device
from fastsae_kernels.gpu.feature_sums import FeatureOrder, feature_sums
from fastsae_kernels.memory import version_of

# enough to fill a device where there is something to zero, few enough to leave at once where there is nothing
CLEARING_PROGRAMS = 1024
CLEARED_BLOCK = 4096


def keep_for_this_stream(*tensors: Tensor | None) -> None:
    """Hold the memory of tensors that another stream made until this one has run what it was given so far."""
    if torch.cuda.is_initialized():  # as it is where any tensor lies on a GPU
        for tensor in tensors:
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))


class RowSums(NamedTuple):
    """The gradient of one weight matrix, `[S, D]`, not summed yet; the arguments of `adam.adam_rows`."""

    by_feature: FeatureOrder
    weights: Tensor  # [nnz], before ordering
    vectors: Tensor  # [N, D]
    version: int | None  # how often `vectors` was written when the pass ended
    extra: Tensor | None = None  # [S, D], added
    extra_flag: Tensor | None = None  # [1] int32: extra counts where it is not 0; None: it counts

    def dense(self) -> Tensor:
        """`[S, D]` fp32, summed."""
        shape = (self.by_feature.offsets.numel() - 1, self.vectors.shape[1])
        sums = torch.empty(shape, dtype=torch.float32, device=self.vectors.device)
        feature_sums(self.by_feature, self.weights, self.vectors, sums)
        keep_for_this_stream(*self.by_feature[:3], self.weights, self.vectors, self.extra, self.extra_flag)
        if self.extra is None:
            return sums
        # while the flag is 0 the buffer holds an earlier step's numbers, NaN perhaps
        return sums + (self.extra if self.extra_flag is None else torch.where(self.extra_flag != 0, self.extra, 0))


class GpuShare(NamedTuple):
    """The share of one pass in the gradients of both weight matrices; None where it is not asked for."""

    W_enc: RowSums | None  # of W_enc.T
    W_dec: RowSums | None

    def without(self, i: int) -> GpuShare | None:
        """The share but for that of the i-th matrix; None where nothing is left."""
        rest = GpuShare(None, self.W_dec) if i == 0 else GpuShare(self.W_enc, None)
        return None if rest == (None, None) else rest


@triton.jit
def _clear_kernel(
    flag_ptr,  # [1] int32, input
    buffer_ptr,  # [n], output
    n,
    BLOCK: tl.constexpr,
):
    """Program i zeroes every num_programs(0)-th block of BLOCK elements, where the flag is set."""
    if tl.load(flag_ptr) == 0:
        return
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n, tl.num_programs(0) * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        tl.store(buffer_ptr + offs, tl.zeros((BLOCK,), dtype=buffer_ptr.dtype.element_ty), mask=offs < n)


@on_device
def clear_where(flag: Tensor, buffer: Tensor) -> None:
    """Zero a contiguous buffer where the flag on the device (`[1]` int32) is not 0, without waiting for it."""
    programs = min(CLEARING_PROGRAMS, triton.cdiv(buffer.numel(), CLEARED_BLOCK))
    _clear_kernel[(programs,)](flag_ptr=flag, buffer_ptr=buffer, n=buffer.numel(), BLOCK=CLEARED_BLOCK, num_warps=4)


def gpu_share(
    by_feature: FeatureOrder,
    values: Tensor,
    grad_hidden_pre: Tensor,
    x: Tensor,
    grad_out: Tensor,
    row_scale: Tensor | None = None,
    n_overflow: Tensor | None = None,
    buffer: Tensor | None = None,
) -> tuple[RowSums, RowSums]:
    """What a backward pass leaves for the optimiser, kept alive until its step.

    Args:
        by_feature: The entries by feature.
        values: `[nnz]`, 0 on padding.
        grad_hidden_pre: `[nnz]`, 0 on padding.
        x: `[N, d_in]`.
        grad_out: `[N, d_out]`.
        row_scale: `[N]` fp32, what the rows of grad_out are to be multiplied with; None for ones.
        n_overflow: `[1]` int32, how many rows have no entries because they overflowed; None: none can have.
        buffer: `[d_sae * (d_in + d_out)]` for their share, zeroed here where there are any; with `n_overflow`.

    Returns:
        The shares of `W_enc.T` and of `W_dec`. The pass adds the rows that overflowed to the `extra` of both matrices, which
        are contiguous.
    """
    if row_scale is not None:
        values = values * _of_entries(row_scale, by_feature)
    # detached, or the share would keep the pass's graph alive
    encoder = RowSums(by_feature, grad_hidden_pre, x.detach(), version_of(x))
    decoder = RowSums(by_feature, values, grad_out.detach(), version_of(grad_out))
    if n_overflow is not None and buffer is not None:
        clear_where(n_overflow, buffer)
        d_sae = by_feature.offsets.numel() - 1
        shares = buffer.split([d_sae * x.shape[1], d_sae * grad_out.shape[1]])
        encoder = encoder._replace(extra=shares[0].view(d_sae, -1), extra_flag=n_overflow)
        decoder = decoder._replace(extra=shares[1].view(d_sae, -1), extra_flag=n_overflow)
    return encoder, decoder


def _of_entries(per_token: Tensor, by_feature: FeatureOrder) -> Tensor:
    """`[nnz]`: the token's number at each of its entries, before ordering."""
    if by_feature.tokens is None:
        return per_token.repeat_interleave(by_feature.row_length, output_size=by_feature.order.numel())
    return per_token[by_feature.tokens]
