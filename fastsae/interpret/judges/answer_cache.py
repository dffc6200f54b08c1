"""Answers of an endpoint on the disk, by the hash of all that was asked, so that none is paid for twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from fastsae.disk import write_json


class Answer(NamedTuple):
    """What an endpoint said.

    Attributes:
        text: Its words; None where it gave none.
        tokens: How many tokens it counted, of the prompt and of its words.
    """

    text: str | None
    tokens: int


class AnswerCache:
    """One small file per answer, written whole or not at all, so that several runs may share a folder. No key is in it.

    Args:
        folder: Where the files are. None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, url: str, body: dict[str, Any]) -> Answer | None:
        """The answer to a request, or None where it is not there or its file is damaged."""
        path = self._path(url, body)
        if path is None:
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            return Answer(str(kept["answer"]), int(kept["tokens"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, url: str, body: dict[str, Any], answer: Answer) -> None:
        """Keeps an answer."""
        path = self._path(url, body)
        if path is not None:
            write_json(path, {"url": url, "model": body["model"], "answer": answer.text, "tokens": answer.tokens})

    def _path(self, url: str, body: dict[str, Any]) -> Path | None:
        if self.folder is None:
            return None
        asked = hashlib.sha256(json.dumps([url, body], sort_keys=True).encode()).hexdigest()
        return self.folder / asked[:2] / f"{asked}.json"
