"""Where chat datasets come from: local files and folders, and the Hugging Face hub, opened as rows."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastsae.data.json_files import UnusableRow, open_json
from fastsae.data.progress import with_bar
from fastsae.disk import write_atomically
from fastsae.errors import FastsaeError, UsageError

_SPLIT_WORDS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"}
_SPLIT_WORDS |= {"val": "validation", "dev": "validation", "test": "test", "eval": "test"}
_EXPECTED_SUFFIXES = ".jsonl, .ndjson or .json, these also with .gz, or .parquet"
_SEARCHED_FILES = 20_000  # files and folders of a tree that are looked at


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
        return UnusableRow("the row cannot be read", f"row {index}: {type(error).__name__}: {first_line(error)}")


class Concatenation(Sequence[Any]):
    """The rows of several parts, one part after the other."""

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
    parquet = [str(path) for path in paths if _suffix(path) == ".parquet"]
    unknown = [path for path in paths if not _suffix(path)]
    if unknown:
        raise UsageError(f"{unknown[0]}: expected a file that ends in {_EXPECTED_SUFFIXES}")
    parts = [open_json(path, progress) for path in paths if _suffix(path) != ".parquet"]
    if parquet:
        datasets = _import_datasets()
        try:
            with _bars_of_datasets(progress):
                parts.append(datasets.load_dataset("parquet", data_files=parquet, split="train"))
        except Exception as error:
            raise FastsaeError(f"{', '.join(parquet)}: not readable as parquet: {first_line(error)}") from error
    return parts[0] if len(parts) == 1 else Concatenation(parts)


def _suffix(path: Path) -> str:
    """The suffix of a file that can hold chats, in small letters and without `.gz`; empty for other files."""
    found = re.search(r"(\.jsonl|\.ndjson|\.json)(\.gz)?$|(\.parquet)$", path.name.lower())
    return (found[1] or found[3]) if found else ""


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
    for file in _data_files(path):
        words = re.split(r"[^a-z]+", str(file.relative_to(path).with_suffix("")).lower())
        name = next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "train")
        splits.setdefault(name, []).append(file)
    if not splits:
        raise UsageError(f"{path}: expected a saved dataset, or files that end in {_EXPECTED_SUFFIXES}")
    require_split(str(path), split, list(splits))
    return open_files(splits[split], progress)


def _data_files(folder: Path) -> list[Path]:
    """The files of a tree that can hold chats, without hidden ones, and without a packed file beside its content."""
    found: list[Path] = []
    n_seen = 0
    for place, folders, names in os.walk(folder):
        n_seen += len(folders) + len(names)
        if n_seen > _SEARCHED_FILES:
            raise UsageError(
                f"dataset: expected a folder of chat files, got {folder} with more than {_SEARCHED_FILES:,} files and "
                "folders in it; give the folder or the file that holds the chats"
            )
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    files = {file for file in found if _suffix(file) and file.is_file()}
    return sorted(file for file in files if file.suffix.lower() != ".gz" or file.with_suffix("") not in files)


def open_hub(
    source: str, split: str, progress: bool, n_rows: int | None = None, n_bytes: int | None = None
) -> Sequence[Any]:
    """Rows of a dataset on the hub: all of it, downloaded once, or the first ones, streamed once into a file of the cache.

    The file, and not the stream, is what a run reads, in any order and as often as it resumes.

    Args:
        source: The hub id.
        split: Name of the split.
        progress: Show progress bars.
        n_rows: How many rows are enough; None for any number.
        n_bytes: How many bytes of rows, written as JSON, are enough; None for any number.
    """
    if n_rows is not None or n_bytes is not None:
        return open_json(_first_rows(source, split, n_rows, n_bytes, progress), progress)
    datasets = _import_datasets()
    name, _, config = source.partition(":")
    try:
        with _bars_of_datasets(progress):
            rows: Sequence[Any] = datasets.load_dataset(name, config or None, split=split)
        return rows
    except Exception as error:
        raise _hub_error(source, split, error) from error


def _first_rows(source: str, split: str, n_rows: int | None, n_bytes: int | None, progress: bool) -> Path:
    """A file of JSON lines with the first rows of a dataset on the hub, written when it is first asked for."""
    datasets = _import_datasets()
    name, _, config = source.partition(":")
    key = hashlib.sha256(repr((name, config, split, n_rows, n_bytes)).encode()).hexdigest()[:32]
    file = Path(datasets.config.HF_DATASETS_CACHE) / "fastsae" / f"{key}.jsonl"

    def streamed() -> Iterator[Any]:
        try:
            yield from islice(datasets.load_dataset(name, config or None, split=split, streaming=True), n_rows)
        except Exception as error:
            raise _hub_error(source, split, error) from error

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="ascii") as lines:
            for row in with_bar(streamed(), f"reading {name}", "row", total=n_rows, progress=progress):
                lines.write(json.dumps(row, default=str) + "\n")
                if n_bytes is not None and lines.tell() >= n_bytes:
                    break

    if not file.exists():
        write_atomically(file, write)
    return file


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
    return bool(re.search(r"^[./~]|\\|/.*/|\s", source)) or bool(_suffix(Path(source))) or not source


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
            "(files of JSON work without it)"
        ) from error
    return datasets
