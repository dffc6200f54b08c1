"""What `FusedSAEAdam` takes: SAEs, arguments, options and state dicts of PyTorch's optimisers; and what its moments owe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.errors import UsageError
from fastsae_kernels import Collector

UNSUPPORTED = ("amsgrad", "capturable", "decoupled_weight_decay", "differentiable")  # options of torch.optim.Adam
GROUP_KEYS = {"params", "lr", "betas", "eps", "weight_decay"}


def check_sae(sae: Any) -> None:
    """Raises UsageError unless `sae` collects weight gradients and has two weight matrices that a kernel can update."""
    if not isinstance(sae, nn.Module) or not isinstance(getattr(sae, "collector", None), Collector):
        raise UsageError(f"sae: expected an SAE of fastsae, got {type(sae).__name__}")
    matrices = {name: sae._parameters.get(name) for name in ("W_enc", "W_dec")}
    for name, W in matrices.items():
        if W is None or type(W.data) is not Tensor:
            what = "a parametrization" if W is None else type(W.data).__name__
            raise UsageError(f"sae: expected {name} to be a plain parameter, got {what}; use torch.optim.Adam")
    # a process that holds no features has no memory either
    if len({W.data_ptr() for W in matrices.values() if W is not None and W.numel()}) == 1:
        raise UsageError("sae: expected W_enc and W_dec in memory of their own, got one for both; use torch.optim.Adam")


def check_arguments(max_grad_norm: Any, exp_avg_dtype: Any, compute_dtype: Any) -> None:
    """Raises UsageError where an argument that `torch.optim.Adam` has not is of the wrong kind or out of range."""
    is_number = isinstance(max_grad_norm, Real) and math.isfinite(max_grad_norm)
    if max_grad_norm is not None and not (is_number and max_grad_norm > 0):
        raise UsageError(f"max_grad_norm: expected None or a number > 0, got {max_grad_norm!r}")
    if exp_avg_dtype not in (torch.float32, torch.bfloat16):
        raise UsageError(f"exp_avg_dtype: expected torch.float32 or torch.bfloat16, got {exp_avg_dtype}")
    if compute_dtype not in (None, torch.bfloat16, torch.float16):
        raise UsageError(f"compute_dtype: expected None, torch.bfloat16 or torch.float16, got {compute_dtype}")


def check_options(group: Mapping[str, Any]) -> None:
    """Raises UsageError where a parameter group has an option of `torch.optim.Adam` that `FusedSAEAdam` lacks."""
    for name in UNSUPPORTED:
        if group.get(name):
            raise UsageError(f"{name}: expected False, the only value that FusedSAEAdam has, got {group[name]}")


def check_gradient(p: Tensor, state: Mapping[str, Tensor] | None) -> None:
    """Raises UsageError where a parameter's gradient is sparse, or it was moved since the last step, which left `state`."""
    if p.grad is not None and p.grad.layout != torch.strided:
        raise UsageError(f"grad: expected dense gradients, got layout {p.grad.layout}")
    moment = state["exp_avg_sq"] if state else p
    if (moment.dtype, moment.device) != (p.dtype, p.device):
        raise UsageError(
            f"sae: expected {moment.dtype} on {moment.device} as in the last step, got {p.dtype} on {p.device}; "
            "after moving it call optimizer.load_state_dict(optimizer.state_dict())"
        )


def check_state_dict(state_dict: Any, parameters: Sequence[Tensor]) -> None:
    """Checks a state dict against all parameters of the optimiser that is to load it.

    Raises:
        UsageError: It is none of an Adam, has an option that `FusedSAEAdam` lacks, or no moments of these shapes.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise UsageError("state_dict: expected that of an Adam, got no state and param_groups")
    for group in state_dict["param_groups"]:
        if missing := GROUP_KEYS - group.keys():
            raise UsageError(f"state_dict: expected that of an Adam, got a group without {', '.join(sorted(missing))}")
        check_options(group)
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    for index, p in zip(indices, parameters, strict=False):  # another number of them is PyTorch's own error
        state = state_dict["state"].get(index)
        if not state:
            continue
        shapes = [tuple(getattr(state.get(name), "shape", ())) for name in ("exp_avg", "exp_avg_sq")]
        if shapes != [tuple(p.shape)] * 2:
            raise UsageError(f"state_dict: expected two moments of shape {tuple(p.shape)} at {index}, got {shapes}")
        if "step" not in state:
            raise UsageError(f"state_dict: expected a step at {index}, got {', '.join(state)}")


def portable(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same with contiguous tensors, and `fused` left open.

    With it a `torch.optim.Adam` would mix up moments and weights of unlike memory layouts.
    """
    groups = [{**group, "fused": None} for group in state_dict["param_groups"]]
    states = {
        index: {name: value.contiguous() for name, value in state.items()}
        for index, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states, "param_groups": groups}


def restore_unit_norm_(W_dec: Tensor) -> None:
    """Gives every row unit norm; one that has it stays as it is, bit for bit."""
    norm = W_dec.norm(dim=1, keepdim=True)
    has_unit_norm = (norm - 1).abs() <= 16 * torch.finfo(norm.dtype).eps
    W_dec.div_(torch.where(has_unit_norm, 1.0, norm.clamp_min(1e-8)))


class OwedDecay:
    """The decay that the second moments of untouched rows owe, with `betas[0] == 0`.

    The update of such a row is zero, so a step leaves it alone; its second moment is multiplied by a power of `beta2` when it
    is touched again or read.

    Attributes:
        last_step: For each weight matrix, [d_sae] int32: the step to which each row's second moment has decayed.
        beta2: The base of the power.
    """

    def __init__(self) -> None:
        self.last_step: dict[nn.Parameter, Tensor] = {}
        self.beta2 = 1.0

    def begin(self, p: nn.Parameter, step: int, d_sae: int) -> None:
        """From this step on rows of `p` may be left alone."""
        if p not in self.last_step:
            self.last_step[p] = torch.full((d_sae,), step, dtype=torch.int32, device=p.device)

    def factor(self, steps: Tensor, like: Tensor) -> Tensor:
        """Returns `[C, 1]`: what so many steps without a gradient leave of the rows of a second moment."""
        return torch.pow(self.beta2, steps.double()).to(like.dtype)[:, None]

    def pay(self, p: nn.Parameter, step: int, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Brings the moments of `p`, `[d_sae, d_in]`, to this step."""
        owed = step - self.last_step[p]
        exp_avg.masked_fill_((owed > 0)[:, None], 0)
        exp_avg_sq *= self.factor(owed, exp_avg_sq)
