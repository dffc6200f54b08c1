"""Adam by the GPU's kernel: one pass over each row sums its gradient and updates it, its moments and its 16-bit copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

# Triton is optional, so what needs it is imported where a pass of its kernels has left sums
if TYPE_CHECKING:
    from fastsae_kernels.gpu.weight_gradients import RowSums


def can_update(weights: list[Tensor], group: dict[str, Any], d_in: int) -> bool:
    """Whether the kernel has these weights' dtype and width, and the options of the parameter group."""
    from fastsae_kernels.gpu.tiles import MAX_DEPTH

    plain = not group["maximize"] and group["weight_decay"] == 0 and not isinstance(group["lr"], Tensor)
    return plain and all(p.dtype == torch.float32 for p in weights) and d_in <= MAX_DEPTH


def row_norms(s: RowSums, w: Tensor, *, project: bool) -> Tensor:
    """`[d_sae]`: the squared norm of each row's gradient, without its part along `w`, `[d_sae, d_in]`, if `project`."""
    from fastsae_kernels.gpu.adam import grad_norms

    return grad_norms(s, w, project=project)


def update_rows(
    s: RowSums,
    w: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    group: dict[str, Any],
    *,
    on_sphere: bool,
    **options: Any,
) -> None:
    """`fastsae_kernels.gpu.adam.adam_rows` with the rates of a parameter group.

    Args:
        s: The sums that are the gradient.
        w: The weights, `[d_sae, d_in]`; the moments likewise.
        exp_avg: The first moment, which is not written where `betas[0]` is 0.
        exp_avg_sq: The second moment.
        group: The parameter group.
        on_sphere: Whether rows have unit norm, and their gradient no part along them.
        options: The arguments of `adam_rows` that are not named here.
    """
    from fastsae_kernels.gpu.adam import adam_rows

    beta1, beta2 = group["betas"]
    adam_rows(
        s, w, exp_avg if beta1 else None, exp_avg_sq, lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"],
        project=on_sphere, unit_norm=on_sphere, **options,
    )  # fmt: skip
