"""The mixing buffer: every row once, shuffled, half kept, bit-equal resume."""

import pytest
import torch

from fastsae.data.buffer import ActivationBatch, MixingBuffer
from fastsae.errors import FastsaeError, UsageError

WIDTH = 3


def piece(start, length, dtype=torch.float32):
    rows = torch.arange(start, start + length)
    acts = torch.stack([rows, rows * 2, -rows], dim=1).to(dtype)
    return ActivationBatch(acts, token_ids=rows + 1000, positions=rows + 2000, dialogue_ids=rows + 3000)


def pieces(n_rows, sizes=(7, 1, 40, 0, 13)):
    """Rows 0 .. n_rows - 1 in pieces whose lengths cycle through `sizes`."""
    start, i = 0, 0
    while start < n_rows:
        length = min(sizes[i % len(sizes)], n_rows - start)
        yield piece(start, length)
        start, i = start + length, i + 1


class Counted:
    """A source that knows how many pieces were taken, and starts at any of them."""

    def __init__(self, n_rows, taken=0):
        self.all, self.taken = list(pieces(n_rows)), taken

    def __iter__(self):
        while self.taken < len(self.all):
            self.taken += 1
            yield self.all[self.taken - 1]


def rows_of(batch):
    """Check that what belongs to a row stayed with it, and return the row numbers."""
    rows = batch.token_ids - 1000
    expected = piece(0, int(rows.max()) + 1)[rows]
    for name, tensor in batch.tensors().items():
        assert torch.equal(tensor, expected.tensors()[name]), name
    return rows.tolist()


@pytest.mark.parametrize(("capacity", "batch_size"), [(64, 8), (50, 16), (33, 16), (2, 1), (1000, 10)])
@pytest.mark.parametrize("n_rows", [200, 256])
def test_a_finite_source_is_served_once_in_full_batches(capacity, batch_size, n_rows):
    buffer = MixingBuffer(pieces(n_rows), capacity, batch_size, seed=0)
    batches = [rows_of(batch) for batch in buffer]
    assert {len(batch) for batch in batches} == {batch_size}
    assert len(batches) == n_rows // batch_size
    served = [row for batch in batches for row in batch]
    assert len(set(served)) == len(served)
    assert set(served) <= set(range(n_rows))
    with pytest.raises(StopIteration):
        next(buffer)


def test_half_is_served_and_half_kept_between_refills():
    source = Counted(1000)
    buffer = MixingBuffer(source, capacity=64, batch_size=8, seed=0)
    taken, held = [], set(range(64))
    for step in range(40):
        served = set(rows_of(next(buffer)))
        taken.append(source.taken)
        assert served <= held, "a row was served before the fill that reads it"
        held -= served
        if step % 4 == 3:  # half of 64 rows in batches of 8
            assert len(held) == 32
            held |= set(range(64 + 32 * (step // 4), 64 + 32 * (step // 4 + 1)))
    assert all(taken[i] == taken[i - i % 4] for i in range(40))


def test_rows_are_shuffled_across_pieces_and_by_seed():
    def first(seed):
        return rows_of(next(MixingBuffer(pieces(400), capacity=200, batch_size=100, seed=seed)))

    assert first(0) == first(0) != first(1)
    assert abs(sum(first(0)) / 100 - 99.5) < 25  # mean of 100 of 0 .. 199: standard error 4


def test_resume_is_bit_equal_at_every_batch():
    def make(source):
        return MixingBuffer(source, capacity=60, batch_size=7, seed=5)

    source = Counted(500)
    buffer = make(source)
    batches, states = [], [(source.taken, buffer.state_dict())]
    for batch in buffer:
        batches.append(batch)
        states.append((source.taken, buffer.state_dict()))
    assert len(batches) == 500 // 7
    assert any(state["pending"] is not None for _, state in states)
    for position in range(0, len(batches), 3):
        taken, state = states[position]
        rest = list(_loaded(make(Counted(500, taken)), state))
        assert len(rest) == len(batches) - position
        for ours, theirs in zip(rest, batches[position:], strict=True):
            for name, tensor in ours.tensors().items():
                assert torch.equal(tensor, theirs.tensors()[name])


def _loaded(buffer, state):
    buffer.load_state_dict(state)
    return buffer


def test_state_is_a_copy_and_survives_a_file(tmp_path):
    source = Counted(500)
    buffer = MixingBuffer(source, capacity=60, batch_size=7, seed=5)
    next(buffer)
    taken, state = source.taken, buffer.state_dict()
    torch.save(state, tmp_path / "state.pt")
    expected = [rows_of(next(buffer)) for _ in range(20)]
    for saved in (state, torch.load(tmp_path / "state.pt", weights_only=True)):
        resumed = _loaded(MixingBuffer(Counted(500, taken), capacity=60, batch_size=7, seed=99), saved)
        assert [rows_of(next(resumed)) for _ in range(20)] == expected
    with pytest.raises(UsageError, match=r"holds 53 rows, this run's only 20"):
        MixingBuffer([], capacity=20, batch_size=7, seed=5).load_state_dict(state)


def test_storage_is_allocated_once_and_keeps_the_dtype():
    buffer = MixingBuffer((piece(i, 10, torch.bfloat16) for i in range(0, 120, 10)), 40, 5, seed=0)
    assert next(buffer).acts.dtype == torch.bfloat16
    address = buffer._storage.acts.data_ptr()
    assert len(list(buffer)) == 23
    assert buffer._storage.acts.data_ptr() == address
    assert len(buffer._storage) == 40


def test_a_sample_is_what_the_buffer_holds_and_serves_later():
    buffer = MixingBuffer(pieces(200), capacity=64, batch_size=8, seed=0)
    untouched = [rows_of(batch) for batch in MixingBuffer(pieces(200), capacity=64, batch_size=8, seed=0)]
    assert sorted(buffer.sample(64)[:, 0].tolist()) == list(range(64))
    assert [rows_of(batch) for batch in buffer] == untouched
    with pytest.raises(FastsaeError, match="no tokens at all"):
        MixingBuffer([], capacity=64, batch_size=8, seed=0).sample(8)


@pytest.mark.parametrize(("capacity", "batch_size"), [(15, 8), (10, 0)])
def test_capacity_must_hold_two_batches(capacity, batch_size):
    with pytest.raises(UsageError, match="capacity of at least twice the batch size"):
        MixingBuffer([], capacity, batch_size, seed=0)


def test_too_little_data_for_one_batch():
    with pytest.raises(FastsaeError, match="ended after 5 tokens, before one batch of 8 was full"):
        next(MixingBuffer(pieces(5), capacity=64, batch_size=8, seed=0))


@pytest.mark.parametrize("n_wanted", [16, 40, 64, 96, 100, 400])
def test_nothing_is_read_beyond_what_is_wanted(n_wanted):
    source = Counted(1000)
    buffer = MixingBuffer(source, capacity=64, batch_size=8, seed=0, n_wanted=n_wanted)
    served = [row for batch in buffer for row in rows_of(batch)]
    assert len(served) == len(set(served)) == n_wanted // 8 * 8
    assert set(served) <= set(range(n_wanted))
    n_read = sum(len(taken) for taken in source.all[: source.taken])
    assert n_wanted <= n_read < n_wanted + 40  # the longest piece


def test_the_last_rows_are_mixed_with_those_before():
    buffer = MixingBuffer(pieces(1000), capacity=64, batch_size=8, seed=0, n_wanted=200)
    served = [set(rows_of(batch)) for batch in buffer]
    # the last fill takes rows 192 to 199, which come among the 40 that are then served, and not after them
    last = [i for i, batch in enumerate(served) if batch & set(range(192, 200))]
    assert min(last) >= 20
    assert len(last) >= 3
    untouched = MixingBuffer(pieces(1000), capacity=64, batch_size=8, seed=0)
    assert [set(rows_of(next(untouched))) for _ in range(20)] == served[:20]
