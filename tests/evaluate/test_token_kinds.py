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
from fastsae.evaluate.token_kinds import KINDS, TokenKinds

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
    kinds = [KINDS[kind] for kind in TokenKinds(tokenizer, found)(ids, torch.ones_like(ids), sinks).tolist()]
    names = [kind if kind in ("user", "assistant") else None for kind in kinds]
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


# families whose template marks a system prompt in a way of its own, and how
SYSTEM_MARKS = {
    "chatml": "system", "qwen": "system", "thinking": "system", "llama 3": "system", "gemma": "system", "phi": "<|system|>",
    "plain marks": "system", "plain marks with bos": "system", "harmony": "system", "openchat": "System",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_system_prompts_of_each_family(family):
    start, message, special, _, _ = FAMILIES[family]
    special = [*special, "<|system|>"] if family == "phi" else special
    tokenizer = make_tokenizer(start, message, special, WORDS + " system System")
    found = find_special_tokens(tokenizer)
    assert [tokenizer.decode(name).strip() for _, name in found.system] == SYSTEM_MARKS.get(family, "").split()
    dialogue = [{"role": "system", "content": "The system is a user\nsystem"}, *DIALOGUE]
    for messages in (dialogue, DIALOGUE):
        ids = torch.tensor([render(tokenizer, messages)])
        sinks = torch.zeros(ids.shape[1], dtype=torch.bool)
        kinds = [KINDS[kind] for kind in TokenKinds(tokenizer, found)(ids, torch.ones_like(ids), sinks).tolist()]
        if family not in SYSTEM_MARKS or (family == "qwen" and messages is DIALOGUE):  # it writes a prompt of its own
            assert family == "qwen" or "system" not in kinds
            continue
        for token, got, wanted in zip(ids[0].tolist(), kinds, spoken(tokenizer, messages), strict=True):
            if re.search(r"\w", tokenizer.decode([token])) and wanted is not None:
                assert (got == wanted) or (family == "phi" and got == "template"), (
                    tokenizer.decode([token]),
                    got,
                    wanted,
                )


def test_a_prompt_that_the_template_writes_by_itself_is_a_system_prompt():
    start, message, special, _, _ = FAMILIES["qwen"]
    tokenizer = make_tokenizer(start, message, special, WORDS)
    ids = torch.tensor([render(tokenizer, DIALOGUE)])
    sinks = torch.zeros(ids.shape[1], dtype=torch.bool)
    kinds = TokenKinds(tokenizer, find_special_tokens(tokenizer))(ids, torch.ones_like(ids), sinks)
    said = tokenizer.decode(ids[0][kinds == KINDS.index("system")])
    assert said.strip() == "You are a helpful assistant user."


def test_sinks_and_special_tokens():
    start, message, special, _, _ = FAMILIES["chatml"]
    tokenizer = make_tokenizer(start, message, special, WORDS)
    short, long = (render(tokenizer, dialogue) for dialogue in (DIALOGUE[:2], DIALOGUE))
    width = len(long)
    ids = torch.tensor([short + [0] * (width - len(short)), long])
    mask = torch.tensor([[1] * len(short) + [0] * (width - len(short)), [1] * width])
    sinks = torch.zeros(len(short) + len(long), dtype=torch.bool)
    found = find_special_tokens(tokenizer)
    is_special = (found.classes(ids) < len(found.names))[mask.bool()]
    late = [9, len(short) + int(is_special[len(short) + 2 :].nonzero()[0]) + 2]  # an ordinary token, and a special one
    sinks[late] = True
    kinds = [KINDS[kind] for kind in TokenKinds(tokenizer, found)(ids, mask, sinks).tolist()]
    assert [kinds[i] for i in (0, len(short))] == ["special_position_0"] * 2
    assert [kinds[i] for i in late] == ["late_sink", "special_late_sink"]
    others = [i for i in range(len(kinds)) if i not in (0, len(short), *late)]
    assert all((kinds[i] == "special") is bool(is_special[i]) for i in others)
