"""Encode: `x @ W_enc + b_enc`, JumpReLU and the selection of its active entries, without the dense product.

Three kernels do it behind `list_entries`, with equal results (`listing` has the formulas): tiles through pointers
(`list_pointers`), tiles through descriptors (`list_descriptors`), a library product in chunks and compaction
(`list_products`); `choice` says which serves a call.

Numerics: operands in their dtype, fp32 ones by IEEE products; accumulated, compared and stored in fp32. NaN is listed with
its value, and so reaches the output. Slots are taken in any order; `topk.sort_rows` puts them in order, so results do not
depend on it.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fastsae_kernels.gpu.choice import KERNELS, Choice, forced, from_table
from fastsae_kernels.gpu.config import on_device
from fastsae_kernels.gpu.listing import Listing
from fastsae_kernels.gpu.topk import MAX_SORT, sort_packed, sort_rows
from fastsae_kernels.types import SparseActs

# set to 1, calls use and make measurements (`tune`)
AUTOTUNE = "FASTSAE_AUTOTUNE"
# first guess of an inference call; a row with more active features costs one retry. Before and after sorting it takes 16
# bytes for each entry that a row can hold: 2.7 % of a dense 16-bit tensor at d_sae 65,536
DEFAULT_CAPACITY = 224


def chosen_listing(x: Tensor, W_enc: Tensor) -> str:
    """Which kernel `list_entries` would take for these operands, and why: "list_pointers: the table of sm_80 ...".

    Never measures: where `FASTSAE_AUTOTUNE=1` and nothing is cached for this shape, it says what serves until then.

    Raises:
        ValueError: `use_listing` asks for a kernel whose rules do not hold.
    """
    return str(_choose(x, W_enc))


def _choose(x: Tensor, W_enc: Tensor, call: Listing | None = None) -> Choice:
    """What to take; measures it first where `call` is given, tuning is on and nothing is cached."""
    choice = forced(x, W_enc)
    if choice is None and x.is_cuda and os.environ.get(AUTOTUNE) == "1":
        # here, for it is a command too: what the package imports would run twice
        from fastsae_kernels.gpu import tune

        choice = tune.tuned(x, W_enc, call)
    return choice or from_table(x, W_enc)


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
) -> None:
    """Append the entries of a range of features to every row's slots, in any order.

    Args:
        x: `[N, d_in]`; fp32, bf16 or fp16. Strides are free, here and below.
        W_enc, b_enc, threshold: `[d_in, S]`, `[S]`, `[S]` of that range, the last two contiguous, the last fp32.
        cursors: `[N]` int32, the next slot of each row; moves on by every entry, also those that find no slot.
        row_ends: `[N]` int32, where the slots of each row end.
        entries: `[nnz]` int64, see `tiles.pack_entry`.
        bandwidth: Width of the straight-through window.
        bounds: `[N]` fp32 >= 0 or None: entries with a smaller value are left out, hence the window's where it is positive.
        first_feature: Index of the first feature of the range.

    Raises:
        TypeError: x is fp64.
        ValueError: A cursor could pass 2^31, or `use_listing` asks for a kernel that cannot serve.
    """
    if x.dtype == torch.float64:
        raise TypeError("x: expected float32, bfloat16 or float16 on the Triton path, got float64")
    n_tokens, d_sae = x.shape[0], W_enc.shape[1]
    if entries.numel() + first_feature + d_sae >= 2**31:  # a cursor may run that far past the last slot
        raise ValueError(f"x: expected fewer than 2**31 entries in one call, got {entries.numel()}; split the tokens")
    if n_tokens == 0:
        return
    call = Listing(x, W_enc, b_enc, threshold, cursors, row_ends, entries, bandwidth, bounds, first_feature)
    choice = _choose(x, W_enc, call)
    KERNELS[choice.kernel].launch(call, choice.config)


def list_all_entries(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    row_offsets: Tensor,
    nnz: int,
    bandwidth: float,
) -> tuple[Tensor, Tensor]:
    """`counts [N]` int32, entries that found no slot included, and `entries [nnz]` int64, in each row's slots (`row_offsets`)."""
    starts, ends = row_offsets[:-1], row_offsets[1:]
    cursors = starts.clone()
    entries = torch.empty(nnz, dtype=torch.int64, device=x.device)
    list_entries(x, W_enc, b_enc, threshold, cursors, ends, entries, bandwidth=bandwidth)
    return cursors - starts, entries


def padded_offsets(n_tokens: int, capacity: int, device: torch.device) -> Tensor:
    """`arange(n_tokens + 1) * capacity`, int32: as many slots for every row."""
    return torch.arange(n_tokens + 1, device=device, dtype=torch.int32) * capacity


@on_device
def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    *,
    bandwidth: float = 0.0,
) -> SparseActs:
    """Active (and window) entries of every row, for inference; one host synchronisation.

    Equivalent to `fastsae_kernels.reference.encode` without `k` (with it: `row_topk.encode_topk`). Rows are tried with a fixed
    number of slots; where one has more entries, the call is repeated with as many as the first one counted.

    Args:
        x: `[N, d_in]`; fp32, bf16 or fp16. Strides are free, here and below.
        W_enc: `[d_in, d_sae]`, dtype of x.
        b_enc: `[d_sae]`.
        threshold: `[d_sae]` fp32, >= 0.
        bandwidth: Inactive entries closer than half of it to the threshold are listed with value 0.

    Returns:
        Rows sorted by feature index, values fp32.

    Raises:
        TypeError: x is fp64.
    """
    b_enc, threshold = b_enc.contiguous(), threshold.contiguous()
    n_tokens, d_sae = x.shape[0], W_enc.shape[1]
    capacity = min(DEFAULT_CAPACITY, d_sae, MAX_SORT)
    row_offsets = padded_offsets(n_tokens, capacity, x.device)
    operands = (x, W_enc, b_enc, threshold)
    counts, entries = list_all_entries(*operands, row_offsets, n_tokens * capacity, bandwidth)
    longest, nnz = torch.stack((counts.max().long(), counts.sum())).tolist() if n_tokens else (0, 0)
    if longest <= capacity:
        return sort_rows(counts, entries, row_offsets, (n_tokens, d_sae), None)
    row_offsets = torch.zeros_like(row_offsets)
    row_offsets[1:] = counts.cumsum(0)
    _, entries = list_all_entries(*operands, row_offsets, nnz, bandwidth)
    return sort_packed(entries, row_offsets, (n_tokens, d_sae))
