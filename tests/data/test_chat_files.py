"""Files of chats under every name and in every layout that others give them, and folders too large to search."""

import errno
import gzip
import json

import pytest

from fastsae.data import chat_files
from fastsae.data.chat import load_chats
from fastsae.errors import FastsaeError, UsageError

CHATS = [
    [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"[{{answer}}]\n{i}"}]
    for i in range(3)
]
ROWS = [{"messages": chat, "id": i} for i, chat in enumerate(CHATS)]
LINES = "\n".join(map(json.dumps, ROWS)).encode()


def written(path, content):
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.NDJSON", "a.Json", "a.v2.jsonl"])
def test_suffixes_of_json_files(tmp_path, name):
    assert list(load_chats(written(tmp_path / name, LINES))) == CHATS


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.ndjson.gz", "a.json.gz", "a.JSON.GZ"])
@pytest.mark.parametrize("content", [LINES, json.dumps(ROWS).encode()], ids=["lines", "list"])
def test_files_packed_by_gzip(tmp_path, name, content):
    path = written(tmp_path / name, gzip.compress(content))
    dataset = load_chats(path)
    assert list(dataset) == CHATS
    assert dataset[-1] == CHATS[-1]
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(LINES * 50)[:-9],
        LINES,
        gzip.compress(LINES)[:12] + b"\xff" * 40,
        gzip.compress(LINES) + b"more",
    ],
    ids=["cut off", "not packed", "damaged", "more behind it"],
)
def test_a_damaged_gzip_is_one_clear_error(tmp_path, content):
    with pytest.raises(FastsaeError, match=r"a\.jsonl\.gz: expected a file packed by gzip, but .* get it again"):
        load_chats(written(tmp_path / "a.jsonl.gz", content))


LAYOUTS = {
    "a list on one line": json.dumps(ROWS),
    "a list of lists on one line": json.dumps(CHATS),
    "a list over many lines": json.dumps(ROWS, indent=2),
    "a list with a row on each line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "a list whose bracket is on the first row's line": "[" + ",\n ".join(map(json.dumps, ROWS)) + "]",
    "objects over many lines": "\n".join(json.dumps(row, indent=4) for row in ROWS),
    "the same behind a byte order mark": "\ufeff\n" + "\n".join(json.dumps(row, indent=4) for row in ROWS),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_layouts_of_json(tmp_path, layout, name):
    assert list(load_chats(written(tmp_path / name, LAYOUTS[layout].encode()))) == CHATS


def test_one_object_over_many_lines_is_one_row(tmp_path):
    assert list(load_chats(written(tmp_path / "a.jsonl", json.dumps(ROWS[0], indent=2).encode()))) == CHATS[:1]


def test_lists_of_messages_on_lines_stay_dialogues(tmp_path):
    lines = [json.dumps(chat).encode() for chat in CHATS]
    assert list(load_chats(written(tmp_path / "one.jsonl", lines[0]))) == CHATS[:1]
    assert list(load_chats(written(tmp_path / "a.jsonl", b"\n".join(lines)))) == CHATS
    damaged = b"\n".join([lines[0][:-20], *lines])
    assert load_chats(written(tmp_path / "b.jsonl", damaged)).drops.counts == {"the line is damaged JSON": 1}


@pytest.mark.parametrize("text", [json.dumps(ROWS, indent=2)[:-30], json.dumps(ROWS[0], indent=2)[:-30], "{"])
def test_a_cut_off_layout_names_its_first_line(tmp_path, text):
    with pytest.raises(FastsaeError, match=r"a\.jsonl, line 1: expected one JSON object per line"):
        load_chats(written(tmp_path / "a.jsonl", text.encode()))


def test_a_folder_reads_every_suffix_once(tmp_path):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    written(tmp_path / "a.JSONL", LINES)
    written(tmp_path / "a.JSONL.gz", gzip.compress(LINES))  # packed beside its content
    written(tmp_path / "deep" / "b.ndjson.gz", gzip.compress(LINES))
    written(tmp_path / "deep" / "deeper" / "test.json", json.dumps(ROWS).encode())
    assert list(load_chats(str(tmp_path))) == CHATS * 2
    assert list(load_chats(str(tmp_path), split="test")) == CHATS


def test_the_search_of_a_folder_ends(tmp_path, monkeypatch):
    written(tmp_path / "a.jsonl", LINES)
    (tmp_path / ".hidden").mkdir()
    for i in range(20):
        (tmp_path / ".hidden" / f"{i}").touch()
    monkeypatch.setattr(chat_files, "_SEARCHED_FILES", 10)
    assert list(load_chats(str(tmp_path))) == CHATS
    (tmp_path / "deep").mkdir()
    for i in range(20):
        (tmp_path / "deep" / f"{i}").touch()
    with pytest.raises(UsageError, match=r"dataset: expected a folder of chat files, got .* with more than 10 files"):
        load_chats(str(tmp_path))


class Hub:
    """Stands in for `datasets.load_dataset`: streams rows, counts them, and can fail after some."""

    def __init__(self, n_rows, fails_after=None):
        self.n_rows, self.fails_after, self.n_read, self.calls = n_rows, fails_after, 0, []

    def __call__(self, name, config, *, split, streaming=False):
        self.calls.append((name, config, split, streaming))
        return self._rows()

    def _rows(self):
        for i in range(self.n_rows):
            if i == self.fails_after:
                raise ConnectionError("the line is dead")
            self.n_read += 1
            yield {"messages": CHATS[i % 3], "id": i, "odd": {1}}


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "fastsae"


def test_a_limited_dataset_of_the_hub_is_streamed_once(monkeypatch, hub_cache):
    hub = Hub(10**9)
    monkeypatch.setattr("datasets.load_dataset", hub)
    first = load_chats("me/chats:part", "test", limit=50)
    assert hub.calls == [("me/chats", "part", "test", True)]
    assert hub.n_read == len(first) == 155  # the limit, a tenth more, and a hundred
    assert first[4] == CHATS[1]
    again = load_chats("me/chats:part", "test", limit=50)  # a resumed run, without a network
    assert hub.n_read == 155
    assert list(again) == list(first)
    load_chats("me/chats", "test", limit=50)
    assert hub.n_read == 310


def test_a_stream_that_breaks_leaves_no_half_of_a_file(monkeypatch, hub_cache):
    monkeypatch.setattr("datasets.load_dataset", Hub(10**9, fails_after=20))
    with pytest.raises(FastsaeError, match="hub could not be reached: the line is dead"):
        load_chats("me/chats", limit=50)
    assert list(hub_cache.iterdir()) == []
    monkeypatch.setattr("datasets.load_dataset", Hub(30))
    assert len(load_chats("me/chats", limit=50)) == 30


def test_a_full_disk_is_not_the_fault_of_the_hub(monkeypatch, hub_cache):
    def full(path, write):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("datasets.load_dataset", Hub(30))
    monkeypatch.setattr(chat_files, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        load_chats("me/chats", limit=50)
