"""Google DeepMind's Gemma Scope, first edition (npz) and second (safetensors): JumpReLU, `b_dec` never subtracted."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae.disk import write_atomically, write_json, write_tensors
from fastsae.peers.formats.converted import (
    Converted,
    as_jumprelu,
    refuse,
    refuse_unless,
    same_dtype,
    with_b_dec_applied,
)
from fastsae.peers.formats.registry import Format
from fastsae.peers.formats.source import PROVENANCE, Source
from fastsae.peers.formats.stored import take

_FIRST, _SECOND, _CONFIG = "params.npz", "params.safetensors", "config.json"
_SHAPES = {"W_enc": "d_in d_sae", "b_enc": "d_sae", "W_dec": "d_sae d_out", "b_dec": "d_out", "threshold": "d_sae"}
_SITES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}


def read_first(source: Source) -> Converted:
    """Reads `params.npz`; an SAE of embeddings is rescaled, because it was trained on embeddings times sqrt(d_in)."""
    path, stored = source.tensors()
    stored = {f"W{name[1:]}" if name.startswith("w_") else name: value for name, value in stored.items()}
    is_transcoder = (
        source.asked == "gemma_2_transcoder" or re.search(r"gemma-scope[^/]*-transcoders", source.words) is not None
    )
    tensors = take(path, stored, _SHAPES, {})
    W_enc, W_dec = tensors["W_enc"], tensors["W_dec"]
    if not is_transcoder and W_enc.shape[0] != W_dec.shape[1]:
        raise ValueError(
            f"{path}: W_dec: expected rows as wide as the input, {W_enc.shape[0]}, got {W_dec.shape[1]}; if it is a transcoder, "
            "say so with --from gemma_2_transcoder"
        )
    converted = Converted(
        "jumprelu",
        W_enc,
        tensors["b_enc"],
        W_dec,
        tensors["b_dec"],
        threshold=tensors["threshold"],
        is_transcoder=is_transcoder,
        metadata=_first_metadata(source),
    )
    if not _is_of_embeddings(source):
        return converted
    scale = math.sqrt(converted.d_in)
    return converted.noted(
        "rescaled an SAE of embeddings: W_enc /= sqrt(d_in), W_dec *= sqrt(d_in)",
        W_enc=W_enc / scale,
        W_dec=W_dec * scale,
    )


def _is_of_embeddings(source: Source) -> bool:
    """As they are published: `embedding/width_4k/average_l0_6`."""
    return re.search(r"/embedding/width_[^/]*/average_l0_[^/]*$", source.folder.absolute().as_posix()) is not None


def _first_metadata(source: Source) -> dict[str, Any]:
    layer = source.layer()
    site = next((hook for word, hook in _SITES.items() if f"-{word}/" in f"{source.words}/"), None)
    if _is_of_embeddings(source):
        return {"hook_name": "hook_embed"}
    return {} if layer is None or site is None else {"hook_name": f"blocks.{layer}.{site}"}


def write_first(converted: Converted, folder: Path, provenance: dict[str, Any]) -> Converted:
    """Writes `params.npz`, and the provenance beside it."""
    refuse("gemma-scope", {"a skip connection": converted.W_skip is not None})
    refuse_unless(converted, "gemma-scope", ["jumprelu", "standard"], transcoders=True)
    converted = same_dtype(with_b_dec_applied(as_jumprelu(converted), False))
    arrays = {name: getattr(converted, name) for name in _SHAPES}
    if any(tensor.dtype == torch.bfloat16 for tensor in arrays.values()):
        arrays = {name: tensor.float() for name, tensor in arrays.items()}
        converted = converted.noted("widened bfloat16, which NumPy lacks, to float32")
    numbers = {name: tensor.detach().cpu().numpy() for name, tensor in arrays.items()}
    write_atomically(folder / _FIRST, lambda temporary: _savez(temporary, numbers))
    write_json(folder / PROVENANCE, {**provenance, "changes": list(converted.notes)})
    return converted


def _savez(path: Path, arrays: dict[str, Any]) -> None:
    with path.open("wb") as file:  # of a path without its suffix, NumPy would make another
        np.savez(file, **arrays)


def read_second(source: Source) -> Converted:
    """Reads `params.safetensors`, and `config.json` where there is one."""
    path, stored = source.tensors(_SECOND if source.path.is_dir() and source.has(_SECOND) else None)
    has_config = (source.folder / _CONFIG).is_file()
    found = source.json(_CONFIG) if has_config else None
    shapes = {name.replace("W_", "w_"): dims for name, dims in _SHAPES.items()}
    w_dec = stored.get("w_dec")
    if w_dec is not None and len(getattr(w_dec, "shape", ())) == 3:
        raise ValueError(
            f"{path}: w_dec: expected one decoder, got those of a cross-layer transcoder or a crosscoder, which no other format "
            "holds"
        )
    try:
        if found is not None:
            found.choice("architecture", ["jump_relu"])
        is_transcoder = found is not None and found.get("hf_hook_point_out", None) not in (
            None,
            found.get("hf_hook_point_in", None),
        )
    except ValueError as error:
        raise ValueError(f"{source.folder / _CONFIG}: {error}") from None
    named = source.folder.absolute().parent.name.startswith("transcoder")  # as they are published
    is_transcoder = is_transcoder or named or "affine_skip_connection" in stored
    tensors = take(
        path, stored, {**shapes, "affine_skip_connection": "d_in d_out"}, {}, optional="affine_skip_connection"
    )
    if not is_transcoder and tensors["w_enc"].shape[0] != tensors["w_dec"].shape[1]:
        raise ValueError(f"{path}: w_dec: expected rows as wide as the input, {tensors['w_enc'].shape[0]}, got others")
    skip = tensors.get("affine_skip_connection")
    config = {} if found is None else found.values
    converted = Converted(
        "jumprelu",
        tensors["w_enc"],
        tensors["b_enc"],
        tensors["w_dec"],
        tensors["b_dec"],
        threshold=tensors["threshold"],
        W_skip=None if skip is None else skip.t(),
        is_transcoder=is_transcoder,
        metadata=_second_metadata(source, config),
        configs={"gemma-scope-2": {name: value for name, value in config.items() if name != "provenance"}},
        history={} if found is None else found.fields("provenance", default={}).values,
    )
    return converted if skip is None else converted.noted("transposed affine_skip_connection")


def _second_metadata(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    if isinstance(config.get("model_name"), str):
        metadata["model_name"] = config["model_name"]
    layer = source.layer()
    sites = {"resid_post": "hook_resid_post", "attn_out": "attn.hook_z", "mlp_out": "hook_mlp_out"}
    site = next((hook for word, hook in sites.items() if word in source.words), None)
    if layer is not None and site is not None:
        metadata["hook_name"] = f"blocks.{layer}.{site}"
    return metadata


def write_second(converted: Converted, folder: Path, provenance: dict[str, Any]) -> Converted:
    """Writes `params.safetensors` and `config.json`."""
    refuse_unless(converted, "gemma-scope-2", ["jumprelu", "standard"], transcoders=True)
    converted = same_dtype(with_b_dec_applied(as_jumprelu(converted), False))
    tensors: dict[str, Tensor] = {name.replace("W_", "w_"): getattr(converted, name) for name in _SHAPES}
    if converted.W_skip is not None:
        tensors["affine_skip_connection"] = converted.W_skip.t().contiguous()
        converted = converted.noted("transposed W_skip into affine_skip_connection")
    config = {
        **converted.configs.get("gemma-scope-2", {}),
        "architecture": "jump_relu",
        "affine_connection": converted.W_skip is not None,
        "provenance": {**provenance, "changes": list(converted.notes)},
    }
    if "model_name" in converted.metadata:
        config.setdefault("model_name", converted.metadata["model_name"])
    if converted.is_transcoder:
        config.setdefault("hf_hook_point_in", converted.metadata.get("hook_name", "input"))
        config.setdefault("hf_hook_point_out", converted.metadata.get("hook_name_out", "output"))
    write_tensors(folder / _SECOND, tensors)
    write_json(folder / _CONFIG, config)
    return converted


def _is_first(source: Source) -> bool:
    return source.weights is not None and source.weights.suffix == ".npz"


def _is_second(source: Source) -> bool:
    if source.path.is_dir() and source.has(_SECOND):
        return True
    return source.weights is not None and source.weights.suffix == ".safetensors" and "w_enc" in source.names()


FORMATS = [
    Format(
        "gemma-scope",
        "Gemma Scope: params.npz",
        (_FIRST,),
        _is_first,
        read_first,
        write_first,
        ("gemma_2", "gemma_2_transcoder"),
    ),
    Format(
        "gemma-scope-2",
        "Gemma Scope 2: config.json, params.safetensors",
        (_SECOND, _CONFIG),
        _is_second,
        read_second,
        write_second,
        ("gemma_3",),
    ),
]
