"""OpenMOSS' Llama Scope, its R1 release, and Llamascopium: dataset norms folded, decoder norms in the gate.

A model of these libraries sees x * c_in, with c = sqrt(d_model) / the average norm of the activations, and predicts
y * c_out. With activations as they are, the same function has

    b_enc / c_in,  W_dec * c_in / c_out,  b_dec / c_out,  threshold / c_in

and feature activations are smaller by c_in. Where `sparsity_include_decoder_norm` is set, a feature fires where
hidden_pre * |W_D| is above its threshold, with the norm of the W_D that is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.disk import write_json, write_tensors
from fastsae.fields import Fields
from fastsae.peers.formats.converted import (
    Converted,
    decoder_norms,
    refuse,
    refuse_unless,
    same_dtype,
    widened,
    with_b_dec_applied,
)
from fastsae.peers.formats.registry import Format
from fastsae.peers.formats.source import Source
from fastsae.peers.formats.stored import take

_SCOPE, _CONFIG, _WEIGHTS = "hyperparams.json", "config.json", "sae_weights.safetensors"
_CHECKPOINTS = ("checkpoints/pruned.safetensors", "checkpoints/final.safetensors")  # the peer's order
_LINEAR = {
    "encoder.weight": "d_sae d_in",
    "encoder.bias": "d_sae",
    "decoder.weight": "d_in d_sae",
    "decoder.bias": "d_in",
}
_NAMES = {"W_E": "d_in d_sae", "b_E": "d_sae", "W_D": "d_sae d_in", "b_D": "d_in"}
_LOG = "activation_function.log_jumprelu_threshold"
_NORM = "dataset_average_activation_norm."


def read_scope(source: Source) -> Converted:
    """Reads `hyperparams.json` and the checkpoint; its one threshold is in units of activations as they are."""
    name = next((name for name in _CHECKPOINTS if (source.folder / name).is_file()), _CHECKPOINTS[-1])
    path, stored = source.tensors(name)
    found = source.json(_SCOPE)
    try:
        _refuse_options(found)
        sizes = {name: found.integer(other, 1, 2**31) for name, other in (("d_in", "d_model"), ("d_sae", "d_sae"))}
        found.choice("act_fn", ["jumprelu"], default="jumprelu")
        gate = found.number("jump_relu_threshold", 0)
        norms = found.fields("dataset_average_activation_norm")
        in_norm = norms.number("in", 0, above=True)
        out_norm = norms.number("out", 0, above=True, default=in_norm)
        hooks = [found.values.get(name) for name in ("hook_point_in", "hook_point_out")]
    except ValueError as error:
        raise ValueError(f"{source.folder / _SCOPE}: {error}") from None
    tensors = take(path, stored, _LINEAR, sizes)
    W_dec = tensors["decoder.weight"].t()
    wide = torch.promote_types(W_dec.dtype, torch.float32)
    threshold = torch.full((sizes["d_sae"],), gate, dtype=wide)
    converted = Converted(
        "jumprelu",
        tensors["encoder.weight"].t(),
        tensors["encoder.bias"],
        W_dec,
        tensors["decoder.bias"],
        threshold=threshold,
        is_transcoder=hooks[1] is not None and hooks[0] != hooks[1],
        metadata=_metadata(hooks),
        configs={"llama-scope": {name: value for name, value in found.values.items() if name != "provenance"}},
        history=found.fields("provenance", default={}).values,
    ).noted("transposed encoder.weight and decoder.weight")
    if found.boolean("sparsity_include_decoder_norm", default=False):
        converted = _gate_without_norms(converted)
    return _raw(converted, in_norm, out_norm, threshold_is_raw=True)


def _refuse_options(found: Fields) -> None:
    for option in ("use_glu_encoder", "apply_decoder_bias_to_pre_encoder"):
        if found.boolean(option, default=False):
            raise found.wrong(option, "false, because no other format can say it")
    found.choice("norm_activation", ["dataset-wise", "inference"], default="dataset-wise")
    if found.get("sae_type", "sae") != "sae":
        raise found.wrong("sae_type", "'sae'")


def _metadata(hooks: list[Any]) -> dict[str, Any]:
    metadata = {"hook_name": hooks[0]} if isinstance(hooks[0], str) else {}
    return {**metadata, "hook_name_out": hooks[1]} if hooks[1] != hooks[0] and isinstance(hooks[1], str) else metadata


def _gate_without_norms(converted: Converted) -> Converted:
    """`hidden_pre * |W_D| > threshold` as `hidden_pre > threshold / |W_D|`."""
    assert converted.threshold is not None
    norms = decoder_norms(converted.W_dec)
    if (norms - 1).abs().max() < 1e-6:
        return converted
    if not norms.all():
        raise ValueError("W_D: expected rows with a length, by which thresholds are divided, got a row of zeros")
    threshold = (converted.threshold.double() / norms).to(converted.threshold.dtype)
    return converted.noted("folded decoder norms into the gate: threshold /= |W_D|", threshold=threshold)


def _raw(converted: Converted, in_norm: float, out_norm: float, *, threshold_is_raw: bool) -> Converted:
    """For activations as they are."""
    if converted.rescale_acts_by_decoder_norm and in_norm != out_norm:
        raise ValueError(
            "sparsity_include_decoder_norm: expected one norm for input and output, by which ranks stay, got two"
        )
    c_in, c_out = math.sqrt(converted.d_in) / in_norm, math.sqrt(converted.d_in) / out_norm
    converted = widened(converted)
    dtype, threshold = converted.dtype, converted.threshold
    if threshold is not None and not threshold_is_raw:
        threshold = (threshold.double() / c_in).to(threshold.dtype)
    units = "" if threshold_is_raw or threshold is None else ", threshold /= c_in"
    note = (
        f"folded dataset norms in {in_norm!r}, out {out_norm!r}: b_enc /= c_in, W_dec *= c_in / c_out, b_dec /= c_out{units}, "
        "with c = sqrt(d_in) / norm"
    )
    return converted.noted(
        note,
        b_enc=(converted.b_enc.double() / c_in).to(dtype),
        W_dec=converted.W_dec if c_in == c_out else converted.W_dec * (c_in / c_out),
        b_dec=(converted.b_dec.double() / c_out).to(dtype),
        threshold=threshold,
    )


def read_llamascopium(source: Source) -> Converted:
    """Reads `config.json` and the weights of a Llamascopium SAE, or of the R1 release, whose names are older."""
    path, stored = source.tensors(_WEIGHTS)
    found = source.json(_CONFIG)
    try:
        _refuse_options(found)
        d_in = found.integer("d_model", 1, 2**31)
        sizes = {"d_in": d_in, "d_sae": int(d_in * found.number("expansion_factor", 0, above=True))}
        act_fn = found.choice("act_fn", ["relu", "jumprelu", "topk"], default="jumprelu")
        k = found.integer("top_k", 1, sizes["d_sae"]) if act_fn == "topk" else None
        include = found.boolean("sparsity_include_decoder_norm", default=True)
        bias = found.boolean("use_decoder_bias", default=True)
        hooks = [found.values.get(name) for name in ("hook_point_in", "hook_point_out")]
        is_folded = found.get("norm_activation", "dataset-wise") == "inference"
    except ValueError as error:
        raise ValueError(f"{source.folder / _CONFIG}: {error}") from None
    norms = {name: stored[name] for name in stored if name.startswith(_NORM)}
    tensors = _take_named(path, {n: v for n, v in stored.items() if n not in norms}, sizes, act_fn == "jumprelu", bias)
    converted = Converted(
        "topk" if act_fn == "topk" else "jumprelu" if act_fn == "jumprelu" else "standard",
        tensors["W_E"],
        tensors["b_E"],
        tensors["W_D"],
        tensors.get("b_D", torch.zeros(d_in, dtype=tensors["W_D"].dtype)),
        threshold=tensors.get(_LOG),
        k=k,
        rescale_acts_by_decoder_norm=include and act_fn == "topk",
        is_transcoder=hooks[1] is not None and hooks[0] != hooks[1],
        metadata=_metadata(hooks),
        configs={"llamascopium": {name: value for name, value in found.values.items() if name != "provenance"}},
        history=found.fields("provenance", default={}).values,
    )
    if act_fn == "jumprelu":
        log = tensors[_LOG]
        wide = torch.promote_types(log.dtype, torch.float32)
        converted = converted.noted("took the exponential of log_jumprelu_threshold", threshold=log.to(wide).exp())
        converted = _gate_without_norms(converted) if include else converted
    if converted.rescale_acts_by_decoder_norm:
        converted = converted.noted(
            "multiplied feature activations by |W_D|, by which they are ranked; sae_out is the same"
        )
    if is_folded:
        return converted
    in_norm, out_norm = (_norm(path, norms, hook, found) for hook in hooks)
    return _raw(converted, in_norm, out_norm, threshold_is_raw=False)


def _take_named(
    path: Path, stored: Mapping[str, Any], sizes: dict[str, int], is_gated: bool, has_bias: bool
) -> dict[str, Tensor]:
    if "W_E" in stored:
        shapes = {name: dims for name, dims in _NAMES.items() if has_bias or name != "b_D"}
        return take(path, stored, shapes | ({_LOG: "d_sae"} if is_gated else {}), sizes)
    log = next((name for name in stored if name.endswith("log_jumprelu_threshold")), "log_jumprelu_threshold")
    tensors = take(path, stored, _LINEAR | ({log: "d_sae"} if is_gated else {}), sizes)
    renamed = {
        "W_E": tensors["encoder.weight"].t(),
        "b_E": tensors["encoder.bias"],
        "W_D": tensors["decoder.weight"].t(),
        "b_D": tensors["decoder.bias"],
    }
    return renamed | ({_LOG: tensors[log]} if is_gated else {})


def _norm(path: Path, norms: Mapping[str, Any], hook: Any, found: Fields) -> float:
    """The average norm of one place's activations, in the weights' file or in the config."""
    listed = found.values.get("dataset_average_activation_norm")
    if isinstance(listed, dict) and hook in listed:
        return Fields(listed).number(str(hook), 0, above=True)
    if f"{_NORM}{hook}" not in norms:
        raise ValueError(
            f"{path}: {_NORM}{hook}: expected the norm that its activations are scaled by, but it is missing; save the SAE with "
            "fold_activation_scale=True"
        )
    value = float(take(path, {"norm": norms[f"{_NORM}{hook}"]}, {"norm": ""}, {})["norm"])
    if not 0 < value < math.inf:
        raise ValueError(f"{path}: {_NORM}{hook}: expected a number above 0, got {value!r}")
    return value


def write_llamascopium(converted: Converted, folder: Path, provenance: dict[str, Any]) -> Converted:
    """Writes `config.json` and the weights, for activations as they are (`norm_activation` is `inference`)."""
    refuse_unless(converted, "llamascopium", ["standard", "jumprelu", "topk"], transcoders=True)
    wide = converted.d_out != converted.d_in
    refuse("llamascopium", {"a skip connection": converted.W_skip is not None, "an output of another width": wide})
    converted = same_dtype(with_b_dec_applied(converted, False))
    tensors = {"W_E": converted.W_enc, "b_E": converted.b_enc, "W_D": converted.W_dec, "b_D": converted.b_dec}
    if converted.threshold is not None:
        tensors[_LOG] = _exact_log(converted.threshold)
    hook = converted.metadata.get("hook_name", "unknown")
    config = {
        "sae_type": "sae",
        "hook_point_in": hook,
        "hook_point_out": converted.metadata.get("hook_name_out", "unknown_out") if converted.is_transcoder else hook,
        "dtype": str(converted.dtype),
        "d_model": converted.d_in,
        "expansion_factor": converted.d_sae / converted.d_in,
        "act_fn": {"standard": "relu"}.get(converted.architecture, converted.architecture),
        "top_k": converted.k or 50,
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": converted.rescale_acts_by_decoder_norm,
        "use_decoder_bias": True,
        "use_glu_encoder": False,
    }
    if int(config["d_model"] * config["expansion_factor"]) != converted.d_sae:  # the peer computes d_sae so
        raise ValueError(
            f"llamascopium cannot hold d_sae = {converted.d_sae}: it multiplies d_model by a factor and rounds down"
        )
    write_tensors(folder / _WEIGHTS, tensors)
    write_json(folder / _CONFIG, {**config, "provenance": {**provenance, "changes": list(converted.notes)}})
    return converted


def _exact_log(threshold: Tensor) -> Tensor:
    """The logarithm, which the peer stores, where its exponential gives each number back; refused where none does."""
    log = threshold.clamp_min(torch.finfo(threshold.dtype).tiny).log()
    for step in (0, 1, -1, 2, -2, 3, -3, 4, -4):
        candidate = log.clone()
        towards = torch.full_like(log, math.copysign(math.inf, step))
        for _ in range(abs(step)):
            candidate = torch.nextafter(candidate, towards)
        wrong = log.exp() != threshold
        log = torch.where(wrong & (candidate.exp() == threshold), candidate, log)
    n_wrong = int((log.exp() != threshold).sum())
    if n_wrong:
        raise ValueError(
            f"llamascopium stores the logarithm of the threshold, whose exponential would change {n_wrong:,} of "
            f"{threshold.numel():,} thresholds (zeros and rounded ones); nothing was written"
        )
    return log


def write_scope(converted: Converted, folder: Path, provenance: dict[str, Any]) -> Converted:
    """Writes `hyperparams.json` and the checkpoint, for activations as they are: norms of sqrt(d_in) scale by 1."""
    refuse_unless(converted, "llama-scope", ["standard", "jumprelu"], transcoders=True)
    threshold = converted.threshold
    uneven = threshold is not None and not torch.equal(threshold, threshold[:1].expand_as(threshold))
    refuse(
        "llama-scope",
        {
            "a threshold for each feature, only one for all": uneven,
            "a skip connection": converted.W_skip is not None,
            "an output of another width": converted.d_out != converted.d_in,
        },
    )
    converted = same_dtype(with_b_dec_applied(converted, False)).noted("transposed W_enc and W_dec")
    norm = math.sqrt(converted.d_in)
    tensors = {
        "encoder.weight": converted.W_enc.t().contiguous(),
        "encoder.bias": converted.b_enc,
        "decoder.weight": converted.W_dec.t().contiguous(),
        "decoder.bias": converted.b_dec,
    }
    hook = converted.metadata.get("hook_name", "unknown")
    config = {
        "hook_point_in": hook,
        "hook_point_out": converted.metadata.get("hook_name_out", "unknown_out") if converted.is_transcoder else hook,
        "d_model": converted.d_in,
        "d_sae": converted.d_sae,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.0 if threshold is None else max(0.0, float(threshold[0])),
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norm, "out": norm},
        "sparsity_include_decoder_norm": False,
        "use_decoder_bias": True,
        "provenance": {**provenance, "changes": list(converted.notes)},
    }
    write_tensors(folder / _CHECKPOINTS[-1], tensors)
    write_json(folder / _SCOPE, config)
    return converted


def _is_scope(source: Source) -> bool:
    return (source.folder / _SCOPE).is_file() and any((source.folder / name).is_file() for name in _CHECKPOINTS)


FORMATS = [
    Format(
        "llama-scope",
        "Llama Scope: hyperparams.json, checkpoints/final.safetensors",
        (_SCOPE, *_CHECKPOINTS),
        _is_scope,
        read_scope,
        write_scope,
        ("llama_scope",),
    ),
    Format(
        "llamascopium",
        "Llamascopium, and Llama Scope R1: config.json, sae_weights.safetensors",
        (_CONFIG, _WEIGHTS),
        lambda source: source.has(_CONFIG, _WEIGHTS),
        read_llamascopium,
        write_llamascopium,
        ("llama_scope_r1_distill",),
    ),
]
