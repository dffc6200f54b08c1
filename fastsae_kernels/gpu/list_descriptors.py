"""Listing entries with tiles that descriptors load: a persistent grid and the tensor memory accelerator of Hopper and later.

The formulas and the result are those of `list_pointers`. What differs is how operands arrive: the accelerator copies whole
tiles of x `[N, d_in]` and of feature-major W_enc `[S, d_in]` into shared memory, in the layout that the matrix unit reads and
with zeros past the ends, so that no thread spends registers or instructions on addresses and masks. That leaves registers
for a tile of 128 x 256, which reads each operand half as often from L2 as one of 128 x 128.

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

from fastsae_kernels.gpu.config import LaunchConfig, capability
from fastsae_kernels.gpu.listing import Listing, list_tile
from fastsae_kernels.gpu.tiles import start_of_tile

ALIGNMENT = 16  # bytes, of a descriptor's base and of its rows
MULTIPROCESSORS = 4  # where there is no device to ask (Triton's interpreter, the report)


@triton.jit(do_not_specialize=["n_tokens", "first_feature"])
def _list_descriptors_kernel(
    x_desc,  # [B, D]
    W_enc_desc,  # [S, D]
    gate_and_rows,  # GateAndRows
    first_feature,
    n_tokens,
    d_in,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_B: tl.constexpr,
    RUN: tl.constexpr,
    LANES: tl.constexpr,
):
    """Program walks over every num_programs-th tile of BLOCK_B tokens and BLOCK_S features."""
    d_sae = gate_and_rows.d_sae
    n_tiles = tl.cdiv(n_tokens, BLOCK_B) * tl.cdiv(d_sae, BLOCK_S)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        start_b, start_s = start_of_tile(tile, n_tokens, d_sae, BLOCK_B, BLOCK_S, GROUP_B)
        product = tl.zeros((BLOCK_B, BLOCK_S), dtype=tl.float32)
        for start_d in range(0, d_in, BLOCK_D):
            x = x_desc.load([start_b, start_d])
            W_enc = W_enc_desc.load([start_s, start_d])
            product = tl.dot(x, W_enc.T, product)
        list_tile(product, start_b, start_s, gate_and_rows, first_feature, n_tokens, RUN, LANES)


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
    """Why this kernel cannot list these operands; empty where it can."""
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
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def launch(call: Listing, config: LaunchConfig) -> None:
    """List the entries of `call`, with the tiles of `config` and `PROGRAMS` on each multiprocessor."""
    options = dict(config)
    programs = options.pop("PROGRAMS", 1) * (
        _multiprocessors(call.x.device.index) if call.x.is_cuda else MULTIPROCESSORS
    )
    n_tokens, d_in = call.x.shape
    n_tiles = triton.cdiv(n_tokens, config["BLOCK_B"]) * triton.cdiv(call.W_enc.shape[1], config["BLOCK_S"])
    _list_descriptors_kernel[(min(programs, n_tiles),)](
        x_desc=_descriptor(call.x, [config["BLOCK_B"], config["BLOCK_D"]]),
        W_enc_desc=_descriptor(call.W_enc.t(), [config["BLOCK_S"], config["BLOCK_D"]]),
        **call.arguments(),
        d_in=d_in,
        **options,
    )
