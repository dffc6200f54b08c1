"""The dense path without a dense tensor: products in feature chunks, on any device, with no host synchronisation.

It serves early training, when half of all features are active and a gather costs more than the product it replaces. The
forward keeps nothing of a chunk; the backward multiplies it again (6 products instead of 5), which is cheaper than
writing and reading `[N, d_sae]` tensors. It is exact, NaN and Inf included.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastsae_kernels.gradients import AutoencodeGrads, AutoencodeNeeds, AutoencodeOutput, gate_backward
from fastsae_kernels.penalty import penalty_slope, penalty_terms
from fastsae_kernels.spec import AutoencodeSpec

CHUNKS = 64  # of the features; with its chunk-sized temporaries a pass takes 17 % of the dense tensor (d_sae 16384)
MIN_CHUNK = 128  # below this the products lose more than the memory is worth


def chunk_bounds(d_sae: int) -> Iterator[tuple[int, int]]:
    """Feature ranges `(start, stop)`."""
    size = max(MIN_CHUNK, -(-d_sae // CHUNKS))
    for start in range(0, d_sae, size):
        yield start, min(start + size, d_sae)


def _hidden_pre(x_t: Tensor, W_enc: Tensor, b_enc: Tensor, start: int, stop: int) -> Tensor:
    """`[C, N]` pre-activations in at least fp32, features first: the layout in which every product here is fast."""
    product = W_enc[:, start:stop].t() @ x_t
    wide = torch.promote_types(product.dtype, torch.float32)
    return product.to(wide) + b_enc[start:stop, None]


def autoencode_forward(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    feature_scale: Tensor | None,
    spec: AutoencodeSpec,
) -> AutoencodeOutput:
    """`reference.autoencode`, chunk by chunk; `spec.k` must be None (a token's rank needs all chunks at once)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_t = x.t()
    sae_out = b_dec.to(wide).repeat(x.shape[0], 1)  # a copy: expand() of one row would be b_dec itself
    penalty = torch.zeros(x.shape[0], dtype=wide, device=x.device)
    l0 = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    counts = torch.empty(W_enc.shape[1], dtype=torch.int64, device=x.device)
    for start, stop in chunk_bounds(W_enc.shape[1]):
        hidden_pre = _hidden_pre(x_t, W_enc, b_enc, start, stop)
        active = hidden_pre > threshold[start:stop, None]
        acts = hidden_pre * active
        sae_out += acts.t().to(x.dtype) @ W_dec[start:stop]
        scale = None if feature_scale is None else feature_scale[start:stop, None]
        per_token = active.sum(0)
        penalty += per_token if spec.penalty == "l0" else penalty_terms(acts, scale, spec).sum(0)
        l0 += per_token
        counts[start:stop] = active.sum(1)
    return AutoencodeOutput(sae_out.to(x.dtype), penalty, l0, counts, None)


def autoencode_backward(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    feature_scale: Tensor | None,
    spec: AutoencodeSpec,
    grad_out: Tensor,
    grad_penalty: Tensor,
    needs: AutoencodeNeeds,
) -> AutoencodeGrads:
    """Every gradient of `autoencode_forward`; multiplies each chunk again instead of having kept it."""
    x_t, grad_out_t = x.t(), grad_out.t()
    grad_W_enc_t = torch.empty_like(W_enc.t(), memory_format=torch.contiguous_format) if needs.W_enc else None
    grad_W_dec = torch.empty_like(W_dec) if needs.W_dec else None
    grad_x = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if needs.x else None
    grads = AutoencodeGrads(
        x=grad_x,
        W_enc=None if grad_W_enc_t is None else grad_W_enc_t.t(),
        b_enc=torch.empty_like(b_enc),
        threshold=torch.zeros_like(threshold),
        W_dec=grad_W_dec,
        b_dec=grad_out.sum(0),
        feature_scale=None if feature_scale is None or spec.penalty == "l0" else torch.empty_like(feature_scale),
    )
    for start, stop in chunk_bounds(W_enc.shape[1]):
        rows = slice(start, stop)
        theta = threshold[rows, None]
        hidden_pre = _hidden_pre(x_t, W_enc, b_enc, start, stop)
        active = hidden_pre > theta
        acts = hidden_pre * active
        if grad_W_dec is not None:
            grad_W_dec[rows] = acts.to(x.dtype) @ grad_out
        grad_acts = (W_dec[rows] @ grad_out_t).to(hidden_pre.dtype)
        if spec.penalty != "l0":
            scale = None if feature_scale is None else feature_scale[rows, None]
            grad_scaled = grad_penalty * penalty_slope(acts, scale, spec)
            if grads.feature_scale is not None:
                grads.feature_scale[rows] = (grad_scaled * acts).sum(1)
            grad_acts += grad_scaled if scale is None else grad_scaled * scale
        window = (hidden_pre - theta).abs() < spec.bandwidth / 2
        grad_hidden_pre, grad_theta = gate_backward(active, window, theta, grad_acts, grad_penalty, spec)
        if grad_theta is not None:
            grads.threshold[rows] = grad_theta.sum(1)
        grads.b_enc[rows] = grad_hidden_pre.sum(1)
        grad_hidden_pre = grad_hidden_pre.to(x.dtype)
        if grad_W_enc_t is not None:
            grad_W_enc_t[rows] = grad_hidden_pre @ x
        if grad_x is not None:
            grad_x += grad_hidden_pre.t() @ W_enc[:, rows].t()
    return grads
