"""Plain text and token ids from files, folders and the hub, opened as a sequence of texts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fastsae.data import texts
from fastsae.data.texts import load_texts
from fastsae.data.tokens import TokenRows
from fastsae.errors import FastsaeError, UsageError

LINES = [f"line {i}: the tide went out\n" for i in range(200)]


class Tokenizer:
    """A token for each letter, and a BOS token for `^`."""

    bos_token, bos_token_id = "^", 94

    def __call__(self, written: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in written]}


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.txt.gz"])
def test_a_text_file_is_read_in_pieces_that_end_with_a_line(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_PIECE", 100)
    content = "".join(LINES).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = list(load_texts(str(tmp_path / name)))
    assert "".join(found) == "".join(LINES)
    assert all(piece.endswith("\n") for piece in found)
    assert {100 < len(piece) < 130 for piece in found[:-1]} == {True}


def test_odd_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfno end of line \xff")
    (tmp_path / ".hidden.txt").write_text("secret")
    assert list(load_texts(str(tmp_path))) == ["no end of line �"]
    with pytest.raises(UsageError, match="there is no such file"):
        load_texts(str(tmp_path / "missing.txt"))


@pytest.mark.parametrize("column", ["text", "content", "document"])
def test_rows_with_a_column_of_texts(tmp_path: Path, column: str) -> None:
    rows = [{"id": 1, column: "one"}, {"id": 2, column: None}, {"id": 3}, {"id": 4, column: "four \ud800"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{damaged\n")
    found = load_texts(str(path))
    assert list(found) == ["one", "", "", "four �", ""]
    rows_of, drops = TokenRows(found, Tokenizer(), 100, None).read(range(5))
    assert rows_of[0] == (0, [94, *map(ord, "one")])
    assert drops.total == 3


@pytest.mark.parametrize("column", ["input_ids", "tokens"])
def test_rows_that_are_tokenised_already(tmp_path: Path, column: str) -> None:
    rows = [[5, 6, 7, 8], [], None, "no ids", [5, 600], [5, -1], [9, 9.5], [3, 4]]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    found, drops = TokenRows(load_texts(str(path)), Tokenizer(), 3, 100).read(range(8))
    assert found == [(0, [5, 6, 7]), (7, [3, 4])]
    assert drops.counts == {"it has fewer than 2 tokens": 4, "the model has no embedding for one of its tokens": 2}


def test_rows_without_text_are_one_message(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [], "n": 3}\n')
    with pytest.raises(UsageError, match=r"expected a \.txt file, or rows with a column of texts .* 'messages', 'n'"):
        load_texts(str(path))


def test_a_dataset_of_the_hub_is_streamed_as_far_as_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    n_read = 0

    def stream(*_: Any, streaming: bool, **__: Any) -> Any:
        nonlocal n_read
        assert streaming
        while True:
            n_read += 1
            yield {"text": "a" * 90}

    monkeypatch.setattr(datasets, "load_dataset", stream)
    found = load_texts("me/pile", n_tokens=1000)
    assert (len(found), n_read) == (78, 78)  # of 103 bytes each: 8,000 bytes

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(FastsaeError, match="could not be reached"):
        load_texts("me/other", n_tokens=10)
