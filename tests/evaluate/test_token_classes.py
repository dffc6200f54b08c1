"""Who says each token, on the templates of several families, against the rendered text and the tokens' offsets."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from test_special_tokens import FAMILIES, make_tokenizer

from fastsae.data.special_tokens import find_special_tokens
from fastsae.data.tokens import render
from fastsae.evaluate.token_classes import CLASSES, TokenClasses

DIALOGUE = [
    {"role": "user", "content": "Is the assistant, or the model, a user?"},
    {"role": "assistant", "content": "No: the user asks. The model answers."},
    {"role": "user", "content": "And (in short)?\nOne line"},
    {"role": "assistant", "content": "Yes"},
]
WORDS = "user assistant model\nuser\nassistant\nmodel User Assistant"


def spoken(tokenizer, dialogue) -> list[str | None]:
    """The speaker of each token that holds a letter of a message."""
    text = tokenizer.apply_chat_template(dialogue, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    who, place = dict[int, str](), 0
    for message in dialogue:
        place = text.index(message["content"], place)
        who |= {place + i: message["role"] for i in range(len(message["content"]))}
        place += len(message["content"])
    return [next((who[i] for i in range(*span) if i in who), None) for span in encoded["offset_mapping"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_speakers_of_each_family(family):
    start, message, special, _, _ = FAMILIES[family]
    tokenizer = make_tokenizer(start, message, special, WORDS, ["<think>", "</think>"] if family == "thinking" else ())
    found = find_special_tokens(tokenizer)
    ids = torch.tensor([render(tokenizer, DIALOGUE)])
    sinks = torch.zeros(ids.shape[1], dtype=torch.bool)
    classes = dict(zip(CLASSES, TokenClasses(tokenizer, found)(ids, torch.ones_like(ids), sinks), strict=True))
    parts = torch.stack([classes[name] for name in ("special", "user", "assistant", "template")])
    assert (parts.sum(0) == 1).all(), "each token is in one of these classes"
    names = [next((who for who in ("user", "assistant") if classes[who][i]), None) for i in range(ids.shape[1])]
    if family in ("llama 2", "plain text"):  # no special token and no name behind one tells the two apart
        assert set(names) == {None}
        return
    expected = spoken(tokenizer, DIALOGUE)
    has_word = [bool(re.search(r"\w", tokenizer.decode([token]))) for token in ids[0].tolist()]
    for i, (got, wanted) in enumerate(zip(names, expected, strict=True)):
        if "think" in tokenizer.decode([ids[0, i]]):  # marks that are not special count as said
            continue
        if got != wanted:  # punctuation between a name and the first word is the header's, whoever wrote it
            assert not has_word[i], (family, tokenizer.decode(ids[0, : i + 1]), got, wanted)


def test_sinks_are_in_no_class_but_their_own():
    start, message, special, _, _ = FAMILIES["chatml"]
    tokenizer = make_tokenizer(start, message, special, WORDS)
    short, long = (render(tokenizer, dialogue) for dialogue in (DIALOGUE[:2], DIALOGUE))
    width = len(long)
    ids = torch.tensor([short + [0] * (width - len(short)), long])
    mask = torch.tensor([[1] * len(short) + [0] * (width - len(short)), [1] * width])
    sinks = torch.zeros(len(short) + len(long), dtype=torch.bool)
    sinks[[0, 9, len(short), len(short) + 12]] = True
    classes = dict(zip(CLASSES, TokenClasses(tokenizer, find_special_tokens(tokenizer))(ids, mask, sinks), strict=True))
    assert torch.equal(classes["sinks"], sinks)
    assert torch.equal(classes["all"], ~sinks)
    for name in ("special", "user", "assistant", "template"):
        assert not (classes[name] & sinks).any()
    assert classes["position_0"].nonzero().flatten().tolist() == [0, len(short)]
