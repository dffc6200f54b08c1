"""How windows of dialogues become rows: little padding, blocks of one length, packed rows; each resumes exactly."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fastsae.data import sequencing
from fastsae.data.sequencing import BlockSequencer, FastSequencer, PackedSequencer, Sequencer, TokenBatch
from fastsae.errors import FastsaeError, UsageError


class TokenIds:
    """A tokenizer for data that are token ids already."""

    pad_token_id, bos_token = 0, None


def dialogues(n: int, longest: float = 400) -> list[list[int]]:
    """Lengths spread as those of real dialogues: many short ones, few long ones; the ids of each are its own."""
    generator = torch.Generator().manual_seed(0)
    lengths = (100 * torch.randn(n, generator=generator).mul(0.7).exp()).clamp(2, longest).int().tolist()
    return [[1000 * i + j for j in range(length)] for i, length in enumerate(lengths)]


def make(kind: str, data: list[list[int]], **options: Any) -> Sequencer:
    classes: dict[str, Any] = {"fast": FastSequencer, "packed": PackedSequencer, "block": BlockSequencer}
    if kind == "block":
        options["block_length"] = 128
    return classes[kind](data, range(len(data)), TokenIds(), **options)


def pieces(batch: TokenBatch) -> list[tuple[int, list[int], list[int]]]:
    """The (dialogue, positions, token ids) of each part of a dialogue in a batch, row by row."""
    found = []
    for row in range(len(batch.input_ids)):
        real = batch.attention_mask[row]
        assert not real.int().diff().gt(0).any()  # padded on the right
        for index in batch.dialogue_ids[row][real].unique_consecutive().tolist():
            of_it = (batch.dialogue_ids[row] == index) & real
            found.append((index, batch.positions[row][of_it].tolist(), batch.input_ids[row][of_it].tolist()))
    return found


@pytest.mark.parametrize("kind", ["fast", "packed", "block"])
def test_every_token_is_served_once_with_its_place(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequencing, "WINDOW", 100)
    data = dialogues(250)
    served: dict[int, list[int]] = {i: [] for i in range(250)}
    for batch in make(kind, data, batch_tokens=2000, endless=False, shuffle=False):
        assert batch.input_ids.numel() <= 2000
        assert batch.is_packed is (kind == "packed")
        for index, positions, ids in pieces(batch):
            assert positions == list(range(len(served[index]), len(served[index]) + len(ids)))
            served[index] += ids
    if kind == "block":
        assert all(ids == data[i][: len(ids)] for i, ids in served.items())
        for window in range(0, 250, 100):  # what is left of a window is less than a block
            missing = sum(len(data[i]) - len(served[i]) for i in range(window, min(250, window + 100)))
            assert missing == sum(map(len, data[window : window + 100])) % 128
    else:
        assert served == dict(enumerate(data))


@pytest.mark.parametrize(("kind", "most"), [("fast", 0.04), ("packed", 0.015), ("block", 0.0)])
@pytest.mark.parametrize("batch_tokens", [4096, 8192, 16384])
def test_little_of_what_is_computed_is_padding(kind: str, most: float, batch_tokens: int) -> None:
    batches = list(make(kind, dialogues(2048), batch_tokens=batch_tokens, endless=False))
    computed = sum(batch.input_ids.numel() for batch in batches)
    assert 1 - sum(int(batch.attention_mask.sum()) for batch in batches) / computed <= most
    assert computed / len(batches) > 2000  # and no more passes than that takes


def test_fast_batches_cost_the_least() -> None:
    """Against all ways to cut a few dialogues."""
    data = [[7] * length for length in (2, 3, 3, 9, 10, 30, 31, 60)]
    cost = sequencing._COST_OF_A_PASS

    def of(parts: list[list[int]]) -> int:
        return sum(len(part) * part[-1] + cost for part in parts)

    def ways(lengths: list[int]) -> Any:
        if not lengths:
            yield []
        for n in range(1, len(lengths) + 1):
            if n == 1 or n * lengths[n - 1] <= 64:
                yield from ([lengths[:n], *rest] for rest in ways(lengths[n:]))

    found = [
        sorted(batch.attention_mask.sum(1).tolist())
        for batch in make("fast", data, batch_tokens=64, endless=False, shuffle=False)
    ]
    assert of(found) == min(map(of, ways([len(ids) for ids in data])))


def test_blocks_are_full_and_hold_whatever_follows() -> None:
    data = [list(range(100 * i, 100 * i + 50)) for i in range(7)]
    sequencer = BlockSequencer(
        data, range(7), TokenIds(), batch_tokens=60, shuffle=False, endless=False, block_length=30
    )
    rows = [row for batch in sequencer for row in batch.input_ids.tolist()]
    joined = [token for ids in data for token in ids]
    assert rows == [joined[start : start + 30] for start in range(0, 330, 30)]


@pytest.mark.parametrize("kind", ["fast", "packed", "block"])
def test_resume_goes_on_with_the_next_batch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequencing, "WINDOW", 40)
    data = dialogues(90)

    def start() -> Sequencer:
        return make(kind, data, batch_tokens=600, seed=3)

    sequencer, states, batches = start(), [], []
    while sequencer.epoch < 2:
        states.append(json.loads(json.dumps(sequencer.state_dict())))
        batches.append(next(sequencer))
    for position in range(0, len(states), 5):
        resumed = start()
        resumed.load_state_dict(states[position])
        for batch in batches[position : position + 8]:
            found = next(resumed)
            for name in ("input_ids", "attention_mask", "dialogue_ids", "positions"):
                assert torch.equal(getattr(found, name), getattr(batch, name))


def test_too_little_for_one_block_is_one_message() -> None:
    sequencer = BlockSequencer([[5] * 9, [6] * 9], range(2), TokenIds(), block_length=19)
    with pytest.raises(UsageError, match=r"block_length: expected a block that the .* can fill, got 19 tokens"):
        next(sequencer)
    with pytest.raises(FastsaeError, match="all 2 dialogues were dropped"):
        next(BlockSequencer([[5], [6]], range(2), TokenIds(), block_length=19))
