"""A checkpoint's data for another number of processes: every row once, and each process as far as it would be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastsae.data.buffer import ActivationBatch, MixingBuffer
from fastsae.distributed import Groups
from fastsae.train.repartition import BatchPart, repartition

BATCH, STEPS, CAPACITY, SEED = 7, 12, 40, 3


def source(start: int, piece: int) -> Iterator[ActivationBatch]:
    """Rows that are told apart by their token id."""
    while True:
        ids = torch.arange(start, start + piece)
        start += piece
        yield ActivationBatch(ids[:, None].float().expand(-1, 3), ids, ids % 5, ids % 11)


def buffer_of(part: BatchPart, pieces: Iterator[ActivationBatch]) -> MixingBuffer:
    capacity = max(CAPACITY // part.n_processes, 2 * part.rows)
    return MixingBuffer(pieces, capacity, part.rows, seed=1, n_wanted=STEPS * part.rows)


def at(window: int, batch: int, seen: int) -> dict[str, Any]:
    dropped = {"seen": seen, "counts": {"it is long": 1}, "first_rows": {"it is long": window}}
    return {"epoch": 1, "window": window, "batch": batch, "dropped": dropped}


def state_of(buffer: MixingBuffer, step: int, rank: int) -> dict[str, Any]:
    return {
        "options": {"0": {}},
        "streams": {
            str(4 - layer): {
                "sequencer": {"at": at(rank % 2, 5 - rank + layer, seen=10 + layer), "taken": 7 + rank},
                "median_norm": 0.1 if rank else 0.3,
                "counts": {"computed": 1000 + rank, "sinks": rank},
            }
            for layer in (0, 1)
        },
        "buffers": {"4": buffer.state_dict()},
        "trainers": {"0": {"step": step, "history": [], "sums": {"loss": torch.tensor(1.0 + rank)}}},
        "failures": {},
        "seconds": 2.5,
    }


def parts(n_processes: int) -> list[BatchPart]:
    return [BatchPart(BATCH, n_processes, rank) for rank in range(n_processes)]


def saved(n_processes: int, step: int) -> tuple[list[dict[str, Any]], list[int]]:
    """The states of processes that have made `step` steps, and the rows that they have served."""
    states, served = [], []
    for rank in range(n_processes):
        buffer = buffer_of(BatchPart(BATCH, n_processes, rank), source(1000 * rank, 9 + rank))
        buffer.prepare()
        for _ in range(step):
            served += next(buffer).token_ids.tolist()
        states.append(state_of(buffer, step, rank))
    return states, served


def held(buffer: dict[str, Any]) -> list[int]:
    return [] if buffer["rows"] is None else buffer["rows"]["token_ids"].tolist()


def waiting(buffer: dict[str, Any]) -> list[int]:
    return [] if buffer["pending"] is None else buffer["pending"]["token_ids"].tolist()


@pytest.mark.parametrize("step", [0, 1, 2, 5, 11, 12])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 3), (2, 3), (3, 2), (3, 1), (2, 7), (7, 2)])
def test_no_row_is_lost_or_comes_twice(before: int, after: int, step: int) -> None:
    states, served = saved(before, step)
    old = [state["buffers"]["4"] for state in states]
    every = sorted(row for buffer in old for row in held(buffer) + waiting(buffer))
    buffers = [
        repartition(states, part, SEED, buffer_of(part, source(0, 1)).capacity)["buffers"]["4"] for part in parts(after)
    ]
    assert sorted(row for buffer in buffers for row in held(buffer) + waiting(buffer)) == every
    soon = [buffer["to_serve"] for buffer in buffers]
    n_soon, n_waiting = (sum(old_buffer["to_serve"] for old_buffer in old), sum(len(waiting(buffer)) for buffer in old))
    assert n_soon - after <= sum(soon) <= n_soon  # a buffer that cannot hold a row more leaves it for later
    assert sum(buffer["taken"] for buffer in buffers) + sum(len(waiting(b)) for b in buffers) == (
        sum(buffer["taken"] for buffer in old) + n_waiting
    )
    for part, state in zip(parts(after), buffers, strict=True):
        assert state["taken"] == step * part.rows + len(held(state)) <= STEPS * part.rows
        assert state["to_serve"] <= len(held(state))
        goes_on(state, part, step, set(served))


def goes_on(state: dict[str, Any], part: BatchPart, step: int, served: set[int]) -> None:
    """The process serves what is left of the run, from what it holds and then from its source, no row twice."""
    buffer = buffer_of(part, source(10**6, 4))
    buffer.load_state_dict(state)
    rows = [row for _ in range(STEPS - step) for row in next(buffer).token_ids.tolist()]
    assert len(rows) == len({*rows}) == (STEPS - step) * part.rows
    assert not served & {*rows}
    assert {*held(state)} <= {*rows}  # all that was held is wanted


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_what_is_counted(after: int) -> None:
    states, _ = saved(3, 4)
    found = [repartition(states, part, SEED, CAPACITY) for part in parts(after)]
    for name, total in (("computed", 3003), ("sinks", 3)):
        assert sum(state["streams"]["4"]["counts"][name] for state in found) == total
    for state in found:
        for layer in ("4", "3"):  # both where the furthest was
            sequencer = state["streams"][layer]["sequencer"]
            assert {**sequencer["at"], "dropped": None} == {"epoch": 1, "window": 1, "batch": 5, "dropped": None}
            assert sequencer["taken"] == 0
        assert state["streams"]["4"]["median_norm"] == 0.1
        assert state["trainers"]["0"]["sums"]["loss"].item() == pytest.approx((3 * 1 + 2 * 2 + 2 * 3) / 7)
        assert state["seconds"] == 2.5
    dropped = [state["streams"]["3"]["sequencer"]["at"]["dropped"] for state in found]
    assert dropped[0] == {"seen": 33, "counts": {"it is long": 3}, "first_rows": {"it is long": 0}}
    assert all(each == {"seen": 0, "counts": {}, "first_rows": {}} for each in dropped[1:])
    generators = {bytes(state["buffers"]["4"]["generator"].tolist()) for state in found}
    assert len(generators) == after


def test_a_part_is_what_a_process_serves_of_a_batch() -> None:
    for n in (1, 2, 3, 7):
        groups = Groups.alone()
        groups.world.size = n
        assert [part.rows for part in parts(n)] == groups.rows_of_batch(BATCH)


def test_rows_of_all_old_processes_are_mixed() -> None:
    states, _ = saved(2, 0)
    buffer = MixingBuffer(source(10**6, 4), CAPACITY, BATCH, seed=1)
    buffer.load_state_dict(repartition(states, BatchPart(BATCH, 1, 0), SEED, CAPACITY)["buffers"]["4"])
    assert {row // 1000 for row in next(buffer).token_ids.tolist()} == {0, 1}


def test_a_run_that_has_not_begun() -> None:
    states = [state_of(buffer_of(BatchPart(BATCH, 2, rank), source(0, 4)), 0, rank) for rank in range(2)]
    found = repartition(states, BatchPart(BATCH, 3, 2), SEED, CAPACITY)["buffers"]["4"]
    assert found["rows"] is found["pending"] is None
    assert (found["to_serve"], found["taken"], found["served_any"]) == (0, 0, False)
