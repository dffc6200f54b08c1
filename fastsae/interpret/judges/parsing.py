"""Reads what a language model answered: JSON where it wrote some, else the marks and digits in its words."""

from __future__ import annotations

import json
import re
from typing import Any

_THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_MARKED = re.compile(r"\[\[(.+?)\]\]", re.DOTALL)
_DECODER = json.JSONDecoder()
_WORDS = {"1": 1, "0": 0, "true": 1, "false": 0, "yes": 1, "no": 0}
_LONGEST_NAME = 200  # characters
_LONGEST_ANSWER = 10_000  # characters; JSON that never ends would be tried again from each of its braces


def find_json(text: str) -> dict[str, Any] | None:
    """The first JSON object in a text, None where there is none."""
    text = _THOUGHT.sub("", text)[:_LONGEST_ANSWER]
    at = text.find("{")
    while at >= 0:
        try:
            found, _ = _DECODER.raw_decode(text, at)
            return found
        except (ValueError, RecursionError):
            at = text.find("{", at + 1)
    return None


def read_number(text: str | None, field: str, low: int, high: int) -> int | None:
    """A whole number: a field of JSON, or `[[3]]`, or the only number of the text that lies in the range.

    Args:
        text: What was answered.
        field: The field.
        low: The least that it may be.
        high: The most.
    """
    if text is None:
        return None
    found = find_json(text)
    if found is not None and field in found:
        candidates = {str(found[field]).strip().removesuffix(".0").removesuffix(f"/{high}")}
    else:
        plain = re.sub(rf"/\s*{high}\b|\bout of {high}\b", "", _THOUGHT.sub("", text))  # as in 4/5
        marked = [mark.strip() for mark in _MARKED.findall(plain) if mark.strip().isdecimal()]
        candidates = set(marked[:1] or re.findall(r"(?<![\w.])\d+(?![\w.]*\d)", plain))
    numbers = {int(word) for word in candidates if re.fullmatch(r"\d{1,9}", word)}
    fitting = [number for number in numbers if low <= number <= high]
    return fitting[0] if len(fitting) == 1 else None


def read_words(text: str | None, field: str) -> str | None:
    """A phrase: a field of JSON, or the first `[[words]]` that are no number."""
    if text is None:
        return None
    found = find_json(text)
    if found is not None:
        words = found.get(field)
    else:
        marked = (mark for mark in _MARKED.findall(_THOUGHT.sub("", text)) if not mark.strip().isdecimal())
        words = next(marked, None)
    if not isinstance(words, str) or not words.strip():
        return None
    return " ".join(words.split())[:_LONGEST_NAME]


def read_yes_or_no(text: str | None, field: str, n: int) -> list[int | None]:
    """A list of `n` answers, 1 or 0 each, None for one that is neither; all None for a list of another length."""
    unread: list[int | None] = [None] * n
    if text is None:
        return unread
    found = find_json(text)
    if found is not None:
        words = found.get(field)
    else:
        listed = re.search(r"\[[^\[\]]*\]", _THOUGHT.sub("", text))
        words = None if listed is None else listed.group()[1:-1].split(",")
    if not isinstance(words, list) or len(words) != n:
        return unread
    return [_WORDS.get(str(word).strip().lower()) for word in words]
