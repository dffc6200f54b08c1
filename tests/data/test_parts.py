"""Several processes that serve a dataset together: each dialogue once per epoch, whatever their number, also after a resume."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from fastsae.data import sequencing
from fastsae.data.sequencing import BlockSequencer, FastSequencer, PackedSequencer, Sequencer
from fastsae.errors import FastsaeError, UsageError

TOKENIZER = SimpleNamespace(pad_token_id=0, bos_token_id=None, bos_token=None)  # for data that are token ids already
WINDOW = 8


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequencing, "WINDOW", WINDOW)


def texts(n: int) -> list[list[int]]:
    """Text `i` has 2 to 6 tokens; all of them are its own number."""
    return [[i + 1] * (2 + i % 5) for i in range(n)]


def part_of(n: int, rank: int, size: int, kind: type[Sequencer] = FastSequencer, **options: object) -> Sequencer:
    return kind(texts(n), range(n), TOKENIZER, batch_tokens=20, seed=3, part=(rank, size), **options)


def served(sequencer: Sequencer, epoch: int, n_batches: int = 10**6) -> list[int]:
    """The dialogues of the rest of an epoch, or of its next few batches, in the order in which they are served."""
    found = list[int]()
    for _ in range(n_batches):
        before = sequencer.state_dict()
        batch = next(sequencer)
        if sequencer.epoch != epoch:
            sequencer.load_state_dict(before)
            break
        found += list(dict.fromkeys(batch.dialogue_ids[batch.attention_mask].tolist()))
    return found


@pytest.mark.parametrize("kind", [FastSequencer, PackedSequencer])
@pytest.mark.parametrize(("n", "size"), [(100, 3), (97, 4), (7, 7), (9, 2), (8, 5)])
def test_together_the_parts_serve_each_dialogue_once_per_epoch(kind: type[Sequencer], n: int, size: int) -> None:
    parts = [part_of(n, rank, size, kind) for rank in range(size)]
    orders = []
    for epoch in range(3):
        each = [served(part, epoch) for part in parts]
        assert sorted(index for one in each for index in one) == list(range(n))
        assert max(map(len, each)) - min(map(len, each)) <= 1
        orders.append(each)
    if n > 20:
        assert orders[0] != orders[1], "each epoch has an order of its own"
        assert set(orders[0][0]) != set(orders[1][0]), "a process serves other dialogues in the next epoch"


def test_blocks_of_all_parts_hold_only_their_own_dialogues() -> None:
    each = [set(served(part_of(90, rank, 3, BlockSequencer, block_length=8), 0)) for rank in range(3)]
    assert not set.intersection(*each)
    assert sum(map(len, each)) == len(set.union(*each)) > 80


def test_without_a_shuffle_the_parts_take_turns() -> None:
    batches = [list(part_of(10, rank, 3, shuffle=False, endless=False)) for rank in range(3)]
    found = [sorted({i for b in each for i in b.dialogue_ids[b.attention_mask].tolist()}) for each in batches]
    assert found == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]


def test_one_part_is_the_whole_bit_for_bit() -> None:
    plain = FastSequencer(texts(50), range(50), TOKENIZER, batch_tokens=20, seed=3)
    one = part_of(50, 0, 1)
    for _ in range(60):
        ours, theirs = next(one), next(plain)
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert torch.equal(ours.dialogue_ids, theirs.dialogue_ids)
        assert one.state_dict() == plain.state_dict()


@pytest.mark.parametrize("size", [1, 3])
def test_a_part_resumes_exactly(size: int) -> None:
    whole = part_of(60, size - 1, size)
    for _ in range(7):
        next(whole)
    resumed = part_of(60, size - 1, size)
    resumed.load_state_dict(whole.state_dict())
    for _ in range(40):
        assert torch.equal(next(resumed).input_ids, next(whole).input_ids)


def resumed_parts(state: dict[str, object], n: int, size: int) -> list[Sequencer]:
    parts = [part_of(n, rank, size) for rank in range(size)]
    for part in parts:
        part.load_state_dict(state)
    return parts


def most_advanced(parts: Sequence[Sequencer]) -> dict[str, object]:
    return max(
        (part.state_dict() for part in parts), key=lambda state: (state["epoch"], state["window"], state["batch"])
    )


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("n_batches", [0, 1, 4, 11, 19])
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (1, 4), (4, 1), (2, 1), (3, 5)])
def test_another_number_of_parts_serves_nothing_twice(epoch: int, n_batches: int, before: int, after: int) -> None:
    n = 211
    parts = [part_of(n, rank, before) for rank in range(before)]
    seen = set[int]()
    for part in parts:
        for earlier in range(epoch):
            served(part, earlier)
        seen |= set(served(part, epoch, n_batches))
    new = resumed_parts(most_advanced(parts), n, after)
    later = [served(part, epoch) for part in new]
    found = [index for one in later for index in one]
    assert len(found) == len(set(found)), "no dialogue is served by two of the new parts"
    assert not seen & set(found), "no dialogue comes again within the epoch"
    # of each old part the rest of a window, and of each new one less than a window
    assert n - len(seen) - len(found) < WINDOW * (before + after) + before
    if n_batches == 0:
        assert len(found) == n, "a state from between two epochs skips nothing"
    everything = sorted(index for part in new for index in served(part, epoch + 1))
    assert everything == list(range(n)), "the next epoch is whole again"


def test_a_state_of_an_earlier_version_is_that_of_one_part() -> None:
    one = part_of(60, 0, 1)
    next(one)
    state = {name: value for name, value in one.state_dict().items() if name != "parts"}
    resumed = part_of(60, 0, 1)
    resumed.load_state_dict(state)
    assert torch.equal(next(resumed).input_ids, next(one).input_ids)


@pytest.mark.parametrize("change", [{"parts": 0}, {"parts": True}, {"parts": -1}, {"parts": 2, "window": 10**12}])
def test_a_state_that_no_part_writes_is_refused(change: dict[str, object]) -> None:
    one = part_of(60, 0, 1)
    with pytest.raises(ValueError, match=r"parts|there is no batch"):
        one.load_state_dict({**one.state_dict(), **change})


def test_fewer_dialogues_than_processes_are_refused_in_all_of_them() -> None:
    for rank in range(4):
        with pytest.raises(UsageError, match="at least one for each of the 4 processes, got 3"):
            part_of(3, rank, 4)


def test_a_process_whose_dialogues_are_all_dropped_says_so() -> None:
    data = [[1] if i % 2 else [1, 2, 3] for i in range(10)]  # a text of one token cannot be used
    odd = FastSequencer(data, range(10), TOKENIZER, shuffle=False, part=(1, 2))
    with pytest.raises(FastsaeError, match="all 5 dialogues were dropped"):
        next(odd)
