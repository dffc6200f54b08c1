"""Chat datasets as one type: a lazy sequence of dialogues, each a list of role/content messages."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any, TypeAlias, overload

import numpy as np

from fastsae.data import chat_files
from fastsae.data.chat_files import each_row, read_row
from fastsae.data.dropped import Dropped
from fastsae.data.json_files import UnusableRow
from fastsae.data.progress import with_bar
from fastsae.data.roles import KNOWN_ROLES, SILENT_ROLES, canonical_role, without_lone_surrogates
from fastsae.disk import local_path
from fastsae.errors import FastsaeError, UsageError

Message: TypeAlias = dict[str, str]
Dialogue: TypeAlias = list[Message]

CHAT_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
NO_TEXT = "no message has a role and text"
NO_SPEAKER = "neither a user nor an assistant says anything"
_PROBED_ROWS = 100  # readable ones, to find the chat column
_SEARCHED_ROWS = 10_000
_SHOWN_ROLES = 5
_SPARE_ROWS = 100  # read beyond a limit, for rows that are dropped

logger = logging.getLogger(__name__)


def load_chats(
    source: str, split: str = "train", *, limit: int | None = None, progress: bool = False
) -> Sequence[Dialogue]:
    """Open a chat dataset without reading it into memory.

    A dialogue is a list of `{"role", "content"}` messages. Recognised are columns of messages with `role` and
    `content`, or `from` and `value` (ShareGPT), also as JSON text. Words such as `human`, `gpt` or `ChatGPT` become
    `user` and `assistant` (see `fastsae.data.roles.canonical_role`); other words stay, and a warning names them.
    Content given as a list of parts becomes the text parts joined. Half a surrogate pair becomes U+FFFD. A turn
    without text is left out.

    A row that is damaged, holds no such turn, or none of a user or an assistant, is dropped. `ChatDataset.drops`
    counts those rows by reason, and a warning tells of them where they are more than 1 %.

    Args:
        source: `"demo"`; a `.jsonl`, `.ndjson` or `.json` file (JSON lines, a list, or values of several lines each),
            also packed as `.gz`, which takes the unpacked size in the folder for temporary files; a `.parquet` file; a
            folder written by `datasets.save_to_disk`, or one that holds such files; or a Hugging Face hub id, with its
            configuration behind a colon if it has several (`BAAI/Infinity-Instruct:0625`).
        split: Name of the split. Files of a folder belong to the split whose name is a word of their own name or of
            their folder's; a single file is `"train"`.
        limit: How many dialogues will be used: a dataset on the hub is then streamed and not downloaded whole, with a tenth
            of its rows more for those that are dropped. None uses all.
        progress: Show progress bars where reading takes longer than a second.

    Raises:
        UsageError: Nothing is found at `source`, it has no such split or no chat column, or no usable dialogue.
        FastsaeError: A file is damaged as a whole or in half of its rows, a download fails, or the `datasets` package
            is missing.
    """
    if source == "demo":
        from fastsae.data import demo  # lazy: builds its dialogues from installed documentation

        chat_files.require_split(source, split, ["train"])
        return demo.load_dialogues(progress=progress)
    path = local_path(source)
    if path.is_dir():
        rows = chat_files.open_folder(path, split, progress)
    elif path.is_file():
        chat_files.require_split(source, split, ["train"])
        rows = chat_files.open_files([path], progress)
    elif chat_files.looks_like_path(source):
        raise UsageError(f"dataset {source!r}: there is no such file or folder ({path.absolute()})")
    else:
        n_rows = None if limit is None else limit + limit // 10 + _SPARE_ROWS
        rows = chat_files.open_hub(source, split, progress, n_rows)
    dataset = ChatDataset(rows, source, progress=progress)
    if dataset.drops.is_worth_a_warning:
        logger.warning("%s: %s", source, dataset.drops)
    if dataset.unknown_roles:
        shown = ", ".join(f"{word[:40]!r} ({n:,})" for word, n in dataset.unknown_roles.most_common(_SHOWN_ROLES))
        more = ", ..." if len(dataset.unknown_roles) > _SHOWN_ROLES else ""
        logger.warning(
            "%s: these roles are not known, and the chat template gets them as they are (in so many dialogues): %s%s",
            source, shown, more,
        )  # fmt: skip
    return dataset


class ChatDataset(Sequence[Dialogue]):
    """Rows of a dataset, read and turned into dialogues when asked for.

    Attributes:
        column: The chat column's name, None where a row is itself the list of messages.
        kept_rows: int64, the row of each dialogue.
        drops: The rows that cannot be used, by reason.
        unknown_roles: The role words that stand for no known role, with the number of dialogues that have them.

    Raises:
        UsageError: There are no rows, no chat column, or no usable dialogue.
        FastsaeError: Half of the rows or more cannot be read.
    """

    def __init__(self, rows: Sequence[Any], source: str, *, progress: bool = False) -> None:
        if len(rows) == 0:
            raise UsageError(f"dataset {source!r} is empty: expected at least one row with a dialogue")
        self.column = _find_column(rows, source)
        if self.column is not None and hasattr(rows, "select_columns"):
            rows = rows.select_columns([self.column])  # others may be images, which cost time to decode
        self.rows = rows
        scan = _scan(rows, self.column, progress)
        self.kept_rows = np.concatenate(scan.kept)
        self.drops, self.unknown_roles = scan.drops, scan.unknown_roles
        unreadable = self.drops.counts.keys() - {NO_TEXT, NO_SPEAKER}
        if 2 * sum(self.drops.counts[reason] for reason in unreadable) >= len(rows):
            first: UnusableRow = read_row(rows, min(self.drops.first_rows[reason] for reason in unreadable))
            raise FastsaeError(f"{first.detail}. {self.drops}")
        if len(self.kept_rows) == 0:
            raise UsageError(
                f"dataset {source!r}: expected dialogues with text of a user or an assistant; {self.drops}"
            )

    @property
    def dropped(self) -> int:
        """Number of rows that cannot be used."""
        return self.drops.total

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
        except (ValueError, RecursionError):
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
        if isinstance(role, str) and role.strip() and text.strip():
            dialogue.append({"role": canonical_role(role), "content": text})
    return dialogue


def _text(content: Any) -> str:
    if not isinstance(content, str):
        parts = content if isinstance(content, list) else [content]
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        content = "".join(text for text in texts if isinstance(text, str))
    return content if content.isascii() else without_lone_surrogates(content)


def _turns(row: Any, column: str | None) -> Any:
    if column is None:
        return row
    return row.get(column) if isinstance(row, dict) else None


def _find_column(rows: Sequence[Any], source: str) -> str | None:
    """Name the column that holds dialogues, a usual name first; None if the rows are dialogues themselves."""
    sample: list[Any] = []
    unusable: list[UnusableRow] = []
    for row in islice(each_row(rows), _SEARCHED_ROWS):
        (unusable if isinstance(row, UnusableRow) else sample).append(row)
        if len(sample) == _PROBED_ROWS:
            break
    if not sample and hasattr(rows, "with_format"):  # images that cannot be decoded, say; in Arrow they are bytes
        sample = rows.with_format("arrow")[:_PROBED_ROWS].to_pylist()
    if any(as_dialogue(row) for row in sample if isinstance(row, list)):
        return None
    records = [row for row in sample if isinstance(row, dict)]
    columns: list[str] = list(dict.fromkeys(name for row in records for name in row))
    for name in sorted(columns, key=lambda name: CHAT_COLUMNS.index(name) if name in CHAT_COLUMNS else 99):
        if any(as_dialogue(row.get(name)) for row in records):
            return name
    if len(unusable) >= len(sample):
        raise FastsaeError(f"{unusable[0].detail}. {len(unusable)} of the first {len(unusable + sample)} rows are so")
    raise UsageError(
        f"dataset {source!r}: no chat column in the first {len(sample)} rows. Expected a column such as 'messages' or "
        f"'conversations' with a list of {{role, content}} or {{from, value}} items; the columns found are: "
        f"{', '.join(map(repr, columns)) or 'none'}"
    )


class _Scan:
    """What one look at every row finds: the rows of usable dialogues, why others are not, and unknown roles."""

    def __init__(self, n_rows: int) -> None:
        self.kept = [np.empty(0, dtype=np.int64)]
        self.drops = Dropped(n_rows)
        self.unknown_roles: Counter[str] = Counter()


def _scan(rows: Sequence[Any], column: str | None, progress: bool) -> _Scan:
    if column is not None and hasattr(rows, "with_format"):
        found = _arrow_scan(rows, column, progress)
        if found is not None:
            return found
    scan, kept = _Scan(len(rows)), []
    for i, row in enumerate(with_bar(each_row(rows), "reading dialogues", "row", total=len(rows), progress=progress)):
        if isinstance(row, UnusableRow):
            scan.drops.add(row.reason, [i])
            continue
        roles = {message["role"] for message in as_dialogue(_turns(row, column))}
        if roles - SILENT_ROLES:
            kept.append(i)
            scan.unknown_roles.update(roles - KNOWN_ROLES)
        else:
            scan.drops.add(NO_SPEAKER if roles else NO_TEXT, [i])
    scan.kept.append(np.array(kept, dtype=np.int64))
    return scan


def _arrow_scan(dataset: Any, column: str, progress: bool, block: int = 20_000) -> _Scan | None:
    """The same on Arrow columns, 50 times faster; None if they are no lists of records of strings, or damaged."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = dataset.select_columns([column]).with_format("arrow")
    scan = _Scan(len(dataset))
    starts = range(0, len(dataset), block)
    for start in with_bar(starts, "reading dialogues", "block", total=len(starts), progress=progress):
        chats = table[start : start + block].column(column).combine_chunks()
        if not (pa.types.is_list(chats.type) or pa.types.is_large_list(chats.type)):
            return None
        item = chats.type.value_type
        fields = {field.name: field.type for field in item} if pa.types.is_struct(item) else {}
        names = [pair for pair in (("role", "content"), ("from", "value")) if set(pair) <= set(fields)]
        if len(names) != 1 or not all(_is_string(fields[name]) for name in names[0]):
            return None
        try:
            role, content = (pc.struct_field(pc.list_flatten(chats), name) for name in names[0])
            has_text = pc.and_(*(pc.not_equal(pc.utf8_trim_whitespace(text), "") for text in (role, content)))
            is_turn = pc.fill_null(has_text, False)
            roles = pc.filter(role, is_turn).dictionary_encode()
            words = [canonical_role(word) for word in roles.dictionary.to_pylist()]
        except ValueError:  # text that is not UTF-8: the rows are then read one by one
            return None
        owners = pc.filter(pc.list_parent_indices(chats), is_turn).to_numpy(zero_copy_only=False).astype(np.int64)
        _add_block(scan, start, len(chats), owners, roles.indices.to_numpy(zero_copy_only=False), words)
    return scan


def _add_block(
    scan: _Scan, start: int, n_rows: int, owners: np.ndarray, role_ids: np.ndarray, roles: list[str]
) -> None:
    """Add rows `start` and on, given the row in the block and the role of each of their turns with text."""
    has_turns = np.zeros(n_rows, dtype=bool)
    has_turns[owners] = True
    is_usable = np.zeros(n_rows, dtype=bool)
    is_usable[owners[np.array([role not in SILENT_ROLES for role in roles], dtype=bool)[role_ids]]] = True
    scan.kept.append(np.flatnonzero(is_usable) + start)
    scan.drops.add(NO_TEXT, np.flatnonzero(~has_turns) + start)
    scan.drops.add(NO_SPEAKER, np.flatnonzero(has_turns & ~is_usable) + start)
    is_unknown = np.array([role not in KNOWN_ROLES for role in roles], dtype=bool)[role_ids] & is_usable[owners]
    pairs = {
        (owner, roles[i]) for owner, i in zip(owners[is_unknown].tolist(), role_ids[is_unknown].tolist(), strict=True)
    }
    scan.unknown_roles.update(role for _, role in pairs)


def _is_string(arrow_type: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type))
