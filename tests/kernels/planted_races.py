"""Kernels whose programs race, and one whose programs do not; what the race detector is tested with."""

import triton
import triton.language as tl


@triton.jit
def counter_without_atomic(
    count_ptr,  # [1] int32
    out_ptr,  # [programs] int32
):
    count = tl.load(count_ptr)
    tl.store(count_ptr, count + 1)
    tl.store(out_ptr + count, tl.program_id(0))


@triton.jit
def neighbours_output(
    x_ptr,  # [programs] int32
    y_ptr,  # [programs] int32
):
    pid = tl.program_id(0)
    tl.store(x_ptr + pid, pid, mask=pid == 0)  # its own
    tl.store(y_ptr + pid, tl.load(x_ptr + pid - 1, mask=pid == 1, other=0))  # another program's


@triton.jit
def stale_slot(
    cursor_ptr,  # [1] int32
    out_ptr,  # [programs] int32
):
    slot = tl.load(cursor_ptr)
    tl.atomic_add(cursor_ptr, 1)
    tl.store(out_ptr + slot, tl.program_id(0))


@triton.jit
def store_beside_atomic(
    count_ptr,  # [1] int32
):
    if tl.program_id(0) == 0:
        tl.store(count_ptr, 0)
    else:
        tl.atomic_add(count_ptr, 1)


@triton.jit
def halves(
    wide_ptr,  # [1] int64
    narrow_ptr,  # [1] int32: the upper half of it
    out_ptr,  # [1] int32
):
    if tl.program_id(0) == 0:
        tl.store(wide_ptr, tl.cast(1, tl.int64))
    else:
        tl.store(out_ptr, tl.load(narrow_ptr))


@triton.jit
def own_slot(
    cursor_ptr,  # [1] int32
    out_ptr,  # [programs] int32
):
    pid = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(out_ptr + tl.atomic_add(cursor_ptr, 1), pid)
