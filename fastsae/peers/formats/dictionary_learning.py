"""dictionary_learning's folder: config.json, which names the class, and ae.pt, its state dict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.disk import write_atomically, write_json
from fastsae.fields import Fields
from fastsae.peers.formats.converted import (
    Converted,
    refuse_unless,
    same_dtype,
    with_b_dec_applied,
    without_rescaling,
)
from fastsae.peers.formats.registry import Format
from fastsae.peers.formats.source import Source
from fastsae.peers.formats.stored import scalar, take

_CONFIG, _WEIGHTS = "config.json", "ae.pt"
_LINEAR = {"encoder.weight": "d_sae d_in", "encoder.bias": "d_sae", "decoder.weight": "d_in d_sae"}
_PLAIN = {"W_enc": "d_in d_sae", "b_enc": "d_sae", "W_dec": "d_sae d_in", "b_dec": "d_in"}
_SHAPES = {
    "AutoEncoder": {**_LINEAR, "bias": "d_in"},
    "AutoEncoderNew": {**_LINEAR, "decoder.bias": "d_in"},
    "AutoEncoderTopK": {**_LINEAR, "b_dec": "d_in"},
    "BatchTopKSAE": {**_LINEAR, "b_dec": "d_in"},
    "MatryoshkaBatchTopKSAE": _PLAIN,
    "JumpReluAutoEncoder": {**_PLAIN, "threshold": "d_sae"},
}
_BY_BATCH = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")


def read(source: Source) -> Converted:
    """Reads both files; the BatchTopK classes become the JumpReLU that they are at inference."""
    path, stored = source.tensors(_WEIGHTS)
    config = source.json(_CONFIG)
    try:
        trainer = config.fields("trainer")
        name = trainer.choice("dict_class", list(_SHAPES))
        sizes = {"d_in": trainer.integer("activation_dim", 1, 2**31), "d_sae": trainer.integer("dict_size", 1, 2**31)}
        k = trainer.integer("k", 1, sizes["d_sae"]) if name in (*_BY_BATCH, "AutoEncoderTopK") else None
    except ValueError as error:
        raise ValueError(f"{source.folder / _CONFIG}: {error}") from None
    extra = {"k", "threshold", "group_sizes"} if k is not None else set()
    tensors = take(path, {n: v for n, v in stored.items() if n not in extra}, _SHAPES[name], sizes)
    if k is not None and scalar(path, stored, "k") not in (None, k):
        raise ValueError(f"{path}: k: expected {k}, as {_CONFIG} says, got {scalar(path, stored, 'k')}")
    converted = _converted(name, tensors, k)
    config_kept: dict[str, Any] = {"config": {n: v for n, v in config.values.items() if n != "provenance"}}
    if k is not None:
        threshold = scalar(path, stored, "threshold")
        threshold = -1.0 if threshold is None else float(threshold)
        config_kept["threshold"] = threshold
        if name in _BY_BATCH:
            converted = _gated(converted, threshold, name)
    if name == "MatryoshkaBatchTopKSAE":
        groups = stored.get("group_sizes")
        config_kept["group_sizes"] = groups.load().tolist() if groups is not None else []
    return replace(
        converted,
        metadata=_metadata(trainer, config),
        configs={"dictionary-learning": config_kept},
        history=config.fields("provenance", default={}).values,
    )


def _converted(name: str, tensors: dict[str, Tensor], k: int | None) -> Converted:
    is_linear = "encoder.weight" in tensors
    bias = next(tensors[n] for n in ("b_dec", "bias", "decoder.bias") if n in tensors)
    converted = Converted(
        "jumprelu" if name == "JumpReluAutoEncoder" else "topk" if name == "AutoEncoderTopK" else "standard",
        tensors["encoder.weight"].t() if is_linear else tensors["W_enc"],
        tensors["encoder.bias"] if is_linear else tensors["b_enc"],
        tensors["decoder.weight"].t() if is_linear else tensors["W_dec"],
        bias,
        threshold=tensors.get("threshold"),
        k=k if name == "AutoEncoderTopK" else None,
        apply_b_dec_to_input=name not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
        batch_topk_k=k if name in _BY_BATCH else None,
    )
    return converted.noted("transposed encoder.weight and decoder.weight") if is_linear else converted


def _gated(converted: Converted, threshold: float, name: str) -> Converted:
    """With the one threshold for every feature; one that was never set is -1, and lets every positive number pass."""
    dtype = torch.promote_types(converted.dtype, torch.float32)
    thresholds = torch.full((converted.d_sae,), max(threshold, 0.0), dtype=dtype)
    return converted.noted(
        f"read {name} as the JumpReLU that it is at inference, with its threshold {threshold:g} for every feature",
        architecture="jumprelu",
        threshold=thresholds,
    )


def _metadata(trainer: Fields, config: Fields) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    if isinstance(trainer.values.get("lm_name"), str):
        metadata["model_name"] = trainer.values["lm_name"]
    if isinstance(trainer.values.get("layer"), int):
        metadata["hook_name"] = f"blocks.{trainer.values['layer']}.hook_resid_post"
    buffer = config.values.get("buffer")
    if isinstance(buffer, dict) and isinstance(buffer.get("ctx_len"), int):
        metadata["context_size"] = buffer["ctx_len"]
    return metadata


def write(converted: Converted, folder: Path, provenance: dict[str, Any]) -> Converted:
    """Writes both files, the weights first, as the class that computes the same."""
    refuse_unless(converted, "dictionary-learning", ["standard", "jumprelu", "topk"])
    kept = converted.configs.get("dictionary-learning", {})
    name = _class_of(converted)
    converted = without_rescaling(with_b_dec_applied(converted, name not in ("AutoEncoderNew", "JumpReluAutoEncoder")))
    converted = same_dtype(converted)
    state: dict[str, Tensor]
    if name == "JumpReluAutoEncoder":
        assert converted.threshold is not None
        state = {n: getattr(converted, n) for n in _PLAIN} | {"threshold": converted.threshold}
    else:
        converted = converted.noted("transposed W_enc into encoder.weight and W_dec into decoder.weight")
        bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(name, "b_dec")
        state = {
            "encoder.weight": converted.W_enc.t().contiguous(),
            "encoder.bias": converted.b_enc,
            "decoder.weight": converted.W_dec.t().contiguous(),
            bias: converted.b_dec,
        }
    k = converted.k if name == "AutoEncoderTopK" else converted.batch_topk_k
    if name in ("AutoEncoderTopK", "BatchTopKSAE"):
        threshold = float(kept.get("threshold", -1.0)) if converted.threshold is None else float(converted.threshold[0])
        state |= {"k": torch.tensor(k, dtype=torch.int), "threshold": torch.tensor(threshold)}
    config = dict(kept.get("config", {}))
    trainer = {**(config.get("trainer") or {}), "dict_class": name}
    trainer |= {"activation_dim": converted.d_in, "dict_size": converted.d_sae}
    trainer |= {"k": k} if "k" in state else {}
    trainer.setdefault("lm_name", converted.metadata.get("model_name", "unknown"))
    config |= {"trainer": trainer, "provenance": {**provenance, "changes": list(converted.notes)}}
    write_atomically(folder / _WEIGHTS, lambda temporary: torch.save(state, temporary))
    write_json(folder / _CONFIG, config)
    return converted


def _class_of(converted: Converted) -> str:
    threshold = converted.threshold
    if converted.architecture == "topk":
        return "AutoEncoderTopK"
    if threshold is None:
        return "AutoEncoder" if converted.apply_b_dec_to_input else "AutoEncoderNew"
    if converted.batch_topk_k is not None and torch.equal(threshold, threshold[:1].expand_as(threshold)):
        return "BatchTopKSAE"
    return "JumpReluAutoEncoder"


FORMATS = [
    Format(
        "dictionary-learning",
        "dictionary_learning: config.json, ae.pt",
        (_CONFIG, _WEIGHTS),
        lambda source: source.has(_CONFIG, _WEIGHTS),
        read,
        write,
        ("dictionary_learning_1", "dictionary_learning"),
    )
]
