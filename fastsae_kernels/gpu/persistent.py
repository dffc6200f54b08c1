"""Listing entries with Hopper's tensor memory accelerator: a persistent grid over tiles that descriptors load.

The same formulas and result as in `pointer`. What differs is how operands arrive: the accelerator copies whole tiles of x
`[N, d_in]` and of feature-major W_enc `[S, d_in]` into shared memory, in the layout that the matrix unit reads and with
zeros past the ends, so that no thread spends registers or instructions on addresses and masks. That leaves registers for a
tile of 128 x 256, which reads each operand half as often from L2 as the pointer kernel's. The epilogue works on the left and
the right half of the tile one after the other: on the whole it spills.

Numerics: 16-bit operands, accumulated, compared and stored in fp32. fp32 operands are refused: an IEEE product has no matrix
instruction that would want them in shared memory.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastsae_kernels.gpu.append import append_in_turn, count_active, listed_values
from fastsae_kernels.gpu.config import LaunchConfig, capability
from fastsae_kernels.gpu.listing import Listing

ALIGNMENT = 16  # bytes, of a descriptor's base and of its rows
# tiles in flight where there is no device to ask (Triton's interpreter, the report)
PROGRAMS = 4


@triton.jit
def _list_half(
    product, offs_b, offs_s, n_tokens, d_sae, b_enc_ptr, threshold_ptr, bounds_ptr, half_bandwidth,
    l0_ptr, feature_counts_ptr, first_feature, cursors_ptr, row_ends_ptr, entries_ptr,
):  # fmt: skip
    value = listed_values(
        product, offs_b, offs_s, n_tokens, d_sae, b_enc_ptr, threshold_ptr, bounds_ptr, half_bandwidth
    )  # fmt: skip
    rows = offs_b % n_tokens
    count_active(value, rows, offs_s % d_sae, l0_ptr, feature_counts_ptr)
    append_in_turn(value, rows, offs_s, first_feature, cursors_ptr, row_ends_ptr, entries_ptr)


@triton.jit(do_not_specialize=["n_tokens", "first_feature"])
def _persistent_encode_kernel(
    # inputs
    x_desc,  # [B, D]
    W_enc_desc,  # [S, D]
    b_enc_ptr,  # [S]
    threshold_ptr,  # [S] fp32
    row_ends_ptr,  # [B] int32
    bounds_ptr,  # [B] fp32 or None
    # outputs
    cursors_ptr,  # [B] int32
    entries_ptr,  # [nnz] int64
    l0_ptr,  # [B] or None
    feature_counts_ptr,  # [S] or None
    # scalars and sizes
    half_bandwidth,
    first_feature,
    n_tokens,
    d_in,
    d_sae,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_B: tl.constexpr,  # row tiles that share a column tile before the next one: both stay in L2
):
    """Program walks over every num_programs-th tile of BLOCK_B tokens and BLOCK_S features."""
    tiles_b = tl.cdiv(n_tokens, BLOCK_B)
    tiles_s = tl.cdiv(d_sae, BLOCK_S)
    for tile in range(tl.program_id(0), tiles_b * tiles_s, tl.num_programs(0)):
        first_b = tile // (GROUP_B * tiles_s) * GROUP_B
        group = min(tiles_b - first_b, GROUP_B)
        start_b = (first_b + tile % (GROUP_B * tiles_s) % group) * BLOCK_B
        start_s = tile % (GROUP_B * tiles_s) // group * BLOCK_S
        acc = tl.zeros((BLOCK_B, BLOCK_S), dtype=tl.float32)
        for start_d in range(0, d_in, BLOCK_D):
            x = x_desc.load([start_b, start_d])
            W_enc = W_enc_desc.load([start_s, start_d])
            acc = tl.dot(x, W_enc.T, acc)

        HALF: tl.constexpr = BLOCK_S // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_B, 2, HALF)), (0, 2, 1)))
        offs_b = start_b + tl.arange(0, BLOCK_B)
        offs_s = start_s + tl.arange(0, HALF)
        _list_half(
            left, offs_b, offs_s, n_tokens, d_sae, b_enc_ptr, threshold_ptr, bounds_ptr, half_bandwidth,
            l0_ptr, feature_counts_ptr, first_feature, cursors_ptr, row_ends_ptr, entries_ptr,
        )  # fmt: skip
        offs_s += HALF
        _list_half(
            right, offs_b, offs_s, n_tokens, d_sae, b_enc_ptr, threshold_ptr, bounds_ptr, half_bandwidth,
            l0_ptr, feature_counts_ptr, first_feature, cursors_ptr, row_ends_ptr, entries_ptr,
        )  # fmt: skip


def _unfit(name: str, matrix: Tensor) -> str:
    """What keeps a descriptor from reading `matrix`, empty where nothing does."""
    n_rows, n_columns = matrix.shape
    if n_columns > 1 and matrix.stride(1) != 1:
        return f"{name} is not stored with d_in innermost (stride {matrix.stride(1)})"
    stride = matrix.stride(0)
    if n_rows > 1 and (stride * matrix.element_size() % ALIGNMENT or stride < n_columns):
        return f"the rows of {name} are {stride} elements apart, not at least d_in and a multiple of {ALIGNMENT} bytes"
    if matrix.device.type != "meta" and matrix.data_ptr() % ALIGNMENT:
        return f"{name} does not start at a multiple of {ALIGNMENT} bytes"
    return ""


def refuses(x: Tensor, W_enc: Tensor) -> str:
    """Why this way cannot list these operands; empty where it can."""
    if x.is_cuda and capability(x.device.index) < (9, 0):
        return "the GPU has no tensor memory accelerator (it takes sm_90)"
    if x.element_size() == 4:
        return "fp32 operands have no matrix instruction"
    if x.dtype != W_enc.dtype:
        return f"x is {x.dtype} and W_enc {W_enc.dtype}"
    return _unfit("x", x) or _unfit("W_enc", W_enc.t())


def _descriptor(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    # a single row or column may have any stride; the descriptor wants a legal one
    n_rows, n_columns = matrix.shape
    unit = ALIGNMENT // matrix.element_size()
    stride = matrix.stride(0) if n_rows > 1 else triton.cdiv(n_columns, unit) * unit
    return TensorDescriptor(matrix, [n_rows, n_columns], [stride, 1], block)


@cache
def _programs(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def launch(call: Listing, config: LaunchConfig) -> None:
    """List the entries of `call`, with the tiles of `config`."""
    n_tokens, d_in = call.x.shape
    d_sae = call.W_enc.shape[1]
    tile = [config["BLOCK_B"], config["BLOCK_S"]]
    n_tiles = triton.cdiv(n_tokens, tile[0]) * triton.cdiv(d_sae, tile[1])
    programs = _programs(call.x.device.index) if call.x.is_cuda else PROGRAMS
    _persistent_encode_kernel[(min(programs, n_tiles),)](
        x_desc=_descriptor(call.x, [tile[0], config["BLOCK_D"]]),
        W_enc_desc=_descriptor(call.W_enc.t(), [tile[1], config["BLOCK_D"]]),
        **call.arguments(),
        d_in=d_in,
        **config,
    )
