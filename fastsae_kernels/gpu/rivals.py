"""Which of the three ways lists the entries of a call.

    pointer      `pointer`: tiles loaded through pointers. Any strides, any d_in, every architecture.
    persistent   `persistent`: tiles loaded by the tensor memory accelerator. sm_90 and later, aligned rows.
    chunks       `compact`: a library product chunk by chunk, then compaction.

All give the same entries. The launch table names the one that serves an architecture, dtype and number of tokens; where its
rules do not hold for the operands, the pointer kernel serves, and `chosen_path` says so. With `FASTSAE_AUTOTUNE=1` the
winner measured on this machine goes first (`tune`). `use_rival` forces one, and a call that it cannot serve is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import Tensor

from fastsae_kernels.gpu import compact, persistent, pointer
from fastsae_kernels.gpu.config import LaunchConfig, arch_of, find_config
from fastsae_kernels.gpu.listing import Listing


class Rival(NamedTuple):
    """One way of listing entries."""

    kernel: str  # its name in the launch table
    refuses: Callable[[Tensor, Tensor], str]  # why not, empty where its rules hold
    launch: Callable[[Listing, LaunchConfig], None]


RIVALS = {
    "pointer": Rival("encode", pointer.refuses, pointer.launch),
    "persistent": Rival("encode_persistent", persistent.refuses, persistent.launch),
    "chunks": Rival("encode_chunks", compact.refuses, compact.launch),
}

_forced: ContextVar[str | None] = ContextVar("forced_rival", default=None)


class Path(NamedTuple):
    """The way that a call takes, and why."""

    rival: str
    config: LaunchConfig
    why: str

    def __str__(self) -> str:
        return f"{self.rival}: {self.why}"


@contextmanager
def use_rival(name: str) -> Iterator[None]:
    """Inside, every listing takes the way `name`: `pointer`, `persistent` or `chunks`; for tests and benchmarks."""
    if name not in RIVALS:
        raise ValueError(f"rival: expected one of {', '.join(RIVALS)}, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def config_of(rival: str, x: Tensor, n_tokens: int | None = None) -> LaunchConfig | None:
    """What the launch table has for a rival (and another number of tokens than x has); None where it has nothing."""
    n_tokens = x.shape[0] if n_tokens is None else n_tokens
    kernel = RIVALS[rival].kernel
    config = find_config(kernel, x, n_tokens=n_tokens)
    if config is None or x.shape[1] % config.get("BLOCK_D", 1) == 0:
        return config
    return find_config(kernel, x, n_tokens=n_tokens, odd=True)


def refusal(rival: str, x: Tensor, W_enc: Tensor) -> str:
    """Why a rival cannot serve a call; empty where it can."""
    refused = RIVALS[rival].refuses(x, W_enc)
    if not refused and config_of(rival, x) is None:
        return f"the table of {arch_of(x.device)} has no tiles of it for {x.dtype}"
    return refused


def table_path(x: Tensor, W_enc: Tensor) -> Path:
    """What the shipped table says, or the pointer kernel where the rules of that do not hold."""
    row = find_config("encode_rival", x, n_tokens=x.shape[0]) or {"rival": "pointer"}
    source = f"the table of {arch_of(x.device)} for {x.dtype}, {x.shape[0]} tokens"
    refused = refusal(row["rival"], x, W_enc)
    rival, why = ("pointer", f"{source} says {row['rival']}, but {refused}") if refused else (row["rival"], source)
    config = config_of(rival, x)
    if config is None:
        raise ValueError(f"x: {refusal(rival, x, W_enc)}")
    return Path(rival, config, why)


def forced_path(x: Tensor, W_enc: Tensor) -> Path | None:
    """What `use_rival` asks for, None outside of it.

    Raises:
        ValueError: Its rules do not hold.
    """
    name = _forced.get()
    if name is None:
        return None
    refused = refusal(name, x, W_enc)
    config = config_of(name, x)
    if refused or config is None:
        raise ValueError(f"rival {name!r} cannot serve this call: {refused}")
    return Path(name, config, "use_rival asks for it")
