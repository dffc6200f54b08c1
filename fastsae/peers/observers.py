"""Whether somebody has hooked into a module, or looks at it from outside in a way that the ops cannot serve."""

from __future__ import annotations

from typing import Any

import torch

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hook_on(module: Any) -> bool:
    """Whether a forward or backward hook is attached to a module; False for what is no module."""
    return any(getattr(module, name, None) for name in HOOKS)


def in_transform() -> bool:
    """Whether `torch.func.grad`, `vmap` or the like runs the caller, which cannot pass through the ops."""
    is_inside = getattr(torch._C, "_are_functorch_transforms_active", None)
    return is_inside is not None and is_inside()
