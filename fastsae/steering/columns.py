"""Text of a model for a terminal: nothing in it moves the cursor, and lines break where the terminal is full."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import zip_longest

_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format, surrogates, separators of lines and paragraphs
_JOINERS = "\u200c\u200d"  # they shape letters of Arabic and Indic scripts, and join emoji
_GAP = 3


def printable(text: str) -> str:
    """The text with every sign that a terminal could obey written as its escape; line breaks stay, a tab is four spaces."""
    return "".join(map(_printable, text))


def _printable(sign: str) -> str:
    if sign == "\t":
        return "    "
    if sign == "\n" or sign in _JOINERS or unicodedata.category(sign) not in _UNSEEN:
        return sign
    return sign.encode("unicode_escape").decode()


def width(text: str) -> int:
    """How many columns a printable text takes: two for a wide sign, none for a mark on the sign before it."""
    return sum(map(_width, text))


def _width(sign: str) -> int:
    if unicodedata.category(sign) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(sign) in "WF" else 1


def pad(text: str, columns: int) -> str:
    """The text with spaces behind it; one that is too wide is cut and ends with a sign for that."""
    if width(text) > columns:
        text = _split(text, columns - 1)[0] + "…"
    return text + " " * (columns - width(text))


def wrap(text: str, columns: int) -> list[str]:
    """Lines of at most `columns`, broken between words where that is possible."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in re.findall(r"\s*\S+|\s+$", paragraph):
            if line and width(line) + width(word) > columns:
                lines.append(line)
                line, word = "", word.lstrip()
            while width(word) > columns and (parts := _split(word, columns))[1]:
                lines.append(parts[0])
                word = parts[1]
            line += word
        lines.append(line)
    return lines


def _split(text: str, columns: int) -> tuple[str, str]:
    """The part of a text that fits, which is at least one sign, and the rest."""
    used = 0
    for i, sign in enumerate(text):
        used += _width(sign)
        if used > columns and i:
            return text[:i], text[i:]
    return text, ""


def beside(blocks: Sequence[Sequence[str]], columns: int) -> list[str]:
    """Blocks of lines beside each other, each `columns` wide."""
    between = " " * _GAP
    return [between.join(pad(cell, columns) for cell in row).rstrip() for row in zip_longest(*blocks, fillvalue="")]


def share(total: int, n: int) -> int:
    """The width of each of `n` blocks that stand beside each other in `total` columns."""
    return (total - _GAP * (n - 1)) // n
