"""The dense backend, without a dense tensor: products in tiles of features and tokens, on any device.

It serves early training, when half of all features are active and a gather costs more than the product it replaces. A small
pass keeps its pre-activations for the backward. A larger one keeps nothing of a tile and multiplies it again (6 products
instead of 5), so that no `[N, d_sae]` tensor is ever held. It is exact, NaN and Inf included, and does not
synchronise with the host.

Between its products a tile is gated by PyTorch's ops (`gates`), or on a GPU by one kernel in each direction (`gpu.gates`).
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fastsae_kernels import gates as by_pytorch
from fastsae_kernels.gates import Features, Gates
from fastsae_kernels.loss_terms import scaled, subtract_target, weighted_sum
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
    from fastsae_kernels.gpu import gates as by_triton
    from fastsae_kernels.weight_gradients import WeightGradients

    _all_gates: tuple[Gates, Gates] = (by_pytorch, by_triton)  # the type checker holds the modules to the contract

TILE = 2**17  # elements of a tile for each thread of a CPU: four are alive at a time, and stay in its cache
KEPT_TILE = 2**20  # elements of a tile of a pass that keeps its pre-activations: these take the memory then
MIN_TILES = 512  # of a large pass: with the copies for products one takes up to 4 % of the dense tensor (d_sae 16384)
MIN_TILES_GPU = 32  # fewer and larger ones, which fill a GPU: each reads and writes the whole reconstruction once
FEATURES = 512  # of a tile where tokens are many
KEPT_ELEMENTS = 2**24  # of the pre-activations that a pass keeps: 64 MB in fp32
MIN_CHUNK = 128  # features; with fewer the products lose more than the memory is worth
# features on a CPU, where tokens are few and nothing is kept; with more the sums of weight gradients outgrow the tile
MAX_CHUNK = 1024


def _tiles(x: Tensor, d_sae: int, *, is_kept: bool, all_tokens: bool = False) -> tuple[list[slice], list[slice]]:
    """The features and the tokens of the tiles: one empty tile where there are no tokens."""
    n_tokens, on_cpu = max(1, x.shape[0]), x.device.type == "cpu"
    elements = n_tokens * d_sae // (MIN_TILES if on_cpu else MIN_TILES_GPU)
    if on_cpu:
        elements = min(elements, TILE * torch.get_num_threads())
    elements = max(elements, KEPT_TILE if is_kept else TILE)
    tokens = n_tokens if all_tokens else min(n_tokens, max(1, elements // FEATURES))
    features = elements // tokens
    if on_cpu and not is_kept:
        features = min(features, MAX_CHUNK)
    return _blocks(d_sae, max(MIN_CHUNK, features)), _blocks(n_tokens, tokens)


def _blocks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _gates(x: Tensor) -> Gates:
    """PyTorch's ops, or on a GPU the kernels, which know no fp64; Triton is optional, so they are imported on first use."""
    if x.is_cuda and x.dtype != torch.float64 and _has_kernels(x.device):
        return cast(Gates, import_module("fastsae_kernels.gpu.gates"))
    return by_pytorch


@cache
def _has_kernels(device: torch.device) -> bool:
    """Whether Triton is installed, and Triton and the GPU are new enough."""
    try:
        import_module("fastsae_kernels.gpu.config").arch_of(device)
    except (ImportError, RuntimeError):
        return False
    return True


def _features(inputs: PassInputs, rows: slice) -> Features:
    scale = None if inputs.feature_scale is None else inputs.feature_scale[rows]
    return Features(inputs.b_enc[rows], inputs.threshold[rows], scale)


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
    inputs = inputs.with_contiguous_vectors()
    x, W_enc, _, _, W_dec, b_dec, _, target, _ = inputs
    gates = _gates(x)
    wide, W_enc_t = torch.promote_types(x.dtype, torch.float32), W_enc.t()
    sae_out = b_dec.to(wide).repeat(x.shape[0], 1)  # a copy: expand() of one row would be b_dec itself
    penalty = torch.zeros(x.shape[0], dtype=wide, device=x.device)
    l0 = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    counts = torch.zeros(W_enc.shape[1], dtype=torch.int64, device=x.device)
    kept = None
    if keeps_dense and len(x) * inputs.d_sae <= KEPT_ELEMENTS:
        kept = x.new_empty(inputs.d_sae, len(x), dtype=gates.kept_dtype(x.dtype))
    tiles_of_features, tiles_of_tokens = _tiles(x, W_enc.shape[1], is_kept=kept is not None)
    for rows in tiles_of_features:
        features = _features(inputs, rows)
        for tokens in tiles_of_tokens:
            out = None if kept is None else kept[rows, tokens]
            hidden_pre = gates.hidden_pre(x[tokens], W_enc_t[rows], features, out)
            gated = gates.gate_tile(hidden_pre, features, spec, x.dtype, kept is not None)
            del hidden_pre  # before the product, whose operands are copied in places
            multiply(gated.acts.t(), W_dec[rows], sae_out[tokens], add=True)
            l0[tokens] += gated.l0.long()
            counts[rows] += gated.counts.long()
            penalty[tokens] += gated.penalty
            del gated  # before the next tile
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
    inputs = inputs.with_contiguous_vectors()
    if spec.penalty == "l0":
        inputs = inputs._replace(feature_scale=None)  # which weighs no count
    x, W_enc, b_enc, threshold, W_dec, _, feature_scale, *_ = inputs
    grad_out, row_scale, grad_penalty = grads
    gates = _gates(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    W_enc_t = W_enc.t()
    of_weights = needs.weight_dtype or x.dtype
    # in the layout of the weights: autograd would copy another, and a copy that transposes takes a fifth of a product's time
    grad_W_enc_t = None
    if needs.W_enc:
        grad_W_enc_t = empty_like(W_enc, of_weights).t() if W_enc.is_contiguous() else empty_like(W_enc_t, of_weights)
    totals = AutoencodeGrads(
        x=torch.zeros_like(x, dtype=wide) if needs.x else None,
        W_enc=None if grad_W_enc_t is None else grad_W_enc_t.t(),
        b_enc=torch.zeros_like(b_enc, dtype=wide),
        threshold=torch.zeros_like(threshold),
        W_dec=empty_like(W_dec, of_weights) if needs.W_dec else None,
        b_dec=weighted_sum(row_scale, grad_out),
        feature_scale=None if feature_scale is None else torch.zeros_like(feature_scale, dtype=wide),
    )
    hidden_pre, is_kept = kept.hidden_pre, kept.hidden_pre is not None
    # each part of a sum over tokens is rounded to the dtype of the products, so that only fp32 and wider ones may be cut
    tiles_of_features, tiles_of_tokens = _tiles(x, W_enc.shape[1], is_kept=is_kept, all_tokens=x.dtype != wide)
    if len(tiles_of_tokens) == 1:
        grad_out, row_scale = scaled(grad_out, row_scale), None
    for rows in tiles_of_features:
        features = _features(inputs, rows)
        for tokens in tiles_of_tokens:
            grad_of_tokens = scaled(grad_out[tokens], None if row_scale is None else row_scale[tokens])
            if hidden_pre is None:
                of_tile = gates.hidden_pre(x[tokens], W_enc_t[rows], features, None)
            else:
                of_tile = hidden_pre[rows, tokens]
            found = gates.gate_tile_backward(
                of_tile, W_dec[rows], grad_of_tokens, grad_penalty[tokens], features, spec, is_kept
            )
            del of_tile  # before the products, whose operands are copied in places
            is_later = tokens.start > 0
            if totals.W_dec is not None:
                multiply(found.acts, grad_of_tokens, totals.W_dec[rows], add=is_later)
            if grad_W_enc_t is not None:
                multiply(found.grad_hidden_pre, x[tokens], grad_W_enc_t[rows], add=is_later)
            if totals.x is not None:
                multiply(found.grad_hidden_pre.t(), W_enc_t[rows], totals.x[tokens], add=True)
            totals.b_enc[rows] += found.b_enc
            if found.threshold is not None:
                totals.threshold[rows] += found.threshold
            if totals.feature_scale is not None and found.scale is not None:
                totals.feature_scale[rows] += found.scale
            del found  # before the next tile
    return totals
