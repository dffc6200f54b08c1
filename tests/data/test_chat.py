"""load_chats: every source and message format, and every mistake a user can make with them."""

import json
import sys
from pathlib import Path

import pytest

from fastsae.data.chat import ChatDataset, as_dialogue, load_chats
from fastsae.errors import FastsaeError, UsageError

datasets = pytest.importorskip("datasets")

EXPECTED = [
    [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "π?"}],
]
MESSAGES = [{"messages": dialogue, "id": i} for i, dialogue in enumerate(EXPECTED)]
SHAREGPT = [
    {
        "id": i,
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], turn["role"]), "value": turn["content"]}
            for turn in dialogue
        ],
    }
    for i, dialogue in enumerate(EXPECTED)
]


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_json(path: Path, rows: list) -> str:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("rows", [MESSAGES, SHAREGPT, EXPECTED], ids=["messages", "sharegpt", "bare lists"])
@pytest.mark.parametrize(("name", "write"), [("a.jsonl", write_jsonl), ("a.json", write_json)])
def test_json_files_give_the_dialogues(tmp_path, rows, name, write):
    assert list(load_chats(write(tmp_path / name, rows))) == EXPECTED


def test_a_json_file_may_hold_json_lines(tmp_path):
    assert list(load_chats(write_jsonl(tmp_path / "a.json", MESSAGES))) == EXPECTED


@pytest.mark.parametrize("rows", [MESSAGES, SHAREGPT], ids=["messages", "sharegpt"])
def test_arrow_sources_give_the_dialogues(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": dataset.select([1]), "test": dataset}).save_to_disk(str(tmp_path / "dict"))
    assert list(load_chats(str(tmp_path / "a.parquet"))) == EXPECTED
    assert list(load_chats(str(tmp_path / "saved"))) == EXPECTED
    assert list(load_chats(str(tmp_path / "dict"))) == EXPECTED[1:]
    assert list(load_chats(str(tmp_path / "dict"), split="test")) == EXPECTED


def test_folder_files_are_joined_in_order_and_grouped_by_split(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    (folder / "data").mkdir(parents=True)
    write_jsonl(folder / "data" / "train-00000.jsonl", MESSAGES[:1])
    write_jsonl(folder / "data" / "train-00001.jsonl", MESSAGES[1:])
    datasets.Dataset.from_list(MESSAGES).to_parquet(str(folder / "data" / "train-00002.parquet"))
    write_jsonl(folder / "test.jsonl", MESSAGES[1:])
    (folder / "README.md").write_text("not data")
    train = load_chats(str(folder))
    assert list(train) == EXPECTED * 2
    assert [train[i] for i in (3, 0, -2)] == [EXPECTED[1], EXPECTED[0], EXPECTED[0]]
    assert train[1:3] == [EXPECTED[1], EXPECTED[0]]
    assert list(load_chats(str(folder), split="test")) == EXPECTED[1:]
    with pytest.raises(UsageError, match="no split 'validation'; its splits are: 'train', 'test'"):
        load_chats(str(folder), split="validation")


def test_demo(monkeypatch):
    monkeypatch.setattr("fastsae.data.demo.load_dialogues", lambda progress: EXPECTED)
    assert load_chats("demo") is EXPECTED
    with pytest.raises(UsageError, match="'demo' has no split 'test'; its splits are: 'train'"):
        load_chats("demo", split="test")


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([{"role": "user", "content": None}, {"role": "assistant", "content": "yes"}], [("assistant", "yes")]),
        ([{"role": "user", "content": "  \n"}, {"role": "tool", "content": "{}"}], [("tool", "{}")]),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, "b"]}], [("user", "ab")]),
        ([{"role": "user", "content": 3}], []),
        ([{"role": None, "content": "x"}, "text"], []),
        ('[{"role": "user", "content": "from JSON text"}]', [("user", "from JSON text")]),
        ('[{"role": "user", "content": "cut', []),
        ({"from": ["human", "gpt"], "value": ["a", "b"]}, [("user", "a"), ("assistant", "b")]),
        ("plain text", []),
        (None, []),
    ],
)
def test_as_dialogue_keeps_turns_with_text(turns, expected):
    assert [(turn["role"], turn["content"]) for turn in as_dialogue(turns)] == expected


def test_rows_without_text_are_dropped_and_counted_alike_in_json_and_arrow(tmp_path):
    empty = [
        [],
        None,
        [{"role": "user", "content": " "}],
        [{"role": None, "content": "x"}],
        [{"role": "user", "content": None}],
    ]
    rows = [MESSAGES[0], *({"messages": turns, "id": 9} for turns in empty), MESSAGES[1]] * 3
    plain = ChatDataset(rows, "rows")
    arrow = ChatDataset(datasets.Dataset.from_list(rows), "arrow")
    assert list(plain) == list(arrow) == EXPECTED * 3
    assert plain.dropped == arrow.dropped == 3 * len(empty)
    # The scan of Arrow columns gives up on content in parts; the rows are then read one by one.
    parts = [{"messages": [{"role": "user", "content": [{"text": text}]}]} for text in ("a", "", "b")]
    assert ChatDataset(datasets.Dataset.from_list(parts), "parts").kept_rows.tolist() == [0, 2]


def test_preferred_column_wins_even_where_its_first_rows_are_empty():
    rows = [{"rejected": EXPECTED[1], "messages": []}, {"rejected": EXPECTED[1], "messages": EXPECTED[0]}]
    dataset = ChatDataset(rows, "rows")
    assert (dataset.column, dataset.dropped, list(dataset)) == ("messages", 1, EXPECTED[:1])


def test_json_lines_are_parsed_when_asked_for(tmp_path, monkeypatch):
    dataset = load_chats(write_jsonl(tmp_path / "a.jsonl", MESSAGES * 50))
    parsed = []
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or {"messages": EXPECTED[0]})
    assert dataset[70] == EXPECTED[0]
    assert len(parsed) == 1


@pytest.mark.parametrize("source", ["missing.jsonl", "./nowhere", "/no/such/folder", "a b", ""])
def test_missing_path(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"no such file|expected a saved dataset"):
        load_chats(source)


def test_messages_for_bad_files(tmp_path):
    cases = {
        "columns.jsonl": (b'{"text": "a", "label": 1}\n', UsageError, "'messages' or.*found are: 'text', 'label'"),
        "empty.jsonl": (b"\n\n", UsageError, "is empty"),
        "empty.json": (b"[]", UsageError, "is empty"),
        "cut.jsonl": (b'{"messages": []}\n\n{"messages": [{"ro', FastsaeError, "cut.jsonl, line 3: expected one JSON"),
        "latin.jsonl": (b'{"messages": "\xe9"}\n', FastsaeError, "latin.jsonl, line 1"),
        "cut.json": (b'[{"messages": ', FastsaeError, "cut.json: expected a JSON list"),
        "chats.csv": (b"a,b", UsageError, "ends in .jsonl, .ndjson or .json"),
        "broken.parquet": (b"PAR1 and then nothing", FastsaeError, "not readable as parquet"),
    }
    for name, (content, error, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(error, match=message):
            load_chats(str(tmp_path / name))
    with pytest.raises(UsageError, match="no split 'test'; its splits are: 'train'"):
        load_chats(write_jsonl(tmp_path / "a.jsonl", MESSAGES), split="test")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="expected a saved dataset, or files that end in"):
        load_chats(str(tmp_path / "folder"))
    (tmp_path / "folder" / "state.json").write_text("{}")
    with pytest.raises(FastsaeError, match="not readable as a saved dataset"):
        load_chats(str(tmp_path / "folder"))


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"),
            FastsaeError,
            "could not be reached",
        ),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist"),
            UsageError,
            "neither a file.*nor a dat",
        ),
        (
            ValueError("Unknown split \"x\". Should be one of ['train', 'test']."),
            UsageError,
            r"no split.*'train', 'test'",
        ),
        (ValueError("Config name is missing.\nPick one among ['7M']"), UsageError, r"\['7M'\].*owner/name:config"),
        (datasets.exceptions.DatasetGenerationError("stopped"), FastsaeError, "downloaded whole.*stopped.*Run again"),
        (OSError(28, "No space left on device"), FastsaeError, "No space left on device.*free disk space"),
    ],
)
def test_hub_failures_say_what_to_do(monkeypatch, failure, error, message):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(FastsaeError, match=f"(?s){message}") as caught:
        load_chats("a/b", split="x")
    assert type(caught.value) is error


def test_hub_id_with_configuration(monkeypatch):
    asked = {}

    def load_dataset(name, config, split):
        asked.update(name=name, config=config, split=split)
        return datasets.Dataset.from_list(MESSAGES)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(load_chats("owner/name:7M", split="train[:2]")) == EXPECTED
    assert asked == {"name": "owner/name", "config": "7M", "split": "train[:2]"}


def test_json_works_without_datasets_and_parquet_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert list(load_chats(write_jsonl(tmp_path / "a.jsonl", MESSAGES))) == EXPECTED
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(FastsaeError, match=r"pip install 'fastsae-kernels\[train\]'"):
        load_chats(str(tmp_path / "a.parquet"))
