"""Files of JSON, opened as rows: one a line, the items of one list, or values of several lines each; packed by gzip or not."""

from __future__ import annotations

import gzip
import json
import mmap
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastsae.data.progress import with_bar
from fastsae.errors import FastsaeError

_LONGEST_LINE = 64 * 2**20  # bytes; parsing one takes ten times as much memory
_SCANNED = 2**24  # bytes of a file looked through at once for ends of lines
_SPACE = re.compile(r"[ \t\r\n]*")
_PARSER = json.JSONDecoder()


@dataclass(frozen=True)
class UnusableRow:
    """A row that cannot be read: the reason under which it is counted, and what exactly is wrong, and where."""

    reason: str
    detail: str


def open_json(path: Path, progress: bool) -> Sequence[Any]:
    """Rows of a file, which its name says to hold a list (`.json`) or one row a line, and which may hold the other.

    Raises:
        FastsaeError: The file is damaged as a whole.
    """
    with unpacked(path, progress) as file:
        is_list = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
        if is_list and path.name.lower().removesuffix(".gz").endswith(".json"):
            try:
                return _all_values(path, file, progress)
            except (ValueError, RecursionError) as error:
                found = "it nests too deeply" if isinstance(error, RecursionError) else error
                raise FastsaeError(
                    f"{path}: expected a JSON list of rows, but {found}. The file may have been cut off"
                ) from error
        lines = _JsonLines(path, file, progress)
        if not lines.are_rows():
            try:
                return _all_values(path, file, progress)
            except (ValueError, RecursionError):
                pass  # the lines then say what is wrong with each of them
    return lines


@contextmanager
def unpacked(path: Path, progress: bool) -> Iterator[BinaryIO]:
    """Gives the file, or for a name that ends in `.gz` a temporary one that holds its content."""
    if path.suffix.lower() != ".gz":
        with path.open("rb") as plain:
            yield plain
        return
    with tempfile.TemporaryFile() as file:  # on the disk, so that rows are found by their offsets here as well
        try:
            with gzip.open(path) as packed:
                pieces = iter(lambda: packed.read(_SCANNED), b"")
                for piece in with_bar(pieces, f"unpacking {path.name}", "piece", total=None, progress=progress):
                    file.write(piece)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise FastsaeError(
                f"{path}: expected a file packed by gzip, but {error}. The file may have been cut off: get it again"
            ) from error
        file.flush()
        file.seek(0)
        yield file


def _all_values(path: Path, file: BinaryIO, progress: bool) -> list[Any]:
    """Parses the whole file, whatever its lines are.

    Raises:
        ValueError: It is no JSON.
        RecursionError: It is nested too deeply.
    """
    file.seek(0)
    text = file.read().decode("utf-8-sig", "surrogatepass")
    return list(with_bar(_values(text), f"reading {path.name}", "row", total=None, progress=progress))


def _values(text: str) -> Iterator[Any]:
    """Yields the items of a JSON list, or values that follow each other, one by one.

    The parser's own loop over a list cannot be interrupted.
    """
    position = _behind_space(text, 0)
    if text[position : position + 1] == "[":
        yield from _list_items(text, position)
        return
    while position < len(text):
        value, position = _PARSER.raw_decode(text, position)
        yield value
        position = _behind_space(text, position)


def _list_items(text: str, position: int) -> Iterator[Any]:
    position = _behind_space(text, position + 1)
    after = text[position : position + 1]
    while after != "]":
        item, position = _PARSER.raw_decode(text, position)
        yield item
        position = _behind_space(text, position)
        after = text[position : position + 1]
        if after == ",":
            position = _behind_space(text, position + 1)
        elif after != "]":
            raise json.JSONDecodeError("Expecting ',' or ']' behind an item of the list", text, position)
    if _behind_space(text, position + 1) != len(text):
        raise json.JSONDecodeError("Expecting the end of the file behind the list", text, position + 1)


def _behind_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


class _JsonLines(Sequence[Any]):
    """The records of a JSON-lines file, found by their offsets and parsed on demand."""

    def __init__(self, path: Path, file: BinaryIO, progress: bool) -> None:
        self.path = path
        n_pieces = -(-file.seek(0, os.SEEK_END) // _SCANNED)
        file.seek(0)
        read = iter(lambda: file.read(_SCANNED), b"")
        pieces = with_bar(read, f"finding lines of {path.name}", "piece", total=n_pieces, progress=progress)
        newlines = [np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n")) for piece in pieces]
        # A mapping and not a file handle: threads and forked workers can read it at the same time.
        self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.tell() else b""
        if self.data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise FastsaeError(f"{path}: expected text in UTF-8, but this file is in UTF-16. Save it as UTF-8")
        found = [places + i * _SCANNED for i, places in enumerate(newlines)]
        ends = np.concatenate([*found, [len(self.data)]]).astype(np.int64)
        self.starts, self.ends, self.lines = _filled_lines(self.data, ends)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        start, end = int(self.starts[index]), int(self.ends[index])
        if end - start > _LONGEST_LINE:
            reason = f"the line is longer than {_LONGEST_LINE >> 20} MB"
            return self._unusable(index, reason, f"it has {end - start:,} bytes")
        try:
            return json.loads(self.data[start:end].decode("utf-8", "surrogatepass").lstrip("\ufeff"))
        except ValueError as error:
            return self._unusable(index, "the line is damaged JSON", str(error))
        except RecursionError:
            return self._unusable(index, "the JSON is nested too deeply", "it nests too deeply")

    def are_rows(self) -> bool:
        """Whether each line is a row; not where the first is part of a longer value, or all there is and a list of rows."""
        if not len(self):
            return True
        start, end = int(self.starts[0]), int(self.ends[0])
        try:
            row = json.loads(self._text(start, min(end, start + _LONGEST_LINE)))
            return len(self) > 1 or not isinstance(row, list) or any(map(_is_message, row))
        except (ValueError, RecursionError):
            pass
        head = self._text(start, start + _LONGEST_LINE)
        is_list = head[:1] == "["
        try:
            _, end = _PARSER.raw_decode(head, _behind_space(head, 1) if is_list else 0)
        except (ValueError, RecursionError):  # the line is damaged
            return True
        return not is_list and "\n" not in head[:end]

    def _text(self, start: int, end: int) -> str:
        return self.data[start:end].decode("utf-8", "replace").lstrip("\ufeff \t\r\n")

    def _unusable(self, index: Any, reason: str, found: str) -> UnusableRow:
        return UnusableRow(
            reason,
            f"{self.path}, line {self.lines[index]}: expected one JSON object per line, but {found}. Correct or remove "
            "the line; if it is the last one, the file may have been cut off",
        )


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and ("role" in item or "from" in item)


def _filled_lines(data: Any, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts, ends and numbers of the lines that are not blank; none is read whole, as it can be as long as the file."""
    starts = np.concatenate([[0], ends[:-1] + 1])
    codes = np.frombuffer(data, np.uint8)
    is_filled = starts < ends
    is_filled[is_filled] = ~np.isin(codes[starts[is_filled]], np.frombuffer(b" \t\r\v\f", np.uint8))
    for line in np.flatnonzero(~is_filled & (starts < ends)).tolist():  # they begin with a space, and few do
        is_filled[line] = bool(data[starts[line] : min(ends[line], starts[line] + _LONGEST_LINE)].strip())
    filled = np.flatnonzero(is_filled)
    return starts[filled], ends[filled], filled + 1
