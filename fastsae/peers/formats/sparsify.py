"""EleutherAI's sparsify: TopK autoencoders and transcoders in cfg.json and sae.safetensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae.disk import write_json, write_tensors
from fastsae.peers.formats.converted import (
    Converted,
    refuse,
    refuse_unless,
    same_dtype,
    with_b_dec_applied,
    without_rescaling,
)
from fastsae.peers.formats.registry import Format
from fastsae.peers.formats.source import Source
from fastsae.peers.formats.stored import take

_CONFIG, _WEIGHTS = "cfg.json", "sae.safetensors"


def read(source: Source) -> Converted:
    """Reads both files. The peer subtracts `b_dec` unless it transcodes, whatever `normalize_decoder` says."""
    path, stored = source.tensors(_WEIGHTS)
    found = source.json(_CONFIG)
    try:
        d_in = found.integer("d_in", 1, 2**31)
        d_sae = found.integer("num_latents", 0, 2**31, default=0) or d_in * found.integer(
            "expansion_factor", 1, 2**20, default=32
        )
        k = found.integer("k", 1, d_sae, default=32)
        found.choice("activation", ["topk"], default="topk")
        transcode = found.boolean("transcode", default=False)
        skip = found.boolean("skip_connection", default=False)
        if found.boolean("signed", default=False):
            raise found.wrong("signed", "false, because negative activations have no counterpart elsewhere")
    except ValueError as error:
        raise ValueError(f"{source.folder / _CONFIG}: {error}") from None
    shapes = {"encoder.weight": "d_sae d_in", "encoder.bias": "d_sae", "W_dec": "d_sae d_in", "b_dec": "d_in"}
    tensors = take(path, stored, shapes | ({"W_skip": "d_in d_in"} if skip else {}), {"d_in": d_in, "d_sae": d_sae})
    return Converted(
        "topk",
        tensors["encoder.weight"].t(),
        tensors["encoder.bias"],
        tensors["W_dec"],
        tensors["b_dec"],
        k=k,
        apply_b_dec_to_input=not transcode,
        W_skip=tensors.get("W_skip"),
        is_transcoder=transcode,
        metadata=_metadata(source),
        configs={"sparsify": {name: value for name, value in found.values.items() if name != "provenance"}},
        history=found.fields("provenance", default={}).values,
    ).noted("transposed encoder.weight")


def _metadata(source: Source) -> dict[str, Any]:
    """The folder's name is the hookpoint: the block's output, where it is a layer and nothing within."""
    found = re.fullmatch(r"(?:.*\.)?layers[._](\d+)", source.folder.absolute().name)
    return {"hook_name": f"blocks.{found.group(1)}.hook_resid_post"} if found else {}


def write(converted: Converted, folder: Path, provenance: dict[str, Any]) -> Converted:
    """Writes both files, the weights first."""
    refuse_unless(converted, "sparsify", ["topk"], transcoders=True)
    refuse("sparsify", {"an output of another width than its input": converted.d_out != converted.d_in})
    converted = without_rescaling(with_b_dec_applied(converted, not converted.is_transcoder))
    converted = same_dtype(converted.noted("transposed W_enc into encoder.weight"))
    tensors: dict[str, Tensor] = {
        "encoder.weight": converted.W_enc.t().contiguous(),
        "encoder.bias": converted.b_enc,
        "W_dec": converted.W_dec,
        "b_dec": converted.b_dec,
    }
    if converted.W_skip is not None:
        tensors["W_skip"] = converted.W_skip
    config = {
        "activation": "topk",
        "expansion_factor": max(1, converted.d_sae // converted.d_in),
        "normalize_decoder": False,
        "multi_topk": False,
        **converted.configs.get("sparsify", {}),
        "num_latents": converted.d_sae,
        "k": converted.k,
        "skip_connection": converted.W_skip is not None,
        "transcode": converted.is_transcoder,
        "d_in": converted.d_in,
        "provenance": {**provenance, "changes": list(converted.notes)},
    }
    write_tensors(folder / _WEIGHTS, tensors)
    write_json(folder / _CONFIG, config)
    return converted


FORMATS = [
    Format(
        "sparsify",
        "EleutherAI's sparsify: cfg.json, sae.safetensors",
        (_CONFIG, _WEIGHTS),
        lambda source: source.has(_CONFIG, _WEIGHTS),
        read,
        write,
    )
]
