"""Launch parameters of each kernel, per architecture: tile sizes, warps, pipeline stages.

`configs/<arch>.json` maps kernel -> "16" or "32" (bits of the operands) -> parameters, "16 odd" where a depth that the
tile does not divide needs others (unaligned rows take more registers); `configs/default.json` serves the architectures
that have no file. `python -m fastsae_kernels.report` compiles all of them and fails where one spills.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib.resources import files
from typing import Any, ParamSpec, TypeVar

import torch

LaunchConfig = dict[str, Any]
P = ParamSpec("P")
R = TypeVar("R")

# the report compiles for architectures that this machine has not, the tests use small tiles
_override: str | dict[str, dict[str, LaunchConfig]] | None = None


@cache
def load_table(arch: str) -> dict[str, dict[str, LaunchConfig]]:
    """The table shipped for `arch` ("sm_90"), or the default one."""
    folder = files(__package__) / "configs"
    path = folder / f"{arch}.json"
    if not path.is_file():
        path = folder / "default.json"
    table: dict[str, dict[str, LaunchConfig]] = json.loads(path.read_text())
    return table


@cache
def _arch_of(index: int | None) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def launch_config(kernel: str, like: torch.Tensor, odd: bool = False) -> LaunchConfig:
    """Parameters of `kernel` for operands of the dtype of `like`, on its device; `odd` as in the module's docstring."""
    if isinstance(_override, dict):
        table = _override
    elif isinstance(_override, str):
        table = load_table(_override)
    else:
        table = load_table(_arch_of(like.device.index) if like.is_cuda else "default")
    bits = "32" if like.element_size() == 4 else "16"
    return table[kernel].get(f"{bits} odd" if odd else bits) or table[kernel][bits]


@contextmanager
def override(table: str | dict[str, dict[str, LaunchConfig]]) -> Iterator[None]:
    """Use the table of another architecture (by name), or the one given."""
    global _override
    previous, _override = _override, table
    try:
        yield
    finally:
        _override = previous


def on_device(function: Callable[P, R]) -> Callable[P, R]:
    """Make the device of the first argument current: Triton launches on the current one, not on its tensors'."""

    @wraps(function)
    def launch(*args: P.args, **kwargs: P.kwargs) -> R:
        device: torch.device = args[0].device  # type: ignore[attr-defined]
        if device.type != "cuda":
            return function(*args, **kwargs)
        with torch.cuda.device(device):
            return function(*args, **kwargs)

    return launch
