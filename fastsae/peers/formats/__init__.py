"""Files of other libraries' SAEs: recognised, read, and written where the format can hold what the SAE computes.

    converted = formats.read(Path("layer_20/width_16k/average_l0_71"))
    formats.write(converted, Path("my-sae"), "saelens")

A format is one entry of `FORMATS`; between two of them stands a `Converted`. Nothing in a file is run, sizes are checked
before memory is taken, and what no format can hold exactly is refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.errors import UsageError
from fastsae.peers.formats import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    llama_scope,
    saelens,
    sparsify,
    state_dicts,
)
from fastsae.peers.formats.converted import Converted, same_dtype
from fastsae.peers.formats.registry import Format, by_name
from fastsae.peers.formats.source import Source, find
from fastsae.version import __version__

__all__ = ["FORMATS", "Converted", "difference", "find", "load_content", "read", "recognise", "wanted_files", "write"]

FORMATS: list[Format] = [
    *saelens.FORMATS,
    *gemma_scope.FORMATS,
    *sparsify.FORMATS,
    *dictionary_learning.FORMATS,
    *llama_scope.FORMATS,
    *state_dicts.FORMATS,
    *circuit_tracer.FORMATS,
]


def wanted_files() -> tuple[str, ...]:
    """What a hub repository without folders is searched for."""
    return tuple(dict.fromkeys(name for one in FORMATS for name in one.files))


def recognise(path: Path) -> Format | None:
    """The format of a folder or a file by what is in it; None where no format looks like it."""
    source = Source(path)
    return next((one for one in FORMATS if one.recognises(source)), None)


def read(path: Path, format_name: str | None = None, *, k: int | None = None) -> Converted:
    """Reads an SAE of any format.

    Args:
        path: A folder, or a file of weights.
        format_name: Name or alias of a format; recognised by the files where it is None.
        k: Active features per token, where the format keeps it in no file.

    Raises:
        FileNotFoundError: There is no such path, or a file is missing.
        UsageError: No format has that name, or none looks like the files.
        ValueError: A file is corrupt, or holds what `Converted` does not say; it names the file and the key.
    """
    source = Source(path, k, format_name)
    found = next((one for one in FORMATS if one.recognises(source)), None)
    if format_name is not None:
        found = by_name(FORMATS, format_name, "--from")
    if found is None:
        titles = "; ".join(one.title for one in FORMATS)
        raise UsageError(f"{path}: expected the files of one SAE of a known format, got others. Known are: {titles}")
    converted = same_dtype(found.read(source))
    earlier = converted.history or source.provenance()
    said = {name: earlier[name] for name in ("configs", "metadata") if isinstance(earlier.get(name), dict)}
    return replace(
        converted,
        configs=converted.configs or said.get("configs", {}),
        metadata={**said.get("metadata", {}), **converted.metadata},
        history={
            "format": found.name,
            "files": list(source.digests()),
            **({"history": earlier} if earlier else {}),
        },
    )


def provenance(converted: Converted) -> dict[str, Any]:
    """Where an SAE comes from and what was changed on the way, as it is written beside its weights."""
    versions = {"fastsae": __version__, "torch": torch.__version__}
    kept = {name: getattr(converted, name) for name in ("configs", "metadata") if getattr(converted, name)}
    return {**converted.history, "changes": list(converted.notes), "versions": versions, **kept}


def write(converted: Converted, folder: Path, format_name: str) -> Converted:
    """Writes an SAE in a format, each file atomically, and returns it as written, with notes of what was changed for it.

    Raises:
        UsageError: No format has that name, or it is only read.
        ValueError: The format cannot hold what the SAE computes; nothing was written.
        OSError: The disk is full, or the folder cannot be written.
    """
    found = by_name(FORMATS, format_name, "--to")
    if found.write is None:
        raise UsageError(f"--to: {found.name} is only read; expected another format")
    return found.write(converted, folder, provenance(converted))


def load_content(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What SAELens' two files would say, of a folder or a file of any format: what `SparseAutoencoder.load` builds from.

    None where no format looks like the files.
    """
    if recognise(path) is None:
        return None
    converted = read(path)
    return saelens.content(converted, provenance(converted))


def difference(one: Converted, other: Converted, n_tokens: int = 64) -> dict[str, float]:
    """How far two SAEs are apart on random inputs, by dense formulas in float32 (float64 where either has it).

    Returns:
        `tokens`: how many there were; `other_features`: for how many of them other features fire, which rounding decides at a
        gate or between equal ranks; `sae_out`: the largest difference of a reconstruction of the rest; `size`: the largest
        number in a reconstruction.
    """
    dtype = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_tokens, one.d_in, generator=generator, dtype=dtype)
    x[n_tokens // 2 :] *= 10  # thresholds of many sizes are met
    acts, sae_out = one.forward(x)
    other_acts, other_out = other.forward(x)
    same = ((acts != 0) == (other_acts != 0)).all(dim=-1)
    return {
        "tokens": n_tokens,
        "other_features": int((~same).sum()),
        "sae_out": float((sae_out - other_out)[same].abs().max()) if same.any() else 0.0,
        "size": float(sae_out.abs().max()),
    }
