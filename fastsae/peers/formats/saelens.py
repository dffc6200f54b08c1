"""SAELens' folder of two files, version 6 and the versions before it; this library's own format too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.disk import digest, write_json, write_tensors
from fastsae.errors import shown
from fastsae.fields import DTYPES, Fields
from fastsae.peers.formats.converted import Converted, refuse, same_dtype, without_rescaling
from fastsae.peers.formats.registry import Format
from fastsae.peers.formats.source import Source
from fastsae.peers.formats.stored import take
from fastsae.sae.config_file import is_old, modern, old_metadata
from fastsae.sae.files import CHECKSUM, CONFIG_FILE, SAE_LENS_VERSION, WEIGHTS_FILE, WRITER
from fastsae.version import __version__

_TRANSCODERS = {
    "transcoder": ("standard", False),
    "skip_transcoder": ("standard", True),
    "jumprelu_transcoder": ("jumprelu", False),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}
_TRAINED_BY_BATCH = ("batchtopk", "matryoshka_batchtopk")
_ARCHITECTURES = ("standard", "jumprelu", "topk", *_TRANSCODERS, *_TRAINED_BY_BATCH)
_WORDS = {base: word for word, base in _TRANSCODERS.items()}


def read(source: Source) -> Converted:
    """Reads both files; a training checkpoint of a BatchTopK becomes the JumpReLU that it is at inference."""
    path, stored = source.tensors(WEIGHTS_FILE)
    config_path = source.folder / CONFIG_FILE
    found = source.json(CONFIG_FILE)
    try:
        metadata = dict(found.fields("metadata", default={}).values)
        legacy = is_old(found, metadata)
        if legacy:
            found = modern(found)
            metadata |= old_metadata(found)
        architecture = found.choice("architecture", _ARCHITECTURES)
        own = Fields(metadata.pop("fastsae", None) or {}, "metadata.fastsae.")
        layer_norm, is_hook_z = _options(found, metadata, legacy)
    except ValueError as error:
        raise ValueError(f"{config_path}: {error}") from None
    return _converted(source, path, stored, found, architecture, own, metadata, (layer_norm, is_hook_z, legacy))


def _options(found: Fields, metadata: dict[str, Any], legacy: bool) -> tuple[bool, bool]:
    normalize = found.get("normalize_activations", "none")
    if normalize not in ("none", False, "layer_norm"):
        raise ValueError(
            f"normalize_activations: expected 'none' or 'layer_norm', got {shown(normalize)}; its factor is in no file: fold "
            "it into the weights with SAELens first"
        )
    in_heads = legacy and "hook_z" in str(metadata.get("hook_name"))
    reshape = found.get("reshape_activations", "hook_z" if in_heads else "none")
    if reshape not in ("none", "hook_z"):
        raise ValueError(f"reshape_activations: expected 'none' or 'hook_z', got {shown(reshape)}")
    return normalize == "layer_norm", reshape == "hook_z"


def _converted(
    source: Source,
    path: Path,
    stored: dict[str, Any],
    found: Fields,
    architecture: str,
    own: Fields,
    metadata: dict[str, Any],
    options: tuple[bool, bool, bool],
) -> Converted:
    layer_norm, is_hook_z, legacy = options
    base, skip = _TRANSCODERS.get(architecture, (architecture, False))
    transcoder, by_batch = architecture in _TRANSCODERS, architecture in _TRAINED_BY_BATCH
    try:
        sizes = {name: found.integer(name, 1, 2**31) for name in ("d_in", "d_sae")}
        sizes["d_out"] = found.integer("d_out", 1, 2**31) if transcoder else sizes["d_in"]
        k = found.get("k", None) if base == "topk" or by_batch else None
        if base == "topk" or k is not None:
            k = Fields({"k": int(k) if isinstance(k, float) and k.is_integer() else k}).integer("k", 1, sizes["d_sae"])
        elif own.get("architecture", None) in ("standard", "jumprelu"):
            k = own.integer("k", 1, sizes["d_sae"], default=None)
        rescale = found.boolean("rescale_acts_by_decoder_norm", default=by_batch)
        applied = found.boolean("apply_b_dec_to_input", default=True)
        if transcoder and applied:
            raise found.wrong("apply_b_dec_to_input", "false, because it is a transcoder")
    except ValueError as error:
        raise ValueError(f"{source.folder / CONFIG_FILE}: {error}") from None
    shapes = {"W_enc": "d_in d_sae", "b_enc": "d_sae", "W_dec": "d_sae d_out", "b_dec": "d_out"}
    shapes |= {"threshold": "d_sae"} if base == "jumprelu" else {}
    shapes |= {"W_skip": "d_out d_in"} if skip else {}
    shapes |= {"topk_threshold": ""} if by_batch else {}
    shapes |= {"scaling_factor": "d_sae"} if legacy else {}
    tensors = take(path, stored, shapes, sizes, optional="scaling_factor")
    scaling = tensors.pop("scaling_factor", None)
    if scaling is not None and not torch.allclose(scaling, torch.ones_like(scaling)):
        raise ValueError(
            f"{path}: scaling_factor: expected ones, got others; fold them into the weights with SAELens first"
        )
    history = metadata.pop("provenance", None)
    history = history if isinstance(history, dict) else {}
    configs = history.get("configs")
    metadata = {name: value for name, value in metadata.items() if name != CHECKSUM}
    converted = Converted(
        "topk" if base == "topk" else "jumprelu" if base == "jumprelu" or by_batch else "standard",
        tensors["W_enc"],
        tensors["b_enc"],
        tensors["W_dec"],
        tensors["b_dec"],
        threshold=tensors.get("threshold"),
        k=None if by_batch else k,
        apply_b_dec_to_input=applied,
        rescale_acts_by_decoder_norm=rescale and base == "topk",
        layer_norm=layer_norm,
        W_skip=tensors.get("W_skip"),
        is_transcoder=transcoder,
        is_hook_z=is_hook_z,
        batch_topk_k=k if by_batch else own.get("k", None) if own.get("architecture", None) == "batchtopk" else None,
        metadata=metadata,
        own=dict(own.values),
        configs=configs if isinstance(configs, dict) else {},
        history=history,
    )
    if scaling is not None:
        converted = converted.noted("dropped scaling_factor, which was 1 everywhere")
    return _at_inference(converted, tensors["topk_threshold"], rescale) if by_batch else converted


def _at_inference(converted: Converted, threshold: Tensor, rescale: bool) -> Converted:
    """A training checkpoint as SAELens saves it for inference."""
    wide = torch.promote_types(converted.dtype, torch.float32)
    folded = without_rescaling(replace(converted, rescale_acts_by_decoder_norm=rescale))
    return folded.noted(
        "read BatchTopK as the JumpReLU that it is at inference, with topk_threshold for every feature",
        threshold=threshold.to(wide).expand(converted.d_sae).clone(),
    )


def content(converted: Converted, provenance: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `cfg.json` says, without a checksum, and the tensors of the other file.

    Raises:
        ValueError: SAELens has no architecture that computes it.
    """
    converted = same_dtype(converted)
    is_topk = converted.architecture == "topk"
    refuse(
        "saelens",
        {
            "a top-k transcoder": converted.is_transcoder and is_topk,
            "a skip connection in an autoencoder": converted.W_skip is not None and not converted.is_transcoder,
            "a transcoder that subtracts b_dec from its input": converted.is_transcoder
            and converted.apply_b_dec_to_input,
        },
    )
    word: str = converted.architecture
    if converted.is_transcoder:
        word = _WORDS[converted.architecture, converted.W_skip is not None]
    own = dict(converted.own)
    if converted.batch_topk_k is not None and not own:
        own = _batch_topk(converted, converted.batch_topk_k)
    keys: dict[str, Any] = {"architecture": word, "d_in": converted.d_in, "d_sae": converted.d_sae}
    if is_topk:
        keys |= {"k": converted.k, "rescale_acts_by_decoder_norm": converted.rescale_acts_by_decoder_norm}
    if converted.is_transcoder:
        keys["d_out"] = converted.d_out
    provenance = {
        name: value for name, value in provenance.items() if name != "metadata"
    }  # which stands around it here
    metadata = {**converted.metadata, "sae_lens_version": SAE_LENS_VERSION, "provenance": provenance}
    config = {
        **keys,
        "dtype": next(name for name, dtype in DTYPES.items() if dtype == converted.dtype),
        "device": "cpu",
        "apply_b_dec_to_input": converted.apply_b_dec_to_input,
        "normalize_activations": "layer_norm" if converted.layer_norm else "none",
        "reshape_activations": "hook_z" if converted.is_hook_z else "none",
        WRITER: __version__,
        "metadata": {**metadata, **({"fastsae": own} if own else {})},
    }
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")
    return config, {name: getattr(converted, name) for name in names if getattr(converted, name) is not None}


def _batch_topk(converted: Converted, k: int) -> dict[str, Any]:
    """What lets `FusedBatchTopKSAE` train on, where one threshold serves all features."""
    threshold = converted.threshold
    if threshold is None or not torch.equal(threshold, threshold[:1].expand_as(threshold)):
        return {}
    return {
        "architecture": "batchtopk",
        "k": k,
        "rescale_acts_by_decoder_norm": False,
        "topk_threshold": float(threshold[0]),
    }


def write(converted: Converted, folder: Path, provenance: dict[str, Any]) -> Converted:
    """Writes both files, the weights first."""
    config, tensors = content(converted, provenance)
    write_tensors(folder / WEIGHTS_FILE, tensors)
    config["metadata"][CHECKSUM] = digest(folder / WEIGHTS_FILE)
    write_json(folder / CONFIG_FILE, config)
    return converted


FORMATS = [
    Format(
        "saelens",
        "SAELens and fastsae: cfg.json, sae_weights.safetensors",
        (CONFIG_FILE, WEIGHTS_FILE),
        lambda source: source.has(CONFIG_FILE, WEIGHTS_FILE),
        read,
        write,
        ("sae_lens",),
    )
]
