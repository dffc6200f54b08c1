"""Chat datasets as one type: a lazy sequence of dialogues, each a list of role/content messages."""

from __future__ import annotations

import json
import logging
import mmap
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np

from fastsae.errors import FastsaeError, UsageError

Message: TypeAlias = dict[str, str]
Dialogue: TypeAlias = list[Message]

CHAT_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_SPLIT_WORDS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"}
_SPLIT_WORDS |= {"val": "validation", "dev": "validation", "test": "test", "eval": "test"}
_DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
_PROBED_ROWS = 100

logger = logging.getLogger(__name__)


def load_chats(source: str, split: str = "train") -> Sequence[Dialogue]:
    """Open a chat dataset without reading it into memory.

    A dialogue is a list of `{"role", "content"}` messages. Recognised are columns of messages with `role` and
    `content`, or `from` and `value` (ShareGPT; `human` becomes `user`, `gpt` becomes `assistant`), also as JSON text.
    Content given as a list of parts becomes the text parts joined. A turn without text is left out, and so is a row
    without any such turn; `ChatDataset.dropped` counts those rows.

    Args:
        source: `"demo"`; a `.jsonl`, `.json` (a list, or JSON lines) or `.parquet` file; a folder written by
            `datasets.save_to_disk`, or one that holds such files; or a Hugging Face hub id, with its configuration
            behind a colon if it has several (`BAAI/Infinity-Instruct:0625`).
        split: Name of the split. Files of a folder belong to the split whose name is a word of their own name or of
            their folder's; a single file is `"train"`.

    Raises:
        UsageError: Nothing is found at `source`, it has no such split or no chat column, or it is empty.
        FastsaeError: A file is damaged, a download fails, or the `datasets` package is missing.
    """
    if source == "demo":
        from fastsae.data import demo  # lazy: builds its dialogues from installed documentation

        _require_split(source, split, ["train"])
        return demo.load_dialogues()
    path = Path(source).expanduser()
    if path.is_dir():
        rows = _open_folder(path, split)
    elif path.is_file():
        _require_split(source, split, ["train"])
        rows = _open_files([path])
    elif _looks_like_path(source):
        raise UsageError(f"dataset {source!r}: there is no such file or folder ({path.absolute()})")
    else:
        rows = _open_hub(source, split)
    dataset = ChatDataset(rows, source)
    if dataset.dropped:
        logger.warning("%s: left out %d of %d rows without any text", source, dataset.dropped, len(rows))
    return dataset


class ChatDataset(Sequence[Dialogue]):
    """Rows of a dataset, read and turned into dialogues when asked for.

    `column` is the chat column's name (None where a row is itself the list of messages), `dropped` the number of
    rows left out because they hold no text.
    """

    def __init__(self, rows: Sequence[Any], source: str) -> None:
        if len(rows) == 0:
            raise UsageError(f"dataset {source!r} is empty: expected at least one row with a dialogue")
        self.rows = rows
        self.column = _find_column(islice(iter(rows), _PROBED_ROWS), source)
        self.kept_rows = _rows_with_text(rows, self.column)  # int64, 8 bytes a row
        self.dropped = len(rows) - len(self.kept_rows)

    def __len__(self) -> int:
        return len(self.kept_rows)

    @overload
    def __getitem__(self, index: int) -> Dialogue: ...
    @overload
    def __getitem__(self, index: slice) -> list[Dialogue]: ...
    def __getitem__(self, index: int | slice) -> Dialogue | list[Dialogue]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return as_dialogue(_turns(self.rows[int(self.kept_rows[index])], self.column))


def as_dialogue(turns: Any) -> Dialogue:
    """Turn what a chat column holds into a dialogue; the result is empty if `turns` is no chat or has no text."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            turns = json.loads(turns)
        except ValueError:
            return []
    if isinstance(turns, dict) and all(isinstance(values, list) for values in turns.values()):
        # Older versions of `datasets` turn a list of records into a record of lists.
        turns = [dict(zip(turns, values, strict=False)) for values in zip(*turns.values(), strict=False)]
    if not isinstance(turns, list):
        return []
    dialogue = []
    for turn in turns:
        if not isinstance(turn, dict):
            continue
        role = turn.get("role") or turn.get("from")
        text = _text(turn["content"] if turn.get("content") is not None else turn.get("value"))
        if isinstance(role, str) and text.strip():
            dialogue.append({"role": _SHAREGPT_ROLES.get(role, role), "content": text})
    return dialogue


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(_text(part.get("text") if isinstance(part, dict) else part) for part in content)
    return content if isinstance(content, str) else ""


def _turns(row: Any, column: str | None) -> Any:
    if column is None:
        return row
    return row.get(column) if isinstance(row, dict) else None


def _find_column(sample: Iterable[Any], source: str) -> str | None:
    """Name the column that holds dialogues, a usual name first; None if the rows are dialogues themselves."""
    rows = list(sample)
    if any(as_dialogue(row) for row in rows if isinstance(row, list)):
        return None
    records = [row for row in rows if isinstance(row, dict)]
    columns: list[str] = list(dict.fromkeys(name for row in records for name in row))
    for name in sorted(columns, key=lambda name: CHAT_COLUMNS.index(name) if name in CHAT_COLUMNS else 99):
        if any(as_dialogue(row.get(name)) for row in records):
            return name
    raise UsageError(
        f"dataset {source!r}: no chat column in the first {len(rows)} rows. Expected a column such as 'messages' or "
        f"'conversations' with a list of {{role, content}} or {{from, value}} items; the columns found are: "
        f"{', '.join(map(repr, columns)) or 'none'}"
    )


def _rows_with_text(rows: Sequence[Any], column: str | None) -> np.ndarray:
    """Indices of the rows whose dialogue is not empty."""
    if column is not None and hasattr(rows, "with_format"):
        kept = _arrow_rows_with_text(rows, column)
        if kept is not None:
            return kept
    return np.array([i for i, row in enumerate(rows) if as_dialogue(_turns(row, column))], dtype=np.int64)


def _arrow_rows_with_text(dataset: Any, column: str, block: int = 20_000) -> np.ndarray | None:
    """The same on Arrow columns, 50 times faster; None if their type is not a list of records of strings."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = dataset.select_columns([column]).with_format("arrow")
    kept = [np.empty(0, dtype=np.int64)]
    for start in range(0, len(dataset), block):
        chats = table[start : start + block].column(column).combine_chunks()
        if not (pa.types.is_list(chats.type) or pa.types.is_large_list(chats.type)):
            return None
        item = chats.type.value_type
        fields = {field.name: field.type for field in item} if pa.types.is_struct(item) else {}
        names = [pair for pair in (("role", "content"), ("from", "value")) if set(pair) <= set(fields)]
        if len(names) != 1 or not all(_is_string(fields[name]) for name in names[0]):
            return None
        role, content = (pc.struct_field(pc.list_flatten(chats), name) for name in names[0])
        has_text = pc.and_(pc.greater(pc.binary_length(role), 0), pc.not_equal(pc.utf8_trim_whitespace(content), ""))
        rows = pc.filter(pc.list_parent_indices(chats), pc.fill_null(has_text, False))
        kept.append(np.unique(rows.to_numpy(zero_copy_only=False)).astype(np.int64) + start)
    return np.concatenate(kept)


def _is_string(arrow_type: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type))


class _JsonLines(Sequence[Any]):
    """The records of a JSON-lines file, found by their offsets and parsed on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        starts, ends, offset = [], [], 0
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    starts.append(offset)
                    ends.append(offset + len(line))
                offset += len(line)
            # A mapping and not a file handle: threads and forked workers can read it at the same time.
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if offset else b""
        self.starts = np.array(starts, dtype=np.int64)
        self.ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        start, end = int(self.starts[index]), int(self.ends[index])
        try:
            return json.loads(self.data[start:end])
        except ValueError as error:
            line = self.data[:start].count(b"\n") + 1
            raise FastsaeError(
                f"{self.path}, line {line}: expected one JSON object per line, but {error}. Correct or remove the "
                "line; if it is the last one, the file may have been cut off"
            ) from error


class _Concatenation(Sequence[Any]):
    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __iter__(self) -> Iterator[Any]:
        for part in self.parts:
            yield from part

    def __getitem__(self, index: Any) -> Any:
        part = int(np.searchsorted(self.ends, index, side="right"))
        if part == len(self.parts):
            raise IndexError(index)
        return self.parts[part][int(index) - int(self.ends[part]) + len(self.parts[part])]


def _open_files(paths: Sequence[Path]) -> Sequence[Any]:
    """Rows of local files, in the order given, parquet files last."""
    parquet = [str(path) for path in paths if path.suffix == ".parquet"]
    unknown = [path for path in paths if path.suffix not in _DATA_SUFFIXES]
    if unknown:
        raise UsageError(f"{unknown[0]}: expected a file that ends in {', '.join(_DATA_SUFFIXES)}")
    parts = [_open_json(path) for path in paths if path.suffix != ".parquet"]
    if parquet:
        datasets = _import_datasets()
        try:
            parts.append(datasets.load_dataset("parquet", data_files=parquet, split="train"))
        except Exception as error:
            raise FastsaeError(f"{', '.join(parquet)}: not readable as parquet: {_first_line(error)}") from error
    return parts[0] if len(parts) == 1 else _Concatenation(parts)


def _open_json(path: Path) -> Sequence[Any]:
    with path.open("rb") as file:
        if path.suffix == ".jsonl" or file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"[":
            return _JsonLines(path)
        file.seek(0)
        try:
            rows: Sequence[Any] = json.load(file)
            return rows
        except ValueError as error:
            raise FastsaeError(f"{path}: expected a JSON list of rows, but {error}") from error


def _open_folder(path: Path, split: str) -> Sequence[Any]:
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        datasets = _import_datasets()
        try:
            saved: Any = datasets.load_from_disk(str(path))
        except Exception as error:
            raise FastsaeError(f"{path}: not readable as a saved dataset: {_first_line(error)}") from error
        if isinstance(saved, datasets.DatasetDict):
            _require_split(str(path), split, list(saved))
            saved = saved[split]
        else:
            _require_split(str(path), split, [str(saved.split or "train")])
        rows: Sequence[Any] = saved
        return rows
    splits: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if file.suffix in _DATA_SUFFIXES and not any(part.startswith(".") for part in relative.parts):
            words = re.split(r"[^a-z]+", str(relative.with_suffix("")).lower())
            name = next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "train")
            splits.setdefault(name, []).append(file)
    if not splits:
        raise UsageError(f"{path}: expected a saved dataset, or files that end in {', '.join(_DATA_SUFFIXES)}")
    _require_split(str(path), split, list(splits))
    return _open_files(splits[split])


def _open_hub(source: str, split: str) -> Sequence[Any]:
    datasets = _import_datasets()
    name, _, config = source.partition(":")
    try:
        rows: Sequence[Any] = datasets.load_dataset(name, config or None, split=split)
        return rows
    except Exception as error:
        raise _hub_error(source, split, error) from error


def _hub_error(source: str, split: str, error: Exception) -> FastsaeError:
    """Say what went wrong with a hub dataset: `datasets` mixes its own, the hub's and the network's exceptions."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    reason = _first_line(error)
    if "split" in reason.lower() and "ValueError" in kinds:
        return UsageError(f"split: dataset {source!r} has no split {split!r}: {reason}")
    if "config" in reason.lower() and "ValueError" in kinds:
        return UsageError(f"dataset {source!r}: {error}. Name the configuration behind a colon: 'owner/name:config'")
    if kinds & {"DatasetNotFoundError", "DataFilesNotFoundError", "HFValidationError"}:
        return UsageError(
            f"dataset {source!r} is neither a file or folder here nor a dataset on the Hugging Face hub: {reason}. "
            "Check the spelling; a private or gated dataset needs `hf auth login` first"
        )
    if kinds & {"ConnectionError", "OfflineModeIsEnabled", "HTTPError", "TransportError", "LocalEntryNotFoundError"}:
        return FastsaeError(
            f"dataset {source!r} is no file or folder here, and the Hugging Face hub could not be reached: {reason}. "
            "Give a path, or 'demo', or run again with a connection; what was downloaded so far is kept"
        )
    return FastsaeError(
        f"dataset {source!r} could not be downloaded whole ({type(error).__name__}: {reason}). Run again to go on "
        "where it stopped; if it fails in the same place, check the free disk space and delete its cache"
    )


def _require_split(source: str, split: str, splits: Sequence[str]) -> None:
    if split not in splits:
        raise UsageError(
            f"split: dataset {source!r} has no split {split!r}; its splits are: {', '.join(map(repr, splits))}"
        )


def _looks_like_path(source: str) -> bool:
    return bool(re.search(r"^[./~]|\\|/.*/|\s|\.(jsonl?|parquet)$", source)) or not source


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise FastsaeError(
            "this dataset needs the `datasets` package, which is not installed: pip install 'fastsae-kernels[train]' "
            "(.jsonl and .json files work without it)"
        ) from error
    return datasets
