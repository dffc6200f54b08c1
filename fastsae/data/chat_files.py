"""Where chat datasets come from: local files and folders, and the Hugging Face hub, opened as rows."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastsae.data.progress import with_bar
from fastsae.errors import FastsaeError, UsageError

_SPLIT_WORDS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"}
_SPLIT_WORDS |= {"val": "validation", "dev": "validation", "test": "test", "eval": "test"}
_DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
_LONGEST_LINE = 64 * 2**20  # bytes; parsing one takes ten times as much memory
_SCANNED = 2**24  # bytes of a file looked through at once for ends of lines


@dataclass(frozen=True)
class UnusableRow:
    """A row that cannot be read: the reason under which it is counted, and what exactly is wrong, and where."""

    reason: str
    detail: str


def each_row(rows: Sequence[Any]) -> Iterator[Any]:
    """Yields every row, an `UnusableRow` where reading one fails, as for text of a parquet file that is not UTF-8."""
    iterator = iter(rows)
    for index in range(len(rows)):
        try:
            row = next(iterator)
        except Exception:  # whatever the library raises; it ends the iteration, so the other rows are read singly
            iterator = (read_row(rows, i) for i in range(index, len(rows)))
            row = next(iterator)
        yield row


def read_row(rows: Sequence[Any], index: int) -> Any:
    """Returns one row, an `UnusableRow` where reading it fails."""
    try:
        return rows[index]
    except Exception as error:
        return UnusableRow("unreadable row", f"row {index}: {type(error).__name__}: {first_line(error)}")


class _JsonLines(Sequence[Any]):
    """The records of a JSON-lines file, found by their offsets and parsed on demand."""

    def __init__(self, path: Path, progress: bool) -> None:
        self.path = path
        with path.open("rb") as file:
            n_pieces = -(-path.stat().st_size // _SCANNED)
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
            return self._unusable(index, f"line longer than {_LONGEST_LINE >> 20} MB", f"it has {end - start:,} bytes")
        try:
            return json.loads(self.data[start:end].decode("utf-8", "surrogatepass").lstrip("\ufeff"))
        except ValueError as error:
            return self._unusable(index, "damaged JSON", str(error))
        except RecursionError:
            return self._unusable(index, "JSON nested too deeply", "it nests too deeply")

    def _unusable(self, index: Any, reason: str, found: str) -> UnusableRow:
        return UnusableRow(
            reason,
            f"{self.path}, line {self.lines[index]}: expected one JSON object per line, but {found}. Correct or remove "
            "the line; if it is the last one, the file may have been cut off",
        )


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


def open_files(paths: Sequence[Path], progress: bool) -> Sequence[Any]:
    """Rows of local files, in the order given, parquet files last."""
    parquet = [str(path) for path in paths if path.suffix == ".parquet"]
    unknown = [path for path in paths if path.suffix not in _DATA_SUFFIXES]
    if unknown:
        raise UsageError(f"{unknown[0]}: expected a file that ends in {', '.join(_DATA_SUFFIXES)}")
    parts = [_open_json(path, progress) for path in paths if path.suffix != ".parquet"]
    if parquet:
        datasets = _import_datasets()
        try:
            with _bars_of_datasets(progress):
                parts.append(datasets.load_dataset("parquet", data_files=parquet, split="train"))
        except Exception as error:
            raise FastsaeError(f"{', '.join(parquet)}: not readable as parquet: {first_line(error)}") from error
    return parts[0] if len(parts) == 1 else _Concatenation(parts)


def _open_json(path: Path, progress: bool) -> Sequence[Any]:
    with path.open("rb") as file:
        if path.suffix == ".jsonl" or file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"[":
            return _JsonLines(path, progress)
    rows: list[Any] = []
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogatepass")
        rows.extend(with_bar(_list_items(text), f"reading {path.name}", "row", total=None, progress=progress))
    except (ValueError, RecursionError) as error:
        found = "it nests too deeply" if isinstance(error, RecursionError) else error
        raise FastsaeError(
            f"{path}: expected a JSON list of rows, but {found}. The file may have been cut off"
        ) from error
    return rows


def _list_items(text: str) -> Iterator[Any]:
    """Yields the items of a JSON list one by one: the parser's own loop over a list cannot be interrupted."""
    parse, space = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n]*")

    def skip(start: int) -> int:
        match = space.match(text, start)
        return match.end() if match else start

    position = skip(skip(0) + 1)  # behind the opening bracket
    after = text[position : position + 1]
    while after != "]":
        item, position = parse(text, position)
        yield item
        position = skip(position)
        after = text[position : position + 1]
        if after == ",":
            position = skip(position + 1)
        elif after != "]":
            raise json.JSONDecodeError("Expecting ',' or ']' behind an item of the list", text, position)
    if skip(position + 1) != len(text):
        raise json.JSONDecodeError("Expecting the end of the file behind the list", text, position + 1)


def open_folder(path: Path, split: str, progress: bool) -> Sequence[Any]:
    """Rows of one split of a saved dataset, or of the files of a folder."""
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        datasets = _import_datasets()
        try:
            saved: Any = datasets.load_from_disk(str(path))
        except Exception as error:
            raise FastsaeError(f"{path}: not readable as a saved dataset: {first_line(error)}") from error
        if isinstance(saved, datasets.DatasetDict):
            require_split(str(path), split, list(saved))
            saved = saved[split]
        else:
            require_split(str(path), split, [str(saved.split or "train")])
        rows: Sequence[Any] = saved
        return rows
    splits: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if (
            file.suffix in _DATA_SUFFIXES
            and file.is_file()
            and not any(part.startswith(".") for part in relative.parts)
        ):
            words = re.split(r"[^a-z]+", str(relative.with_suffix("")).lower())
            name = next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "train")
            splits.setdefault(name, []).append(file)
    if not splits:
        raise UsageError(f"{path}: expected a saved dataset, or files that end in {', '.join(_DATA_SUFFIXES)}")
    require_split(str(path), split, list(splits))
    return open_files(splits[split], progress)


def open_hub(source: str, split: str, progress: bool) -> Sequence[Any]:
    """Rows of a dataset on the hub, downloaded once."""
    datasets = _import_datasets()
    name, _, config = source.partition(":")
    try:
        with _bars_of_datasets(progress):
            rows: Sequence[Any] = datasets.load_dataset(name, config or None, split=split)
        return rows
    except Exception as error:
        raise _hub_error(source, split, error) from error


def _hub_error(source: str, split: str, error: Exception) -> FastsaeError:
    """Say what went wrong with a hub dataset: `datasets` mixes its own, the hub's and the network's exceptions."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    reason = first_line(error)
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


def require_split(source: str, split: str, splits: Sequence[str]) -> None:
    """Raises UsageError unless `split` is one of `splits`."""
    if split not in splits:
        raise UsageError(
            f"split: dataset {source!r} has no split {split!r}; its splits are: {', '.join(map(repr, splits))}"
        )


def looks_like_path(source: str) -> bool:
    """Whether a name that is neither a file nor a folder was meant as one, and not as a hub id."""
    return bool(re.search(r"^[./~]|\\|/.*/|\s|\.(jsonl?|parquet)$", source)) or not source


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def _bars_of_datasets(progress: bool) -> Iterator[None]:
    """Without `progress`, keeps the bars of the `datasets` package off, and on afterwards where they were on."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if progress or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise FastsaeError(
            "this dataset needs the `datasets` package, which is not installed: pip install 'fastsae-kernels[train]' "
            "(.jsonl and .json files work without it)"
        ) from error
    return datasets
