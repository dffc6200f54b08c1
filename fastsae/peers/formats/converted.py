"""A sparse autoencoder between two formats: what it computes, and where every number came from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

Architecture = Literal["standard", "jumprelu", "topk"]
LAYER_NORM_EPS = 1e-5  # OpenAI and SAELens add the same number
_FEATURES_AT_ONCE = 4096  # float64 copies are made of so many


@dataclass(frozen=True)
class Converted:
    """What a file of any format computes.

        x'           = (x - mean) / (std + eps)  with layer_norm, else x
        hidden_pre   = (x' - b_dec) @ W_enc + b_enc         (x' alone, without apply_b_dec_to_input)
        feature_acts = relu(hidden_pre)                     standard
                       hidden_pre * (hidden_pre > max(threshold, 0))             jumprelu
                       relu of the k largest hidden_pre     topk; chosen by hidden_pre * |W_dec| with rescale
        sae_out      = feature_acts @ W_dec + b_dec  (+ x @ W_skip.T, then * std + mean with layer_norm)

    Args:
        W_enc: `[d_in, d_sae]`.
        b_enc: `[d_sae]`.
        W_dec: `[d_sae, d_out]`.
        b_dec: `[d_out]`.
        threshold: `[d_sae]`, of jumprelu alone.
        k: How many features a topk SAE keeps; for other SAEs a cap, which only this library's own files have.
        rescale_acts_by_decoder_norm: Of topk: features are chosen, and scaled, by the length of their decoder row.
        W_skip: `[d_out, d_in]`.
        is_transcoder: It predicts another place's activations than those it reads.
        is_hook_z: Its input is the heads of an attention layer side by side, which SAELens reshapes by itself.
        batch_topk_k: For a jumprelu that was trained as BatchTopK: the average number of active features.
        metadata: By SAELens' names.
        own: What this library keeps in `metadata.fastsae` of its own files.
        notes: What was transposed, folded or rescaled on the way here, one sentence each.
        configs: By format, the config file that was read, so that writing this format again keeps what it said.
        history: The provenance that the file itself came with.
    """

    architecture: Architecture
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    k: int | None = None
    apply_b_dec_to_input: bool = False
    rescale_acts_by_decoder_norm: bool = False
    layer_norm: bool = False
    W_skip: Tensor | None = None
    is_transcoder: bool = False
    is_hook_z: bool = False
    batch_topk_k: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    history: dict[str, Any] = field(default_factory=dict)

    @property
    def d_in(self) -> int:
        """Width of what it reads."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """Width of what it predicts."""
        return self.W_dec.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.W_enc.dtype

    def noted(self, note: str, **changes: Any) -> Converted:
        """The same with changes, and a sentence that says which."""
        return replace(self, notes=(*self.notes, note), **changes)

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`feature_acts` and `sae_out` by dense formulas in the dtype of `x`, `[N, d_in]`: what `--check` compares."""
        W_enc, b_enc, W_dec, b_dec = (t.to(x.dtype) for t in (self.W_enc, self.b_enc, self.W_dec, self.b_dec))
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        normed = (x - mean) / (std + LAYER_NORM_EPS) if self.layer_norm else x
        sae_in = normed - b_dec if self.apply_b_dec_to_input else normed
        hidden_pre = sae_in @ W_enc + b_enc
        if self.rescale_acts_by_decoder_norm:
            norms = W_dec.norm(dim=1).clamp_min(1e-8)
            hidden_pre, W_dec = hidden_pre * norms, W_dec / norms[:, None]
        if self.threshold is not None:
            hidden_pre = hidden_pre * (hidden_pre > self.threshold.to(x.dtype))
        acts = hidden_pre.relu()
        if self.k is not None:
            kept = acts.topk(self.k, dim=-1)
            acts = torch.zeros_like(acts).scatter_(-1, kept.indices, kept.values)
        sae_out = acts @ W_dec + b_dec
        if self.W_skip is not None:
            sae_out = sae_out + x @ self.W_skip.to(x.dtype).t()
        return acts, sae_out * std + mean if self.layer_norm else sae_out


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The narrowest dtype that holds the numbers of all tensors exactly."""
    dtype = torch.float16
    for i, tensor in enumerate(tensors):
        dtype = tensor.dtype if i == 0 else torch.promote_types(dtype, tensor.dtype)
    return dtype


def same_dtype(converted: Converted) -> Converted:
    """All weights in the narrowest dtype that holds them exactly, contiguous; the threshold at least in float32."""
    names = ["W_enc", "b_enc", "W_dec", "b_dec"] + (["W_skip"] if converted.W_skip is not None else [])
    dtype = common_dtype(getattr(converted, name) for name in names)
    changes = {name: getattr(converted, name).to(dtype).contiguous() for name in names}
    if converted.threshold is not None:
        changes["threshold"] = converted.threshold.to(torch.promote_types(dtype, torch.float32)).contiguous()
    return replace(converted, **changes)


def widened(converted: Converted) -> Converted:
    """Weights of at least float32: what is folded into 16-bit numbers would be rounded to 16 bits."""
    if converted.dtype not in (torch.float16, torch.bfloat16):
        return converted
    names = [name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip") if getattr(converted, name) is not None]
    before = str(converted.dtype).removeprefix("torch.")
    changes = {name: getattr(converted, name).float() for name in names}
    return converted.noted(f"widened {before} to float32, because folding rounds", **changes)


def with_b_dec_applied(converted: Converted, wanted: bool) -> Converted:
    """The same function with `b_dec` subtracted from the input, or not; `b_enc` takes up the difference."""
    if converted.apply_b_dec_to_input == wanted:
        return converted
    if converted.d_out != converted.d_in:
        raise ValueError(
            "b_dec: a transcoder whose output is not as wide as its input cannot subtract it from the input"
        )
    if not converted.b_dec.any():
        return replace(converted, apply_b_dec_to_input=wanted)
    converted = widened(converted)
    b_dec = converted.b_dec.double()
    shift = torch.cat([b_dec @ columns.double() for columns in converted.W_enc.split(_FEATURES_AT_ONCE, dim=1)])
    b_enc = (converted.b_enc.double() + (shift if wanted else -shift)).to(converted.dtype)
    sign = "+" if wanted else "-"
    note = f"folded b_dec: b_enc = b_enc {sign} b_dec @ W_enc, since the target's apply_b_dec_to_input is {str(wanted).lower()}"
    return converted.noted(note, b_enc=b_enc, apply_b_dec_to_input=wanted)


def decoder_norms(W_dec: Tensor) -> Tensor:
    """`[d_sae]` float64: the length of each row."""
    return torch.cat([rows.double().norm(dim=1) for rows in W_dec.split(_FEATURES_AT_ONCE)])


def without_rescaling(converted: Converted) -> Converted:
    """The same function with decoder norms folded into the encoder, as SAELens saves for inference."""
    if not converted.rescale_acts_by_decoder_norm:
        return converted
    converted = widened(converted)
    norms = decoder_norms(converted.W_dec).clamp_min(1e-8).to(converted.dtype)
    return converted.noted(
        "folded decoder norms: W_enc *= |W_dec|, b_enc *= |W_dec|, W_dec /= |W_dec|",
        W_enc=converted.W_enc * norms,
        b_enc=converted.b_enc * norms,
        W_dec=converted.W_dec / norms[:, None],
        rescale_acts_by_decoder_norm=False,
    )


def as_jumprelu(converted: Converted) -> Converted:
    """A ReLU as the JumpReLU with threshold 0, which is the same function."""
    if converted.architecture != "standard":
        return converted
    threshold = torch.zeros(converted.d_sae, dtype=torch.promote_types(converted.dtype, torch.float32))
    return converted.noted("wrote ReLU as JumpReLU with threshold 0", architecture="jumprelu", threshold=threshold)


def refuse(target: str, problems: dict[str, bool]) -> None:
    """Raises ValueError with the first reason that holds."""
    for reason, holds in problems.items():
        if holds:
            raise ValueError(f"{target} cannot hold {reason}; nothing was written")


def refuse_unless(
    converted: Converted, target: str, architectures: Iterable[str], *, transcoders: bool = False
) -> None:
    """Refuses what most formats cannot say: other architectures, LayerNorm, skips, transcoders, caps of this library."""
    wanted = list(architectures)
    refuse(
        target,
        {
            f"a {converted.architecture} SAE, only {' or '.join(wanted)}": converted.architecture not in wanted,
            "the LayerNorm of its input, which depends on each token and folds into no weight": converted.layer_norm,
            "a skip connection": converted.W_skip is not None and not transcoders,
            "a transcoder": converted.is_transcoder and not transcoders,
            f"a cap of k = {converted.k} active features beside the gate": converted.architecture != "topk"
            and converted.k is not None,
        },
    )
