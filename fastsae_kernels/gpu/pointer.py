"""Listing entries with tiles loaded through pointers: any strides, any d_in, every architecture.

Program owns one tile of `x @ W_enc`, whose accumulators never leave the registers: the loads of the next blocks of d_in
(cp.async from sm_80 on) run while the matrix unit works on this one, then the tile is gated and its entries are appended.
The `[N, d_sae]` product is never written; a dense step writes and reads it several times.

A call of up to 64 tokens is bound by reading W_enc once; its tiles (`n<=64` in the launch table) are short in tokens and
long in d_in, so that many bytes are under way.

Numerics: operands in their dtype, fp32 ones by IEEE products; accumulated, compared and stored in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.append import append_each, append_in_turn, count_active, listed_values
from fastsae_kernels.gpu.config import LaunchConfig
from fastsae_kernels.gpu.listing import Listing
from fastsae_kernels.gpu.tiles import tile_product


@triton.jit(do_not_specialize=["n_tokens", "first_feature"])
def _encode_kernel(
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
    l0_ptr,  # [B] or None
    feature_counts_ptr,  # [S] or None
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
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_B: tl.constexpr,  # row tiles that share a column tile before the next one: both stay in L2
    IN_TURN: tl.constexpr = False,  # append_in_turn rather than append_each
):
    """Program owns one tile: BLOCK_B tokens, BLOCK_S features; it lists the entries of that tile."""
    pid = tl.program_id(0)
    tiles_b = tl.cdiv(n_tokens, BLOCK_B)
    tiles_s = tl.cdiv(d_sae, BLOCK_S)
    first_b = pid // (GROUP_B * tiles_s) * GROUP_B
    group = min(tiles_b - first_b, GROUP_B)
    pid_b = first_b + pid % (GROUP_B * tiles_s) % group
    pid_s = pid % (GROUP_B * tiles_s) // group

    offs_b = pid_b * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_s = pid_s * BLOCK_S + tl.arange(0, BLOCK_S)
    rows = offs_b % n_tokens  # wrap around rather than mask: the loop stays free of masks
    columns = offs_s % d_sae
    product = tile_product(
        x_ptr, rows, stride_xb, stride_xd, W_enc_ptr, columns, stride_wd, stride_ws, d_in,
        PRECISION, BLOCK_B, BLOCK_S, BLOCK_D, EVEN_D,
    )  # fmt: skip
    value = listed_values(
        product, offs_b, offs_s, n_tokens, d_sae, b_enc_ptr, threshold_ptr, bounds_ptr, half_bandwidth
    )  # fmt: skip
    count_active(value, rows, columns, l0_ptr, feature_counts_ptr)
    if IN_TURN:
        append_in_turn(value, rows, offs_s, first_feature, cursors_ptr, row_ends_ptr, entries_ptr)
    else:
        append_each(value, rows, offs_s, first_feature, cursors_ptr, row_ends_ptr, entries_ptr)


def refuses(x: Tensor, W_enc: Tensor) -> str:
    """Why this way cannot list these operands: it can list any."""
    return ""


def launch(call: Listing, config: LaunchConfig) -> None:
    """List the entries of `call`, with the tiles of `config`."""
    n_tokens, d_in = call.x.shape
    d_sae = call.W_enc.shape[1]
    grid = (triton.cdiv(n_tokens, config["BLOCK_B"]) * triton.cdiv(d_sae, config["BLOCK_S"]),)
    _encode_kernel[grid](
        x_ptr=call.x,
        W_enc_ptr=call.W_enc,
        **call.arguments(),
        d_in=d_in,
        stride_xb=call.x.stride(0),
        stride_xd=call.x.stride(1),
        stride_wd=call.W_enc.stride(0),
        stride_ws=call.W_enc.stride(1),
        PRECISION="ieee",
        EVEN_D=d_in % config["BLOCK_D"] == 0,
        **config,
    )
