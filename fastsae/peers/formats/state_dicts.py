"""Releases of one state dict each, without a config: OpenAI, Goodfire, Qwen Scope, and the R1 SAEs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastsae.disk import write_atomically, write_json
from fastsae.errors import shown
from fastsae.fields import Fields
from fastsae.peers.formats.converted import (
    Converted,
    refuse,
    refuse_unless,
    same_dtype,
    with_b_dec_applied,
    without_rescaling,
)
from fastsae.peers.formats.registry import Format
from fastsae.peers.formats.source import PROVENANCE, Source
from fastsae.peers.formats.stored import take

_OPENAI = {"encoder.weight": "d_sae d_in", "latent_bias": "d_sae", "decoder.weight": "d_in d_sae", "pre_bias": "d_in"}
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_QWEN = {"W_enc": "d_sae d_in", "b_enc": "d_sae", "W_dec": "d_in d_sae", "b_dec": "d_in"}


def read_openai(source: Source) -> Converted:
    """Reads an `Autoencoder`; one with TopK normalises each token, which only SAELens' files can say too."""
    path, stored = source.tensors()
    stored = {name: value for name, value in stored.items() if name not in _STATISTICS}
    state = Fields({name: stored.pop(name) for name in ("activation", "activation_state_dict") if name in stored})
    try:
        activation = state.choice("activation", ["ReLU", "TopK"], default="ReLU")
        inner = state.fields("activation_state_dict", default={})
        k = inner.integer("k", 1) if activation == "TopK" else None
        if activation == "TopK":
            inner.choice("postact_fn", ["ReLU"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tensors = take(path, stored, _OPENAI, {})
    if k is not None and k > len(tensors["latent_bias"]):
        raise ValueError(f"{path}: k: expected at most d_sae = {len(tensors['latent_bias'])}, got {k}")
    return Converted(
        "standard" if k is None else "topk",
        tensors["encoder.weight"].t(),
        tensors["latent_bias"],
        tensors["decoder.weight"].t(),
        tensors["pre_bias"],
        k=k,
        apply_b_dec_to_input=True,
        layer_norm=k is not None,
    ).noted("transposed encoder.weight and decoder.weight; left out the statistics of training")


def write_openai(converted: Converted, folder: Path, provenance: dict[str, Any]) -> Converted:
    """Writes `autoencoder.pt`, and the provenance beside it."""
    is_topk = converted.architecture == "topk"
    if not is_topk or not converted.layer_norm:
        refuse_unless(converted, "openai", ["standard", "topk"])
    reason = "a top-k SAE without LayerNorm: its reader applies LayerNorm wherever the activation is TopK"
    refuse(
        "openai",
        {
            reason: is_topk and not converted.layer_norm,
            "a skip connection or a transcoder": converted.is_transcoder or converted.W_skip is not None,
        },
    )
    converted = same_dtype(without_rescaling(with_b_dec_applied(converted, True)))
    converted = converted.noted("transposed W_enc and W_dec")
    zeros = torch.zeros(converted.d_sae)
    state: dict[str, Any] = {
        "pre_bias": converted.b_dec,
        "latent_bias": converted.b_enc,
        "stats_last_nonzero": zeros.long(),
        "latents_activation_frequency": torch.ones_like(zeros),
        "latents_mean_square": zeros,
        "encoder.weight": converted.W_enc.t().contiguous(),
        "decoder.weight": converted.W_dec.t().contiguous(),
        "activation": "TopK" if is_topk else "ReLU",
        "activation_state_dict": {"k": converted.k, "postact_fn": "ReLU"} if is_topk else {},
    }
    return _save(folder / "autoencoder.pt", state, provenance, converted)


def _save(path: Path, state: dict[str, Any], provenance: dict[str, Any], converted: Converted) -> Converted:
    write_atomically(path, lambda temporary: torch.save(state, temporary))
    write_json(path.parent / PROVENANCE, {**provenance, "changes": list(converted.notes)})
    return converted


def _linear(encoder: str, decoder: str) -> dict[str, str]:
    return {
        f"{encoder}.weight": "d_sae d_in",
        f"{encoder}.bias": "d_sae",
        f"{decoder}.weight": "d_in d_sae",
        f"{decoder}.bias": "d_in",
    }


def _read_linear(encoder: str, decoder: str) -> Callable[[Source], Converted]:
    """A reader of ReLU SAEs made of two linear layers, whose encoder reads x as it is."""

    def read(source: Source) -> Converted:
        path, stored = source.tensors()
        W_enc, b_enc, W_dec, b_dec = take(path, stored, _linear(encoder, decoder), {}).values()
        return Converted("standard", W_enc.t(), b_enc, W_dec.t(), b_dec, metadata=_residual(source)).noted(
            f"transposed {encoder}.weight and {decoder}.weight"
        )

    return read


def _residual(source: Source) -> dict[str, Any]:
    found = re.search(r"(?:layer|-l|_l)(\d+)", source.path.name)
    return {"hook_name": f"blocks.{found.group(1)}.hook_resid_post"} if found else {}


def _write_linear(target: str, encoder: str, decoder: str) -> Callable[[Converted, Path, dict[str, Any]], Converted]:
    def write(converted: Converted, folder: Path, provenance: dict[str, Any]) -> Converted:
        refuse_unless(converted, target, ["standard"])
        converted = same_dtype(with_b_dec_applied(converted, False)).noted("transposed W_enc and W_dec")
        state = {
            f"{encoder}.weight": converted.W_enc.t().contiguous(),
            f"{encoder}.bias": converted.b_enc,
            f"{decoder}.weight": converted.W_dec.t().contiguous(),
            f"{decoder}.bias": converted.b_dec,
        }
        return _save(folder / "sae.pt", state, provenance, converted)

    return write


def read_qwen(source: Source) -> Converted:
    """Reads `layerN.sae.pt`; k is only in the name of its repository, `...-L0_50`, or given."""
    path, stored = source.tensors()
    named = re.findall(r"-L0_(\d+)", source.words)
    k = source.k if source.k is not None else int(named[-1]) if named else None
    if k is None:
        raise ValueError(
            f"{path}: k: expected in the path, as in SAE-Res-Qwen3-1.7B-Base-W32K-L0_50, or given with --k, because the file "
            "does not hold it"
        )
    tensors = take(path, stored, _QWEN, {})
    if not 1 <= k <= len(tensors["b_enc"]):
        raise ValueError(f"{path}: k: expected an integer from 1 to d_sae = {len(tensors['b_enc'])}, got {shown(k)}")
    return Converted(
        "topk",
        tensors["W_enc"].t(),
        tensors["b_enc"],
        tensors["W_dec"].t(),
        tensors["b_dec"],
        k=k,
        metadata=_residual(source),
    ).noted(f"transposed W_enc and W_dec; k = {k} was {'given' if source.k is not None else 'in the path'}")


def write_qwen(converted: Converted, folder: Path, provenance: dict[str, Any]) -> Converted:
    """Writes `layerN.sae.pt`; the folder's name has to say k, as the peer's repositories do."""
    refuse_unless(converted, "qwen-scope", ["topk"])
    wanted = f"-L0_{converted.k}"
    if not folder.absolute().name.endswith(wanted):
        raise ValueError(
            f"qwen-scope keeps k in the name of the folder alone: expected a target ending in {wanted}, got {folder.name}"
        )
    converted = same_dtype(without_rescaling(with_b_dec_applied(converted, False))).noted("transposed W_enc and W_dec")
    found = re.search(r"\d+", str(converted.metadata.get("hook_name", "")))
    state = {
        "W_enc": converted.W_enc.t().contiguous(),
        "b_enc": converted.b_enc,
        "W_dec": converted.W_dec.t().contiguous(),
        "b_dec": converted.b_dec,
    }
    return _save(folder / f"layer{found.group() if found else 0}.sae.pt", state, provenance, converted)


def read_hook_z(source: Source) -> Converted:
    """Reads an SAE of Kissane and Krzyzanowski on the heads of GPT-2: `NAME.pt` beside `NAME_cfg.json`."""
    path, stored = source.tensors()
    found = source.json(f"{path.stem}_cfg.json")
    try:
        sizes = {"d_in": found.integer("act_size", 1, 2**31), "d_sae": found.integer("dict_size", 1, 2**31)}
    except ValueError as error:
        raise ValueError(f"{path.parent / path.stem}_cfg.json: {error}") from None
    shapes = {"W_enc": "d_in d_sae", "b_enc": "d_sae", "W_dec": "d_sae d_in", "b_dec": "d_in"}
    W_enc, b_enc, W_dec, b_dec = take(path, stored, shapes, sizes).values()
    metadata = {"model_name": "gpt2-small", "hook_name": found.values.get("act_name")}
    return Converted(
        "standard", W_enc, b_enc, W_dec, b_dec, apply_b_dec_to_input=True, is_hook_z=True, metadata=metadata
    )


def _is_hook_z(source: Source) -> bool:
    weights = source.weights
    return weights is not None and (weights.parent / f"{weights.stem}_cfg.json").is_file()


def _has(*names: str) -> Callable[[Source], bool]:
    def recognises(source: Source) -> bool:
        weights = source.weights
        return weights is not None and weights.suffix in (".pt", ".pth") and set(names) <= source.names()

    return recognises


FORMATS = [
    Format(
        "openai",
        "OpenAI's sparse_autoencoder: one state dict",
        (),
        _has("latent_bias", "pre_bias"),
        read_openai,
        write_openai,
    ),
    Format(
        "goodfire",
        "Goodfire: one state dict of encoder_linear, decoder_linear",
        (),
        _has("encoder_linear.weight", "decoder_linear.weight"),
        _read_linear("encoder_linear", "decoder_linear"),
        _write_linear("goodfire", "encoder_linear", "decoder_linear"),
    ),
    Format(
        "deepseek-r1",
        "the DeepSeek R1 SAEs: one state dict of encoder, decoder",
        (),
        _has("encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias"),
        _read_linear("encoder", "decoder"),
        _write_linear("deepseek-r1", "encoder", "decoder"),
        ("deepseek_r1",),
    ),
    Format(
        "hook-z",
        "SAEs on GPT-2's heads: NAME.pt, NAME_cfg.json",
        (),
        _is_hook_z,
        read_hook_z,
        None,
        ("connor_rob_hook_z",),
    ),
    Format(
        "qwen-scope",
        "Qwen Scope: layerN.sae.pt, and k in the folder's name",
        (),
        _has("W_enc", "b_enc", "W_dec", "b_dec"),
        read_qwen,
        write_qwen,
        ("qwen_scope",),
    ),
]
