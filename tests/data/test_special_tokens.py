"""Special tokens by id and role names by position, on the templates of several families, against a regular expression."""

import re

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastsae.data.special_tokens import RoleHeader, SpecialTokens, find_special_tokens
from fastsae.data.tokens import render
from fastsae.errors import FastsaeError, UsageError

MESSAGES = "{%- for message in messages %}{{ "
SYSTEM = "{{ '<|im_start|>system\nYou are a helpful assistant user.<|im_end|>\n' }}"
CHATML = "'<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n'"
LLAMA3 = "'<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>'"
GEMMA = "'<start_of_turn>' + message.role.replace('assistant', 'model') + '\n' + message.content + '<end_of_turn>\n'"
PHI = "'<|' + message.role + '|>\n' + message.content + '<|end|>\n'"
PLAIN_MARKS = "'<|' + message.role + '|>\n' + message.content + '</s>\n'"  # the marks are ordinary text
MISTRAL = "('[INST] ' + message.content + ' [/INST]') if message.role == 'user' else (' ' + message.content + '</s>')"
HARMONY = (
    "('<|start|>' + message.role + ('<|channel|>final' if message.role == 'assistant' else '') + '<|message|>' + "
    "message.content + '<|end|>')"
)
OPENCHAT = "('GPT4 Correct ' + message.role | capitalize + ': ' + message.content + '<|end_of_turn|>')"
THINK = (
    "'<|im_start|>' + message.role + '\n' + ('<think>\n\n</think>\n\n' if message.role == 'assistant' and loop.last else '')"
    " + message.content + '<|im_end|>\n'"
)
TEXT = "(message.role | capitalize + ': ' + message.content + '\n\n')"
# name -> template's start, template of a message, its special tokens, names of the roles, where the template writes them
FAMILIES = {
    "chatml": ("", CHATML, ["<|im_start|>", "<|im_end|>"], ["user", "assistant"], r"<\|im_start\|>(user|assistant)"),
    "qwen": (SYSTEM, CHATML, ["<|im_start|>", "<|im_end|>"], ["user", "assistant"], r"<\|im_start\|>(user|assistant)"),
    "thinking": ("", THINK, ["<|im_start|>", "<|im_end|>"], ["user", "assistant"], r"<\|im_start\|>(user|assistant)"),
    "llama 3": (
        "{{ bos_token }}",
        LLAMA3,
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        ["user", "assistant"],
        r"header_id\|>(user|assistant)<",
    ),
    "gemma": (
        "{{ bos_token }}",
        GEMMA,
        ["<start_of_turn>", "<end_of_turn>"],
        ["user", "model"],
        r"<start_of_turn>(user|model)",
    ),
    "phi": ("", PHI, ["<|user|>", "<|assistant|>", "<|end|>"], [], None),
    "plain marks": ("", PLAIN_MARKS, ["</s>"], ["user", "assistant"], r"<\|(user|assistant)\|>"),
    "plain marks with bos": (
        "{{ bos_token }}",
        PLAIN_MARKS,
        ["</s>"],
        ["user", "assistant"],
        r"<\|(user|assistant)\|>",
    ),
    "mistral": ("{{ bos_token }}", MISTRAL, ["[INST]", "[/INST]", "</s>"], [], None),
    "llama 2": ("{{ bos_token }}", MISTRAL, ["</s>"], [], None),  # the same in ordinary text
    "harmony": (
        "",
        HARMONY,
        ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"],
        ["user", "assistant"],
        r"<\|start\|>(user|assistant)",
    ),
    "openchat": (
        "{{ bos_token }}",
        OPENCHAT,
        ["<|end_of_turn|>"],
        ["User", "Assistant"],
        r"GPT4 Correct (User|Assistant)",
    ),
    "plain text": ("", TEXT, [], [], None),
}
DIALOGUE = [
    {"role": "user", "content": "a user and an assistant meet a model user"},
    {"role": "assistant", "content": "assistant\nuser\nmodel user: User"},
    {"role": "user", "content": "final Assistant"},
    {"role": "assistant", "content": "user"},
]


def make_tokenizer(start: str, message: str, special: list[str], words: str, added=()) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which each of `words` is one token and other words are many."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens = ["<bos>", *special]
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=tokens, show_progress=False)
    backend.train_from_iterator([words] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", pad_token="<bos>")
    if added:
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    tokenizer.chat_template = start + MESSAGES + message + " }}{%- endfor %}"
    return tokenizer


def expected_names(tokenizer, special, place, dialogue) -> list[str | None]:
    """For each token of the dialogue the name that it counts as, from the rendered text and the tokens' offsets."""
    text = tokenizer.apply_chat_template(dialogue, tokenize=False)
    spans = {span: match[1] for match in re.finditer(place, text) for span in range(*match.span(1))} if place else {}
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    names = []
    for index, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        token = tokenizer.convert_ids_to_tokens(index)
        names.append(token if token in special else next((spans[i] for i in range(begin, end) if i in spans), None))
    return names


def found_names(found: SpecialTokens, ids: list[int]) -> list[str | None]:
    return [[*found.names, None][index] for index in found.classes(torch.tensor([ids]))[0].tolist()]


@pytest.mark.parametrize(
    "words",
    ["user assistant model\nuser\nassistant\nmodel User Assistant", "us er ass istant"],
    ids=["one token", "several"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_of_each_family(family, words):
    start, message, special, roles, place = FAMILIES[family]
    tokenizer = make_tokenizer(start, message, special, words, ["<think>", "</think>"] if family == "thinking" else ())
    found = find_special_tokens(tokenizer)
    assert sorted(found.ids) == sorted(special)
    assert all(tokenizer.convert_tokens_to_ids(token) == index for token, index in found.ids.items())
    assert list(found.roles) == roles
    name_lengths = {len(header.name) for headers in found.roles.values() for header in headers}
    if roles:
        assert (name_lengths == {1}) is (words[:4] == "user")
    ids = render(tokenizer, DIALOGUE)
    assert found_names(found, ids) == expected_names(tokenizer, special, place, DIALOGUE)
    # a dialogue that was cut off keeps its names, down to the tokens of a name that was cut off itself
    assert found_names(found, ids[:7])[:6] == expected_names(tokenizer, special, place, DIALOGUE)[:6] or not roles


def test_added_tokens_that_are_not_declared_special():
    """Turn markers count, line breaks and what is not written in every exchange do not."""
    template = "'<User>' + message.content if message.role == 'user' else '\n\n<Bot>' + message.content + '</s>'"
    tokenizer = make_tokenizer("", f"({template})", ["</s>"], "user", ["<User>", "<Bot>", "\n\n", "<table>"])
    assert sorted(find_special_tokens(tokenizer).ids) == ["</s>", "<Bot>", "<User>"]


def test_a_template_that_refuses_long_dialogues():
    refuse = "{%- if messages|length > 2 %}{{ raise_exception('one exchange only') }}{%- endif %}"
    tokenizer = make_tokenizer(refuse, CHATML, ["<|im_start|>", "<|im_end|>"], "user assistant")
    assert list(find_special_tokens(tokenizer).ids) == ["<|im_start|>", "<|im_end|>"]


def test_a_template_that_refuses_everything_has_no_special_tokens(caplog):
    tokenizer = make_tokenizer("{{ raise_exception('closed') }}", CHATML, ["<|im_start|>"], "user")
    with pytest.raises(FastsaeError):
        render(tokenizer, DIALOGUE)
    found = find_special_tokens(tokenizer)
    assert (found, found.names) == (SpecialTokens(), [])
    assert found_names(found, [1, 2]) == [None, None]


def test_no_template():
    tokenizer = make_tokenizer("", CHATML, ["<|im_start|>"], "user")
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="has no chat template"):
        find_special_tokens(tokenizer)


def test_a_tokenizer_that_changes_the_text():
    """Lower case and no spaces of its own: the role's name is found by its tokens all the same."""
    tokenizer = make_tokenizer("", CHATML, ["<|im_start|>", "<|im_end|>"], "user assistant")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    found = find_special_tokens(tokenizer)
    assert list(found.roles) == ["user", "assistant"]


def test_classes_by_hand():
    user, ai = (RoleHeader((1,), (7,)), RoleHeader((-1, 5), (7,))), (RoleHeader((1,), (8, 9)),)
    found = SpecialTokens({"<s>": 1, "<e>": 2}, {"user": user, "ai": ai})
    rows = [
        [1, 7, 7, 2, 1, 8, 9, 9],  # the second 7 and the last 9 are words of a message
        [5, 7, 1, 8, 1, 8, 9, 2],  # the first header has no special token; a part of a name alone is none
        [7, 8, 9, 5, 7, 1, 2, 0],
    ]
    other = 4
    assert found.names == ["<s>", "<e>", "user", "ai"]
    assert found.classes(torch.tensor(rows)).tolist() == [
        [0, 2, other, 1, 0, 3, 3, other],
        [other, 2, 0, other, 0, 3, 3, 1],
        [other, other, other, other, other, 0, 1, other],
    ]
    assert found.classes(torch.tensor([[1], [3]])).tolist() == [[0], [other]]
    assert found.classes(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0)
