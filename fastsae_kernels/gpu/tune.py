"""Measures which kernel lists entries fastest on this machine, and remembers it.

    FASTSAE_AUTOTUNE=1 python train.py                                  the first call of each shape measures
    python -m fastsae_kernels.gpu.tune --shape 8192 2304 65536          measures ahead of time, and shows all times

Candidates are all tiles that the launch table has for the operands' dtype, of every kernel whose rules hold: they are known
to compile without spills. The winner is kept in memory and in one file per key under `$XDG_CACHE_HOME/fastsae`
(`~/.cache/fastsae`), written aside and renamed, so that processes that tune at once never see half a file nor lose one
another's. Nothing is measured while a CUDA graph is captured or a function is traced: the launch table serves then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastsae_kernels.gpu.choice import KERNELS, Choice, serve, tiles_of
from fastsae_kernels.gpu.config import SMALL_BATCHES, LaunchConfig, capability
from fastsae_kernels.gpu.listing import Listing

CAPACITY = 64  # entries that a row can hold while measuring; a row with more goes on counting, as it would in use

Bench = Callable[[Callable[[], None]], float]

_winners: dict[str, Choice] = {}


class Timing(NamedTuple):
    """One candidate and its time."""

    choice: Choice
    milliseconds: float


@cache
def _device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def key_of(x: Tensor, W_enc: Tensor) -> str:
    """What a measurement is good for: the machine, the versions, the operands, the number of tokens to a power of two."""
    device = _device_name(x.device.index) if x.is_cuda else x.device.type
    number = ".".join(map(str, capability(x.device.index))) if x.is_cuda else "-"
    layout = "feature-major" if W_enc.stride(0) == 1 else "strided"
    n_tokens = triton.next_power_of_2(x.shape[0])
    dtype = str(x.dtype).removeprefix("torch.")
    if torch.are_deterministic_algorithms_enabled():  # leaves fewer candidates
        layout += " deterministic"
    return (
        f"{device} {number} | triton {triton.__version__} torch {torch.__version__} | {dtype} {layout} | "
        f"N<={n_tokens} d_in={W_enc.shape[0]} d_sae={W_enc.shape[1]}"
    )


def cache_folder() -> Path:
    """Where winners are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastsae" / "encode"


def _file_of(key: str) -> Path:
    return cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def candidates(x: Tensor, W_enc: Tensor) -> Iterator[Choice]:
    """Every shipped tile of every kernel that can serve these operands, chunks of three sizes."""
    for kernel in KERNELS:
        if serve(kernel, x, W_enc)[1]:
            continue
        seen: list[LaunchConfig] = []
        for n_tokens in (*SMALL_BATCHES, max(SMALL_BATCHES) + 1):
            for tiles in tiles_of(kernel, x, n_tokens):
                # the size of a chunk is no constant of a kernel: other sizes compile to the same
                sizes = [tiles["CHUNK_MIB"] * factor for factor in (1, 0.5, 2)] if "CHUNK_MIB" in tiles else []
                seen += [{**tiles, "CHUNK_MIB": size} for size in sizes] or [tiles]
        for number, tiles in enumerate(seen):
            if tiles not in seen[:number]:
                yield Choice(kernel, tiles, "measured on this machine")


def _read(key: str) -> dict[str, object] | None:
    path = _file_of(key)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] == key and isinstance(stored["config"], dict) and isinstance(stored["kernel"], str):
            return stored
        problem = "it is of another measurement"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    warnings.warn(f"{path}: not a tuning result ({problem}); it is measured again", stacklevel=2)
    return None


def _write(key: str, winner: Timing) -> None:
    path = _file_of(key)
    stored = {"key": key, **winner.choice._asdict(), "milliseconds": winner.milliseconds}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(stored, file, indent=1)
        os.replace(aside, path)
    except OSError as error:
        warnings.warn(f"{path}: cannot keep the tuning result ({error}); it is measured again next time", stacklevel=2)


def known(x: Tensor, W_enc: Tensor) -> Choice | None:
    """The winner that memory or disk knows for these operands, if it still is a candidate."""
    key = key_of(x, W_enc)
    winner = _winners.get(key)
    if winner is None:
        stored = _read(key)
        # tables change between versions of this library: a tile that is no longer shipped is measured again
        kept = (stored["kernel"], stored["config"]) if stored is not None else None
        winner = next((choice for choice in candidates(x, W_enc) if choice[:2] == kept), None)
        if winner is None:
            return None
        _winners[key] = winner
    return None if serve(winner.kernel, x, W_enc)[1] else winner


def _measurable() -> bool:
    return not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()


def tuned(x: Tensor, W_enc: Tensor, call: Listing | None) -> Choice | None:
    """The measured way; measures it where `call` is given and measuring is possible now. None where there is none."""
    choice = known(x, W_enc)
    if choice is not None or call is None or not _measurable():
        return choice
    return tune(call)[0].choice


def _bench(run: Callable[[], None]) -> float:
    return triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")


def measure(call: Listing, bench: Bench = _bench) -> list[Timing]:
    """Time of each candidate, fastest first; the outputs of `call` are left alone.

    Raises:
        RuntimeError: Not one candidate runs.
    """
    n_tokens = call.x.shape[0]
    starts = torch.arange(n_tokens, dtype=torch.int32, device=call.x.device) * CAPACITY
    cursors, row_ends = starts.clone(), starts + CAPACITY
    entries = torch.empty(n_tokens * CAPACITY, dtype=torch.int64, device=call.x.device)
    scratch = call._replace(cursors=cursors, row_ends=row_ends, entries=entries)
    timings, failures = [], []
    for candidate in candidates(call.x, call.W_enc):

        def run(candidate: Choice = candidate) -> None:
            cursors.copy_(starts)
            KERNELS[candidate.kernel].launch(scratch, candidate.config)

        try:
            timings.append(Timing(candidate, bench(run)))
        except Exception as error:  # out of shared memory, a library that lacks the product: the others can still win
            failures.append(f"{candidate.kernel} {candidate.config}: {type(error).__name__}: {error}")
            warnings.warn(f"not a candidate on this machine: {failures[-1]}", stacklevel=2)
    if not timings:
        raise RuntimeError("no kernel that lists entries runs on this machine: " + "; ".join(failures))
    return sorted(timings, key=lambda timing: timing.milliseconds)


def tune(call: Listing, bench: Bench = _bench) -> list[Timing]:
    """`measure`, and keep the winner in memory and on disk."""
    timings = measure(call, bench)
    key = key_of(call.x, call.W_enc)
    _winners[key] = timings[0].choice
    _write(key, timings[0])
    return timings


def random_call(n_tokens: int, d_in: int, d_sae: int, dtype: torch.dtype, l0: float) -> Listing:
    """Random operands on the current CUDA device (or on CPU where there is none) with about `l0` entries in a row."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(n_tokens, d_in, device=device, dtype=dtype)
    W_enc = (torch.randn(d_sae, d_in, device=device) / d_in**0.5).to(dtype).t()
    quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - min(l0 / d_sae, 0.5)))
    threshold = torch.full((d_sae,), float(quantile), device=device)
    row_offsets = torch.arange(n_tokens + 1, dtype=torch.int32, device=device) * CAPACITY
    entries = torch.empty(n_tokens * CAPACITY, dtype=torch.int64, device=device)
    b_enc = torch.zeros(d_sae, device=device, dtype=dtype)
    return Listing(x, W_enc, b_enc, threshold, row_offsets[:-1].clone(), row_offsets[1:], entries, 0.0, None, 0)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastsae_kernels.gpu.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=3, action="append", required=True, metavar=("N", "D_IN", "D_SAE"))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--l0", type=float, default=64, help="active features per token")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write("tune: expected a CUDA device, found none\n")
        return 1
    for n_tokens, d_in, d_sae in arguments.shape:
        call = random_call(n_tokens, d_in, d_sae, getattr(torch, arguments.dtype), arguments.l0)
        timings = tune(call)
        sys.stdout.write(f"{key_of(call.x, call.W_enc)}\n")
        for timing in timings:
            tiles = " ".join(f"{name}={value}" for name, value in timing.choice.config.items())
            sys.stdout.write(f"  {timing.milliseconds:10.4f} ms  {timing.choice.kernel:<16}  {tiles}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
