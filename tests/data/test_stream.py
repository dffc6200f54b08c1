"""The stream of activations: real tokens with their places, sinks left out by one rule, counts, exact resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae.data.buffer import MixingBuffer
from fastsae.data.sequencing import TokenBatch
from fastsae.data.stream import ActivationStream, StreamCounts


class Batches:
    """Serves a list of batches, and goes on at any of them."""

    def __init__(self, batches: list[TokenBatch]) -> None:
        self.batches, self.taken = batches, 0

    def __next__(self) -> TokenBatch:
        if self.taken == len(self.batches):
            raise StopIteration
        self.taken += 1
        return self.batches[self.taken - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
IDS = torch.arange(12).reshape(3, 4) + 10
PLACES = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]


@pytest.mark.parametrize("drop_first_position", [False, True])
def test_real_tokens_are_served_with_their_places(drop_first_position: bool) -> None:
    batch = TokenBatch.one_per_row(IDS, MASK, torch.tensor([7, 5, 9]))
    requested = []

    def residual(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        requested.append(attention_mask.clone())
        return torch.stack([input_ids * 1.0, input_ids * 2.0], dim=-1)

    stream = ActivationStream(residual, Batches([batch, batch]), drop_first_position)
    out = next(stream)
    expected = [(row, position) for row, position in PLACES if position > 0 or not drop_first_position]
    assert out.positions.tolist() == [position for _, position in expected]
    assert out.dialogue_ids.tolist() == [[7, 5, 9][row] for row, _ in expected]
    assert out.token_ids.tolist() == [int(IDS[row, position]) for row, position in expected]
    assert out.acts.tolist() == [[float(token), 2.0 * token] for token in out.token_ids.tolist()]
    assert len(requested) == 1, "the stream must not read ahead"
    assert torch.equal(requested[0], MASK), "the first position is still attended to"
    assert stream.counts == StreamCounts(12, 4, 3 if drop_first_position else 0, 0)
    assert len(list(stream)) == 1


@pytest.mark.parametrize(("is_packed", "first"), [(True, [0, 0, 0]), (False, [0])])
def test_the_first_token_of_each_context_is_left_out(is_packed: bool, first: list[int]) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])  # three dialogues
    ids = torch.arange(9)[None]
    batch = TokenBatch(ids, torch.ones(1, 9, dtype=torch.bool), ids // 4, positions, is_packed)
    seen = []

    def residual(input_ids: Tensor, attention_mask: Tensor, *packed: Tensor) -> Tensor:
        seen.extend(packed)
        return input_ids[..., None].float()

    stream = ActivationStream(residual, Batches([batch]))
    out = next(stream)
    assert [tensor.tolist() for tensor in seen] == ([positions.tolist()] if is_packed else [])
    assert stream.counts.first == len(first)
    served = [i for i in range(9) if (i not in (0, 3, 5) if is_packed else i > 0)]
    assert out.token_ids.tolist() == served
    assert out.positions.tolist() == positions[0, served].tolist()
    assert out.dialogue_ids.tolist() == [i // 4 for i in served]


def with_sinks(n_batches: int) -> tuple[list[TokenBatch], Any]:
    """Batches of 100 tokens in two rows, and a model in which ids from 90 on are twenty times as long as the others."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for i in range(n_batches):
        ids = torch.randint(0, 92, (2, 50), generator=generator)
        ids[:, 0] = 95  # first tokens are sinks as well
        batches.append(TokenBatch.one_per_row(ids, torch.ones(2, 50, dtype=torch.bool), torch.tensor([i, i])))
    table = torch.randn(100, 8, generator=generator)
    table = table / table.norm(dim=1, keepdim=True) * (1 + torch.arange(100)[:, None] / 100)
    table[90:] *= 20
    return batches, lambda ids, mask: table[ids]


def test_sinks_are_left_out_wherever_they_stand() -> None:
    batches, residual = with_sinks(60)
    stream = ActivationStream(residual, Batches(batches), True, 10.0)
    pieces = list(stream)
    late = torch.cat([batch.input_ids[:, 1:].flatten() for batch in batches])
    served = torch.cat([piece.token_ids for piece in pieces])
    assert torch.equal(served, late[late < 90])
    assert stream.counts == StreamCounts(6000, 0, 120, int((late >= 90).sum()))
    first = torch.cat([batch.input_ids[:, 1:].flatten() for batch in batches[:21]])  # 98 tokens each: the first 2,048
    assert len(pieces[0]) == int((first < 90).sum())
    assert stream.rule.median_norm == pytest.approx(residual(first, None).norm(dim=1).median().item())
    assert sum(map(len, ActivationStream(residual, Batches(batches)))) == len(late)
    assert stream.rule.max_norm_multiple == 10.0


def test_first_tokens_that_are_trained_on_are_kept_unless_they_are_too_long() -> None:
    batches, residual = with_sinks(3)
    stream = ActivationStream(residual, Batches(batches), False, 10.0)
    assert 95 not in torch.cat([piece.token_ids for piece in stream])
    assert stream.counts.first == 0
    kept = ActivationStream(residual, Batches(batches), False, None)
    assert (torch.cat([piece.token_ids for piece in kept]) == 95).sum() == 6


def test_resume_is_bit_equal_with_the_median_of_the_first_tokens() -> None:
    batches, residual = with_sinks(60)

    def start() -> tuple[ActivationStream, MixingBuffer]:
        stream = ActivationStream(residual, Batches(batches), True, 10.0)
        return stream, MixingBuffer(stream, 500, 50, seed=1, n_wanted=4000)

    stream, buffer = start()
    states, expected = [], []
    for batch in buffer:
        states.append((stream.state_dict(), buffer.state_dict()))
        expected.append(batch)
    assert len(expected) == 80
    for position in range(0, 80, 7):
        resumed, rest = start()
        resumed.load_state_dict(states[position][0])
        rest.load_state_dict(states[position][1])
        found = list(rest)
        assert len(found) == 79 - position
        for ours, theirs in zip(found, expected[position + 1 :], strict=True):
            assert all(torch.equal(ours.tensors()[name], tensor) for name, tensor in theirs.tensors().items())
        assert (resumed.counts, resumed.rule) == (stream.counts, stream.rule)
