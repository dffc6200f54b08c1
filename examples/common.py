"""What the examples share: sizes from the command line, activations to train on, a clock, and how a gain is printed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fastsae.peers.handle import Handle

Result = TypeVar("Result")


def sizes(description: str | None, **defaults: int) -> argparse.Namespace:
    """A whole number for each name, from the command line or as given."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"[{default:,}]")
    return parser.parse_args()


def activations(n_tokens: int, d_in: int, seed: int) -> torch.Tensor:
    """Sparse mixtures of fixed directions, `[n_tokens, d_in]`, somewhat as a language model's activations are."""
    directions = torch.randn(2 * d_in, d_in, generator=torch.Generator().manual_seed(0)) / d_in**0.5
    draw = torch.Generator().manual_seed(seed)
    weights = torch.rand(n_tokens, 2 * d_in, generator=draw)
    return weights.masked_fill_(torch.rand(n_tokens, 2 * d_in, generator=draw) > 0.05, 0) @ directions


def timed(run: Callable[[], Result]) -> tuple[Result, float]:
    """What a function returns, and the seconds that it took."""
    begin = time.perf_counter()
    result = run()
    return result, time.perf_counter() - begin


def show(what: str, before: float, after: float, difference: Any, handle: Handle) -> None:
    """Prints both times, how far the results are apart, and what the handle counted."""
    print(f"{what}: {before:.2f} s before, {after:.2f} s accelerated: {before / after:.1f} times as fast")
    print(f"largest difference of the results: {float(difference):.2g}\n\n{handle.report()}")
