"""Backward of the training pass, of decode and of encode over listed entries: no dense gradient, no `[nnz, d]` temporary.

The training pass and decode share one kernel (`fused_backward`), which forms an entry's gradient and adds it up at once. Of
rows that no program can hold, it forms the entries' gradients alone; the weights' are then summed by `feature_sums`, as is
all that encode's own backward needs.

Numerics: cast to fp32 after loading, accumulated in fp32 in a fixed order: deterministic. Gradients are stored in the
dtype of their parameter, `grad_W_enc` feature-major (`[d_sae, d_in]` storage, viewed `[d_in, d_sae]`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae_kernels.gpu.config import on_device
from fastsae_kernels.gpu.decode import decode_into
from fastsae_kernels.gpu.feature_chunks import FeatureGradients
from fastsae_kernels.gpu.feature_sums import FeatureOrder, feature_order, feature_sums
from fastsae_kernels.gpu.fused_backward import fused_backward
from fastsae_kernels.gpu.tiles import MAX_DEPTH
from fastsae_kernels.loss_terms import scaled
from fastsae_kernels.types import AutoencodeSpec, OutputGrads, PassInputs, SparseActs


def feature_gradients(
    by_feature: FeatureOrder,
    values: Tensor,
    inputs: PassInputs,
    spec: AutoencodeSpec,
    grads: OutputGrads,
    *,
    with_weights: bool = True,
) -> FeatureGradients:
    """Gradients of one pass over listed entries, but those of x and b_dec; the formulas are those of `fused_backward`.

    Args:
        by_feature: The entries by feature.
        values: `[nnz]` fp32, 0 where an entry is in the window only; before ordering.
        inputs: The tensors of the pass, those over features contiguous.
        spec: The options.
        grads: What comes back into the pass.
        with_weights: Whether to sum the weight gradients; otherwise x is not read.

    Returns:
        Weight gradients in the dtype of x.
    """
    x, _, _, threshold, W_dec, _, feature_scale, *_ = inputs
    grad_out, row_scale, grad_penalty = grads
    fused = with_weights and max(x.shape[1], W_dec.shape[1]) <= MAX_DEPTH
    if with_weights and not fused:
        grad_out, row_scale = scaled(grad_out, row_scale), None
    found = fused_backward(
        by_feature, values, x if fused else None, W_dec, grad_out, grad_penalty, threshold, feature_scale, spec,
        row_scale, with_W_dec=fused,
    )  # fmt: skip
    if fused or not with_weights:
        return found
    grad_W_enc, grad_W_dec = W_dec.new_empty(W_dec.shape[0], x.shape[1]), W_dec.new_empty(W_dec.shape)
    feature_sums(by_feature, found.grad_hidden_pre, x, grad_W_enc)
    feature_sums(by_feature, values, grad_out, grad_W_dec)
    return found._replace(W_enc=grad_W_enc, W_dec=grad_W_dec)


@on_device
def decode_backward(acts: SparseActs, W_dec: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `decode` for `acts.values` (`[nnz]`, zero on padding) and `W_dec` (`[d_sae, d_out]`).

    Args:
        acts: The entries that were decoded.
        W_dec: `[d_sae, d_out]`.
        grad_out: `[N, d_out]`, any strides.
    """
    (d_sae, d_out), by_feature = W_dec.shape, feature_order(acts)
    fused = d_out <= MAX_DEPTH
    # no gate: an L1 penalty whose gradient is 0 adds nothing
    threshold = torch.zeros(d_sae, dtype=torch.float32, device=W_dec.device)
    grad_penalty = threshold[0].expand(acts.shape[0])
    grad_values, _, grad_W_dec, *_ = fused_backward(
        by_feature, acts.values.contiguous(), None, W_dec, grad_out, grad_penalty, threshold, None,
        AutoencodeSpec(penalty="l1"), None, with_W_dec=fused, gated=False,
    )  # fmt: skip
    if grad_W_dec is None:
        grad_W_dec = torch.empty(W_dec.shape, dtype=W_dec.dtype, device=W_dec.device)
        feature_sums(by_feature, acts.values, grad_out, grad_W_dec)
    return grad_values.to(acts.values.dtype), grad_W_dec


@on_device
def encode_backward(
    acts: SparseActs, x: Tensor, W_enc: Tensor, grad_hidden_pre: Tensor, needs_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of `hidden_pre = x @ W_enc + b_enc` at the entries of `acts`.

    Args:
        acts: Which entries; its values are not used.
        x: `[N, d_in]`.
        W_enc: `[d_in, d_sae]`.
        grad_hidden_pre: `[nnz]`.
        needs_x: Whether to compute `grad_x`.

    Returns:
        `grad_x [N, d_in]` or None, `grad_W_enc [d_in, d_sae]` (feature-major storage), `grad_b_enc [d_sae]` fp32.
    """
    (d_in, d_sae), by_feature = W_enc.shape, feature_order(acts)
    grad_W_enc = torch.empty(d_sae, d_in, dtype=W_enc.dtype, device=W_enc.device)
    grad_b_enc = torch.empty(d_sae, 1, dtype=torch.float32, device=W_enc.device)
    feature_sums(by_feature, grad_hidden_pre, x, grad_W_enc)
    feature_sums(by_feature, grad_hidden_pre, torch.ones_like(grad_b_enc[:1]).expand(x.shape[0], 1), grad_b_enc)
    grad_x = decode_into(acts, grad_hidden_pre, W_enc.t(), None, x.dtype) if needs_x else None
    return grad_x, grad_W_enc.t(), grad_b_enc.squeeze(1)
