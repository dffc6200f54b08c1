"""The training pass on a CPU: sparse encode, decode and backward in one, sharing the feature-major order."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae_kernels.cpu.backward import (
    by_feature,
    feature_ids,
    grad_input,
    grad_of_acts,
    sum_by_feature,
    to_rows,
    weight_gradient,
)
from fastsae_kernels.cpu.decode import decode
from fastsae_kernels.cpu.encode import encode
from fastsae_kernels.cpu.weight_gradients import WeightGradients
from fastsae_kernels.gradients import AutoencodeGrads, AutoencodeNeeds, AutoencodeOutput, gate_backward
from fastsae_kernels.penalty import penalty_slope, penalty_terms
from fastsae_kernels.sparse_acts import SparseActs
from fastsae_kernels.spec import AutoencodeSpec


def autoencode_forward(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    feature_scale: Tensor | None,
    spec: AutoencodeSpec,
    max_entries: int | None,
) -> AutoencodeOutput | None:
    """`reference.autoencode` over the entries alone; None where there are more than `max_entries` of them."""
    acts = encode(
        x,
        W_enc,
        b_enc,
        threshold,
        bandwidth=spec.bandwidth,
        k=spec.k,
        batch_topk=spec.batch_topk,
        max_entries=max_entries,
    )
    if acts is None:
        return None
    offsets, tokens, values = by_feature(acts)
    features = feature_ids(offsets)
    active = values > 0
    scale = None if feature_scale is None else feature_scale[features]
    terms = penalty_terms(values, scale, spec)
    n_tokens, d_sae = acts.shape
    smallest = values.new_full((), float("inf")) if values.numel() == 0 else values.min()
    return AutoencodeOutput(
        sae_out=decode(acts, W_dec, b_dec),
        penalty=terms.new_zeros(n_tokens).index_add_(0, tokens, terms),
        l0=torch.zeros(n_tokens, dtype=torch.int64).index_add_(0, tokens, active.long()),
        feature_counts=torch.zeros(d_sae, dtype=torch.int64).index_add_(0, features, active.long()),
        acts=acts,
        min_active=smallest if spec.batch_topk else None,
    )


def autoencode_backward(
    acts: SparseActs,
    x: Tensor,
    W_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    feature_scale: Tensor | None,
    spec: AutoencodeSpec,
    grad_out: Tensor,
    grad_penalty: Tensor,
    needs: AutoencodeNeeds,
    weight_gradients: WeightGradients | None = None,
) -> AutoencodeGrads:
    """Every gradient of `autoencode_forward` from its entries; those of the weights not, where somebody collects them."""
    entries = by_feature(acts)
    values, d_sae = entries.values, acts.shape[1]
    features = feature_ids(entries.offsets)
    theta = threshold[features]
    penalty_of_token = grad_penalty[entries.tokens]

    grad_acts = grad_of_acts(entries, W_dec, grad_out)
    grad_scale = None
    if spec.penalty != "l0":
        scale = None if feature_scale is None else feature_scale[features]
        grad_scaled = penalty_of_token * penalty_slope(values, scale, spec)
        if scale is not None:
            grad_scale = sum_by_feature(features, grad_scaled * values, d_sae)
        grad_acts = grad_acts + (grad_scaled if scale is None else grad_scaled * scale)

    window = (values == 0) | (values - theta < spec.bandwidth / 2)
    grad_hidden_pre, grad_theta = gate_backward(values > 0, window, theta, grad_acts, penalty_of_token, spec)
    if weight_gradients is not None and (needs.W_enc or needs.W_dec):
        weight_gradients.add(entries, grad_hidden_pre, x, grad_out)
        needs = needs._replace(W_enc=False, W_dec=False)
    return AutoencodeGrads(
        x=grad_input(acts, to_rows(acts, grad_hidden_pre), W_enc) if needs.x else None,
        W_enc=weight_gradient(entries, grad_hidden_pre, x).t() if needs.W_enc else None,
        b_enc=sum_by_feature(features, grad_hidden_pre, d_sae),
        threshold=torch.zeros_like(threshold) if grad_theta is None else sum_by_feature(features, grad_theta, d_sae),
        W_dec=weight_gradient(entries, values, grad_out) if needs.W_dec else None,
        b_dec=grad_out.sum(0),
        feature_scale=grad_scale,
    )
