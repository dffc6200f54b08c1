"""Files that are whole or not there: written beside their place, moved into it when complete, safe from a power cut."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def local_path(name: str | os.PathLike[str]) -> Path:
    """A path with `~` as the home folder; a `~name` of nobody stays as it is."""
    return Path(os.path.expanduser(name))


def name_of(place: str) -> str:
    """The name of a model or dataset without the folders of this machine in which it lies."""
    path = local_path(place)
    return path.resolve().name if path.exists() else place


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary file beside `path`, then moves it into place; nothing half-written stays behind.

    Raises:
        OSError: The disk is full, or the place cannot be written; it names `path`.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def is_temporary(name: str, of: Iterable[str]) -> bool:
    """Whether a file's name is one under which `write_atomically` prepares one of the files `of`."""
    found = re.fullmatch(r"\.(.+)\.[a-z0-9_]{8}", name)
    return found is not None and found.group(1) in set(of)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's entries, are on the disk, so that a power cut cannot undo a rename."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file atomically; a full disk is an OSError as everywhere else."""
    from safetensors import SafetensorError  # these import torch, which other users of this file do without
    from safetensors.torch import save_file

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:
            found = re.search(r"os error (\d+)", str(error))  # safetensors hides the system's error in its text
            if found is None:
                raise
            number = int(found.group(1))
            raise OSError(number, os.strerror(number), str(path)) from error

    write_atomically(path, write)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically, with a line per entry; NaN is not JSON and is refused."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def digest(path: Path) -> str:
    """SHA-256 of a file: safetensors notices a missing end, but not a flipped byte."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            found.update(block)
    return found.hexdigest()
