"""The training pass on a CPU: sparse encode, decode and backward in one, sharing the feature-major order."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastsae_kernels.cpu.backward import (
    by_feature,
    count_segments,
    grad_input,
    grad_of_acts,
    of_entries,
    sum_segments,
    to_rows,
    weight_gradient,
)
from fastsae_kernels.cpu.decode import decode
from fastsae_kernels.cpu.encode import encode
from fastsae_kernels.gradients import AutoencodeGrads, AutoencodeNeeds, AutoencodeOutput, gate_backward
from fastsae_kernels.penalty import penalty_slope, penalty_terms
from fastsae_kernels.residual import subtract_target, weighted_sum
from fastsae_kernels.sparse_acts import SparseActs
from fastsae_kernels.spec import AutoencodeSpec
from fastsae_kernels.weight_gradients import WeightGradients


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
    target: Tensor | None = None,
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
    # a wider bias joins the residual, which is rounded once: the reconstruction itself would be rounded with it before
    late_bias = b_dec if target is not None and b_dec.dtype != W_dec.dtype else None
    sae_out, squared_error = decode(acts, W_dec, b_dec if late_bias is None else None), None
    if target is not None:
        sae_out, squared_error = subtract_target(sae_out, target, late_bias)
    values = acts.values
    active = values > 0
    l0 = count_segments(active, acts.row_offsets)
    if spec.penalty == "l0":
        penalty = l0.to(values.dtype)
    else:
        scale = None if feature_scale is None else feature_scale.index_select(0, acts.indices)
        penalty = sum_segments(penalty_terms(values, scale, spec), acts.row_offsets)
    entries = by_feature(acts)
    smallest = values.new_full((), float("inf")) if values.numel() == 0 else values.min()
    return AutoencodeOutput(
        sae_out=sae_out,
        penalty=penalty,
        l0=l0,
        feature_counts=count_segments(entries.values > 0, entries.offsets),
        acts=acts,
        min_active=smallest if spec.batch_topk else None,
        squared_error=squared_error,
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
    row_scale: Tensor | None = None,
    weight_gradients: WeightGradients | None = None,
) -> AutoencodeGrads:
    """Every gradient of `autoencode_forward` from its entries; those of the weights not, where somebody collects them.

    The gradient of row n of sae_out is `row_scale[n] * grad_out[n]`.
    """
    entries = by_feature(acts)
    offsets, tokens, values = entries
    grad_acts = grad_of_acts(entries, W_dec, grad_out)
    if row_scale is not None:
        grad_acts *= row_scale.index_select(0, tokens)
    penalty_of_tokens = grad_penalty.index_select(0, tokens)
    grad_scale = None
    if spec.penalty != "l0":
        scale = None if feature_scale is None else of_entries(feature_scale, offsets)
        grad_scaled = penalty_of_tokens * penalty_slope(values, scale, spec)
        if scale is not None:
            grad_scale = sum_segments(grad_scaled * values, offsets)
            grad_scaled *= scale
        grad_acts += grad_scaled

    theta = of_entries(threshold, offsets)
    window = (values == 0) | (values - theta < spec.bandwidth / 2)
    grad_hidden_pre, grad_theta = gate_backward(values > 0, window, theta, grad_acts, penalty_of_tokens, spec)
    del theta, window, penalty_of_tokens  # each as large as a column of the entries, as is what follows
    decoded = values if row_scale is None else row_scale.index_select(0, tokens).mul_(values)
    of_weights = needs.weight_dtype or x.dtype
    if weight_gradients is not None:
        weight_gradients.add(
            entries,
            grad_hidden_pre if needs.W_enc else None,
            x,
            decoded if needs.W_dec else None,
            grad_out,
            of_weights,
        )
        needs = replace(needs, W_enc=False, W_dec=False)
    return AutoencodeGrads(
        x=grad_input(acts, to_rows(acts, grad_hidden_pre), W_enc) if needs.x else None,
        W_enc=weight_gradient(entries, grad_hidden_pre, x.to(of_weights)).t() if needs.W_enc else None,
        b_enc=sum_segments(grad_hidden_pre, offsets),
        threshold=torch.zeros_like(threshold) if grad_theta is None else sum_segments(grad_theta, offsets),
        W_dec=weight_gradient(entries, decoded, grad_out.to(of_weights)) if needs.W_dec else None,
        b_dec=weighted_sum(row_scale, grad_out),
        feature_scale=grad_scale,
    )
