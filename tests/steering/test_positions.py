"""Which tokens of a pass are edited, whatever the passes are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fastsae import UsageError
from fastsae.data.special_tokens import find_special_tokens
from fastsae.evaluate.token_kinds import KINDS, TokenKinds
from fastsae.steering.positions import Positions, Region

CHAT = [
    {"role": "user", "content": "What is a river?"},
    {"role": "assistant", "content": "A river is water that flows. It ends in the sea!"},
    {"role": "user", "content": "And a lake?"},
    {"role": "assistant", "content": "A lake is water that stays."},
]
# Llama's form: a role's name is a word between two special tokens, and nothing tells it from one in a message but its place
LLAMA = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.fixture(scope="module", params=["chatml", "llama"])
def tokenizer(request: pytest.FixtureRequest, tiny_model: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    if request.param == "llama":
        words = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": words})
        tokenizer.chat_template = LLAMA
    return tokenizer


@pytest.fixture(scope="module")
def texts(tokenizer: Any) -> list[list[int]]:
    """Two dialogues of different lengths, the second one begun with the words of a header in a message."""
    chats = [CHAT, [{"role": "user", "content": "assistant user"}, *CHAT[1:2]]]
    return [tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats]


def columns(region: Region, shape: tuple[int, int]) -> Tensor:
    """`[B, T]` bool, what a region edits of a pass."""
    found = torch.zeros(shape, dtype=torch.bool)
    edited = slice(region.start, region.stop)
    found[:, edited] = True if region.chosen is None else region.chosen[:, edited]
    return found


def reader_of(tokenizer: Any, kind: str) -> Callable[[list[int]], list[bool]]:
    """What the functions for whole dialogues say of each token of one."""
    special = find_special_tokens(tokenizer)
    kinds = TokenKinds(tokenizer, special)

    def read(ids: list[int]) -> list[bool]:
        row, no_sinks = torch.tensor([ids], dtype=torch.long), torch.zeros(len(ids), dtype=torch.bool)
        if kind == "special":
            return [index < len(special.names) for index in special.classes(row)[0].tolist()]
        return (kinds(row, torch.ones_like(row), no_sinks) == KINDS.index("assistant")).tolist() if ids else []

    return read


@pytest.mark.parametrize("kind", ["special", "assistant"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sizes", [[1000], [7, 1, 1, 1000], [1] * 90])
def test_words_are_those_of_the_dialogue_so_far(
    tokenizer: Any, texts: list[list[int]], kind: str, side: str, sizes: list[int]
) -> None:
    longest = max(map(len, texts))
    ids, mask = torch.full((2, longest), texts[0][0]), torch.zeros(2, longest, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(longest - len(text), None) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = torch.tensor(text), 1
    positions, start = Positions(kind, tokenizer), 0
    n_found = torch.zeros(2, dtype=torch.long)
    read = reader_of(tokenizer, kind)
    for size in sizes:
        stop = min(start + size, longest)
        if stop == start:
            break
        found = columns(positions.advance(ids[:, start:stop], start, mask[:, :stop]), (2, stop - start))
        for row, text in enumerate(texts):
            n_before, n = int(mask[row, :start].sum()), int(mask[row, :stop].sum())
            assert found[row][mask[row, start:stop].bool()].tolist() == read(text[:n])[n_before:]
        assert not (found & ~mask[:, start:stop].bool()).any()
        n_found, start = n_found + found.sum(1), stop
    assert start == longest
    assert (n_found > 4).all()


def test_a_cut_cache_and_another_text_are_followed(tokenizer: Any, texts: list[list[int]]) -> None:
    positions, read = Positions("special", tokenizer), reader_of(tokenizer, "special")
    one, other = torch.tensor([texts[0]]), torch.tensor([texts[1]])
    positions.advance(one, 0, None)
    again = columns(
        positions.advance(one[:, 9:], 9, None), (1, one.shape[1] - 9)
    )  # as assisted decoding takes tokens back
    assert again[0].tolist() == read(texts[0])[9:]
    assert columns(positions.advance(other, 0, None), tuple(other.shape))[0].tolist() == read(texts[1])


def test_a_generation_with_a_full_cache_knows_the_whole_text(tokenizer: Any, texts: list[list[int]]) -> None:
    positions, expected = Positions("assistant", tokenizer), reader_of(tokenizer, "assistant")(texts[1])
    text, n_cached = torch.tensor([texts[1]]), expected.index(True) + 1
    positions.advance(torch.zeros_like(text), 0, None)  # another text than the one in the cache
    with positions.generating(text, text.shape[1]):
        rest = columns(positions.advance(text[:, n_cached:], n_cached, None), (1, text.shape[1] - n_cached))
    assert rest[0].tolist() == expected[n_cached:]


def test_a_token_stays_what_it_was_when_it_was_read(tokenizer: Any, texts: list[list[int]]) -> None:
    """A role's name of several tokens is known at the last of them: until then, they are words."""
    ids, read = torch.tensor([texts[0]]), reader_of(tokenizer, "special")
    cached, whole = Positions("special", tokenizer), Positions("special", tokenizer)
    found = [columns(cached.advance(ids[:, t : t + 1], t, None), (1, 1)) for t in range(ids.shape[1])]
    for t in range(1, ids.shape[1] + 1):
        text = columns(whole.advance(ids[:, :t], 0, None), (1, t))
        assert torch.equal(text, torch.cat(found[:t], 1))
    assert text[0].tolist() != read(texts[0])


def split_of(
    kind: str, passes: list[tuple[int, int]], prompt: int | None = None, ids: Tensor | None = None
) -> list[Any]:
    """(start, stop) of what is edited in passes over so many tokens behind so many cached ones."""
    ids = torch.arange(100)[None] if ids is None else ids
    positions = Positions(kind)

    def run() -> list[Any]:
        regions = [positions.advance(ids[:, cached : cached + T], cached, None) for T, cached in passes]
        return [(region.start, region.stop) if region.start < region.stop else None for region in regions]

    if prompt is None:
        return run()
    with positions.generating(ids[:, :prompt], prompt):
        return run()


def test_prompt_and_generated_are_told_apart() -> None:
    with_cache = [(5, 0), (1, 5), (1, 6)]
    assert split_of("generated", with_cache) == [None, (0, 1), (0, 1)]
    assert split_of("prompt", with_cache) == [(0, 5), None, None]
    without = [(5, 0), (6, 0), (7, 0)]
    assert split_of("generated", without) == [None, (5, 6), (5, 7)]
    assert split_of("prompt", without) == [(0, 5), (0, 5), (0, 5)]
    chunks = [(4, 0), (4, 4), (1, 8), (1, 9)]
    assert split_of("generated", chunks) == [None, None, (0, 1), (0, 1)]
    assert split_of("generated", chunks, prompt=9) == [None, None, None, (0, 1)]  # the last chunk has one token
    assert split_of("generated", [(1, 0), (1, 1)]) == [None, (0, 1)]
    assert split_of("generated", [(1, 30), (1, 31)]) == [(0, 1), (0, 1)]  # the block begins behind the prompt
    assert split_of("generated", [(4, 30), (1, 34)]) == [None, (0, 1)]
    assert split_of("prompt", [(3, 6), (1, 9)], prompt=9) == [(0, 3), None]  # the first tokens are in a cache
    assert split_of("generated", [(6, 0), (4, 6), (3, 8)], prompt=6) == [
        None,
        (0, 4),
        (0, 3),
    ]  # guesses, two taken back
    assert split_of("generated", [(6, 0), (9, 0)], prompt=6) == [None, (6, 9)]


def test_another_text_begins_anew() -> None:
    assert split_of("generated", [(5, 0), (1, 5), (5, 0), (1, 5)]) == [None, (0, 1), None, (0, 1)]
    positions, ids = Positions("generated"), torch.arange(20)[None]
    positions.advance(ids[:, :5], 0, None)
    region = positions.advance(ids[:, 1:7], 0, None)  # one token more, but of another text
    assert region.start == region.stop
    region = positions.advance(ids[:, 1:9], 0, None)  # the same text, but two tokens more
    assert region.start == region.stop


def test_padding_does_not_continue_a_text() -> None:
    positions, ids = Positions("generated"), torch.ones(1, 5, dtype=torch.long)
    positions.advance(ids[:, :4], 0, torch.tensor([[0, 1, 1, 1]]))
    region = positions.advance(ids, 0, torch.tensor([[1, 1, 1, 1, 1]]))
    assert region.start == region.stop


def test_a_mask_counts_real_tokens() -> None:
    chosen = torch.tensor([[True, False, True, False], [False, True, False, True]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]])
    expected = torch.tensor([[False, False, True, False, True, False], [False, True, False, False, True, False]])
    ids = torch.ones(2, 6, dtype=torch.long)
    assert torch.equal(columns(Positions(chosen).advance(ids, 0, mask), (2, 6)), expected)
    positions = Positions(chosen)
    steps = [positions.advance(ids[:, t : t + 1], t, mask[:, : t + 1]) for t in range(6)]
    assert torch.equal(torch.cat([columns(step, (2, 1)) for step in steps], 1), expected)
    late = Positions(chosen).advance(ids[:, 4:], 4, mask)  # the block began when the cache was filled
    assert torch.equal(columns(late, (2, 2)), expected[:, 4:])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_padding_is_read_from_masks_of_four_dimensions(dtype: torch.dtype) -> None:
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    sees = (torch.ones(5, 8).tril() == 1)[None, None] & torch.nn.functional.pad(real, (0, 3))[:, None, None]
    mask = sees if dtype == torch.bool else torch.where(sees, 0.0, torch.finfo(torch.float32).min)
    chosen = torch.tensor([[True, False, False], [True, False, False]])
    expected = torch.tensor([[False, False, True, False, False], [True, False, False, False, False]])
    ids = torch.ones(2, 5, dtype=torch.long)
    for given in (mask, {"full_attention": mask, "sliding_attention": None}):
        assert torch.equal(columns(Positions(chosen).advance(ids, 0, given), (2, 5)), expected)


def test_last_is_each_rows_last_real_token() -> None:
    ids, mask = torch.ones(3, 4, dtype=torch.long), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    last = Positions("all").advance(ids, 0, mask).last
    assert last is not None
    assert last.tolist() == [1, 3, -1]
    assert Positions("all").advance(ids, 0, None).last is None


def test_what_cannot_be_told_is_refused(tokenizer: Any, tiny_model: Path) -> None:
    plain = transformers.AutoTokenizer.from_pretrained(tiny_model)
    plain.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    bare = transformers.AutoTokenizer.from_pretrained(tiny_model)
    bare.chat_template = None
    for chosen, given, message in (
        ("everything", None, "positions: expected one of all, prompt, .* got 'everything'"),
        (3, None, "positions: expected one of all, .* or a mask, got 3"),
        (torch.ones(2, 3), None, r"positions: expected a mask \[B, T\] of bool, got a tensor float32 \[2, 3\]"),
        (torch.ones(3, dtype=torch.bool), None, r"positions: expected a mask \[B, T\] of bool"),
        (torch.ones(2, 0, dtype=torch.bool), None, r"positions: expected a mask \[B, T\] of bool"),
        ("special", None, "tokenizer: expected the model's for the positions 'special', got none"),
        ("special", plain, "positions: expected for 'special' a chat template with special tokens, got one without"),
        (
            "assistant",
            plain,
            "positions: expected for 'assistant' a chat template that tells when the assistant speaks",
        ),
        ("special", bare, "template"),
    ):
        with pytest.raises(UsageError, match=message):
            Positions(chosen, given)  # type: ignore[arg-type]


def test_a_pass_whose_tokens_cannot_be_told_is_refused(tokenizer: Any) -> None:
    ids, embeddings = torch.ones(1, 4, dtype=torch.long), torch.zeros(1, 4, 8)
    with pytest.raises(UsageError, match="positions: expected the ids of all tokens for 'special', got inputs_embeds"):
        Positions("special", tokenizer).advance(embeddings, 0, None)
    with pytest.raises(UsageError, match="got a cache of 7 tokens that were not read in this block"):
        Positions("assistant", tokenizer).advance(ids, 7, None)
    with pytest.raises(UsageError, match="positions: expected a mask of as many rows as the model is given, 1, got"):
        Positions(torch.ones(2, 4, dtype=torch.bool)).advance(ids, 0, None)
    with pytest.raises(UsageError, match="attention_mask: expected 2 or 4 dimensions for the positions 'special'"):
        Positions("special", tokenizer).advance(ids, 0, object())
    with pytest.raises(UsageError, match="with a beam search, whose rows change places, got 'special'"):
        Positions("special", tokenizer).check_beams(2)
    for kind in ("prompt", "generated", "all"):
        Positions(kind).check_beams(4)
        Positions(kind).advance(embeddings, 0, object())
