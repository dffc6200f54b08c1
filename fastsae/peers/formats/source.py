"""A folder or a file that holds one SAE of any format: what is in it, what was read, and the hub it may come from."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from fastsae.disk import digest, local_path
from fastsae.errors import FastsaeError, UsageError, shown
from fastsae.fields import Fields, read_json
from fastsae.peers.formats.stored import open_npz, open_safetensors, open_torch

PROVENANCE = "provenance.json"  # beside weights that have no config of their own
WEIGHTS = (".safetensors", ".npz", ".pt", ".pth")


class Source:
    """A path as the formats look at it.

    Args:
        path: A folder, or a single file of weights.
        k: Active features per token, where the format keeps it in no file.
        asked: The format's name as the user gave it; some of SAELens' names say more than the format.

    Raises:
        FileNotFoundError: There is no such path.
    """

    def __init__(self, path: Path, k: int | None = None, asked: str | None = None) -> None:
        if not path.exists():
            raise FileNotFoundError(f"{path}: expected the folder or the file of a saved SAE, there is no such path")
        self.path, self.k, self.asked = path, k, asked
        self.folder = path if path.is_dir() else path.parent
        self.read: dict[str, Path] = {}
        self._opened: dict[Path, dict[str, Any]] = {}

    @property
    def words(self) -> str:
        """The whole path: published SAEs say in the names of their folders what their files do not."""
        return self.path.absolute().as_posix()

    @cached_property
    def weights(self) -> Path | None:
        """The one file of weights; None where there are none or several."""
        if self.path.is_file():
            return self.path
        found = [f for f in sorted(self.folder.iterdir()) if f.suffix in WEIGHTS and f.name != "sparsity.safetensors"]
        return found[0] if len(found) == 1 else None

    def has(self, *names: str) -> bool:
        """Whether all these files are there; a source that is a file stands for itself alone."""
        if self.path.is_file():
            return any(self.path.name == PurePosixPath(name).name for name in names) and all(
                (self.folder / name).is_file() or self.path.name == PurePosixPath(name).name for name in names
            )
        return all((self.folder / name).is_file() for name in names)

    def json(self, name: str) -> Fields:
        """The object in a JSON file."""
        path = self._noted(name)
        try:
            return Fields(read_json(path))
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON with an object, got a corrupt file ({error})") from None

    def tensors(self, name: str | None = None) -> tuple[Path, dict[str, Any]]:
        """A file of weights and what its headers say; without a name, the one file that there is."""
        if name is None:
            if self.weights is None:
                raise ValueError(
                    f"{self.path}: expected one file of weights, got several or none; give the file itself"
                )
            name = self.weights.name
        path = self._noted(name)
        if path not in self._opened:
            readers = {".safetensors": open_safetensors, ".npz": open_npz}
            if path.suffix not in WEIGHTS:
                raise ValueError(f"{path}: expected a file of weights, whose name ends in {', '.join(WEIGHTS)}")
            self._opened[path] = readers.get(path.suffix, open_torch)(path)
        return path, self._opened[path]

    def names(self, name: str | None = None) -> set[str]:
        """Names in a file of weights, for telling formats apart; empty where it cannot be opened."""
        before = dict(self.read)
        try:
            return set(self.tensors(name)[1])
        except (ValueError, OSError):
            return set()
        finally:
            self.read = before

    def _noted(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder}: expected a folder with {name}, it is missing")
        self.read[name] = path
        return path

    def digests(self) -> tuple[dict[str, str], ...]:
        """Name and SHA-256 of each file that was read."""
        return tuple({"file": name, "sha256": digest(path)} for name, path in sorted(self.read.items()))

    def provenance(self) -> dict[str, Any]:
        """What a conversion has written beside the weights; empty where there is none."""
        path = self.folder / PROVENANCE
        try:
            return Fields(read_json(path)).values if path.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON with an object, got a corrupt file ({error})") from None

    def layer(self) -> int | None:
        """The layer that the path names, as `layer_12`, `layers.12`, `layer12.sae.pt` or `L12R`."""
        found = re.findall(r"(?:layers?[._]?|[-/]L)(\d+)", self.words)
        return int(found[-1]) if found else None


def find(name: str, files: tuple[str, ...]) -> Path:
    """A local path, or the local copy of what a hub id names: `owner/name`, then a folder or a file within, `@revision` last.

    Args:
        name: What the user gave.
        files: Files of a repository without folders that are wanted.

    Raises:
        UsageError: There is no such path, repository, folder or revision.
        FastsaeError: The hub could not be reached.
    """
    path = local_path(name)
    bare, _, revision = name.removeprefix("hf://").partition("@")
    owner, _, rest = bare.partition("/")
    repository, _, within = rest.partition("/")
    if path.exists() or name.startswith((".", "/", "~")) or not (owner and repository):
        if not path.exists():
            raise UsageError(
                f"{name}: expected a folder, a file or a hub id such as owner/name/folder, there is no such path"
            )
        return path
    within = within.strip("/")
    patterns = [within, f"{within}/*"] if within else list(files)
    folder = _download(f"{owner}/{repository}", revision or None, patterns)
    found = folder / within
    if not found.exists():
        raise UsageError(
            f"{name}: expected a folder or a file {within!r} in the repository {owner}/{repository}, it has none"
        )
    return found


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise FastsaeError(
            f"{repository}: hub ids need huggingface_hub: pip install 'fastsae-kernels[train]' ({error})"
        ) from None
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        what = f"revision {revision!r}" if isinstance(error, RevisionNotFoundError) else "repository"
        raise UsageError(
            f"{repository}: the hub has no such {what}, or you may not read it; log in with `hf auth login`"
        ) from None
    except Exception as error:  # the hub's client raises many kinds, with texts of many lines
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise FastsaeError(
            f"{repository} is no local path, and could not be fetched from the hub ({shown(reason)[1:-1]})"
        ) from None
