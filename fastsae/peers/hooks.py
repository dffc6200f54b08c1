"""Whether somebody has hooked into a module."""

from __future__ import annotations

from typing import Any

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hook_on(module: Any) -> bool:
    """Whether a forward or backward hook is attached to a module; False for what is no module."""
    return any(getattr(module, name, None) for name in HOOKS)
