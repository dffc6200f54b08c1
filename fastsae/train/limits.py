"""Whether a run fits into the memory of this machine, asked before anything of its size is allocated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastsae.data.sequencing import WINDOW
from fastsae.errors import UsageError
from fastsae.machine import free_memory
from fastsae.train.config import TrainConfig


def check_memory(saes: Sequence[TrainConfig], d_in: int, bytes_per_number: int, device: torch.device) -> None:
    """Checks what a run needs at least; its real peak is higher.

    Args:
        saes: The options of the run's SAEs.
        d_in: Width of the activations.
        bytes_per_number: Size of a number of the activations, as the language model computes them.
        device: Where the run computes.

    Raises:
        UsageError: It needs more than is free; the message names the option that needs most.
    """
    config, needs = saes[0], _needs(saes, d_in, bytes_per_number, device.type)
    free, total = free_memory(device), sum(needs.values())
    if free is None or total <= free:
        return
    name = max(needs, key=lambda name: needs[name])
    raise UsageError(
        f"{name}: expected a run that fits into the {_gigabytes(free)} of free memory, got {getattr(config, name):,}, "
        f"which alone takes {_gigabytes(needs[name])} of the {_gigabytes(total)} that this run needs at least; lower it"
    )


def needed_memory(saes: Sequence[TrainConfig], d_in: int, bytes_per_number: int, device: torch.device) -> int:
    """Bytes that a run needs at least; see `check_memory`."""
    return sum(_needs(saes, d_in, bytes_per_number, device.type).values())


def _needs(saes: Sequence[TrainConfig], d_in: int, bytes_per_number: int, device_type: str) -> dict[str, int]:
    """Bytes by the option that decides about them."""
    config = saes[0]
    size = "expansion" if config.d_sae is None else "d_sae"
    n_features, n_layers = sum(sae.n_features(d_in) for sae in saes), len({sae.layer for sae in saes})
    longest_row = config.block_length if config.sequencing == "block" else 0
    longest_batch = max(min(config.forward_tokens, WINDOW * config.max_length), longest_row)
    row = n_layers * (d_in * bytes_per_number + 3 * 8)  # activations with their token, position and dialogue
    n_ahead = min(config.batches_ahead(device_type) * config.forward_tokens, config.tokens)
    return {
        size: 3 * 2 * d_in * n_features * 4,  # W_enc and W_dec, and Adam's two means of each, in fp32
        "buffer_tokens": (config.buffer_tokens + (n_ahead if config.prefetch is None else 0)) * row,
        "prefetch": 0 if config.prefetch is None else n_ahead * row,
        "batch_size": n_layers * config.batch_size * d_in * 4 * 2,  # the batch scaled, and its reconstruction
        "forward_tokens": longest_batch * d_in * bytes_per_number * 2,  # a block's input and output
    }


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:,.1f} GB"
