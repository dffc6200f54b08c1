"""circuit-tracer's transcoders of one layer, one safetensors file each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastsae.disk import write_json, write_tensors
from fastsae.peers.formats.converted import Converted, refuse, refuse_unless, same_dtype, with_b_dec_applied
from fastsae.peers.formats.registry import Format
from fastsae.peers.formats.source import PROVENANCE, Source
from fastsae.peers.formats.stored import take

_SHAPES = {"W_enc": "d_sae d_in", "b_enc": "d_sae", "W_dec": "d_sae d_out", "b_dec": "d_out"}
_THRESHOLD = "activation_function.threshold"


def read(source: Source) -> Converted:
    """Reads a file; ReLU where it has no threshold."""
    path, stored = source.tensors()
    if "k" in stored:
        raise ValueError(
            f"{path}: k: expected ReLU or JumpReLU, got a top-k that lets negative numbers pass, which no other format computes"
        )
    if any(name.startswith("W_enc_") for name in stored):
        raise ValueError(f"{path}: expected a transcoder of one layer, got a part of a cross-layer transcoder")
    names = {_THRESHOLD: "d_sae", "W_skip": "d_out d_in"}
    tensors = take(path, stored, _SHAPES | names, {}, optional=" ".join(names))
    threshold = tensors.get(_THRESHOLD)
    if threshold is not None and (threshold < 0).any():
        raise ValueError(
            f"{path}: {_THRESHOLD}: expected numbers >= 0, got a negative one, past which negative numbers would fire"
        )
    layer = source.layer()
    hooks = (
        {}
        if layer is None
        else {"hook_name": f"blocks.{layer}.mlp.hook_in", "hook_name_out": f"blocks.{layer}.hook_mlp_out"}
    )
    return Converted(
        "standard" if threshold is None else "jumprelu",
        tensors["W_enc"].t(),
        tensors["b_enc"],
        tensors["W_dec"],
        tensors["b_dec"],
        threshold=threshold,
        W_skip=tensors.get("W_skip"),
        is_transcoder=True,
        metadata=hooks,
    ).noted("transposed W_enc")


def write(converted: Converted, folder: Path, provenance: dict[str, Any]) -> Converted:
    """Writes `layer_N.safetensors`, and the provenance beside it."""
    refuse_unless(converted, "circuit-tracer", ["standard", "jumprelu"], transcoders=True)
    threshold = converted.threshold
    refuse(
        "circuit-tracer",
        {
            "an output of another width than its input": converted.d_in != converted.d_out,
            "an autoencoder, only transcoders": not converted.is_transcoder,
        },
    )
    converted = same_dtype(with_b_dec_applied(converted, False)).noted("transposed W_enc")
    names = ("b_enc", "W_dec", "b_dec")
    tensors = {"W_enc": converted.W_enc.t().contiguous(), **{name: getattr(converted, name) for name in names}}
    if threshold is not None:
        tensors[_THRESHOLD] = threshold.clamp_min(0)
    if converted.W_skip is not None:
        tensors["W_skip"] = converted.W_skip
    layer = "".join(filter(str.isdigit, str(converted.metadata.get("hook_name", "")).partition(".hook")[0])) or "0"
    write_tensors(folder / f"layer_{layer}.safetensors", tensors)
    write_json(folder / PROVENANCE, {**provenance, "changes": list(converted.notes)})
    return converted


def _recognises(source: Source) -> bool:
    names = source.names()
    return source.weights is not None and source.weights.suffix == ".safetensors" and set(_SHAPES) <= names


FORMATS = [
    Format(
        "circuit-tracer",
        "circuit-tracer's transcoders: layer_N.safetensors",
        (),
        _recognises,
        read,
        write,
        ("mwhanna_transcoder",),
    )
]
