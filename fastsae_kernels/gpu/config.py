"""Launch parameters of each kernel, per architecture: tile sizes, warps, pipeline stages.

`configs/<arch>.json` maps kernel -> key -> parameters; `configs/default.json` serves the architectures that have no file.
A key is the bits of the operands, then what narrows it down, the narrowest that exists being taken:

    "16"  "32"           bits of the operands
    "16 n<=32"           at most so many tokens (16, 32 or 64): such a call is bound by reading the weights once
    "16 odd"             a depth that the tile does not divide (unaligned rows take more registers)
    "16 n<=32 odd"

A key of a kernel that lists entries may have several: the first serves, the others are measured beside it (`tune`).
"listing" names the kernel that serves (see `choice`).
`python -m tools.kernel_report` compiles all of them and fails where one spills.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib.resources import files
from typing import Any, ParamSpec, TypeVar

import torch
import triton

LaunchConfig = dict[str, Any]
Table = dict[str, dict[str, LaunchConfig | list[LaunchConfig]]]
P = ParamSpec("P")
R = TypeVar("R")

# largest numbers of tokens that have keys of their own
SMALL_BATCHES = (16, 32, 64)
OLDEST = (8, 0)
# before, an atomic on a tensor returned the old value to one of the threads that share an element: entries were lost
OLDEST_TRITON = (3, 5)
# architectures that run another one's table
SAME_AS = {"sm_103": "sm_100", "gfx950": "gfx942"}

# the report compiles for architectures that this machine has not, the tests use small tiles
_override: str | Table | None = None


def check_triton(version: str) -> None:
    """Raises RuntimeError where a release of Triton would give wrong results in silence."""
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        raise RuntimeError(
            f"the Triton kernels need triton {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]} or newer (it comes with torch 2.9; "
            f"atomics of older ones return wrong values, triton-lang/triton#7402), got {version}; use another backend"
        )


check_triton(triton.__version__)


@cache
def load_table(arch: str) -> Table:
    """The table shipped for `arch` ("sm_90"), or the default one."""
    folder = files(__package__) / "configs"
    path = folder / f"{SAME_AS.get(arch, arch)}.json"
    if not path.is_file():
        path = folder / "default.json"
    table: Table = json.loads(path.read_text())
    return table


@cache
def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a CUDA device; `(0, 0)` on AMD, whose numbers mean something else."""
    return (0, 0) if torch.version.hip is not None else torch.cuda.get_device_capability(index)


@cache
def _arch_of(index: int | None) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = capability(index)
    if (major, minor) < OLDEST:
        raise RuntimeError(
            f"the Triton kernels need compute capability {OLDEST[0]}.{OLDEST[1]} or newer, "
            f"{torch.cuda.get_device_name(index)} has {major}.{minor}; use another backend"
        )
    return f"sm_{major}{minor}"


def arch_of(device: torch.device) -> str:
    """Name of the table that serves a device: "sm_90", or "default" where nothing is known about it."""
    if isinstance(_override, str):
        return _override
    return _arch_of(device.index) if device.type == "cuda" else "default"


def table_for(device: torch.device) -> Table:
    """The table that serves a device."""
    return _override if isinstance(_override, dict) else load_table(arch_of(device))


def _keys(like: torch.Tensor, n_tokens: int | None, odd: bool) -> Iterator[str]:
    """Keys that fit, the narrowest first."""
    bits = "32" if like.element_size() == 4 else "16"
    batches = [f" n<={n}" for n in SMALL_BATCHES if n_tokens is not None and n_tokens <= n]
    for batch in (*batches, ""):
        if odd:
            yield f"{bits}{batch} odd"
        yield f"{bits}{batch}"


def find_configs(
    kernel: str, like: torch.Tensor, *, n_tokens: int | None = None, odd: bool = False
) -> list[LaunchConfig]:
    """Parameters of `kernel` for operands of the dtype of `like`, on its device, those that serve first; empty where none are."""
    keys = table_for(like.device).get(kernel, {})
    found = next((keys[key] for key in _keys(like, n_tokens, odd) if key in keys), [])
    return found if isinstance(found, list) else [found]


def launch_config(kernel: str, like: torch.Tensor, odd: bool = False) -> LaunchConfig:
    """The parameters that serve, of a kernel that every table has."""
    found = find_configs(kernel, like, odd=odd)
    if not found:
        raise KeyError(f"{kernel}: expected in the launch table for {like.dtype} operands, found nothing")
    return found[0]


def tile_config(kernel: str, like: torch.Tensor, *depths: int) -> LaunchConfig:
    """The parameters that serve a kernel of products so deep; `EVEN_D` says that none needs masks along its depth."""
    config = launch_config(kernel, like)
    config = launch_config(kernel, like, odd=any(depth % config["BLOCK_D"] for depth in depths))
    return config | {"EVEN_D": all(depth % config["BLOCK_D"] == 0 for depth in depths)}


@contextmanager
def override(table: str | Table) -> Iterator[None]:
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
