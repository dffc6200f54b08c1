"""Encode: `x @ W_enc + b_enc`, JumpReLU and the selection of its active entries, in one kernel.

    hidden_pre = x @ W_enc + b_enc
    listed     = hidden_pre > threshold  or  |hidden_pre - threshold| < bandwidth / 2
    value      = hidden_pre where active, 0 where listed for the window alone

Letters: `B` tokens, `D` d_in, `S` d_sae. A tile's accumulators never leave the registers: each listed entry takes a slot
of its row by an atomic on the row's cursor and is stored there, so the `[N, d_sae]` product is never written (a dense
step writes and reads it several times). The cursor moves on past the row's span while the stores stop, so it counts
the true number of entries and an overflow is never silent. NaN is listed with its value, and so reaches the output.

Numerics: operands in their dtype (fp32: IEEE, not TF32), accumulated, compared and stored in fp32. Slots are taken in any
order; `topk.sort_rows` puts them in order, so results do not depend on it.

The per-element append is the simplest epilogue that does not spill at a 128 x 128 tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import launch_config, on_device
from fastsae_kernels.gpu.tiles import gate, pack_entry, tile_product
from fastsae_kernels.gpu.topk import MAX_SORT, sort_packed, sort_rows
from fastsae_kernels.sparse_acts import SparseActs

# first guess of an inference call; a row with more active features costs one retry
DEFAULT_CAPACITY = 256


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
    hidden_pre = tile_product(
        x_ptr, rows, stride_xb, stride_xd, W_enc_ptr, columns, stride_wd, stride_ws, d_in,
        PRECISION, BLOCK_B, BLOCK_S, BLOCK_D, EVEN_D,
    )  # fmt: skip

    hidden_pre += tl.load(b_enc_ptr + columns).to(tl.float32)[None, :]
    active, window = gate(hidden_pre, tl.load(threshold_ptr + columns)[None, :], half_bandwidth)
    unordered = hidden_pre != hidden_pre
    listed = (active | window | unordered) & (offs_b < n_tokens)[:, None] & (offs_s < d_sae)[None, :]
    value = tl.where(active | unordered, hidden_pre, 0.0)
    if bounds_ptr is not None:
        listed = listed & ~(value < tl.load(bounds_ptr + rows)[:, None])  # not >=: NaN stays

    cursors = cursors_ptr + rows[:, None] + tl.zeros((BLOCK_B, BLOCK_S), dtype=tl.int32)
    slot = tl.atomic_add(cursors, 1, mask=listed, sem="relaxed")
    fits = listed & (slot < tl.load(row_ends_ptr + rows)[:, None])
    tl.store(entries_ptr + slot, pack_entry(first_feature + columns[None, :], value), mask=fits)


def list_entries(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    cursors: Tensor,
    row_ends: Tensor,
    entries: Tensor,
    *,
    bandwidth: float = 0.0,
    bounds: Tensor | None = None,
    first_feature: int = 0,
    precision: str = "ieee",
) -> None:
    """Append the entries of a range of features to every row's span, in any order.

    Args:
        x: `[N, d_in]`; fp32, bf16 or fp16. Strides are free, here and below.
        W_enc, b_enc, threshold: `[d_in, S]`, `[S]`, `[S]` of that range, the last two contiguous, the last fp32.
        cursors: `[N]` int32, the next slot of each row; moves on by every entry, also those that find no slot.
        row_ends: `[N]` int32, where the span of each row ends.
        entries: `[nnz]` int64, see `tiles.pack_entry`.
        bandwidth: Width of the straight-through window.
        bounds: `[N]` fp32 >= 0 or None: entries with a smaller value are left out, hence the window's where it is positive.
        first_feature: Index of the first feature of the range.
        precision: `input_precision` of fp32 products: `ieee`, `tf32x3` or `tf32`.

    Raises:
        TypeError: x is fp64.
        ValueError: A cursor could pass 2^31.
    """
    if x.dtype == torch.float64:
        raise TypeError("x: expected float32, bfloat16 or float16 on the Triton path, got float64")
    n_tokens, d_in = x.shape
    d_sae = W_enc.shape[1]
    if entries.numel() + first_feature + d_sae >= 2**31:  # a cursor may run that far past the last span
        raise ValueError(f"x: expected fewer than 2**31 entries in one call, got {entries.numel()}; split the tokens")
    if n_tokens == 0:
        return
    config = launch_config("encode", x)
    config = launch_config("encode", x, odd=d_in % config["BLOCK_D"] != 0)
    grid = (triton.cdiv(n_tokens, config["BLOCK_B"]) * triton.cdiv(d_sae, config["BLOCK_S"]),)
    _encode_kernel[grid](
        x_ptr=x,
        W_enc_ptr=W_enc,
        b_enc_ptr=b_enc,
        threshold_ptr=threshold,
        row_ends_ptr=row_ends,
        bounds_ptr=bounds,
        cursors_ptr=cursors,
        entries_ptr=entries,
        half_bandwidth=bandwidth / 2,
        first_feature=first_feature,
        n_tokens=n_tokens,
        d_in=d_in,
        d_sae=d_sae,
        stride_xb=x.stride(0),
        stride_xd=x.stride(1),
        stride_wd=W_enc.stride(0),
        stride_ws=W_enc.stride(1),
        PRECISION=precision,
        EVEN_D=d_in % config["BLOCK_D"] == 0,
        **config,
    )


def list_all_entries(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, row_offsets: Tensor, nnz: int, bandwidth: float
) -> tuple[Tensor, Tensor]:
    """`counts [N]` int32, entries that found no slot included, and `entries [nnz]` int64, over spans `row_offsets`."""
    cursors = row_offsets[:-1].clone()
    entries = torch.empty(nnz, dtype=torch.int64, device=x.device)
    list_entries(x, W_enc, b_enc, threshold, cursors, row_offsets[1:], entries, bandwidth=bandwidth)
    return cursors - row_offsets[:-1], entries


def padded_offsets(n_tokens: int, capacity: int, device: torch.device) -> Tensor:
    """`arange(n_tokens + 1) * capacity`, int32: every row the same span."""
    return torch.arange(n_tokens + 1, device=device, dtype=torch.int32) * capacity


@on_device
def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    *,
    bandwidth: float = 0.0,
    k: int | None = None,
) -> SparseActs:
    """Active (and window) entries of every row, exact, for inference; synchronises with the host once.

    Equivalent to `fastsae_kernels.reference.encode`. Rows are tried with a fixed span; where one has more entries, the
    call is repeated with exactly the spans that the first one counted.

    Args:
        x: `[N, d_in]`; fp32, bf16 or fp16. Strides are free, here and below.
        W_enc: `[d_in, d_sae]`, dtype of x.
        b_enc: `[d_sae]`.
        threshold: `[d_sae]` fp32, >= 0.
        bandwidth: Inactive entries closer than half of it to the threshold are listed with value 0.
        k: At most the `k` largest active entries of a row survive, ties to the lower index.

    Returns:
        Rows sorted by feature index, values fp32.

    Raises:
        TypeError: x is fp64.
    """
    b_enc, threshold = b_enc.contiguous(), threshold.contiguous()
    n_tokens, d_sae = x.shape[0], W_enc.shape[1]
    capacity = min(max(DEFAULT_CAPACITY, k or 0), d_sae, MAX_SORT)
    row_offsets = padded_offsets(n_tokens, capacity, x.device)
    counts, entries = list_all_entries(x, W_enc, b_enc, threshold, row_offsets, n_tokens * capacity, bandwidth)
    longest, nnz = torch.stack((counts.max().long(), counts.sum())).tolist() if n_tokens else (0, 0)
    if longest <= capacity:
        return sort_rows(counts, entries, row_offsets, (n_tokens, d_sae), k)
    row_offsets = torch.zeros_like(row_offsets)
    row_offsets[1:] = counts.cumsum(0)
    _, entries = list_all_entries(x, W_enc, b_enc, threshold, row_offsets, nnz, bandwidth)
    return sort_packed(entries, row_offsets, (n_tokens, d_sae), k)
