"""The formats by name: each says by which files it is known, how it is read, and how it is written where it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsae.errors import UsageError
from fastsae.peers.formats.converted import Converted
from fastsae.peers.formats.source import Source


@dataclass(frozen=True)
class Format:
    """One format of files.

    Args:
        name: What `--from` and `--to` call it.
        title: Whose it is, in a few words.
        files: What a hub repository without folders is searched for.
        recognises: Whether a source looks like it, by its files and the names within.
        read: Reads it, or raises ValueError.
        write: Writes it, with its provenance, to a folder, and returns it as written; or raises ValueError before anything is
            written. None where it is only read.
        aliases: Other names for it, SAELens' names of loaders.
    """

    name: str
    title: str
    files: tuple[str, ...]
    recognises: Callable[[Source], bool]
    read: Callable[[Source], Converted]
    write: Callable[[Converted, Path, dict[str, Any]], Converted] | None = None
    aliases: tuple[str, ...] = ()


# SAELens' other loaders, and why there is no format for them
_REFUSED = {
    "temporal": "it looks at earlier tokens, which no other format can say",
    "mntss_clt_layer_transcoder": "it is one layer of a cross-layer transcoder, which reconstructs nothing alone",
}


def by_name(formats: list[Format], name: str, option: str) -> Format:
    """The format of a name or an alias.

    Raises:
        UsageError: There is none.
    """
    for found in formats:
        if name in (found.name, *found.aliases):
            return found
    if name in _REFUSED:
        raise UsageError(f"{option}: {name} is not converted: {_REFUSED[name]}")
    names = ", ".join(one.name for one in formats)
    raise UsageError(f"{option}: expected one of {names}, got {name!r}")
