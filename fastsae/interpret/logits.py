"""What a feature does without the blocks behind it: the logits that its direction raises and lowers, and its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae.data.activations import ResidualStream, decoder_layers

_FEATURES_AT_ONCE = 64  # with 262,144 words their logits take 64 MB
_ROWS_AT_ONCE = 8192  # so many rows of the unembedding or the decoder take 75 MB in fp32 at a width of 2,304
_BINS = 40
_PROBE_SIZE = 16.0  # beside which the epsilon of a norm, about 1e-5, does not show in fp32


class Neighbour(NamedTuple):
    """Another feature, and the cosine of its decoder row with that of the one whose neighbour it is."""

    feature: int
    cosine: float


@dataclass(frozen=True)
class FeatureLogits:
    """What one feature adds to the logits, see `feature_logits`.

    Attributes:
        positive: Token ids and their logits, the largest first.
        negative: Token ids and their logits, the smallest first.
        edges: `n + 1` ascending logits, the borders of the histogram's bins, all of one width.
        histogram: `n` numbers of tokens.
    """

    positive: tuple[tuple[int, float], ...]
    negative: tuple[tuple[int, float], ...]
    edges: tuple[float, ...]
    histogram: tuple[int, ...]


class FinalNorm(NamedTuple):
    """The norm before the unembedding as a map of directions: x -> gain * (x - mean(x)), or gain * x without centring."""

    gain: Tensor
    centres: bool

    def __call__(self, directions: Tensor) -> Tensor:
        """`[n, d_model]` in the gain's dtype."""
        directions = directions.to(self.gain)
        if self.centres:
            directions = directions - directions.mean(-1, keepdim=True)
        return directions * self.gain


@torch.no_grad()
def feature_logits(model: Any, directions: Tensor, k: int = 10) -> list[FeatureLogits] | None:
    """The logits of single features, as TransformerLens computes them from a model that it has folded and centred.

        logit[v] = W_U[v] . norm(d) - mean over v of the same

    where norm(d) is `gain * d`, after subtraction of d's mean where the model's final norm is a LayerNorm. The blocks between
    the feature and the final norm are left out, and so are the division by the length of the residual stream, the norm's and
    the head's biases, and what a model does to its logits afterwards: values tell words of one feature apart.

    Args:
        model: A causal language model of transformers.
        directions: `[n, d_model]` decoder rows of the features.
        k: How many tokens at each end.

    Returns:
        An entry for each row; None for a model without output embeddings, or whose final norm is none of these two.

    Raises:
        ValueError: The rows have another width than the model.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    W_U = getattr(head, "weight", None)
    if not isinstance(W_U, Tensor) or W_U.dim() != 2 or not W_U.is_floating_point():
        return None
    norm = find_final_norm(model, head)
    if norm is None:
        return None
    if directions.shape[-1] != len(norm.gain):
        raise ValueError(f"directions: expected width {len(norm.gain)}, the model's, got {directions.shape[-1]}")
    found = []
    for chunk in norm(directions).to(W_U.device).split(_FEATURES_AT_ONCE):
        logits = torch.cat([chunk @ rows.to(chunk).t() for rows in W_U.split(_ROWS_AT_ONCE)], 1)
        logits -= logits.mean(1, keepdim=True)
        found += [_summary(row, min(k, len(row))) for row in logits.cpu()]
    return found


def _summary(logits: Tensor, k: int) -> FeatureLogits:
    high, low = logits.topk(k), logits.topk(k, largest=False)
    least, most = float(low.values[0]), float(high.values[0])
    counts = logits.histc(_BINS, least, most).long().tolist()
    return FeatureLogits(
        positive=tuple(zip(high.indices.tolist(), high.values.tolist(), strict=True)),
        negative=tuple(zip(low.indices.tolist(), low.values.tolist(), strict=True)),
        edges=tuple(least + (most - least) * i / _BINS for i in range(_BINS + 1)),
        histogram=tuple(counts),
    )


@torch.no_grad()
def find_final_norm(model: Any, head: Any) -> FinalNorm | None:
    """What stands between the last block and the head, found by sending probes through it, so that no name matters.

    A weight stored as its distance from 1, a missing weight and any name of the module are thereby all the same.

    Args:
        model: A causal language model of transformers.
        head: Its output embeddings.

    Returns:
        None where it neither is an RMSNorm nor a LayerNorm.
    """
    last = ResidualStream(model, len(decoder_layers(model)) - 1)
    width = last.d_in
    signs = torch.ones(width, dtype=torch.float32)
    signs[1::2] = -1
    if width % 2:
        signs[-1] = 0  # the mean of the probe is 0
    probe = _PROBE_SIZE * signs
    generator = torch.Generator().manual_seed(0)
    check = _PROBE_SIZE * torch.randn(width, generator=generator)
    swapped = probe.roll(1)  # has its 0, if any, in another place
    sent = torch.stack([probe, -probe, swapped, -swapped, check, -check, check + _PROBE_SIZE, -check - _PROBE_SIZE])
    got = _head_inputs(last, head, sent)
    if got.shape != sent.shape:
        return None
    odd = (got[::2] - got[1::2]) / 2  # without the norm's bias
    scale = signs.square().mean().sqrt()
    gain = torch.where(signs != 0, odd[0] * signs, odd[1] * swapped.sign()) * scale
    for centres in (False, True):
        norm = FinalNorm(gain, centres)
        lengths = [(x - x.mean() if centres else x).square().mean().sqrt() for x in (sent[4], sent[6])]
        expected = norm(torch.stack([sent[4], sent[6]])) / torch.stack(lengths)[:, None]
        if (expected - odd[2:]).abs().max() <= 0.05 * odd[2:].abs().max():
            return norm
    return None


def _head_inputs(last: ResidualStream, head: Any, sent: Tensor) -> Tensor:
    """What the head is given where the last block returns `sent`, `[n, d_model]` each, in fp32."""
    got: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _module, inputs: got.append(inputs[0]))
    ids = torch.zeros(1, len(sent), dtype=torch.long)
    try:
        last.splice(ids, torch.ones_like(ids), lambda hidden: sent[None].to(hidden.device))
    finally:
        handle.remove()
    return got[-1][0].float().cpu()


@torch.no_grad()
def nearest_features(W_dec: Tensor, features: Sequence[int], k: int = 5) -> list[tuple[Neighbour, ...]]:
    """For each of some features, the `k` others whose decoder rows have the largest cosine with its own.

    Rows of length 0 are nobody's neighbours and have none.

    Args:
        W_dec: `[d_sae, d_in]`.
        features: Indices of rows.
        k: How many, fewer in a small SAE.
    """
    all_ids = torch.as_tensor(features, dtype=torch.long, device=W_dec.device)
    return [found for ids in all_ids.split(_FEATURES_AT_ONCE) for found in _nearest(W_dec, ids, k)]


def _nearest(W_dec: Tensor, ids: Tensor, k: int) -> list[tuple[Neighbour, ...]]:
    wanted = _unit(W_dec[ids])
    best, best_ids = wanted.new_zeros(len(ids), 0), ids.new_zeros(len(ids), 0)
    for start in range(0, len(W_dec), _ROWS_AT_ONCE):
        rows = W_dec[start : start + _ROWS_AT_ONCE]
        others = torch.arange(start, start + len(rows), device=W_dec.device)
        cosines = wanted @ _unit(rows).t()
        cosines.masked_fill_((others == ids[:, None]) | ~rows.any(1) | ~wanted.any(1)[:, None], -torch.inf)
        best = torch.cat([best, cosines], 1)
        best_ids = torch.cat([best_ids, others.expand(len(ids), -1)], 1)
        best, places = best.topk(min(k, best.shape[1]))
        best_ids = best_ids.gather(1, places)
    return [
        tuple(Neighbour(i, c) for i, c in zip(row_ids, cosines, strict=True) if c > -torch.inf)
        for row_ids, cosines in zip(best_ids.tolist(), best.tolist(), strict=True)
    ]


def _unit(rows: Tensor) -> Tensor:
    rows = rows.float()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
