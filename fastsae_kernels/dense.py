"""The dense backend, without a dense tensor: products in tiles of features and tokens, on any device.

It serves early training, when half of all features are active and a gather costs more than the product it replaces. A small
pass keeps its pre-activations for the backward. A larger one keeps nothing of a tile and multiplies it again (6 products
instead of 5), so that no `[N, d_sae]` tensor is ever held. It is exact, NaN and Inf included, and does not
synchronise with the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsae_kernels.loss_terms import penalty_slope, penalty_terms, scaled, subtract_target, weighted_sum
from fastsae_kernels.matmul import multiply
from fastsae_kernels.memory import empty_like
from fastsae_kernels.types import (
    AutoencodeGrads,
    AutoencodeNeeds,
    AutoencodeOutput,
    AutoencodeSpec,
    Capacity,
    Kept,
    KeptSize,
    OutputGrads,
    PassInputs,
)

if TYPE_CHECKING:
    from fastsae_kernels.weight_gradients import WeightGradients

TILE = 2**17  # elements of a tile for each thread of a CPU: four are alive at a time, and stay in its cache
KEPT_TILE = 2**20  # elements of a tile of a pass that keeps its pre-activations: these take the memory then
MIN_TILES = 512  # of a large pass: with the copies for products one takes up to 4 % of the dense tensor (d_sae 16384)
MIN_TILES_GPU = 128  # needs larger tiles to fill it, and makes no copies
FEATURES = 512  # of a tile where tokens are many
KEPT_ELEMENTS = 2**24  # of the pre-activations that a pass keeps: 64 MB in fp32
MIN_CHUNK = 128  # features; with fewer the products lose more than the memory is worth
MAX_CHUNK = (
    1024  # features, where tokens are few and nothing is kept; with more the sums of weight gradients outgrow the tile
)


def _tiles(x: Tensor, d_sae: int, *, is_kept: bool, all_tokens: bool = False) -> Iterator[tuple[slice, list[slice]]]:
    """Features, and the tokens of each of their tiles: one empty tile where there are no tokens."""
    n_tokens, on_cpu = max(1, x.shape[0]), x.device.type == "cpu"
    elements = n_tokens * d_sae // (MIN_TILES if on_cpu else MIN_TILES_GPU)
    if on_cpu:
        elements = min(elements, TILE * torch.get_num_threads())
    elements = max(elements, KEPT_TILE if is_kept else TILE)
    tokens = n_tokens if all_tokens else min(n_tokens, max(1, elements // FEATURES))
    features = max(MIN_CHUNK, elements // tokens if is_kept else min(elements // tokens, MAX_CHUNK))
    for rows in _blocks(d_sae, features):
        yield rows, _blocks(n_tokens, tokens)


def _blocks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _hidden_pre(x: Tensor, W_enc_t: Tensor, b_enc: Tensor, out: Tensor | None = None) -> Tensor:
    """`[C, N]` pre-activations in at least fp32, features first: the layout in which every product here is fast."""
    if out is None:
        out = b_enc.new_empty(len(W_enc_t), len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    multiply(W_enc_t, x.t(), out)
    return out.add_(b_enc[:, None])


def _gate(hidden_pre: Tensor, threshold: Tensor) -> Tensor:
    """`hidden_pre > threshold` as 0 and 1 of the same dtype: products with bool would convert it to a tensor of their own.

    And products they are, so that NaN and Inf are not lost behind a closed gate.
    """
    return torch.gt(hidden_pre, threshold, out=torch.empty_like(hidden_pre))


def kept_size(n_tokens: int, d_sae: int, spec: AutoencodeSpec, capacity: Capacity) -> KeptSize:
    """Nothing; one entry, as an empty tensor would have no memory of its own."""
    return KeptSize(1, overflows=False)


def forward(
    inputs: PassInputs, spec: AutoencodeSpec, capacity: Capacity, keeps_dense: bool = False
) -> tuple[AutoencodeOutput, Kept]:
    """`reference.autoencode`, tile by tile, whatever the capacity.

    Raises:
        ValueError: `spec.k` is given: a token's rank needs all features at once.
    """
    if spec.k is not None:
        raise ValueError(f"k: expected None on the dense backend, got {spec.k}")
    x, W_enc, b_enc, threshold, W_dec, b_dec, feature_scale, target, _ = inputs
    wide = torch.promote_types(x.dtype, torch.float32)
    sae_out = b_dec.to(wide).repeat(x.shape[0], 1)  # a copy: expand() of one row would be b_dec itself
    penalty = torch.zeros(x.shape[0], dtype=wide, device=x.device)
    l0 = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    counts = torch.zeros(W_enc.shape[1], dtype=torch.int64, device=x.device)
    kept = None
    if keeps_dense and len(x) * inputs.d_sae <= KEPT_ELEMENTS:
        kept = x.new_empty(inputs.d_sae, len(x), dtype=wide)
    for rows, of_tokens in _tiles(x, W_enc.shape[1], is_kept=kept is not None):
        scale = None if feature_scale is None else feature_scale[rows, None]
        for tokens in of_tokens:
            out = None if kept is None else kept[rows, tokens]
            hidden_pre = _hidden_pre(x[tokens], W_enc.t()[rows], b_enc[rows], out)
            gate = _gate(hidden_pre, threshold[rows, None])
            acts = torch.mul(hidden_pre, gate, out=hidden_pre if kept is None else None)
            per_token = gate.sum(0)
            l0[tokens] += per_token.long()
            counts[rows] += gate.sum(1).long()
            del gate  # before the product, whose operands are copied in places
            multiply(acts.t().to(x.dtype), W_dec[rows], sae_out[tokens], add=True)
            penalty[tokens] += per_token if spec.penalty == "l0" else penalty_terms(acts, scale, spec).sum(0)
    squared_error = None
    if target is not None:
        sae_out, squared_error = subtract_target(sae_out, target)
    output = AutoencodeOutput(sae_out.to(x.dtype), penalty, l0, counts, None, squared_error=squared_error)
    return output, Kept(None, kept, listed=l0)


def backward(
    inputs: PassInputs,
    kept: Kept,
    spec: AutoencodeSpec,
    grads: OutputGrads,
    needs: AutoencodeNeeds,
    collected: WeightGradients | None = None,
) -> AutoencodeGrads:
    """Every gradient of `forward`, those of the weights in any case."""
    x, W_enc, b_enc, threshold, W_dec, _, feature_scale, *_ = inputs
    grad_out, row_scale, grad_penalty = grads
    wide = torch.promote_types(x.dtype, torch.float32)
    W_enc_t = W_enc.t()
    of_weights = needs.weight_dtype or x.dtype
    # in the layout of the weights: autograd would copy another, and a copy that transposes takes a fifth of a product's time
    grad_W_enc_t = None
    if needs.W_enc:
        grad_W_enc_t = empty_like(W_enc, of_weights).t() if W_enc.is_contiguous() else empty_like(W_enc_t, of_weights)
    if spec.penalty == "l0":
        feature_scale = None  # which weighs no count
    totals = AutoencodeGrads(
        x=torch.zeros_like(x, dtype=wide) if needs.x else None,
        W_enc=None if grad_W_enc_t is None else grad_W_enc_t.t(),
        b_enc=torch.zeros_like(b_enc, dtype=wide),
        threshold=torch.zeros_like(threshold),
        W_dec=empty_like(W_dec, of_weights) if needs.W_dec else None,
        b_dec=weighted_sum(row_scale, grad_out),
        feature_scale=None if feature_scale is None else torch.zeros_like(feature_scale, dtype=wide),
    )
    # each part of a sum over tokens is rounded to the dtype of the products, so that only fp32 and wider ones may be cut
    is_kept = kept.hidden_pre is not None
    for rows, of_tokens in _tiles(x, W_enc.shape[1], is_kept=is_kept, all_tokens=x.dtype != wide):
        gate_threshold = threshold[rows, None]
        scale = None if feature_scale is None else feature_scale[rows, None]
        for tokens in of_tokens:
            is_later = tokens.start > 0
            of_rows = scaled(grad_out[tokens], None if row_scale is None else row_scale[tokens])
            if kept.hidden_pre is None:
                hidden_pre = _hidden_pre(x[tokens], W_enc_t[rows], b_enc[rows])
            else:
                hidden_pre = kept.hidden_pre[rows, tokens]
            window = None
            if spec.bandwidth:  # 0 and 1, as the gate
                window = (hidden_pre - gate_threshold).abs_().lt_(spec.bandwidth / 2)
            gate = _gate(hidden_pre, gate_threshold)
            acts = torch.mul(hidden_pre, gate, out=hidden_pre if kept.hidden_pre is None else None)
            del hidden_pre
            if totals.W_dec is not None:
                multiply(acts.to(x.dtype), of_rows, totals.W_dec[rows], add=is_later)
            grad_acts = torch.empty_like(acts)
            multiply(W_dec[rows], of_rows.t(), grad_acts)
            del of_rows
            if spec.penalty != "l0":
                grad_scale = _penalty_backward(acts, scale, grad_penalty[tokens], grad_acts, spec)
                if totals.feature_scale is not None and grad_scale is not None:
                    totals.feature_scale[rows] += grad_scale
            del acts
            estimate = (
                None if window is None else _estimate(window, gate_threshold, grad_acts, grad_penalty[tokens], spec)
            )
            grad_hidden_pre = grad_acts.mul_(gate)
            if estimate is not None:
                totals.threshold[rows] -= estimate.sum(1)
                if spec.ste_to_input:
                    grad_hidden_pre += estimate
            del window, gate, estimate  # before the products, whose operands are copied in places
            totals.b_enc[rows] += grad_hidden_pre.sum(1)
            narrow = grad_hidden_pre.to(x.dtype)
            if grad_W_enc_t is not None:
                multiply(narrow, x[tokens], grad_W_enc_t[rows], add=is_later)
            if totals.x is not None:
                multiply(narrow.t(), W_enc_t[rows], totals.x[tokens], add=True)
    return totals


def _penalty_backward(
    acts: Tensor, scale: Tensor | None, grad_penalty: Tensor, grad_acts: Tensor, spec: AutoencodeSpec
) -> Tensor | None:
    """Adds the slope of the `l1` or `tanh` penalty to `grad_acts`; the gradient of the scale, if there is one."""
    grad_scaled = penalty_slope(acts, scale, spec).mul_(grad_penalty)
    if scale is None:
        grad_acts += grad_scaled
        return None
    grad_acts.addcmul_(grad_scaled, scale)
    return grad_scaled.mul_(acts).sum(1)


def _estimate(
    window: Tensor, threshold: Tensor, grad_acts: Tensor, grad_penalty: Tensor, spec: AutoencodeSpec
) -> Tensor:
    """The straight-through estimate of `loss_terms.gate_backward`, in the memory of `window`."""
    if spec.penalty == "l0":
        window *= torch.addcmul(grad_penalty, threshold, grad_acts)
    else:
        window *= threshold * grad_acts
    return window.div_(spec.bandwidth)
