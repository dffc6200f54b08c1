"""The words that chat datasets have for who speaks."""

from __future__ import annotations

import re
from functools import lru_cache

_WORDS = {
    "user": "user human prompter prompt question instruction",
    "assistant": "assistant ai ai_assistant bot chatbot chat_bot chat_gpt model llm response answer completion",
    "system": "system sys system_prompt system_message",
}
_ROLE_OF = {word: role for role, words in _WORDS.items() for word in words.split()}
_NAMES = "chatgpt gpt claude bard bing gemini llama mistral qwen deepseek vicuna grok copilot".split()
_KINDS = "ai|assistant|bot|chat|flash|haiku|instant|large|medium|mini|nano|opus|plus|pro|small|sonnet|turbo|ultra"
# also with a version or a kind: gpt-4, claude-2.1, gemini-pro, bing chat
_MODEL_NAME = re.compile(rf"(?:{'|'.join(_NAMES)})(?:[ ._-]?\d.*|[ ._-](?:{_KINDS})\b.*)?")
_AROUND = " \t\r\n\u00a0\u200b\ufeff:<>|#*[]"  # spaces, also those that nobody sees, and marks of prompts

SILENT_ROLES = frozenset(
    "system developer tool tools tool_call tool_calls tool_response tool_result tool_results available_tools function "
    "function_call function_response observation ipython environment document documents".split()
)
"""Roles that speak neither as the user nor as the assistant; some chat templates know them, and all get them."""

KNOWN_ROLES = SILENT_ROLES | set(_WORDS)


def without_lone_surrogates(text: str) -> str:
    """Puts U+FFFD for each half of a surrogate pair, which JSON can hold and UTF-8, and so a tokenizer, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@lru_cache(maxsize=4096)
def canonical_role(word: str) -> str:
    """Returns `user`, `assistant` or `system` where a word plainly means one of them, whatever its case.

    `Human`, `prompter` and `USER:` are the user; `gpt`, `ChatGPT`, `bing`, `bard`, `claude-2`, `bot` and `model` are
    the assistant. A word of `SILENT_ROLES` comes back in lower case, any other word as it is, without spaces around it.
    """
    plain = word.strip(_AROUND).lower()
    key = re.sub(r"[ -]", "_", plain)
    if key in _ROLE_OF:
        return _ROLE_OF[key]
    if _MODEL_NAME.fullmatch(plain):
        return "assistant"
    return key if key in SILENT_ROLES else without_lone_surrogates(word.strip())
