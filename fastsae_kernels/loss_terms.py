"""The residual of a pass and its gradients, shared by the backends.

And the weights that the choice of a top-k looks at, where it is not that of the pre-activations themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae_kernels.memory import empty_like
from fastsae_kernels.types import OutputGrads, PassInputs

SUMMED_ROWS = 128  # whose weighted sum is formed by one product
WIDENED_ROWS = 1024
BLOCK_ELEMENTS = 2**18  # of rows that are subtracted together: on a CPU they are still in cache when they are squared


def scoring_encoder(inputs: PassInputs) -> tuple[Tensor, Tensor]:
    """`W_enc` and `b_enc` whose pre-activations gate and top-k look at: those of the pass times `rank_scale`."""
    W_enc_t, b_enc, scale = inputs.W_enc.t(), inputs.b_enc, inputs.rank_scale
    if scale is None:
        return inputs.W_enc, b_enc
    scaled = torch.mul(W_enc_t, scale[:, None], out=empty_like(W_enc_t, W_enc_t.dtype))
    return scaled.t(), (b_enc * scale).to(b_enc.dtype)


def subtract_target(sae_out: Tensor, target: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`sae_out + bias - target` in the memory of `sae_out`, and its squared norms `[N]` in at least fp32.

    The difference is formed in at least fp32, and squared before it is rounded to the dtype of `sae_out`.
    """
    wide = torch.promote_types(sae_out.dtype, torch.float32)
    squared_error = sae_out.new_empty(sae_out.shape[0], dtype=wide)
    size = max(1, BLOCK_ELEMENTS // max(1, sae_out.shape[1]))
    for rows, of_target, squares in zip(
        sae_out.split(size), target.split(size), squared_error.split(size), strict=True
    ):
        difference = rows.to(wide)  # `rows` itself where that is wide
        if bias is not None:
            difference += bias
        difference -= of_target
        torch.linalg.vecdot(difference, difference, out=squares)
        rows.copy_(difference)
    return sae_out, squared_error


def output_grads(
    inputs: PassInputs,
    residual: Tensor | None,
    grad_out: Tensor | None,
    grad_penalty: Tensor | None,
    grad_squared_error: Tensor | None,
) -> OutputGrads:
    """The gradients that reach a pass, from what autograd hands back; None stands for zeros.

    Where the loss is made of squared errors alone, `rows` is the residual itself, which is neither scaled nor copied.

    Args:
        inputs: The tensors of the pass.
        residual: `[N, d_out]`, the first output of a pass with a target; None without one.
        grad_out: `[N, d_out]`, gradient of the first output.
        grad_penalty: `[N]`.
        grad_squared_error: `[N]`; ignored without a target.
    """
    x, threshold = inputs.x, inputs.threshold
    if grad_penalty is None:
        grad_penalty = torch.zeros((), dtype=threshold.dtype, device=x.device).expand(x.shape[0])
    if residual is None or grad_squared_error is None:
        if grad_out is None:
            grad_out = x.new_zeros(x.shape[0], inputs.W_dec.shape[1])
        return OutputGrads(grad_out.contiguous(), None, grad_penalty)
    row_scale = 2 * grad_squared_error
    if grad_out is None:
        return OutputGrads(residual, row_scale, grad_penalty)
    rows = torch.addcmul(grad_out, residual, row_scale[:, None].to(residual.dtype))
    return OutputGrads(rows.contiguous(), None, grad_penalty)


def target_gradient(grads: OutputGrads, dtype: torch.dtype) -> Tensor:
    """The gradient of the target, which is subtracted from the reconstruction."""
    return -scaled(grads.rows, grads.row_scale).to(dtype)


def scaled(rows: Tensor, row_scale: Tensor | None) -> Tensor:
    """`row_scale[n] * rows[n]`, in the dtype of `rows`."""
    return rows if row_scale is None else (rows * row_scale[:, None]).to(rows.dtype)


def weighted_sum(weights: Tensor | None, rows: Tensor) -> Tensor:
    """`weights @ rows` in at least fp32, None for ones; in blocks: one product would sum thousands of terms and lose a digit."""
    if weights is None:
        return rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
    # widened, some at a time: weights that are all the same would be rounded all the same way
    if rows.element_size() == 2:
        blocks = zip(weights.split(WIDENED_ROWS), rows.split(WIDENED_ROWS), strict=True)
        return torch.stack([weighted_sum(w.float(), r.float()) for w, r in blocks]).sum(0)
    weights, whole = weights.to(rows.dtype), len(rows) // SUMMED_ROWS * SUMMED_ROWS
    with torch.autocast(rows.device.type, enabled=False):  # a backward may run under it, and a compiled one does
        shape = (whole // SUMMED_ROWS, SUMMED_ROWS)  # which also tells that there are none where there are no rows
        products = weights[:whole].unflatten(0, shape)[:, None] @ rows[:whole].unflatten(0, shape)
        rest = weights[whole:] @ rows[whole:]
    return torch.cat([products.squeeze(1), rest[None]]).sum(0, dtype=torch.float64).to(rows.dtype)
