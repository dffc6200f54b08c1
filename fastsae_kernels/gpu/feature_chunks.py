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

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae_kernels.gpu.config import launch_config
from fastsae_kernels.gpu.tiles import store_row

# chunks that keep a large GPU busy to the end, and entries per slot in chunks of the shortest length: slots are memory
MAX_SLOTS = 1024
CHUNKS_PER_SLOT = 4


@triton.jit
def program_entries(
    pid,
    feature_offsets_ptr,  # [S + 1] int64
    chunk_length_ptr,  # int64 or None
    slot_ends_ptr,  # [S] int64
    slot_features_ptr,  # [C] int64
    n_slots,  # C
    n_features,  # S
):
    """`(feature, start, count)` of the entries that a program owns: those of a chunk or of a whole feature.

    The count is negative where it owns none: a slot is left over, or the feature is cut into chunks.
    """
    feature = (pid - n_slots).to(tl.int64)
    if chunk_length_ptr is None:
        start = tl.load(feature_offsets_ptr + feature)
        count = tl.load(feature_offsets_ptr + feature + 1) - start
    else:
        is_chunk = pid < n_slots
        feature = tl.where(is_chunk, tl.load(slot_features_ptr + pid, mask=is_chunk, other=0), feature)
        exists = feature < n_features
        start = tl.load(feature_offsets_ptr + feature, mask=exists, other=0)
        count = tl.load(feature_offsets_ptr + feature + 1, mask=exists, other=0) - start
        length = tl.load(chunk_length_ptr)
        first_slot = tl.load(slot_ends_ptr + feature, mask=exists, other=0) - tl.cdiv(count, length)
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
    if slots_dec_ptr is not None:
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
    """Which slot holds which chunk of which feature; the tensors are None where no feature can be long."""

    n_slots: int
    length: Tensor | None = None  # 0-d int64: entries of a chunk; features with more are cut
    slot_ends: Tensor | None = None  # [S] int64: slots of the features 0 .. j
    slot_features: Tensor | None = None  # [C] int64, ascending; S where a slot is left over

    def arguments(self, d_in: int, d_out: int) -> dict[str, Any]:
        """Of the kernels: the plan, and the slots' memory; a width is 0 where that matrix has no gradient here."""

        def make(*shape: int) -> Tensor | None:
            if self.length is None or min(shape) == 0:
                return None
            return torch.empty(shape, dtype=torch.float32, device=self.length.device)

        return {
            "chunk_length_ptr": self.length,
            "slot_ends_ptr": self.slot_ends,
            "slot_features_ptr": self.slot_features,
            "slots_enc_ptr": make(self.n_slots, d_in),
            "slots_dec_ptr": make(self.n_slots, d_out),
            "slots_scalar_ptr": make(3, self.n_slots),
            "n_slots": self.n_slots,
        }


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


def join_chunks(
    offsets: Tensor, d_in: int, d_out: int, outputs: dict[str, Any], chunks: dict[str, Any], like: Tensor
) -> None:
    """Add up the slots of every feature that was cut, into its gradients.

    Args:
        offsets: `[S + 1]` int64, see `FeatureOrder`.
        d_in: The width of the encoder's slots.
        d_out: The width of the decoder's slots.
        outputs: The gradients, as the kernels name them.
        chunks: What `ChunkPlan.arguments` gave.
        like: A tensor whose dtype chooses the launch parameters.
    """
    config = launch_config("join_chunks", like)
    width = max(d_in if chunks["slots_enc_ptr"] is not None else 1, d_out if chunks["slots_dec_ptr"] is not None else 1)
    _join_chunks_kernel[(chunks["n_slots"], triton.cdiv(width, config["BLOCK_D"]))](
        feature_offsets_ptr=offsets,
        n_features=offsets.numel() - 1,
        d_in=d_in,
        d_out=d_out,
        **outputs,
        **chunks,
        **config,
    )
