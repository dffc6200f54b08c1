"""The sparsity penalties as functions of activations; shared by every path that sees activations one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae_kernels.spec import AutoencodeSpec


def penalty_terms(acts: Tensor, scale: Tensor | None, spec: AutoencodeSpec) -> Tensor:
    """The penalty of each activation (fp32, any shape): `[act > 0]`, `act * scale` or `tanh(c * act * scale)`."""
    if spec.penalty == "l0":
        return (acts > 0).float()
    scaled = acts if scale is None else acts * scale
    return scaled if spec.penalty == "l1" else torch.tanh(spec.tanh_scale * scaled)


def penalty_slope(acts: Tensor, scale: Tensor | None, spec: AutoencodeSpec) -> Tensor:
    """Derivative of `penalty_terms` with respect to `act * scale`: 1 for `l1`, `c * sech^2(c * act * scale)` for `tanh`."""
    if spec.penalty == "l1":
        return torch.ones_like(acts)
    scaled = acts if scale is None else acts * scale
    return spec.tanh_scale * (1 - torch.tanh(spec.tanh_scale * scaled) ** 2)
