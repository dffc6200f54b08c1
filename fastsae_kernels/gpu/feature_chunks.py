"""Features with so many entries that several programs share one: how they are cut, and how their sums are joined.

A feature that fires on every token would be one long loop of one program (`feature_visit`). A feature with more entries than
a chunk is cut into chunks, each visited by a program of its own, which leaves its sums in fp32 in a slot; a second kernel
adds a feature's slots in their order. The number of slots is known beforehand, hence their memory; the length of a chunk is
found on the device such that they suffice (`chunk_plan`), so nothing waits for the device.

Letters: `S` d_sae, `C` slots, `I` d_in, `O` d_out. A slot takes `4 * (I + O)` bytes: all of them 1.8 % of a dense 16-bit tensor
for 8,192 tokens with 128 places each, d = 2304 and 65,536 features.

Numerics: fp32, added in an order that the entries alone decide: deterministic, no atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import launch_config

# chunks that keep a large GPU busy to the end, and places per slot in chunks of the shortest length: slots are memory
MAX_SLOTS = 1024
CHUNKS_PER_SLOT = 4


@triton.jit
def store_row(ptr, row, offs_d, depth, values):
    """Columns of one row of a contiguous matrix, in its dtype."""
    tl.store(ptr + row * depth + offs_d, values.to(ptr.dtype.element_ty), mask=offs_d < depth)


@triton.jit
def _slot_sum(
    slots_ptr,  # [C, depth] fp32
    first_slot,
    end_slot,
    depth,
    offs_d,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`[BLOCK_D]` fp32: the sum of a range of slots at some columns."""
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for slot in range(first_slot, end_slot, BLOCK_C):
        offs_c = slot + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = (offs_c < end_slot)[:, None] & (offs_d < depth)[None, :]
        acc += tl.sum(tl.load(slots_ptr + offs_c[:, None] * depth + offs_d[None, :], mask=mask, other=0.0), 0)
    return acc


@triton.jit
def _join_chunks_kernel(
    # inputs
    feature_offsets_ptr,  # [S + 1] int64
    chunk_length_ptr,  # int64
    slot_ends_ptr,  # [S] int64
    slot_features_ptr,  # [C] int64
    slots_enc_ptr,  # [C, I] fp32 or None
    slots_dec_ptr,  # [C, O] fp32 or None
    slots_scalar_ptr,  # [3, C] fp32
    # outputs
    grad_W_enc_ptr,  # [S, I] or None
    grad_W_dec_ptr,  # [S, O] or None
    grad_b_enc_ptr,  # [S] fp32
    grad_threshold_ptr,  # [S] fp32
    grad_scale_ptr,  # [S] fp32 or None
    # sizes
    n_slots,  # C
    n_features,  # S
    d_in,
    d_out,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (c, i) owns columns i * BLOCK_D .. of the feature whose first slot is c; i = 0 adds its scalars too."""
    pid_c, pid_d = tl.program_id(0), tl.program_id(1)
    feature = tl.load(slot_features_ptr + pid_c)
    if feature >= n_features:
        return
    count = tl.load(feature_offsets_ptr + feature + 1) - tl.load(feature_offsets_ptr + feature)
    end_slot = tl.load(slot_ends_ptr + feature)
    first_slot = end_slot - tl.cdiv(count, tl.load(chunk_length_ptr))
    if pid_c != first_slot:
        return
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    if slots_enc_ptr is not None:
        enc = _slot_sum(slots_enc_ptr, first_slot, end_slot, d_in, offs_d, BLOCK_C, BLOCK_D)
        store_row(grad_W_enc_ptr, feature, offs_d, d_in, enc)
        dec = _slot_sum(slots_dec_ptr, first_slot, end_slot, d_out, offs_d, BLOCK_C, BLOCK_D)
        store_row(grad_W_dec_ptr, feature, offs_d, d_out, dec)
    if pid_d == 0:
        one = tl.arange(0, 1).to(tl.int64)
        b_enc = _slot_sum(slots_scalar_ptr, first_slot, end_slot, 1, one, BLOCK_C, 1)
        store_row(grad_b_enc_ptr, feature, one, 1, b_enc)
        threshold = _slot_sum(slots_scalar_ptr + n_slots, first_slot, end_slot, 1, one, BLOCK_C, 1)
        store_row(grad_threshold_ptr, feature, one, 1, threshold)
        if grad_scale_ptr is not None:
            scale = _slot_sum(slots_scalar_ptr + 2 * n_slots, first_slot, end_slot, 1, one, BLOCK_C, 1)
            store_row(grad_scale_ptr, feature, one, 1, scale)


class ChunkPlan(NamedTuple):
    """Which slot holds which chunk of which feature."""

    length: Tensor  # 0-d int64: entries of a chunk; features with more are cut
    slot_ends: Tensor  # [S] int64: slots of the features 0 .. j
    slot_features: Tensor  # [C] int64, ascending; S where a slot is left over


def chunk_plan(offsets: Tensor, n_slots: int, shortest: int) -> ChunkPlan:
    """Cut long features such that `n_slots` hold all their chunks; on the device.

    With `L` entries in features of more than `shortest`, chunks of at least `2 L / n_slots` need no more slots, for a
    feature of c entries that is longer than a chunk has ceil(c / length) < 2 c / length of them.

    Args:
        offsets: `[S + 1]` int64, see `FeatureOrder`.
        n_slots: >= 1.
        shortest: Entries of the shortest chunks, >= 1.
    """
    counts = offsets.diff()
    in_long = torch.where(counts > shortest, counts, 0).sum()
    length = ((2 * in_long + (n_slots - 1)) // n_slots).clamp_min(shortest)
    chunks = torch.where(counts > length, (counts + (length - 1)) // length, 0)
    slot_ends = chunks.cumsum(0)
    slots = torch.arange(n_slots, device=offsets.device)
    return ChunkPlan(length, slot_ends, torch.searchsorted(slot_ends, slots, right=True))


def n_slots_for(nnz: int, shortest: int) -> int:
    """Slots for `nnz` places, padding included; 0 where no feature can be worth cutting."""
    return min(MAX_SLOTS, nnz // (CHUNKS_PER_SLOT * shortest))


def join_chunks(n_slots: int, depth: int, like: Tensor, arguments: dict[str, Any]) -> None:
    """Add up the slots of every feature that was cut, into its gradients.

    Args:
        n_slots: >= 1.
        depth: The longest row of the slots.
        like: Its dtype chooses the launch parameters.
        arguments: Of `_join_chunks_kernel`.
    """
    config = launch_config("join_chunks", like)
    _join_chunks_kernel[(n_slots, triton.cdiv(depth, config["BLOCK_D"]))](**arguments, **config)
