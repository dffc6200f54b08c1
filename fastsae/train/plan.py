"""What a run will take, computed and not measured: memory, arithmetic, bytes between processes, and the time of a step.

Nothing is allocated and no model is loaded, so that a run on many machines can be planned on any.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fastsae.distributed.parts import first_row
from fastsae.distributed.selection import BINS, n_candidates
from fastsae.errors import UsageError, shown
from fastsae.train.config import TrainConfig
from fastsae.train.hardware import Hardware
from fastsae.train.limits import (
    Need,
    held_features,
    n_layers,
    needs,
    start_l0,
    sums_gradients,
    trained_by_one,
    trained_numbers,
)

MOST_PROCESSES = 10**6
_ADAM = 16  # operations for a weight: moments, update, projection and norm
_PASSES = 8  # operations for an active feature and dimension: the decoder, its gradient, and those of both matrices


@dataclass(frozen=True)
class Model:
    """The language model, as far as a plan must know it.

    Attributes:
        d_in: Width of the activations.
        n_before: Weights of the blocks up to the layer, which every token goes through.
        n_weights: All of them.
        bytes_per_number: Size of a weight and of an activation.
    """

    d_in: int
    n_before: int
    n_weights: int
    bytes_per_number: int


@dataclass(frozen=True)
class Part:
    """A part of a step that one process computes.

    Attributes:
        name: What it does.
        flops: Its operations.
        n_bytes: What it reads from memory and writes to it.
        is_narrow: Whether its products are in 16 bits.
    """

    name: str
    flops: float
    n_bytes: float
    is_narrow: bool = False

    def seconds(self, hardware: Hardware) -> float:
        """The longer of computing and of reading and writing, each at its full rate."""
        rate = hardware.flops_16 if self.is_narrow else hardware.flops_32
        return max(self.flops / rate, self.n_bytes / hardware.memory_bandwidth)


@dataclass(frozen=True)
class Exchange:
    """What one process sends in a step for one purpose, in a ring of processes.

    Attributes:
        name: As the traffic of `fastsae.distributed.groups.Group` names it.
        n_bytes: What it sends to its neighbour in the ring.
        size: Processes of the ring.
        stride: The difference of their numbers.
    """

    name: str
    n_bytes: float
    size: int
    stride: int

    def by_link(self, hardware: Hardware) -> tuple[float, float]:
        """Bytes that one device sends inside of its machine, and by its network card.

        Where `m` members of a ring share a machine, the ring's data leave it by the cards of all `m`.
        """
        m = min(self.size, max(1, hardware.per_machine // self.stride))
        if m == self.size:
            return self.n_bytes, 0.0
        return self.n_bytes if m > 1 else 0.0, self.n_bytes / m

    def seconds(self, hardware: Hardware) -> float:
        """The time of the slower link; the latency is left out."""
        inside, outside = self.by_link(hardware)
        return max(inside / hardware.link, outside / hardware.network)


@dataclass(frozen=True)
class Plan:
    """What a run takes, of the process that has most.

    Attributes:
        saes: The options of the run's SAEs.
        model: Its language model.
        n_processes: Its processes.
        memory: What a process holds in a step.
        parts: What it computes in a step, for each SAE.
        exchanges: What it sends in a step.
    """

    saes: Sequence[TrainConfig]
    model: Model
    n_processes: int
    memory: list[Need]
    parts: list[Part]
    exchanges: list[Exchange]

    @property
    def config(self) -> TrainConfig:
        """The options that all SAEs share, and those of the first."""
        return self.saes[0]

    @property
    def is_placed(self) -> bool:
        """Whether each group of processes trains other SAEs."""
        return trained_by_one(self.saes, self.model.d_in, self.n_processes)[1] < self.n_processes

    @property
    def n_bytes(self) -> int:
        """Memory of a process."""
        return sum(need.n_bytes for need in self.memory)

    @property
    def sent(self) -> float:
        """Bytes that a process sends in a step."""
        return sum(exchange.n_bytes for exchange in self.exchanges)

    def hidden(self, hardware: Hardware) -> float:
        """Seconds of a step in which reconstructions travel while the next part of the batch is encoded."""
        own, _ = trained_by_one(self.saes, self.model.d_in, self.n_processes)
        n_parts = [1 if sae.architecture == "batchtopk" else sae.overlap_chunks for sae in own]
        encoded = [part.seconds(hardware) for part in self.parts if part.name == "encode"]
        travels = [e.seconds(hardware) for e in self.exchanges if e.name == "reconstruction"] or [0.0] * len(own)
        return sum(min(a, b) * (n - 1) / n for a, b, n in zip(encoded, travels, n_parts, strict=True))

    def seconds(self, hardware: Hardware) -> float:
        """The time of a step."""
        computed = sum(part.seconds(hardware) for part in self.parts)
        sent = sum(exchange.seconds(hardware) for exchange in self.exchanges)
        return computed + sent - self.hidden(hardware)


def make_plan(saes: Sequence[TrainConfig], model: Model, n_processes: int = 1, device_type: str = "cuda") -> Plan:
    """The plan of a run.

    Args:
        saes: The options of the run's SAEs, which share all that the stream of activations decides.
        model: Its language model, up to the deepest layer.
        n_processes: Its processes.
        device_type: Where it computes, `cpu` or `cuda`.

    Raises:
        UsageError: The processes do not fit the options.
    """
    config, d_in = saes[0], model.d_in
    for sae in saes:
        check_processes(sae, n_processes)
    of_model = Need("weights of the language model", "model", model.n_weights * model.bytes_per_number)
    memory = [of_model, *needs(saes, d_in, model.bytes_per_number, device_type, n_processes)]
    own, n_sharing_batches = trained_by_one(saes, d_in, n_processes)
    parts, exchanges = [_forward(config, model, n_processes)], list[Exchange]()
    for sae in own:
        parts += _step(sae, d_in, n_sharing_batches, device_type)
        traffic = step_traffic(sae, d_in, sae.n_features(d_in), n_sharing_batches, model.bytes_per_number)
        exchanges += [_exchange(name, n, sae, n_sharing_batches) for name, n in traffic.items() if name != "rows"]
    # once for each layer: from all processes where each group trains other SAEs, which see the whole batch
    n_together = n_processes if n_sharing_batches < n_processes else config.shard_features
    rows = rows_traffic(config, d_in, n_processes, n_together, model.bytes_per_number) * n_layers(saes)
    if rows:
        exchanges.insert(0, Exchange("rows", rows, n_together, 1))
    return Plan(saes, model, n_processes, memory, parts, exchanges)


def check_processes(config: TrainConfig, n_processes: int) -> None:
    """Raises UsageError unless so many processes can share the run."""
    if not 1 <= n_processes <= MOST_PROCESSES:
        raise UsageError(f"processes: expected a whole number from 1 to {MOST_PROCESSES:,}, got {shown(n_processes)}")
    if n_processes % config.shard_features:
        raise UsageError(
            f"shard_features: expected a divisor of the {shown(n_processes)} processes, got {config.shard_features:,}"
        )
    if config.shard_features > 1 and config.k is not None and not config.is_topk:
        raise UsageError(
            f"k: expected none where processes share the features of a {config.architecture} SAE, got {config.k:,}; topk and "
            "batchtopk SAEs can be shared"
        )
    if config.batch_size < n_processes:
        raise UsageError(
            f"batch_size: expected at least one token for each of {shown(n_processes)} processes, got {config.batch_size:,}"
        )


def step_traffic(
    config: TrainConfig, d_in: int, d_sae: int, n_processes: int, bytes_of_acts: int, *, with_dead: bool = False
) -> dict[str, float]:
    """Bytes that the first process sends in a training step, by the names of `Group.traffic`; what is not sent has no name.

    Collectives are counted as rings send them: a gather of `S` equal parts `S - 1` times a part, a sum `2 (S - 1) / S` times the
    whole. Numbers of tokens and means for the logs are left out, some 40 bytes.

    Args:
        config: The run.
        d_in: Width of the activations.
        d_sae: Number of features.
        n_processes: The processes of the run.
        bytes_of_acts: Size of a number of the activations.
        with_dead: Whether it is a step of the TopK family in which more than `d_in // 2` dead features learn (AuxK).
    """
    n_shards, n_groups = config.shard_features, n_processes // config.shard_features
    rows = first_row(config.batch_size, n_processes, n_shards)  # of the first group, which has most
    summed = 2 * (n_shards - 1) / n_shards
    found: dict[str, float] = {}
    if n_shards > 1:
        found["rows"] = rows_traffic(config, d_in, n_processes, n_shards, bytes_of_acts)
        found["reconstruction"] = summed * d_in * _sent_rows(config, rows, with_dead) * _bytes_of_parts(config)
        found["penalty"] = summed * rows * 4 * ((1 if _counts_features(config) else 2) + with_dead)
        found["norm"] = summed * 8 if config.clip_norm > 0 else 0
        found["b_dec"] = summed * d_in * 4 * (1 + with_dead) if config.subtracts_b_dec else 0
        chosen = [config.k] if config.architecture == "topk" and config.k else []
        chosen += [max(1, d_in // 2)] if with_dead else []
        found["candidates"] = sum((n_shards - 1) * rows * 4 * _candidates(k, n_shards) for k in chosen)
    if config.architecture == "batchtopk":
        found["histogram"] = 2 * 2 * (n_processes - 1) / n_processes * BINS * 4
    found["gradients"] = 2 * (n_groups - 1) / n_groups * 4 * trained_numbers(config, d_in)
    return {name: float(n) for name, n in found.items() if n}


def rows_traffic(config: TrainConfig, d_in: int, n_processes: int, n_together: int, bytes_of_acts: int) -> float:
    """Bytes of the activations of one layer that a process sends, of which so many put theirs together."""
    return float((n_together - 1) * -(-config.batch_size // n_processes) * d_in * bytes_of_acts)


def _bytes_of_parts(config: TrainConfig) -> int:
    return 2 if config.reduce_dtype == "bfloat16" else 4


def _sent_rows(config: TrainConfig, rows: int, with_dead: bool) -> int:
    """Rows of reconstructions that are summed; in 16 bits each process sums a share of them, so that all shares are as long."""
    size = rows if config.architecture == "batchtopk" else -(-rows // config.overlap_chunks)
    parts = [min(size, rows - start) for start in range(0, rows, size)]
    if with_dead:  # a pass of its own, in as many parts
        again = -(-rows // config.overlap_chunks)
        parts += [min(again, rows - start) for start in range(0, rows, again)]
    n = config.shard_features if _bytes_of_parts(config) == 2 else 1
    return sum(-(-part // n) * n for part in parts)


def _counts_features(config: TrainConfig) -> bool:
    """Whether the penalty is L0, so that one number per token tells both."""
    return config.is_topk or (config.architecture == "jumprelu" and config.sparsity != "tanh")


def _candidates(k: int, n_shards: int) -> float:
    """Values of a token that each process sends, so that the `k` largest of all are found.

    At first it sends twice its fair share, and the others for those tokens of whose `k` largest some process holds as many as
    that. So many tokens are taken to be of this kind as there would be if features lay in the processes at random.
    """
    sent = n_candidates(k, n_shards)
    if sent == k:
        return k
    mean, deviation = k / n_shards, math.sqrt(k * (n_shards - 1)) / n_shards
    of_a_process = math.erfc((sent - 0.5 - mean) / deviation / math.sqrt(2)) / 2  # share of the tokens, as if normal
    return sent + min(1.0, n_shards * of_a_process) * (k - sent)


def _exchange(name: str, n_bytes: float, config: TrainConfig, n_processes: int) -> Exchange:
    n_shards = config.shard_features
    if name == "gradients":
        return Exchange(name, n_bytes, n_processes // n_shards, n_shards)
    return Exchange(name, n_bytes, n_processes if name == "histogram" else n_shards, 1)


def expected_l0(config: TrainConfig, d_in: int) -> float:
    """Active features per token of a step in the middle of the run; those of the start where nothing says more."""
    return min(config.expected_l0 or start_l0(config, d_in), config.n_features(d_in))


def _forward(config: TrainConfig, model: Model, n_processes: int) -> Part:
    """The language model up to the layer, on the tokens that one process reads in a step; none from cached activations."""
    own = 0.0 if config.activations else config.batch_size / n_processes
    of_weights = model.n_before * model.bytes_per_number * own / config.forward_tokens
    return Part("language model", 2 * model.n_before * own, of_weights, model.bytes_per_number == 2)


def _step(config: TrainConfig, d_in: int, n_processes: int, device_type: str) -> list[Part]:
    """What one process computes of an SAE's step."""
    is_narrow, n_shards = config.dtype == "bfloat16", config.shard_features
    rows = config.batch_size / n_processes * n_shards
    matrix, size = held_features(config, d_in) * d_in, 2 if is_narrow else 4
    entries = rows * expected_l0(config, d_in) / n_shards
    trained = trained_numbers(config, d_in)
    of_gradient = 4 if sums_gradients(config, device_type, n_processes) else 0
    return [
        Part("encode", 2 * rows * matrix, matrix * size + rows * d_in * size, is_narrow),
        # of each active feature the decoder's row is read twice; the batch and the errors stay in the cache
        Part("decode, gradients", _PASSES * entries * d_in, 2 * entries * d_in * size + 4 * rows * d_in * 4),
        # weight and both means are read and written, and so is the gradient where it is a tensor
        Part("optimiser", _ADAM * trained, trained * (24 + 2 * of_gradient) + (2 * 2 * matrix if is_narrow else 0)),
    ]


def divisors(n: int) -> list[int]:
    """The numbers that `n` is a multiple of, in order."""
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def alternatives(plan: Plan, device_type: str) -> Mapping[int, Plan]:
    """The same run on as many processes, by the number of those that share the features, where they can be shared."""
    can_be_shared = all(sae.is_topk or sae.k is None for sae in plan.saes)
    return {
        n: make_plan([replace(sae, shard_features=n) for sae in plan.saes], plan.model, plan.n_processes, device_type)
        for n in divisors(plan.n_processes)
        if n == 1 or can_be_shared
    }
