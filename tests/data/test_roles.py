"""Role words: those that plainly mean user, assistant or system, those that some templates know, and all others."""

import pytest

from fastsae.data.roles import KNOWN_ROLES, SILENT_ROLES, canonical_role, without_lone_surrogates


@pytest.mark.parametrize(
    ("role", "words"),
    [
        ("user", "user User USER human Human HUMAN prompter |user| Human: <|user|> ###_human"),
        ("assistant", "assistant ASSISTANT gpt GPT gpt-4 gpt4 gpt-3.5-turbo ChatGPT chatgpt bing bard Bard claude"),
        ("assistant", "claude-2.1 Claude_3 ai AI bot Bot chatbot model Model llm gemini Assistant: ai-assistant"),
        ("system", "system System SYSTEM sys system_prompt"),
        ("tool", "tool Tool TOOL"),
        ("function_call", "function_call Function-Call"),
        ("developer", "developer Developer"),
        ("observation", "observation OBSERVATION"),
    ],
)
def test_plain_words(role, words):
    for word in words.split():
        if word == "###_human":
            word = "### Human"
        assert canonical_role(word) == role
        assert canonical_role(f"  {word}\n") == role
    assert role in KNOWN_ROLES


@pytest.mark.parametrize(
    "word", ["Bing Chat", "gemini-pro", "claude-instant-v1", "Claude Opus 4", "chat_bot", "Chat GPT"]
)
def test_models_with_a_kind(word):
    assert canonical_role(word) == "assistant"


@pytest.mark.parametrize("word", ["\ufeffuser", "user\u00a0", "\u200bUser:"])
def test_spaces_that_nobody_sees(word):
    assert canonical_role(word) == "user"


@pytest.mark.parametrize(
    "word", ["Alice", "user 2", "user_feedback", "assistant2", "bing search", "gptx", "critic", "δ"]
)
def test_other_words_stay(word):
    assert canonical_role(f" {word} ") == word
    assert word not in KNOWN_ROLES


def test_silent_roles_are_not_the_speakers():
    assert {"user", "assistant"}.isdisjoint(SILENT_ROLES)
    assert {"system", "tool"} <= SILENT_ROLES


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain π 😀", "plain π 😀"),
        ("half \ud83d", "half \ufffd"),
        ("\ude00 half", "\ufffd half"),
        ("two halves \ud83d\ude00", "two halves 😀"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\ud83da\ufffd\x00", "\ufffda\ufffd\x00"),
    ],
)
def test_lone_surrogates_become_the_replacement_character(text, expected):
    assert without_lone_surrogates(text) == expected
    assert canonical_role(text) == expected.strip()
