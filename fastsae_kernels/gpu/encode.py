"""Encode: `x @ W_enc + b_enc`, JumpReLU and the selection of its active entries, without the dense product.

    hidden_pre = x @ W_enc + b_enc
    listed     = hidden_pre > threshold  or  |hidden_pre - threshold| < bandwidth / 2
    value      = hidden_pre where active, 0 where listed for the window alone

Three ways do it behind `list_entries`, with equal results: tiles through pointers (`pointer`), tiles through Hopper's
tensor memory accelerator (`persistent`), a library product in chunks and compaction (`compact`); `rivals` says which
serves a call. Letters: `B` tokens, `D` d_in, `S` d_sae.

Numerics: operands in their dtype, accumulated, compared and stored in fp32; fp32 operands as `precision` says, IEEE by
default. NaN is listed with its value, and so reaches the output. Slots are taken in any order; `topk.sort_rows` puts them
in order, so results do not depend on it.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fastsae_kernels.gpu.config import on_device
from fastsae_kernels.gpu.listing import Listing
from fastsae_kernels.gpu.rivals import RIVALS, Path, forced_path, table_path, working_precision
from fastsae_kernels.gpu.topk import MAX_SORT, sort_packed, sort_rows
from fastsae_kernels.sparse_acts import SparseActs

# set to 1, calls use and make measurements (`tune`)
AUTOTUNE = "FASTSAE_AUTOTUNE"
# first guess of an inference call; a row with more active features costs one retry. Before and after sorting, 16 bytes a
# place: 2.7 % of a dense 16-bit tensor at d_sae 65,536
DEFAULT_CAPACITY = 224
# candidates of an fp8 product per entry, with room (measured on a CPU: 2 to 5)
CANDIDATES = 4


def chosen_path(x: Tensor, W_enc: Tensor, *, precision: str = "ieee") -> str:
    """Which way `list_entries` would take for these operands, and why: "pointer: ...", "persistent: ..." or "chunks: ...".

    Never measures: where `FASTSAE_AUTOTUNE=1` and nothing is cached for this shape, it says what serves until then.

    Raises:
        ValueError: `precision` is unknown, or `use_rival` asks for a way whose rules do not hold.
    """
    precision = working_precision(x, precision)
    return str(_path(x, W_enc, precision))


def _path(x: Tensor, W_enc: Tensor, precision: str, call: Listing | None = None) -> Path:
    """The way to take; measures it first where `call` is given, tuning is on and nothing is cached."""
    forced = forced_path(x, W_enc, precision)
    if forced is not None:
        return forced
    if x.is_cuda and os.environ.get(AUTOTUNE) == "1":
        # here, for it is a command too: what the package imports would run twice
        from fastsae_kernels.gpu import tune

        tuned = tune.path(x, W_enc, precision, call)
        if tuned is not None:
            return tuned
    return table_path(x, W_enc, precision)


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
    l0: Tensor | None = None,
    feature_counts: Tensor | None = None,
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
        precision: Of fp32 products: `ieee`, `tf32x3` or `tf32`. 16-bit operands have one, whatever it says.
        l0: `[N]` int32 or int64, or None: the active entries of each row are added to it, those without a slot included.
        feature_counts: `[S]`, the same of each feature. A window's entry is not active, nor is one below the bound or NaN.

    Raises:
        TypeError: x is fp64.
        ValueError: A cursor could pass 2^31, `precision` is unknown, or `use_rival` asks for a way that cannot serve.
    """
    if x.dtype == torch.float64:
        raise TypeError("x: expected float32, bfloat16 or float16 on the Triton path, got float64")
    precision = working_precision(x, precision)
    n_tokens, d_sae = x.shape[0], W_enc.shape[1]
    if entries.numel() + first_feature + d_sae >= 2**31:  # a cursor may run that far past the last span
        raise ValueError(f"x: expected fewer than 2**31 entries in one call, got {entries.numel()}; split the tokens")
    if n_tokens == 0:
        return
    call = Listing(
        x, W_enc, b_enc, threshold, cursors, row_ends, entries, bandwidth, bounds, first_feature, precision,
        l0, feature_counts,
    )  # fmt: skip
    path = _path(x, W_enc, precision, call)
    RIVALS[path.rival].launch(call, path.config)


def list_all_entries(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    row_offsets: Tensor,
    nnz: int,
    bandwidth: float,
    *,
    precision: str = "ieee",
    fp8: bool = False,
    l0: Tensor | None = None,
    feature_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`counts [N]` int32, entries that found no slot included, and `entries [nnz]` int64, over spans `row_offsets`."""
    starts, ends = row_offsets[:-1], row_offsets[1:]
    cursors = starts.clone()
    entries = torch.empty(nnz, dtype=torch.int64, device=x.device)
    if fp8 and x.shape[0] > 0:
        from fastsae_kernels.gpu.fp8 import fp8_weights, list_entries_fp8  # optional, and seldom used

        weights = fp8_weights(W_enc, x)
        list_entries_fp8(
            x, W_enc, b_enc, threshold, cursors, ends, entries, bandwidth=bandwidth, weights=weights
        )  # fmt: skip
    else:
        list_entries(
            x, W_enc, b_enc, threshold, cursors, ends, entries,
            bandwidth=bandwidth, precision=precision, l0=l0, feature_counts=feature_counts,
        )  # fmt: skip
    return cursors - starts, entries


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
    precision: str = "ieee",
    fp8: bool = False,
) -> SparseActs:
    """Active (and window) entries of every row, for inference; one host synchronisation, none for top-k without a window.

    Equivalent to `fastsae_kernels.reference.encode`. Rows are tried with a fixed span; where one has more entries, the
    call is repeated with exactly the spans that the first one counted.

    Args:
        x: `[N, d_in]`; fp32, bf16 or fp16. Strides are free, here and below.
        W_enc: `[d_in, d_sae]`, dtype of x.
        b_enc: `[d_sae]`.
        threshold: `[d_sae]` fp32, >= 0.
        bandwidth: Inactive entries closer than half of it to the threshold are listed with value 0.
        k: At most the `k` largest active entries of a row survive, ties to the lower index.
        precision: As in `list_entries`.
        fp8: Find candidates by an fp8 product first (`fp8`); never with `k`.

    Returns:
        Rows sorted by feature index, values fp32.

    Raises:
        TypeError: x is fp64.
    """
    b_enc, threshold = b_enc.contiguous(), threshold.contiguous()
    if k is not None:
        from fastsae_kernels.gpu.row_topk import encode_topk  # it is built on `list_entries`

        return encode_topk(x, W_enc, b_enc, threshold, bandwidth, k, precision)
    n_tokens, d_sae = x.shape[0], W_enc.shape[1]
    capacity = min(DEFAULT_CAPACITY * (CANDIDATES if fp8 else 1), d_sae, MAX_SORT)
    row_offsets = padded_offsets(n_tokens, capacity, x.device)
    operands = (x, W_enc, b_enc, threshold)
    counts, entries = list_all_entries(
        *operands, row_offsets, n_tokens * capacity, bandwidth, precision=precision, fp8=fp8
    )
    longest, nnz = torch.stack((counts.max().long(), counts.sum())).tolist() if n_tokens else (0, 0)
    if longest <= capacity:
        return sort_rows(counts, entries, row_offsets, (n_tokens, d_sae), None)
    if fp8:  # its counts are those of candidates in some rows and of entries in others: of no use as spans
        return encode(*operands, bandwidth=bandwidth, precision=precision)
    row_offsets = torch.zeros_like(row_offsets)
    row_offsets[1:] = counts.cumsum(0)
    _, entries = list_all_entries(*operands, row_offsets, nnz, bandwidth, precision=precision)
    return sort_packed(entries, row_offsets, (n_tokens, d_sae))
