"""Listing entries of a library's products: x @ W_enc in chunks into a small fp32 buffer, then a kernel that gates and appends.

    for each chunk of tokens and features:
        buffer = x @ W_enc                  cuBLAS, fp32 accumulated and stored
        append the entries of the buffer    one read of it, from L2

The product runs at the library's speed and pays for it with one write and one read of N * d_sae * 4 bytes, which stay in
L2: the buffer is small (`CHUNK_MIB`, and under 3 % of the dense tensor) and used again for the next chunk. A chunk takes all
tokens where that leaves it `MIN_WIDTH` features, so that W_enc is read once; narrower products run slowly.

Numerics: the buffer is fp32 whatever the operands, never a rounded bf16 product. The library chooses how fp32 operands
are multiplied from PyTorch's flags, which are left alone: where they ask for TF32, this way refuses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import LaunchConfig
from fastsae_kernels.gpu.listing import Listing, list_tile

MIN_WIDTH = 256
WIDTH_STEP = 128
DENSE_SHARE = 0.03


@triton.jit(do_not_specialize=["n_tokens", "first_feature"])
def _list_products_kernel(
    product_ptr,  # [B, S] fp32, contiguous
    gate_and_rows,  # GateAndRows
    first_feature,
    n_tokens,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    RUN: tl.constexpr,
    LANES: tl.constexpr,
):
    """Program owns one tile of the product and appends its entries."""
    d_sae = gate_and_rows.d_sae
    tiles_s = tl.cdiv(d_sae, BLOCK_S)
    start_b, start_s = tl.program_id(0) // tiles_s * BLOCK_B, tl.program_id(0) % tiles_s * BLOCK_S
    offs_b, offs_s = start_b + tl.arange(0, BLOCK_B), start_s + tl.arange(0, BLOCK_S)
    mask = (offs_b < n_tokens)[:, None] & (offs_s < d_sae)[None, :]
    # int64: row * d_sae can pass 2^31
    product = tl.load(product_ptr + offs_b.to(tl.int64)[:, None] * d_sae + offs_s[None, :], mask=mask, other=0.0)
    list_tile(product, start_b, start_s, gate_and_rows, first_feature, n_tokens, RUN, LANES)


def _fp32_products_use_tf32() -> bool:
    """What PyTorch's flags say about fp32 products on CUDA; the older flag cannot be read once the newer one is mixed in."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if precision is None:
        return torch.backends.cuda.matmul.allow_tf32
    return precision not in ("ieee", "none")


def refuses(x: Tensor, W_enc: Tensor) -> str:
    """Why this way cannot list these operands; empty where it can."""
    if torch.are_deterministic_algorithms_enabled():
        # cuBLAS raises an error then, unless CUBLAS_WORKSPACE_CONFIG was set before the process used the GPU
        return "deterministic algorithms are asked for, and the library's product need not be one"
    if x.dtype != W_enc.dtype:
        return f"x is {x.dtype} and W_enc {W_enc.dtype}"
    if x.element_size() == 4:
        if _fp32_products_use_tf32():
            return "PyTorch's flags ask for TF32"
    elif x.is_cuda:
        if torch.version.hip is not None or not hasattr(torch.ops.aten.mm, "dtype_out"):
            return "this PyTorch has no product of 16-bit operands with an fp32 result (it takes torch 2.8 on CUDA)"
        if x.dtype == torch.float16 and getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False):
            return "PyTorch's flags ask for fp16 accumulation"
    return ""


@torch.no_grad()  # a result into a buffer has no gradient, and asking for one would be an error
def _product(x: Tensor, W_enc: Tensor, out: Tensor) -> None:
    """`x @ W_enc` in fp32 into `out`."""
    if x.dtype == torch.float32:
        torch.mm(x, W_enc, out=out)
    elif not x.is_cuda or torch.version.cuda is None:  # no such product: operands are widened, which rounds nothing
        torch.mm(x.float(), W_enc.float(), out=out)
    else:
        torch.mm(x, W_enc, out_dtype=torch.float32, out=out)


def chunk_shape(n_tokens: int, d_sae: int, element_size: int, chunk_bytes: int) -> tuple[int, int]:
    """`(tokens, features)` of a chunk: at most `chunk_bytes` of fp32 and 3 % of the dense tensor, or `WIDTH_STEP` wide."""
    rows = min(n_tokens, chunk_bytes // (4 * MIN_WIDTH))
    width = min(chunk_bytes // (4 * rows), int(DENSE_SHARE * d_sae * element_size / 4 * (n_tokens / rows)))
    return rows, min(d_sae, max(width // WIDTH_STEP, 1) * WIDTH_STEP)


def launch(call: Listing, config: LaunchConfig) -> None:
    """List the entries of `call` chunk by chunk, with the buffer and the tiles of `config`."""
    tiles = dict(config)
    n_tokens, d_sae = call.x.shape[0], call.W_enc.shape[1]
    chunk_bytes = int(tiles.pop("CHUNK_MIB") * 2**20)
    height, width = chunk_shape(n_tokens, d_sae, call.x.element_size(), chunk_bytes)
    buffer = torch.empty(height * width, dtype=torch.float32, device=call.x.device)
    for first_row in range(0, n_tokens, height):
        rows = slice(first_row, min(first_row + height, n_tokens))
        for first in range(0, d_sae, width):
            part = call.part(rows, slice(first, min(first + width, d_sae)))
            shape = (part.x.shape[0], part.W_enc.shape[1])
            product = buffer[: shape[0] * shape[1]].view(shape)
            _product(part.x, part.W_enc, product)
            grid = (triton.cdiv(shape[0], tiles["BLOCK_B"]) * triton.cdiv(shape[1], tiles["BLOCK_S"]),)
            _list_products_kernel[grid](product_ptr=product, **part.arguments(), **tiles)
