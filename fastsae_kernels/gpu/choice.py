"""Which kernel lists the entries of a call.

    list_pointers      tiles loaded through pointers. Any strides, any d_in, every architecture.
    list_descriptors   tiles loaded by the tensor memory accelerator. sm_90 and later, aligned rows.
    list_products      a library product chunk by chunk, then compaction.

All give the same entries. The launch table names the one that serves an architecture, dtype and number of tokens; where its
rules do not hold for the operands, `list_pointers` serves, and `encode.chosen_listing` says so. With `FASTSAE_AUTOTUNE=1`
the fastest one that was measured on this machine goes first (`tune`). `use_listing` forces one, and a call that it cannot
serve is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor

from fastsae_kernels.gpu import list_descriptors, list_pointers, list_products
from fastsae_kernels.gpu.config import LaunchConfig, arch_of, find_configs

# each module has `refuses(x, W_enc)`, empty where its rules hold, and `launch(call, config)`
KERNELS: dict[str, Any] = {
    "list_pointers": list_pointers,
    "list_descriptors": list_descriptors,
    "list_products": list_products,
}

_forced: ContextVar[str | None] = ContextVar("forced_listing", default=None)


class Choice(NamedTuple):
    """The kernel that a call takes, its tiles, and why."""

    kernel: str
    config: LaunchConfig
    why: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.why}"


@contextmanager
def use_listing(kernel: str) -> Iterator[None]:
    """Inside, every listing takes that kernel; for tests and benchmarks."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}")
    token = _forced.set(kernel)
    try:
        yield
    finally:
        _forced.reset(token)


def tiles_of(kernel: str, x: Tensor, n_tokens: int | None = None) -> list[LaunchConfig]:
    """The tiles that the launch table has for a kernel (and another number of tokens than x has), the one that serves first."""
    n_tokens = x.shape[0] if n_tokens is None else n_tokens
    found = find_configs(kernel, x, n_tokens=n_tokens)
    if all(x.shape[1] % tiles.get("BLOCK_D", 1) == 0 for tiles in found):
        return found
    return find_configs(kernel, x, n_tokens=n_tokens, odd=True)


def serve(kernel: str, x: Tensor, W_enc: Tensor) -> tuple[list[LaunchConfig], str]:
    """The tiles with which a kernel can serve a call, and an empty string; or none, and why it cannot."""
    refused: str = KERNELS[kernel].refuses(x, W_enc)
    tiles = [] if refused else tiles_of(kernel, x)
    if not refused and not tiles:
        refused = f"the table of {arch_of(x.device)} has no tiles of it for {x.dtype}"
    return tiles, refused


def from_table(x: Tensor, W_enc: Tensor) -> Choice:
    """What the shipped table says, or `list_pointers` where the rules of that do not hold."""
    (row,) = find_configs("listing", x, n_tokens=x.shape[0]) or [{"kernel": "list_pointers"}]
    kernel, why = row["kernel"], f"the table of {arch_of(x.device)} for {x.dtype}, {x.shape[0]} tokens"
    tiles, refused = serve(kernel, x, W_enc)
    if refused and kernel != "list_pointers":
        kernel, why = "list_pointers", f"{why} says {kernel}, but {refused}"
        tiles, refused = serve(kernel, x, W_enc)
    if refused:
        raise ValueError(f"x: {refused}")
    return Choice(kernel, tiles[0], why)


def forced(x: Tensor, W_enc: Tensor) -> Choice | None:
    """What `use_listing` asks for, None outside of it.

    Raises:
        ValueError: Its rules do not hold.
    """
    kernel = _forced.get()
    if kernel is None:
        return None
    tiles, refused = serve(kernel, x, W_enc)
    if refused:
        raise ValueError(f"{kernel} cannot serve this call: {refused}")
    return Choice(kernel, tiles[0], "use_listing asks for it")
