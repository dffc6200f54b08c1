"""What a stranger's files hold: damaged lines, endless lines, odd roles and contents, in JSON and in Arrow."""

import json
import logging
import os

import pytest

from fastsae.data import chat_files, json_files
from fastsae.data.chat import NO_SPEAKER, NO_TEXT, ChatDataset, as_dialogue, load_chats
from fastsae.data.dropped import Dropped
from fastsae.errors import FastsaeError, UsageError

datasets = pytest.importorskip("datasets")


def row(user="hello", assistant="good day", roles=("user", "assistant")):
    texts = (user, assistant)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]}


def write(path, lines):
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return str(path)


GOOD = as_dialogue(row()["messages"])
DEEP = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
DAMAGED = {
    "cut off": (b'{"messages": [{"role": "us', "the line is damaged JSON"),
    "not UTF-8": (b'{"messages": "\xe9\xff"}', "the line is damaged JSON"),
    "NUL bytes": (b"\0" * 50, "the line is damaged JSON"),
    "a huge number": (b'{"id": ' + b"1" * 5000 + b"}", "the line is damaged JSON"),
    "two objects": (b'{"a": 1} {"b": 2}', "the line is damaged JSON"),
    "nested too deeply": (DEEP, "the JSON is nested too deeply"),
    "not closed": (b"[" * 200_000, "the JSON is nested too deeply"),
    "no object": (b"3", NO_TEXT),
    "infinite": (b"-Infinity", NO_TEXT),
    "another column": (b'{"text": "a"}', NO_TEXT),
    "NaN as content": (b'{"messages": [{"role": "user", "content": NaN}]}', NO_TEXT),
    "deep JSON as text": (json.dumps({"messages": "[" * 100_000}).encode(), NO_TEXT),
    "a list of lists": (b'{"messages": [[["user", "a"]]]}', NO_TEXT),
    "an image": (b'{"messages": [{"role": "user", "content": {"type": "image", "bytes": "AAAA"}}]}', NO_TEXT),
    "system alone": (b'{"messages": [{"role": "system", "content": "be brief"}]}', NO_SPEAKER),
    "tools alone": (
        b'{"messages": [{"role": "tool", "content": "1"}, {"role": "System", "content": "a"}]}',
        NO_SPEAKER,
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_line_that_cannot_be_used_is_dropped_and_counted(tmp_path, kind, caplog):
    line, reason = DAMAGED[kind]
    path = write(tmp_path / "a.jsonl", [row(), b"", line, row(), row(), line])
    with caplog.at_level(logging.WARNING, "fastsae"):
        dataset = load_chats(path)
    assert list(dataset) == [GOOD] * 3
    assert dataset.drops == Dropped(5, {reason: 2}, {reason: 1})
    assert f"a.jsonl: 2 of 5 dialogues cannot be used: 2 because {reason} (such as row 1)" in caplog.text


def test_one_dropped_line_in_a_hundred_is_no_warning(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", [*[row()] * 99, b"{"])
    with caplog.at_level(logging.WARNING, "fastsae"):
        assert load_chats(path).dropped == 1
    assert caplog.text == ""


@pytest.mark.parametrize("lines", [[row(), b"{"], [b"{", b"{", row()], [*[row()] * 200, *[b"{"] * 200]])
def test_a_file_of_which_half_is_damaged_is_an_error_that_names_the_first_line(tmp_path, lines):
    first = lines.index(b"{") + 1
    with pytest.raises(FastsaeError, match=rf"a\.jsonl, line {first}: expected one JSON object per line") as caught:
        load_chats(write(tmp_path / "a.jsonl", lines))
    assert not isinstance(caught.value, UsageError)


def test_many_damaged_lines_at_the_start_do_not_hide_the_column(tmp_path):
    dataset = load_chats(write(tmp_path / "a.jsonl", [*[b"{"] * 150, *[row()] * 200]))
    assert (dataset.column, len(dataset), dataset.dropped) == ("messages", 200, 150)


def test_no_usable_dialogue_says_why():
    with pytest.raises(UsageError, match=f"2 of 2 dialogues cannot be used: 2 because {NO_SPEAKER}"):
        ChatDataset([{"messages": [{"role": "system", "content": "a"}]}] * 2, "rows")


def test_line_ends_byte_order_marks_and_blank_lines(tmp_path):
    text = b"\xef\xbb\xbf" + json.dumps(row()).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\r\n".join([text, b"", b"  \t", b" " + text[3:], text]))
    assert list(load_chats(str(path))) == [GOOD] * 3
    path.write_bytes(b"\xff\xfe" + json.dumps(row()).encode("utf-16-le"))
    with pytest.raises(FastsaeError, match=r"this file is in UTF-16\. Save it as UTF-8"):
        load_chats(str(path))


def test_an_endless_line_is_dropped_without_being_read(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    line = json.dumps(row()).encode() + b"\n"
    with path.open("wb") as file:
        file.write(line)
        file.seek(2**28, os.SEEK_CUR)  # a hole of 256 MB, which takes no room on the disk
        file.write(b"\n" + line * 3)
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(len(text)) or loads(text))
    dataset = load_chats(str(path))
    assert list(dataset) == [GOOD] * 4
    assert dataset.drops == Dropped(5, {"the line is longer than 64 MB": 1}, {"the line is longer than 64 MB": 1})
    assert max(parsed) < 100


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_lines_are_found_whatever_piece_they_cross(tmp_path, monkeypatch, size):
    monkeypatch.setattr(json_files, "_SCANNED", size)
    lines = [row(f"é{i}" * (i % 5)) if i % 3 else b"" for i in range(30)]
    path = write(tmp_path / "a.jsonl", lines)
    rows = chat_files.open_files([tmp_path / "a.jsonl"], progress=False)
    assert list(rows) == [line for line in lines if line != b""]
    assert rows.lines.tolist() == [i + 1 for i, line in enumerate(lines) if line != b""]
    assert len(load_chats(path)) == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nests too deeply"),
        (b'[{"messages": [', "expected a JSON list of rows"),
        (b'[{"a": 1} {"a": 2}]', "Expecting ',' or ']'"),
        (b'[{"a": 1},]', "Expecting value"),
        (b"[3] 4", "Expecting the end of the file"),
        (b'["\xff"]', "can't decode byte 0xff"),
    ],
)
def test_a_damaged_json_list_is_one_clear_error(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FastsaeError, match=f"a\\.json: .*{message}"):
        load_chats(str(tmp_path / "a.json"))


@pytest.mark.parametrize("text", ["[]", " [ ] \n", "[1,2]", ' [ {"a" : [1, 2]} , "b" ] ', "[[],[[]]]"])
def test_the_items_of_a_json_list(text):
    assert list(json_files._values(text)) == json.loads(text)


def test_lone_surrogates_are_replaced_and_pairs_joined(tmp_path):
    path = write(tmp_path / "a.jsonl", [rb'{"messages": [{"role": "user", "content": "a \ud83d"}]}'] * 2)
    assert load_chats(path)[0] == [{"role": "user", "content": "a \ufffd"}]
    parts = [{"role": "user", "content": ["\ud83d", {"text": "\ude00"}]}]
    assert as_dialogue(parts) == [{"role": "user", "content": "😀"}]


@pytest.mark.parametrize("kind", ["json", "arrow"])
def test_roles_are_mapped_and_the_unknown_ones_counted_by_dialogue(kind, caplog):
    rows = [
        row(roles=("Human", "chatgpt")),
        row(roles=("HUMAN", "gpt-4")),
        row(roles=("Alice", "Alice")),
        row(roles=("Alice", "assistant")),
        row(roles=("critic", "tool")),
        row("", "x", roles=("nobody", "user")),
    ]
    dataset = ChatDataset(rows if kind == "json" else datasets.Dataset.from_list(rows), "rows")
    assert [[turn["role"] for turn in dialogue] for dialogue in dataset] == [
        ["user", "assistant"],
        ["user", "assistant"],
        ["Alice", "Alice"],
        ["Alice", "assistant"],
        ["critic", "tool"],
        ["user"],
    ]
    assert dataset.unknown_roles == {"Alice": 2, "critic": 1}


def test_unknown_roles_are_shown(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", [row(roles=("Alice", "Bob"))] * 3 + [row(roles=("Alice", "gpt"))])
    with caplog.at_level(logging.WARNING, "fastsae"):
        load_chats(path)
    assert "these roles are not known" in caplog.text
    assert "'Alice' (4), 'Bob' (3)" in caplog.text


def test_json_and_arrow_drop_the_same_rows():
    kinds = [
        row(),
        {"messages": []},
        {"messages": None},
        row(roles=("system", "tool")),
        row(roles=(" ", "SYSTEM")),
        row("  ", "\u2003\n"),
        row(roles=("Human", "system")),
        row("x", None),
    ]
    rows = kinds * 5
    arrow = ChatDataset(datasets.Dataset.from_list(rows), "arrow")
    plain = ChatDataset(rows, "rows")
    assert arrow.drops == plain.drops
    assert plain.drops.counts == {NO_TEXT: 15, NO_SPEAKER: 10}
    assert list(arrow) == list(plain)
    assert len(plain) == 15


def test_parquet_with_text_that_is_not_utf8_drops_that_row(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    text = pa.Array.from_buffers(  # a string array whose third value is not UTF-8
        pa.string(),
        3,
        [None, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0])), pa.py_buffer(b"ab\xff")],
    )
    turns = pa.StructArray.from_arrays([pa.array(["user"] * 3), text], names=["role", "content"])
    chats = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), turns)
    pq.write_table(pa.table({"messages": chats}), tmp_path / "a.parquet")
    dataset = load_chats(str(tmp_path / "a.parquet"))
    assert [turn["content"] for dialogue in dataset for turn in dialogue] == ["a", "b"]
    assert dataset.drops == Dropped(3, {"the row cannot be read": 1}, {"the row cannot be read": 2})


@pytest.mark.parametrize("kind", ["large_list", "json text", "dictionary", "binary", "fixed"])
def test_parquet_with_other_types(tmp_path, monkeypatch, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    turns = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 4
    string = {"dictionary": pa.dictionary(pa.int32(), pa.string()), "binary": pa.binary()}.get(kind, pa.string())
    turn = pa.struct([("role", pa.string()), ("content", string)])
    of = {"large_list": pa.large_list(turn), "fixed": pa.list_(turn, 2)}.get(kind, pa.list_(turn))
    column = pa.array([json.dumps(t) for t in turns]) if kind == "json text" else pa.array(turns, type=of)
    pq.write_table(pa.table({"messages": column}), tmp_path / "a.parquet")
    if kind == "binary":  # bytes are no text
        with pytest.raises(UsageError, match="no chat column"):
            load_chats(str(tmp_path / "a.parquet"))
        return
    assert list(load_chats(str(tmp_path / "a.parquet"))) == turns


def test_other_columns_are_not_decoded():
    """Such as images, which need a library and time."""
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({"messages": [turn], "image": datasets.Image()})
    rows = [{**row(), "image": {"bytes": b"no image", "path": None}}] * 3
    rows = datasets.Dataset.from_list(rows).cast(features)  # the features at once would need Pillow to encode
    dataset = ChatDataset(rows, "rows")
    assert list(dataset) == [GOOD] * 3
