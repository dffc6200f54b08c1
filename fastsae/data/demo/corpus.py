"""The documentation that is installed anyway: docstrings of the standard library, torch and numpy, read with `ast`.

Nothing is imported or executed: sources are found by path, parsed, and their docstrings taken apart. What comes out
therefore depends on the installed versions of Python, torch and numpy; packages that are absent are skipped. The
result is cached as gzipped JSON lines under `$FASTSAE_CACHE` (else `$XDG_CACHE_HOME/fastsae`, else `~/.cache/fastsae`)
with those versions in the file name; a corrupt cache is rebuilt, and one that cannot be written only costs time.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import sysconfig
import tempfile
import zlib
from dataclasses import asdict
from pathlib import Path

from fastsae.data.demo.sources import Entry, read_sources
from fastsae.data.progress import with_bar

FORMAT = 1  # raise it when the content of an entry changes
PACKAGES = ("torch", "numpy")

logger = logging.getLogger(__name__)


def source_roots() -> dict[str, Path]:
    """Folders of the installed sources, by dotted prefix ("" for the standard library); nothing is imported."""
    roots = {"": Path(sysconfig.get_path("stdlib"))}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin:
            roots[package] = Path(spec.origin).parent
    return {prefix: root for prefix, root in roots.items() if root.is_dir()}


def versions() -> dict[str, str]:
    """Versions that decide what the corpus holds; an absent package is "none"."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def cache_dir() -> Path:
    """`$FASTSAE_CACHE`, else `$XDG_CACHE_HOME/fastsae`, else `~/.cache/fastsae`; it need not exist."""
    if os.environ.get("FASTSAE_CACHE"):
        return Path(os.environ["FASTSAE_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path(os.path.expanduser("~/.cache"))) / "fastsae"


def load_entries(*, progress: bool = False) -> list[Entry]:
    """All documented entries, duplicates of whole docstrings dropped, in a fixed order; cached on disk."""
    key = "-".join(f"{name}{re.sub(r'[^0-9A-Za-z.]', '_', version)}" for name, version in versions().items())
    path = cache_dir() / f"demo-corpus-{key}-format{FORMAT}.jsonl.gz"
    entries = _read_cache(path)
    if entries is None:
        logger.info("reading the installed documentation (once; cached as %s)", path)
        found = (entry for prefix, root in source_roots().items() for entry in read_sources(root, prefix))
        entries = list(with_bar(found, "reading", "entry", total=None, progress=progress))
        entries = drop_duplicates(entries)
        _write_cache(path, entries)
    return entries


def drop_duplicates(entries: list[Entry]) -> list[Entry]:
    """Keep the first of the entries that share their whole running text (inherited and boilerplate docstrings)."""
    seen: set[str] = set()
    kept = []
    for entry in entries:
        text = " ".join(entry.sentences)
        if text in seen and (text or not entry.arguments):
            continue
        seen.add(text)
        kept.append(entry)
    return kept


def _read_cache(path: Path) -> list[Entry] | None:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()
        if json.loads(lines[-1]) != {"entries": len(lines) - 1}:
            raise ValueError("it does not end where it should")
        return [Entry(**json.loads(line)) for line in lines[:-1]]
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, TypeError, IndexError, zlib.error) as error:
        logger.warning("rebuilding the cached documentation %s: %s", path, error)
        return None


def _write_cache(path: Path, entries: list[Entry]) -> None:
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(descriptor, "wb") as raw, gzip.open(raw, "wt", encoding="utf-8", compresslevel=4) as file:
            file.writelines(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in entries)
            file.write(json.dumps({"entries": len(entries)}) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("could not cache the documentation in %s (%s); it is read again next time", path.parent, error)
        if temporary:
            Path(temporary).unlink(missing_ok=True)
