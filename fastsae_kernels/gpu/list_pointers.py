"""Listing entries with tiles loaded through pointers: any strides, any d_in, every architecture.

Program owns one tile of `x @ W_enc`, whose accumulators never leave the registers: the loads of the next blocks of d_in
(cp.async from sm_80 on) run while the matrix unit works on this one, then the entries of the tile are appended. The
`[N, d_sae]` product is never written; a dense step writes and reads it several times.

A call of up to 64 tokens is bound by reading W_enc once; its tiles (`n<=64` in the launch table) are short in tokens and
long in d_in, so that many bytes are under way.

Numerics: operands in their dtype, fp32 ones by IEEE products; accumulated, compared and stored in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import LaunchConfig
from fastsae_kernels.gpu.listing import Listing, list_tile
from fastsae_kernels.gpu.tiles import start_of_tile, tile_product


@triton.jit(do_not_specialize=["n_tokens", "first_feature"])
def _list_pointers_kernel(
    # inputs
    x_ptr,  # [B, D]
    W_enc_ptr,  # [D, S]
    b_enc_ptr,  # [S]
    threshold_ptr,  # [S] fp32
    row_ends_ptr,  # [B] int32: where the span of each row ends
    bounds_ptr,  # [B] fp32 or None: smaller entries of a row are left out; where positive, its window too
    # outputs
    cursors_ptr,  # [B] int32: where each span starts; moves on by every entry, also those that find no slot
    entries_ptr,  # [nnz] int64: index and bits of the value
    # scalars and sizes
    half_bandwidth,
    first_feature,  # index of the first column of W_enc
    n_tokens,
    d_in,
    d_sae,
    # strides
    stride_xb,
    stride_xd,
    stride_wd,
    stride_ws,
    EVEN_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_B: tl.constexpr,
    RUN: tl.constexpr,
    LANES: tl.constexpr,
):
    """Program owns one tile: BLOCK_B tokens, BLOCK_S features; it lists the entries of that tile."""
    start_b, start_s = start_of_tile(tl.program_id(0), n_tokens, d_sae, BLOCK_B, BLOCK_S, GROUP_B)
    rows = (start_b + tl.arange(0, BLOCK_B)) % n_tokens  # wrap around rather than mask: the loop stays free of masks
    columns = (start_s + tl.arange(0, BLOCK_S)) % d_sae
    product = tile_product(
        x_ptr, rows, stride_xb, stride_xd, W_enc_ptr, columns, stride_wd, stride_ws, d_in,
        BLOCK_B, BLOCK_S, BLOCK_D, EVEN_D,
    )  # fmt: skip
    list_tile(
        product, start_b, start_s, b_enc_ptr, threshold_ptr, row_ends_ptr, bounds_ptr, cursors_ptr, entries_ptr,
        half_bandwidth, first_feature, n_tokens, d_sae, RUN, LANES,
    )  # fmt: skip


def refuses(x: Tensor, W_enc: Tensor) -> str:
    """Why this kernel cannot list these operands: it can list any."""
    return ""


def launch(call: Listing, config: LaunchConfig) -> None:
    """List the entries of `call`, with the tiles of `config`."""
    n_tokens, d_in = call.x.shape
    grid = (triton.cdiv(n_tokens, config["BLOCK_B"]) * triton.cdiv(call.W_enc.shape[1], config["BLOCK_S"]),)
    _list_pointers_kernel[grid](
        x_ptr=call.x,
        W_enc_ptr=call.W_enc,
        **call.arguments(),
        d_in=d_in,
        stride_xb=call.x.stride(0),
        stride_xd=call.x.stride(1),
        stride_wd=call.W_enc.stride(0),
        stride_ws=call.W_enc.stride(1),
        EVEN_D=d_in % config["BLOCK_D"] == 0,
        **config,
    )
