"""What a run needs of memory, and whether it fits into this machine, asked before anything of its size is allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastsae.data.sequencing import WINDOW
from fastsae.errors import UsageError
from fastsae.machine import free_memory
from fastsae.train.config import TrainConfig
from fastsae.train.placement import placed

_BYTES_OF_ENTRY = 40  # index, value, order by feature and gradients of one active feature of a token
_ROOM_FOR_ENTRIES = {"cpu": 1.0, "cuda": 1.5}  # a GPU's rows have room for more of them than there are on average
_BYTES_OF_FEATURE = 12  # of a token and a feature, active or not, where so many are active that the pass is dense
_LOG_OF_A_TOKEN = 3 * 8  # bytes: token, position and dialogue, which are kept with its activations


@dataclass(frozen=True)
class Need:
    """Memory of one process.

    Attributes:
        what: What it holds.
        option: The name of the option that decides about its size.
        n_bytes: How much it takes.
    """

    what: str
    option: str
    n_bytes: int


def check_memory(
    saes: Sequence[TrainConfig],
    d_in: int,
    bytes_per_number: int,
    device: torch.device,
    n_processes: int = 1,
    n_sharing: int = 1,
) -> None:
    """Checks what each process of a run needs at least, beside the language model; its real peak is higher.

    Args:
        saes: The options of the run's SAEs.
        d_in: Width of the activations.
        bytes_per_number: Size of a number of the activations, as the language model computes them.
        device: Where the run computes.
        n_processes: The processes of the run.
        n_sharing: Those of them that share the memory of `device`: all on this machine where it is a CPU.

    Raises:
        UsageError: It needs more than is free; the message names the option that needs most.
    """
    config, by_option = saes[0], Counter[str]()
    for need in needs(saes, d_in, bytes_per_number, device.type, n_processes):
        by_option[need.option] += need.n_bytes * n_sharing
    free, total = free_memory(device), sum(by_option.values())
    if free is None or total <= free:
        return
    name, largest = by_option.most_common(1)[0]
    raise UsageError(
        f"{name}: expected a run that fits into the {_gigabytes(free)} of free memory, got {getattr(config, name):,}, "
        f"which alone takes {_gigabytes(largest)} of the {_gigabytes(total)} that this run needs at least; lower it"
    )


def needed_memory(saes: Sequence[TrainConfig], d_in: int, bytes_per_number: int, device: torch.device) -> int:
    """Bytes that a run of one process needs at least; see `check_memory`."""
    return sum(need.n_bytes for need in needs(saes, d_in, bytes_per_number, device.type))


def needs(
    saes: Sequence[TrainConfig], d_in: int, bytes_per_number: int, device_type: str, n_processes: int = 1
) -> list[Need]:
    """What the largest process of a run holds in a training step, beside the language model's weights.

    Args:
        saes: The options of the run's SAEs.
        d_in: Width of the activations.
        bytes_per_number: Size of a number of the activations.
        device_type: `cpu` or `cuda`.
        n_processes: The processes of the run, a multiple of `shard_features`.
    """
    own, n_sharing_batches = trained_by_one(saes, d_in, n_processes)
    weights = [_weights(sae, d_in, device_type, n_sharing_batches) for sae in own]
    # the SAEs are trained one after the other, so that of what a step holds only the largest counts
    steps = [_step(sae, d_in, device_type, n_sharing_batches) for sae in own]
    step = max(steps, key=lambda found: sum(need.n_bytes for need in found))
    batches = Need(
        "batches as they come",
        "batch_size",
        n_layers(saes) * _rows(saes[0], n_sharing_batches) * d_in * bytes_per_number,
    )
    return [*_summed(weights), *_stream(saes, d_in, bytes_per_number, device_type, n_processes), batches, *step]


def trained_by_one(saes: Sequence[TrainConfig], d_in: int, n_processes: int) -> tuple[list[TrainConfig], int]:
    """The SAEs of the group of processes that has most to train, and how many processes share each of their batches.

    Where there are enough SAEs for all groups, each group trains its own on whole batches; else all groups train every SAE, each
    on a part of the batches.
    """
    n_groups = n_processes // saes[0].shard_features
    if n_groups == 1 or len(saes) < n_groups:
        return list(saes), n_processes
    groups = placed({str(i): sae.n_features(d_in) for i, sae in enumerate(saes)}, n_groups)
    of_groups = [[sae for i, sae in enumerate(saes) if groups[str(i)] == group] for group in range(n_groups)]
    return max(of_groups, key=lambda own: sum(sae.n_features(d_in) for sae in own)), saes[0].shard_features


def n_layers(saes: Sequence[TrainConfig]) -> int:
    """How many layers the SAEs read."""
    return len({sae.layer for sae in saes})


def _rows(config: TrainConfig, n_processes: int) -> int:
    """Rows of a batch that a process trains on, of those that so many processes share."""
    return -(-config.batch_size // n_processes) * config.shard_features


def _summed(parts: Sequence[Sequence[Need]]) -> list[Need]:
    totals = Counter[tuple[str, str]]()
    for part in parts:
        for need in part:
            totals[need.what, need.option] += need.n_bytes
    return [Need(what, option, n) for (what, option), n in totals.items()]


def held_features(config: TrainConfig, d_in: int) -> int:
    """Features that the first process of a group holds; no other one holds more."""
    return -(-config.n_features(d_in) // config.shard_features)


def trained_numbers(config: TrainConfig, d_in: int) -> int:
    """Numbers of the SAE's weights, biases and thresholds that one process holds and trains."""
    vectors = 2 if config.architecture == "jumprelu" else 1
    matrices = 2 if config.frozen is None else 1
    return held_features(config, d_in) * (matrices * d_in + vectors) + d_in


def sums_gradients(config: TrainConfig, device_type: str, n_processes: int = 1) -> bool:
    """Whether the optimiser gets the gradients of the weights as tensors, and does not sum them row by row."""
    is_averaged = n_processes > config.shard_features
    is_chosen_from = config.is_topk and config.shard_features > 1
    is_rescaled = config.is_topk and not config.normalize_decoder
    is_clipped = device_type == "cpu" and config.clip_norm > 0
    return is_averaged or is_chosen_from or is_rescaled or is_clipped


def _weights(config: TrainConfig, d_in: int, device_type: str, n_processes: int) -> list[Need]:
    """What has the size of the SAE's weights."""
    option = "expansion" if config.d_sae is None else "d_sae"
    features, trained = held_features(config, d_in), trained_numbers(config, d_in)
    matrix = features * d_in
    frozen = 0 if config.frozen is None else matrix
    found = [
        Need("weights of the SAE", option, 4 * (trained + frozen)),
        Need("Adam's two means", option, 2 * 4 * trained),
    ]
    if sums_gradients(config, device_type, n_processes):
        found.append(Need("gradients of the weights", option, 4 * trained))
    elif device_type == "cuda" and config.k is None:
        size = 2 if config.dtype == "bfloat16" else 4
        found.append(Need("gradients of tokens with too many active features", option, size * 2 * matrix))
    if config.dtype == "bfloat16":
        found.append(Need("copies of the weights in bfloat16", option, 2 * 2 * matrix))
    if config.is_topk and not config.normalize_decoder:
        found.append(Need("weights rescaled by the decoder's norms", option, 4 * 2 * matrix))
    return found


def _stream(
    saes: Sequence[TrainConfig], d_in: int, bytes_per_number: int, device_type: str, n_processes: int
) -> list[Need]:
    """What holds activations of the language model before the SAEs see them."""
    config = saes[0]
    row = n_layers(saes) * (d_in * bytes_per_number + _LOG_OF_A_TOKEN)
    n_batches = config.batches_ahead(device_type, n_processes)
    ahead = min(n_batches * config.forward_tokens, -(-config.tokens // n_processes)) * row
    of_batch = -(-config.batch_size // n_processes)
    longest_row = config.block_length if config.sequencing == "block" else 0
    longest_batch = max(min(config.forward_tokens, WINDOW * config.max_length), longest_row)
    return [
        Need("mixing buffer", "buffer_tokens", max(-(-config.buffer_tokens // n_processes), 2 * of_batch) * row),
        Need("activations computed ahead", "buffer_tokens" if config.prefetch is None else "prefetch", ahead),
        # the input and the output of a block
        Need("pass of the language model", "forward_tokens", longest_batch * d_in * bytes_per_number * 2),
    ]


def _step(config: TrainConfig, d_in: int, device_type: str, n_processes: int) -> list[Need]:
    """What a training step holds of a batch, which is that of a whole group of processes."""
    n_shards, rows = config.shard_features, _rows(config, n_processes)
    batch = rows * d_in * (4 + (2 if config.dtype == "bfloat16" else 0))  # scaled, and for the products
    results = rows * d_in * 4 * (3 if n_shards > 1 else 2)  # the reconstruction, its error, and a part that travels
    sparse = _ROOM_FOR_ENTRIES[device_type] * start_l0(config, d_in) * _BYTES_OF_ENTRY
    of_token = min(sparse, config.n_features(d_in) * _BYTES_OF_FEATURE) / n_shards
    return [
        Need("batch as the SAE takes it", "batch_size", batch),
        Need("reconstruction and its error", "batch_size", results),
        Need("active features of the batch", "batch_size", int(rows * of_token)),
    ]


def start_l0(config: TrainConfig, d_in: int) -> float:
    """Active features per token at the start, when they are most; about half of all where `b_enc` starts at 0."""
    d_sae = config.n_features(d_in)
    if config.k is not None:
        return min(config.k, d_sae)
    most = d_sae / 2 if config.init_l0 is None else config.init_l0
    return min(max(most, config.expected_l0 or 0.0), d_sae)


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:,.1f} GB"
