"""The reconstruction less its target, formed where the reconstruction is, and the gradient that comes back through it."""

from __future__ import annotations

import torch
from torch import Tensor

SUMMED_ROWS = 128  # whose weighted sum is formed by one product
WIDENED_ROWS = 1024
BLOCK_ELEMENTS = 2**18  # of rows that are subtracted together: on a CPU they are still in cache when they are squared


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


def row_gradients(
    residual: Tensor | None, grad_out: Tensor | None, grad_squared_error: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`(rows, row_scale)`: the gradient of row n of the reconstruction is `row_scale[n] * rows[n]`.

    Where the loss is made of squared errors alone, `rows` is the residual itself, which is neither scaled nor copied.

    Args:
        residual: `[N, d_out]`; None without a target.
        grad_out: Of the first output, `[N, d_out]`; None where the loss does not use it.
        grad_squared_error: Of the squared errors, `[N]`; None likewise.
    """
    if residual is None or grad_squared_error is None:
        assert grad_out is not None
        return grad_out.contiguous(), None
    row_scale = 2 * grad_squared_error
    if grad_out is None:
        return residual, row_scale
    return torch.addcmul(grad_out, residual, row_scale[:, None].to(residual.dtype)).contiguous(), None


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
        products = weights[:whole].view(-1, 1, SUMMED_ROWS) @ rows[:whole].unflatten(0, (-1, SUMMED_ROWS))
        rest = weights[whole:] @ rows[whole:]
    return torch.cat([products.squeeze(1), rest[None]]).sum(0, dtype=torch.float64).to(rows.dtype)
