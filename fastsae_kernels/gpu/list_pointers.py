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
from fastsae_kernels.gpu.tiles import matrix_of, start_of_tile, tile_product


@triton.jit(do_not_specialize=["n_tokens", "first_feature"])
def _list_pointers_kernel(
    x,  # Matrix [B, D]
    W_enc,  # Matrix [D, S]
    gate_and_rows,  # GateAndRows
    first_feature,
    n_tokens,
    d_in,
    EVEN_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_B: tl.constexpr,
    RUN: tl.constexpr,
    LANES: tl.constexpr,
):
    """Program owns one tile: BLOCK_B tokens, BLOCK_S features; it lists the entries of that tile."""
    d_sae = gate_and_rows.d_sae
    start_b, start_s = start_of_tile(tl.program_id(0), n_tokens, d_sae, BLOCK_B, BLOCK_S, GROUP_B)
    rows = (start_b + tl.arange(0, BLOCK_B)) % n_tokens  # wrap around rather than mask: the loop stays free of masks
    columns = (start_s + tl.arange(0, BLOCK_S)) % d_sae
    product = tile_product(
        x.rows, rows, x.stride_row, x.stride_column, W_enc.rows, columns, W_enc.stride_row, W_enc.stride_column, d_in,
        BLOCK_B, BLOCK_S, BLOCK_D, EVEN_D,
    )  # fmt: skip
    list_tile(product, start_b, start_s, gate_and_rows, first_feature, n_tokens, RUN, LANES)


def refuses(x: Tensor, W_enc: Tensor) -> str:
    """Why this kernel cannot list these operands: it can list any."""
    return ""


def launch(call: Listing, config: LaunchConfig) -> None:
    """List the entries of `call`, with the tiles of `config`."""
    n_tokens, d_in = call.x.shape
    grid = (triton.cdiv(n_tokens, config["BLOCK_B"]) * triton.cdiv(call.W_enc.shape[1], config["BLOCK_S"]),)
    _list_pointers_kernel[grid](
        x=matrix_of(call.x),
        W_enc=matrix_of(call.W_enc),
        **call.arguments(),
        d_in=d_in,
        EVEN_D=d_in % config["BLOCK_D"] == 0,
        **config,
    )
