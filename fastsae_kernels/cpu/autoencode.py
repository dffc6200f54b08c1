"""The training pass on a CPU: sparse encode, decode and backward in one, sharing the feature-major order."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastsae_kernels import dense
from fastsae_kernels.cpu.decode import decode
from fastsae_kernels.cpu.encode import encode
from fastsae_kernels.cpu.gradients import (
    by_feature,
    count_segments,
    grad_input,
    grad_of_acts,
    of_entries,
    sum_segments,
    to_rows,
    weight_gradient,
)
from fastsae_kernels.gates import gate_backward, penalty_slope, penalty_terms
from fastsae_kernels.loss_terms import scoring_encoder, subtract_target, weighted_sum
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
from fastsae_kernels.weight_gradients import WeightGradients


def kept_size(n_tokens: int, d_sae: int, spec: AutoencodeSpec, capacity: Capacity) -> KeptSize:
    """Room for rows with so many entries on average; with `k`, for the k largest and as many of the window."""
    per_row = capacity.mean
    if spec.k is not None:
        per_row = min(spec.k if spec.bandwidth == 0 else spec.k + capacity.mean, d_sae)
    return KeptSize(n_tokens * per_row + 1, overflows=False)


def forward(
    inputs: PassInputs, spec: AutoencodeSpec, capacity: Capacity, keeps_dense: bool = False
) -> tuple[AutoencodeOutput, Kept]:
    """`reference.autoencode` over the entries alone, or by `dense` where there are more than the capacity.

    Raises:
        ValueError: A value is NaN or Inf where `k` is given.
    """
    x, _, _, threshold, W_dec, b_dec, feature_scale, target, rank_scale = inputs
    max_entries = kept_size(len(x), inputs.d_sae, spec, capacity).entries if spec.k is None else None
    acts = encode(x, *scoring_encoder(inputs), threshold, spec, max_entries)
    if acts is None:
        if spec.k is not None:
            raise ValueError("x, W_enc, b_enc: expected finite values where k is given, got NaN or Inf")
        return dense.forward(inputs, spec, capacity, keeps_dense)
    smallest = acts.values.new_full((), float("inf")) if acts.values.numel() == 0 else acts.values.min()
    if rank_scale is not None:
        acts = acts.divided(rank_scale)
    # a wider bias joins the residual, which is rounded once: the reconstruction itself would be rounded with it before
    late_bias = b_dec if target is not None and b_dec.dtype != W_dec.dtype else None
    sae_out, squared_error = decode(acts, W_dec, b_dec if late_bias is None else None), None
    if target is not None:
        sae_out, squared_error = subtract_target(sae_out, target, late_bias)
    values = acts.values
    l0 = count_segments(values > 0, acts.row_offsets)
    if spec.penalty == "l0":
        penalty = l0.to(values.dtype)
    else:
        scale = None if feature_scale is None else feature_scale.index_select(0, acts.indices)
        penalty = sum_segments(penalty_terms(values, scale, spec), acts.row_offsets)
    entries = by_feature(acts)
    output = AutoencodeOutput(
        sae_out=sae_out,
        penalty=penalty,
        l0=l0,
        feature_counts=count_segments(entries.values > 0, entries.offsets),
        acts=acts,
        min_active=smallest if spec.batch_topk else None,
        squared_error=squared_error,
    )
    return output, Kept(acts)


def backward(
    inputs: PassInputs,
    kept: Kept,
    spec: AutoencodeSpec,
    grads: OutputGrads,
    needs: AutoencodeNeeds,
    collected: WeightGradients | None = None,
) -> AutoencodeGrads:
    """Every gradient of `forward` from its entries; those of the weights not, where somebody collects them."""
    acts = kept.acts
    if acts is None:
        return dense.backward(inputs, kept, spec, grads, needs, collected)
    x, W_enc, _, threshold, W_dec, _, feature_scale, *_ = inputs
    grad_out, row_scale, grad_penalty = grads
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

    of_entry = of_entries(threshold, offsets)
    window = (values == 0) | (values - of_entry < spec.bandwidth / 2)
    grad_hidden_pre, grad_threshold = gate_backward(values > 0, window, of_entry, grad_acts, penalty_of_tokens, spec)
    del of_entry, window, penalty_of_tokens  # each as large as a column of the entries, as is what follows
    decoded = values if row_scale is None else row_scale.index_select(0, tokens).mul_(values)
    of_weights = needs.weight_dtype or x.dtype
    if collected is not None:
        collected.add(
            entries,
            grad_hidden_pre if needs.W_enc else None,
            x,
            decoded if needs.W_dec else None,
            grad_out,
            of_weights,
        )
        needs = replace(needs, W_enc=False, W_dec=False)
    spare_enc, spare_dec = needs.spares or (None, None)
    grad_W_enc = grad_W_dec = None
    if needs.W_enc:
        grad_W_enc = weight_gradient(entries, grad_hidden_pre, x.to(of_weights), spare_enc).t()
    if needs.W_dec:
        grad_W_dec = weight_gradient(entries, decoded, grad_out.to(of_weights), spare_dec)
    return AutoencodeGrads(
        x=grad_input(acts, to_rows(acts, grad_hidden_pre), W_enc) if needs.x else None,
        W_enc=grad_W_enc,
        b_enc=sum_segments(grad_hidden_pre, offsets),
        threshold=torch.zeros_like(threshold) if grad_threshold is None else sum_segments(grad_threshold, offsets),
        W_dec=grad_W_dec,
        b_dec=weighted_sum(row_scale, grad_out),
        feature_scale=grad_scale,
    )
