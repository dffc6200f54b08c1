"""Leakage on tiny models in fp64: against gradients from autograd, with the packed rows as the control."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from gradient_problem import D_IN, KINDS, dense_gradients, make, tokens

from fastsae import UsageError
from fastsae.data.activations import ResidualStream
from fastsae.data.sequencing import BlockSequencer, TokenBatch
from fastsae.evaluate import leakage as module
from fastsae.evaluate.leakage import PLACES, leakage, places, squared_differences
from fastsae.sae.token_gradients import SparsityTerm, token_gradients

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61, "hidden_size": D_IN, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
LENGTHS = [7, 20, 12, 33, 3, 9, 16, 28, 5, 11]  # 144 tokens
BLOCK = 16


class TokenIds:
    pad_token_id, bos_token = 0, None


@pytest.fixture(scope="module")
def residual() -> ResidualStream:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(8)  # so that attention matters
    return ResidualStream(model, 1)


@pytest.fixture(scope="module")
def dialogues() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 61, (n,), generator=generator).tolist() for n in LENGTHS]


def measure(residual: ResidualStream, dialogues: Any, kind: str = "step", **options: Any) -> dict[str, Any]:
    sae, term = make(kind)
    with torch.no_grad():
        sae.W_enc.mul_(0.3)  # the activations are longer than those of the other tests
    options = {"block_length": BLOCK, "batch_tokens": 40, "progress": False, **options}
    return leakage(sae, residual, dialogues, range(len(dialogues)), TokenIds(), term, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_differences_of_rank_one_gradients(kind: str) -> None:
    sae, term = make(kind)
    x = tokens(8)
    others = torch.cat([x[:1], x[1:3] + 0.1, 0.3 * tokens(16)[8:13]])
    others[5] = 0  # in most SAEs no feature fires there
    found = squared_differences(sae, *(token_gradients(sae, rows, term) for rows in (x, others)))
    a, b = (dense_gradients(sae, rows, term) for rows in (x, others))
    assert found.keys() == a.keys()
    for name, (difference, whole) in found.items():
        expected = (a[name] - b[name]).flatten(1).square().sum(1), a[name].flatten(1).square().sum(1)
        torch.testing.assert_close(whole, expected[1], rtol=1e-9, atol=0)
        torch.testing.assert_close(difference, expected[0], rtol=1e-9, atol=1e-12 * float(expected[1].max()))
        if kind != "batchtopk":  # whose choice for a token depends on the others
            assert difference[0] == 0


def by_hand(residual: ResidualStream, dialogues: list[list[int]]) -> list[dict[str, Any]]:
    """Each token of the blocks: its dialogue, its place, and activations alone and in the block."""
    stream = [(d, p) for d, ids in enumerate(dialogues) for p in range(len(ids))]
    alone = [residual(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))[0] for ids in dialogues]
    found = []
    for start in range(0, len(stream) - BLOCK + 1, BLOCK):
        part = stream[start : start + BLOCK]
        ids = torch.tensor([[dialogues[d][p] for d, p in part]])
        block = residual(ids, torch.ones_like(ids, dtype=torch.bool))[0]
        for column, (d, p) in enumerate(part):
            first_column = next(c for c, (other, _) in enumerate(part) if other == d)
            first_position = part[first_column][1]
            place = 2 if first_position > 0 else int(first_column > 0)
            row = {"column": column, "position": p, "distance": column - first_column, "place": place}
            found.append({**row, "alone": alone[d][p], "block": block[column]})
    return found


@pytest.mark.parametrize("kind", ["step", "tanh", "topk"])
def test_blocks_against_single_forwards_and_autograd(
    residual: ResidualStream, dialogues: list[list[int]], kind: str
) -> None:
    result, rows = measure(residual, dialogues, kind), by_hand(residual, dialogues)
    assert (result["blocks"], result["tokens"], result["dialogues"]) == (9, 144, 10)
    sae, term = make(kind)
    with torch.no_grad():
        sae.W_enc.mul_(0.3)
    alone, block = (torch.stack([row[way] for row in rows]) for way in ("alone", "block"))
    squares = {"activation": ((block - alone).square().sum(1), alone.square().sum(1))}
    a, b = (dense_gradients(sae, x, term) for x in (alone, block))
    for name, grad in a.items():
        squares[name] = ((grad - b[name]).flatten(1).square().sum(1), grad.flatten(1).square().sum(1))
    column, position, distance, place = (
        torch.tensor([row[name] for row in rows]) for name in ("column", "position", "distance", "place")
    )
    sinks = (column == 0) | (position == 0)  # none of them is too long
    assert result["sinks"] == int(sinks.sum())

    def check(summary: dict[str, Any], chosen: torch.Tensor) -> None:
        for name, (difference, whole) in squares.items():
            values = (difference / whole)[chosen & (whole > 0)]
            assert summary[name]["tokens"] == len(values)
            pooled = summary[name]["pooled"]
            if pooled is None:
                assert not whole[chosen].any()
            else:
                assert pooled == pytest.approx(
                    float(difference[chosen].sum() / whole[chosen].sum()), rel=1e-6, abs=1e-15
                )
            if len(values):
                assert summary[name]["median"] == pytest.approx(float(values.quantile(0.5)), rel=1e-6, abs=1e-15)
                assert summary[name]["mean"] == pytest.approx(float(values.mean()), rel=1e-6, abs=1e-15)

    check(result["block"]["sinks"], sinks)
    for i, name in enumerate(PLACES):
        of_place = (place == i) & ~sinks
        check(result["block"][name], of_place)
        for one in result["block"][name]["bins"]:
            check(one, of_place & (distance >= one["from"]) & (distance <= one["to"]))
        assert sum(one["activation"]["tokens"] for one in result["block"][name]["bins"]) == int(of_place.sum())
    json.dumps(result, allow_nan=False)


def test_where_nothing_leaks(residual: ResidualStream, dialogues: list[list[int]]) -> None:
    result = measure(residual, dialogues)
    assert result["model_dtype"] == "float64"
    for name in PLACES:
        for group in ("activation", "W_dec", "W_enc", "b_enc", "b_dec"):
            assert (
                result["packed"][name][group]["mean"] < 1e-14
            )  # rounding of fp64: products of gradients are subtracted
        if name != "begins_the_block":
            assert result["block"][name]["W_dec"]["median"] > 1e-3
    nothing_before = result["block"]["begins_the_block"]
    assert nothing_before["activation"]["tokens"] > 0
    assert nothing_before["W_dec"]["mean"] < 1e-14


def test_places() -> None:
    batch = next(
        iter(
            BlockSequencer(
                [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14, 15], [16, 17, 18]],
                range(4),
                TokenIds(),
                shuffle=False,
                endless=False,
                block_length=7,
            )
        )
    )
    distance, place = places(batch)
    assert distance.tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 0, 1, 2]]
    assert place.tolist() == [[0, 0, 0, 1, 1, 1, 1], [2, 2, 1, 1, 1, 1, 1]]


def test_a_dialogue_behind_itself_is_another_one() -> None:
    ids = torch.arange(6)[None]
    batch = TokenBatch(
        ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids), torch.tensor([[1, 2, 0, 1, 2, 3]])
    )
    distance, place = places(batch)
    assert distance.tolist() == [[0, 1, 0, 1, 2, 3]]
    assert place.tolist() == [[2, 2, 1, 1, 1, 1]]


def test_a_model_that_mixes_packed_dialogues_has_no_control(
    residual: ResidualStream, dialogues: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise UsageError("no")

    monkeypatch.setattr(module, "check_packing", refuse)
    result = measure(residual, dialogues)
    assert result["packed"] is None
    assert result["block"]["begins_behind_another"]["activation"]["tokens"] > 0


def test_bad_input(residual: ResidualStream, dialogues: list[list[int]]) -> None:
    with pytest.raises(UsageError, match=r"block_length: expected a block that the .* can fill, got 200"):
        measure(residual, dialogues, block_length=200)
    sae, _ = make("step")
    sae.d_in = 8
    with pytest.raises(UsageError, match="width 16, got one of width 8"):
        leakage(sae, residual, dialogues, [0], TokenIds(), SparsityTerm(), block_length=8)
