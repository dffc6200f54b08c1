"""Plain text, or text that is tokenised already, to train on in the place of dialogues."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastsae.data import chat_files
from fastsae.data.chat_files import each_row, read_row
from fastsae.data.json_files import UnusableRow, unpacked
from fastsae.data.roles import without_lone_surrogates
from fastsae.disk import local_path
from fastsae.errors import UsageError

TEXT_COLUMNS = ("text", "content", "document", "raw_content")
TOKEN_COLUMNS = ("input_ids", "tokens", "token_ids")
_PIECE = 16_384  # bytes of a .txt file that make a text, up to the next end of a line
_PROBED_ROWS = 100
# A token of English has 4 to 5 letters, and a row of JSON holds other things beside its text.
_BYTES_OF_A_TOKEN = 8


def load_texts(
    source: str, split: str = "train", *, n_tokens: int | None = None, progress: bool = False
) -> Sequence[Any]:
    """Open plain texts, or lists of token ids, without reading them into memory.

    Args:
        source: `demo`, the documentation of which the demo's dialogues are made; a `.txt` file, which is read in pieces of 16 kB,
            each of them a text; a file of chats' kinds (see `fastsae.data.chat.load_chats`) with a column of texts (`text`) or
            of token ids (`input_ids`); a folder of either kind; or a Hugging Face hub id.
        split: Name of the split, for folders and the hub.
        n_tokens: How many tokens will be used: a dataset on the hub is then streamed as far as surely holds them, and not
            downloaded whole.
        progress: Show progress bars where reading takes longer than a second.

    Raises:
        UsageError: Nothing is found at `source`, or no column of texts.
        FastsaeError: A file is damaged, or a download fails.
    """
    if source == "demo":
        from fastsae.data import demo

        return list(demo.plain_text())
    path = local_path(source)
    files = _text_files(path)
    if files:
        return chat_files.Concatenation([_TextFile(file, progress) for file in files])
    if path.is_dir():
        rows = chat_files.open_folder(path, split, progress)
    elif path.is_file():
        rows = chat_files.open_files([path], progress)
    elif chat_files.looks_like_path(source) or source.endswith((".txt", ".txt.gz")):
        raise UsageError(f"text {source!r}: there is no such file or folder ({path.absolute()})")
    else:
        n_bytes = None if n_tokens is None else _BYTES_OF_A_TOKEN * n_tokens
        rows = chat_files.open_hub(source, split, progress, n_bytes=n_bytes)
    return _TextRows(rows, source)


def _text_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if _is_text(file) and not file.name.startswith("."))
    return [path] if path.is_file() and _is_text(path) else []


def _is_text(file: Path) -> bool:
    return file.name.lower().endswith((".txt", ".txt.gz")) and file.is_file()


class _TextFile(Sequence[str]):
    """A file of plain text in pieces that end with a line."""

    def __init__(self, path: Path, progress: bool) -> None:
        with unpacked(path, progress) as file:
            size = file.seek(0, 2)
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        starts = [0]
        while (end := self.data.find(b"\n", starts[-1] + _PIECE)) >= 0:
            starts.append(end + 1)
        self.edges = np.unique([*starts, size])

    def __len__(self) -> int:
        return len(self.edges) - 1

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return (
            self.data[int(self.edges[index]) : int(self.edges[index + 1])].decode("utf-8", "replace").lstrip("\ufeff")
        )


class _TextRows(Sequence[Any]):
    """One column of rows: texts, or lists of token ids; empty where a row has none.

    Raises:
        UsageError: No column holds either.
    """

    def __init__(self, rows: Sequence[Any], source: str) -> None:
        probed = [row for row in islice(each_row(rows), _PROBED_ROWS) if isinstance(row, dict)]
        columns = list(dict.fromkeys(name for row in probed for name in row))
        known = [name for name in (*TEXT_COLUMNS, *TOKEN_COLUMNS) if any(_is_content(row.get(name)) for row in probed)]
        if not known:
            raise UsageError(
                f"text {source!r}: expected a .txt file, or rows with a column of texts ({', '.join(TEXT_COLUMNS)}) or of "
                f"token ids ({', '.join(TOKEN_COLUMNS)}), found the columns {', '.join(map(repr, columns)) or 'none'}"
            )
        self.column = known[0]
        self.rows = rows.select_columns([self.column]) if hasattr(rows, "select_columns") else rows
        self.is_tokens = self.column in TOKEN_COLUMNS

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)  # where iteration ends; `read_row` would take it for a damaged row
        row = read_row(self.rows, int(index))
        found = None if isinstance(row, UnusableRow) or not isinstance(row, dict) else row.get(self.column)
        if self.is_tokens:
            return found if isinstance(found, list) and _is_content(found) else []
        return without_lone_surrogates(found) if isinstance(found, str) else ""


def _is_content(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, list) and len(value) > 0 and all(type(item) is int for item in value)
