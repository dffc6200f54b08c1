"""Which options and state dicts of PyTorch's optimisers `FusedSAEAdam` can go on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastsae.errors import UsageError

UNSUPPORTED = ("amsgrad", "capturable", "decoupled_weight_decay", "differentiable")  # options of torch.optim.Adam
GROUP_KEYS = {"params", "lr", "betas", "eps", "weight_decay"}


def check_options(group: Mapping[str, Any]) -> None:
    """Raises UsageError where a parameter group has an option of `torch.optim.Adam` that `FusedSAEAdam` lacks."""
    for name in UNSUPPORTED:
        if group.get(name):
            raise UsageError(f"{name}: expected False, the only value that FusedSAEAdam has, got {group[name]}")


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
