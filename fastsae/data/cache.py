"""Activations on disk: computed once, read memory-mapped by any number of runs, in the place of the model's forward passes.

A folder holds `cache.json` and shards of contexts, in the order in which training reads them. A context is what the model sees
as one text: a dialogue, or a block of several. A shard is a safetensors file with n tokens of m contexts:

    token_ids [n] int32    offsets [m + 1] int64, where each context begins    layer_L [n, d_in], in the model's dtype
    dialogue_ids [m], starts [m] int64, the dialogue of a context's first token, and the place of that token in it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsae.data.sequencing import Sequencer, TokenBatch
from fastsae.disk import digest, write_json, write_tensors
from fastsae.errors import FastsaeError, UsageError
from fastsae.fields import Fields, read_json

MANIFEST = "cache.json"
FORMAT = 2
SHARD_BYTES = 2**28


@dataclass
class Manifest:
    """What `cache.json` says.

    Attributes:
        options: The options that the activations depend on, as a run's config.json names them.
        layers: The layers.
        fingerprints: What tells this dataset and this model, with its chat template, from others.
        sequencer: Its state behind the last context that was written.
        tokens: How many were written.
        is_complete: Whether that is all that was wanted.
        holds_all: Whether there are no other dialogues to train on.
        shards: Name, SHA-256 and numbers of contexts and tokens of each.
    """

    options: dict[str, Any]
    layers: list[int]
    fingerprints: dict[str, str]
    sequencer: dict[str, Any]
    tokens: int
    is_complete: bool
    holds_all: bool
    shards: list[dict[str, Any]]

    @property
    def n_trainable(self) -> int:
        """Tokens behind the first of their context, attention sinks among them."""
        return self.tokens - sum(shard["contexts"] for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Writes it atomically."""
        write_json(folder / MANIFEST, {"format": FORMAT, **vars(self)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads that of a folder.

        Raises:
            UsageError: The folder holds none.
            FastsaeError: It is corrupt.
        """
        try:
            found = Fields(read_json(folder / MANIFEST))
            if found.get("format") != FORMAT:
                raise found.wrong("format", str(FORMAT))
            kinds = {"options": dict, "layers": list, "fingerprints": dict, "sequencer": dict, "tokens": int,
                     "is_complete": bool, "holds_all": bool, "shards": list}  # fmt: skip
            for name, kind in kinds.items():
                if not isinstance(found.get(name), kind):
                    raise found.wrong(name, f"a value of type {kind.__name__}")
            for shard in found.get("shards"):
                fields = Fields(shard, "shards.")
                fields.integer("contexts", 1)
                fields.integer("tokens", 1)
                if not isinstance(fields.get("file"), str) or Path(fields.get("file")).name != fields.get("file"):
                    raise fields.wrong("file", "the name of a file")
            return cls(**{name: found.get(name) for name in kinds})
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(f"{folder}: expected a folder of `fastsae cache`, {MANIFEST} is missing") from None
        except ValueError as error:
            raise FastsaeError(
                f"{folder / MANIFEST}: expected what `fastsae cache` writes, got another file ({error})"
            ) from None


class Context(NamedTuple):
    """A context in a batch: the dialogue of its first token, that token's place there, and where in the batch it stands."""

    dialogue: int
    start: int
    row: int
    column: int
    length: int

    @property
    def part(self) -> tuple[int, slice]:
        """Its tokens in a batch."""
        return self.row, slice(self.column, self.column + self.length)


def contexts_of(batch: TokenBatch) -> Iterator[Context]:
    """The contexts of a batch: in packed rows its whole dialogues, else its rows."""
    begins = batch.attention_mask.bool().clone()
    if batch.is_packed:
        begins &= batch.positions == 0
    else:
        begins[:, 1:] = False
    rows, columns = begins.nonzero(as_tuple=True)
    n_real = batch.attention_mask.sum(1).tolist()
    places = list(zip(rows.tolist(), columns.tolist(), strict=True))
    for i, (row, column) in enumerate(places):
        is_last = i + 1 == len(places) or places[i + 1][0] != row
        end = n_real[row] if is_last else places[i + 1][1]
        first = batch.dialogue_ids[row, column], batch.positions[row, column]
        yield Context(int(first[0]), int(first[1]), row, column, end - column)


def write_cache(
    folder: Path,
    manifest: Manifest,
    sequencer: Sequencer,
    read: Callable[[TokenBatch], Sequence[Tensor]],
    n_tokens: int,
    advance: Callable[[int], object],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the activations of the contexts that follow those in the manifest, until `n_tokens` are there or all dialogues.

    A shard has its name once it is whole, and counts once the manifest names it: a killed run goes on behind the last one.

    Args:
        folder: The cache.
        manifest: What is there already; kept up to date.
        sequencer: Where the last shard ended.
        read: Maps a batch to the activations [B, T, d_in] of each of the manifest's layers.
        n_tokens: How many tokens behind the first of their context the cache is to hold.
        advance: Is told how many tokens came in.
        shard_bytes: Size of a shard, or a batch more.

    Raises:
        OSError: The disk is full.
    """
    held: list[tuple[Context, Tensor, list[Tensor]]] = []  # with its token ids, and its activations of each layer
    size = n_held = 0
    while manifest.n_trainable + n_held < n_tokens and not manifest.holds_all:
        batch = next(sequencer)
        if sequencer.epoch > 0:
            manifest.holds_all = True
            break
        acts = [layer.cpu() for layer in read(batch)]
        for context in contexts_of(batch):
            tensors = [layer[context.part] for layer in acts]
            held.append((context, batch.input_ids[context.part].int(), tensors))
            size += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            n_held += context.length - 1
            advance(context.length)
        if size >= shard_bytes:
            _write_shard(folder, manifest, held, sequencer.state_dict())
            held, size, n_held = [], 0, 0
    if held:
        _write_shard(folder, manifest, held, sequencer.state_dict())
    manifest.is_complete = True
    manifest.write(folder)


def _write_shard(folder: Path, manifest: Manifest, held: list[Any], state: dict[str, Any]) -> None:
    name = f"activations-{len(manifest.shards):05d}.safetensors"
    lengths = torch.tensor([0] + [context.length for context, _, _ in held])
    tensors = {
        "dialogue_ids": torch.tensor([context.dialogue for context, _, _ in held]),
        "starts": torch.tensor([context.start for context, _, _ in held]),
        "offsets": lengths.cumsum(0),
        "token_ids": torch.cat([ids for _, ids, _ in held]),
    }
    for i, layer in enumerate(manifest.layers):
        tensors[f"layer_{layer}"] = torch.cat([acts[i] for _, _, acts in held])
    write_tensors(folder / name, tensors)
    n_tokens = int(lengths.sum())
    manifest.shards.append({"file": name, "sha256": digest(folder / name), "contexts": len(held), "tokens": n_tokens})
    manifest.tokens += n_tokens
    manifest.sequencer = state
    manifest.write(folder)


class CachedActivations:
    """Reads a cache in the place of the model.

    Each shard is opened, and its checksum compared, when it is first needed; its activations are read from the memory-mapped
    file, and only those of the contexts that are asked for.

    Args:
        folder: What `fastsae cache` wrote.
        layers: The layers that are read.

    Raises:
        UsageError: The folder is no cache, or has not all of the layers.
        FastsaeError: It is corrupt, a shard is missing or truncated, or the cache was not written to its end.
    """

    def __init__(self, folder: Path, layers: Sequence[int]) -> None:
        self.folder, self.layers, self.manifest = folder, list(layers), Manifest.read(folder)
        for layer in layers:
            if layer not in self.manifest.layers:
                there = ", ".join(map(str, self.manifest.layers))
                raise UsageError(f"layer: expected one of the cache {folder}, {there}, got {layer}")
        if not self.manifest.is_complete:
            raise FastsaeError(
                f"{folder}: expected a whole cache, got one that was interrupted; go on with fastsae cache --resume"
            )
        self._open: dict[int, Any] = {}
        self._offsets: list[np.ndarray] = []
        places = [self._places(number, shard) for number, shard in enumerate(self.manifest.shards)]
        found = np.concatenate(places) if places else np.empty((0, 3), dtype=np.int64)
        self._index = found[np.argsort(found[:, 0], kind="stable")]  # key of a context, shard, place in it

    def _places(self, number: int, shard: dict[str, Any]) -> np.ndarray:
        with self._checked_file(shard) as file:
            ids, starts, offsets = (file.get_tensor(name).numpy() for name in ("dialogue_ids", "starts", "offsets"))
            self._offsets.append(offsets)
            if len(ids) != shard["contexts"] or offsets[-1] != shard["tokens"]:
                raise self._corrupt(shard, "its numbers of contexts and tokens are others")
        return np.stack([_key(ids, starts), np.full_like(ids, number), np.arange(len(ids))], axis=1)

    def _checked_file(self, shard: dict[str, Any]) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.folder / shard["file"], framework="pt")
        except (OSError, SafetensorError) as error:
            raise self._corrupt(shard, error) from None

    def _corrupt(self, shard: dict[str, Any], reason: object) -> FastsaeError:
        return FastsaeError(
            f"{self.folder / shard['file']}: expected a whole shard of activations, got a missing, truncated or changed one "
            f"({reason}); delete the cache and write it again"
        )

    def _file(self, number: int) -> Any:
        if number not in self._open:
            shard = self.manifest.shards[number]
            if digest(self.folder / shard["file"]) != shard["sha256"]:
                raise self._corrupt(shard, "its checksum is another")
            self._open[number] = self._checked_file(shard)
        return self._open[number]

    def read(self, batch: TokenBatch) -> list[Tensor]:
        """The activations [B, T, d_in] of each layer, zero on padding.

        Raises:
            FastsaeError: A context is not in the cache, or has other tokens there.
        """
        found: list[Tensor | None] = [None] * len(self.layers)
        for context in contexts_of(batch):
            file, begin, end = self._find(context)
            ids = file.get_slice("token_ids")[begin:end]
            if not torch.equal(ids.long(), batch.input_ids[context.part]):
                raise FastsaeError(
                    f"{self.folder}: expected {_described(context)} of this run, got other tokens: the cache was written from "
                    "another dataset or chat template"
                )
            for i, layer in enumerate(self.layers):
                acts = file.get_slice(f"layer_{layer}")[begin:end]
                if (whole := found[i]) is None:
                    whole = found[i] = acts.new_zeros(*batch.input_ids.shape, acts.shape[1])
                whole[context.part] = acts
        return [acts for acts in found if acts is not None]

    def _find(self, context: Context) -> tuple[Any, int, int]:
        key = _key(context.dialogue, context.start)
        at = int(np.searchsorted(self._index[:, 0], key))
        if at == len(self._index) or self._index[at, 0] != key:
            raise FastsaeError(
                f"{self.folder}: the cache ends after {len(self._index):,} contexts, and this run needs {_described(context)}; "
                "lower --tokens, or write more with fastsae cache --resume --tokens N"
            )
        _, number, place = self._index[at].tolist()
        begin, end = self._offsets[number][place : place + 2].tolist()
        return self._file(number), begin, end


def _key(dialogue: Any, start: Any) -> Any:
    """One number for the first token of a context: numbers of dialogues and places in them stay below 2^31."""
    return dialogue << 32 | start


def _described(context: Context) -> str:
    return f"dialogue {context.dialogue}" + (f" from its token {context.start} on" if context.start else "")
