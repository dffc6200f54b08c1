"""Features with so many entries that several programs share one: how they are cut, and how their sums are joined.

A feature that fires on every token would be one long loop of one program of the fused backward. A feature with more entries
than a chunk is cut into chunks, each of which has a program of its own, which leaves its sums in fp32 in a slot; a second
kernel adds a feature's slots in their order. The number of slots is known beforehand, hence their memory; the length of a
chunk is found on the device such that they suffice (`chunk_plan`), so nothing waits for the device.

Letters: `S` d_sae, `C` slots, `I` d_in, `O` d_out. A slot takes `4 * (I + O)` bytes: all of them 1.8 % of a dense 16-bit tensor
for 8,192 tokens with room for 128 entries each, d = 2304 and 65,536 features.

Numerics: fp32, added in an order that the entries alone decide: deterministic, no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import launch_config
from fastsae_kernels.gpu.tiles import store_row

# chunks that keep a large GPU busy to the end, and entries per slot in chunks of the shortest length: slots are memory
MAX_SLOTS = 1024
CHUNKS_PER_SLOT = 4


class ChunkPlan(NamedTuple):
    """Which slot holds which chunk of which feature; the tensors are None where no feature can be long."""

    n_slots: int  # C
    length: Tensor | None = None  # 0-d int64: entries of a chunk; features with more are cut
    slot_ends: Tensor | None = None  # [S] int64: slots of the features 0 .. j
    slot_features: Tensor | None = None  # [C] int64, ascending; S where a slot is left over


class FeatureGradients(NamedTuple):
    """Gradients of one pass over listed entries; those of the weights are None where nobody asked for them."""

    grad_hidden_pre: Tensor  # [nnz] fp32, zero on padding
    W_enc: Tensor | None  # [S, d_in]
    W_dec: Tensor | None  # [S, d_out]
    b_enc: Tensor  # [S] fp32
    threshold: Tensor  # [S] fp32
    scale: Tensor | None  # [S] fp32


class Slots(NamedTuple):
    """The sums of chunks, each None where there are no chunks or nobody asked for that gradient."""

    W_enc: Tensor | None  # [C, I] fp32
    W_dec: Tensor | None  # [C, O] fp32
    scalars: Tensor | None  # [3, C] fp32: b_enc, threshold, scale


@triton.jit
def program_entries(pid, offsets_ptr, plan, n_features):
    """`(feature, start, count)` of the entries that a program owns: those of a chunk or of a whole feature.

    The count is negative where it owns none: a slot is left over, or the feature is cut into chunks.
    """
    feature = (pid - plan.n_slots).to(tl.int64)
    if plan.length is None:
        start = tl.load(offsets_ptr + feature)
        count = tl.load(offsets_ptr + feature + 1) - start
    else:
        is_chunk = pid < plan.n_slots
        feature = tl.where(is_chunk, tl.load(plan.slot_features + pid, mask=is_chunk, other=0), feature)
        exists = feature < n_features
        start = tl.load(offsets_ptr + feature, mask=exists, other=0)
        count = tl.load(offsets_ptr + feature + 1, mask=exists, other=0) - start
        length = tl.load(plan.length)
        first_slot = tl.load(plan.slot_ends + feature, mask=exists, other=0) - tl.cdiv(count, length)
        skipped = tl.where(is_chunk, (pid - first_slot) * length, 0)
        owned = exists & (is_chunk | (count <= length))
        start += skipped
        count = tl.where(owned, tl.minimum(count - skipped, length), -1)
    return feature, start, count.to(tl.int32)


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
    offsets_ptr,  # [S + 1] int64
    plan,  # ChunkPlan
    slots,  # Slots
    grads,  # FeatureGradients, outputs but for those of entries
    n_features,  # S
    d_in,
    d_out,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (c, i) owns columns i * BLOCK_D .. of the feature whose first slot is c; i = 0 adds its scalars too."""
    pid_c, pid_d = tl.program_id(0), tl.program_id(1)
    feature = tl.load(plan.slot_features + pid_c)
    if feature >= n_features:
        return
    count = tl.load(offsets_ptr + feature + 1) - tl.load(offsets_ptr + feature)
    end_slot = tl.load(plan.slot_ends + feature)
    first_slot = end_slot - tl.cdiv(count, tl.load(plan.length))
    if pid_c != first_slot:
        return
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    if slots.W_enc is not None:
        enc = _slot_sum(slots.W_enc, first_slot, end_slot, d_in, offs_d, BLOCK_C, BLOCK_D)
        store_row(grads.W_enc, feature, offs_d, d_in, enc)
    if slots.W_dec is not None:
        dec = _slot_sum(slots.W_dec, first_slot, end_slot, d_out, offs_d, BLOCK_C, BLOCK_D)
        store_row(grads.W_dec, feature, offs_d, d_out, dec)
    if pid_d == 0:
        one = tl.arange(0, 1).to(tl.int64)
        b_enc = _slot_sum(slots.scalars, first_slot, end_slot, 1, one, BLOCK_C, 1)
        store_row(grads.b_enc, feature, one, 1, b_enc)
        threshold = _slot_sum(slots.scalars + plan.n_slots, first_slot, end_slot, 1, one, BLOCK_C, 1)
        store_row(grads.threshold, feature, one, 1, threshold)
        if grads.scale is not None:
            scale = _slot_sum(slots.scalars + 2 * plan.n_slots, first_slot, end_slot, 1, one, BLOCK_C, 1)
            store_row(grads.scale, feature, one, 1, scale)


def chunk_plan(offsets: Tensor, n_slots: int, shortest: int) -> ChunkPlan:
    """Cut long features such that `n_slots` hold all their chunks; on the device.

    With `L` entries in features of more than `shortest`, chunks of at least `2 L / n_slots` need no more slots, for a
    feature of c entries that is longer than a chunk has ceil(c / length) < 2 c / length of them.

    Args:
        offsets: `[S + 1]` int64, see `FeatureOrder`.
        n_slots: The number of slots, >= 1.
        shortest: The number of entries of the shortest chunks, >= 1.
    """
    counts = offsets.diff()
    in_long = torch.where(counts > shortest, counts, 0).sum()
    length = ((2 * in_long + (n_slots - 1)) // n_slots).clamp_min(shortest)
    chunks = torch.where(counts > length, (counts + (length - 1)) // length, 0)
    slot_ends = chunks.cumsum(0)
    slots = torch.arange(n_slots, device=offsets.device)
    return ChunkPlan(n_slots, length, slot_ends, torch.searchsorted(slot_ends, slots, right=True))


def plan_chunks(offsets: Tensor, nnz: int, n_tokens: int, shortest: int) -> ChunkPlan:
    """The plan for `nnz` entries, padding included, of a batch; no slots where no feature is worth cutting."""
    n_slots = min(MAX_SLOTS, nnz // (CHUNKS_PER_SLOT * shortest))
    # a token has an entry once, so no feature is longer than the batch
    return chunk_plan(offsets, n_slots, shortest) if n_slots and n_tokens > shortest else ChunkPlan(0)


def slots_for(plan: ChunkPlan, grads: FeatureGradients) -> Slots:
    """The memory of the plan's slots for the gradients that are asked for."""

    def make(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=grads.b_enc.device)

    if plan.n_slots == 0:
        return Slots(None, None, None)
    W_enc, W_dec = (None if W is None else make(plan.n_slots, W.shape[1]) for W in (grads.W_enc, grads.W_dec))
    return Slots(W_enc, W_dec, make(3, plan.n_slots))


def join_chunks(offsets: Tensor, plan: ChunkPlan, slots: Slots, grads: FeatureGradients, like: Tensor) -> None:
    """Add up the slots of every feature that was cut, into its gradients.

    Args:
        offsets: `[S + 1]` int64, see `FeatureOrder`.
        plan: Which slot holds which chunk.
        slots: The sums of the chunks.
        grads: The gradients, overwritten at the features that were cut.
        like: A tensor whose dtype chooses the launch parameters.
    """
    config = launch_config("join_chunks", like)
    d_in, d_out = (1 if W is None else W.shape[1] for W in (grads.W_enc, grads.W_dec))
    _join_chunks_kernel[(plan.n_slots, triton.cdiv(max(d_in, d_out), config["BLOCK_D"]))](
        offsets_ptr=offsets,
        plan=plan,
        slots=slots,
        grads=grads,
        n_features=offsets.numel() - 1,
        d_in=d_in,
        d_out=d_out,
        **config,
    )
