"""What is known of the activity: how many features are active decides between gathers and products, and sizes rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fastsae_kernels.memory import Spare
from fastsae_kernels.types import Capacity

# Share of entries above which a gather costs more than the product that it replaces. CPU: forward and backward, forced to
# either path on one thread of a Zen 5 with bf16 units, take as long at 0.16 in fp32 and at 0.11 in bf16 (d_in 768, d_sae
# 16384, 512 tokens; 512, 4096 and 256 tokens alike); other CPUs 0.1 to 0.3. CUDA: bandwidth over arithmetic rate of an H200
# with gathers half from L2, not yet measured.
MAX_DENSITY = {"cpu": 0.125, "cuda": 0.006}

SAMPLE = (32, 128)  # tokens and features, whose product takes no time beside the rest
RUN = (
    8  # features side by side in a sample: each costs a line of the cache otherwise, where weights are stored by input
)
DENSE = Capacity(0, 0)  # stands for the dense backend


class ActivityHint:
    """How many features were active lately, known without waiting for the GPU.

    After each pass the per-token counts are reduced on the device and copied to pinned memory behind an event; a later
    pass reads the newest copy that has arrived. A stale hint costs time, never exactness: a row that outgrows its
    capacity is computed by the device-side overflow path.
    """

    HEADROOM = 1.25  # capacity over the largest count seen, outliers left out
    MEAN_HEADROOM = 1.5  # capacity of the whole batch over the mean of the counts
    OUTLIERS = 1024  # one token in so many may have more entries than its capacity: it is computed exactly, and slower
    UNKNOWN = Capacity(256, 256)  # before any count: more than most SAEs have active, 2 KiB a token
    _known: ClassVar[WeakValueDictionary[int, ActivityHint]] = WeakValueDictionary()
    _keys: ClassVar[Iterator[int]] = itertools.count(1)

    def __init__(self) -> None:
        self.mean: float | None = None
        self.largest: int | None = None
        self.spares = (Spare(), Spare())  # the memory of the last gradients of W_enc and W_dec, once they are gone
        self.plan: Capacity = DENSE  # the capacity in a compiled graph, which is compiled again where this changes
        self._pending: tuple[Tensor, torch.cuda.Event, torch.device] | None = None
        self._register()

    def _register(self) -> None:
        self.key = next(self._keys)
        self._known[self.key] = self

    @classmethod
    def of(cls, key: int) -> ActivityHint | None:
        """The hint with that `key`, by which graphs name it; None for 0."""
        return cls._known.get(key)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": None}  # a CUDA event can be neither copied nor pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()  # a copy lives its own life

    def update(self, counts: Tensor, d_sae: int) -> None:
        """Takes how many entries each token of a pass had, `[N]`; nothing while a CUDA graph is captured."""
        self._take(counts)
        if self.mean is not None:
            dense = self.is_dense(d_sae, counts.device.type)
            # it only grows, as each change compiles the graph again
            self.plan = DENSE if dense else Capacity(*map(max, self.plan, self.capacity(d_sae)))

    def _take(self, counts: Tensor) -> None:
        if counts.numel() == 0 or self._pending is not None:
            return
        if not counts.is_cuda:
            summary = self._mean_and_largest(counts)
            self.mean, self.largest = float(summary[0]), int(summary[1])
            return
        with torch.cuda.device(counts.device):  # an event is recorded on the stream of the current device
            if torch.cuda.is_current_stream_capturing():
                return
            host = torch.empty(2, dtype=torch.float64, pin_memory=True)
            host.copy_(self._mean_and_largest(counts), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = (host, event, counts.device)

    def poll(self) -> None:
        """Reads the pending counts if they have arrived; a query would end the capture of a CUDA graph."""
        if self._pending is None:
            return
        host, event, device = self._pending
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing() or not event.query():
                return
        self.mean, self.largest, self._pending = float(host[0]), int(host[1]), None

    def is_dense(self, d_sae: int, device_type: str) -> bool:
        """Whether the dense path is the faster one; True while nothing is known."""
        self.poll()
        return self.mean is None or self.mean > MAX_DENSITY.get(device_type, MAX_DENSITY["cuda"]) * d_sae

    def capacity(self, d_sae: int) -> Capacity:
        """What to reserve: for a row a power of two above the largest count seen, outliers left out."""
        self.poll()
        if self.mean is None or self.largest is None:
            return Capacity(min(self.UNKNOWN.row, d_sae), min(self.UNKNOWN.mean, d_sae))
        row = min(1 << (max(32, int(self.largest * self.HEADROOM)) - 1).bit_length(), d_sae)
        return Capacity(row, min(32 * (int(self.MEAN_HEADROOM * self.mean) // 32 + 1), row))

    def _mean_and_largest(self, counts: Tensor) -> Tensor:
        largest = counts.topk(counts.numel() // self.OUTLIERS + 1).values[-1]
        return torch.stack([counts.double().mean(), largest.double()])


def sampled_share(x: Tensor, W_enc: Tensor, b_enc: Tensor, lower: Tensor) -> float:
    """The share of pre-activations above `lower`, `[d_sae]`, in a sample of tokens and features, on a CPU."""
    n_tokens, n_features = SAMPLE
    run = min(RUN, len(lower))
    step = max(run, len(lower) * run // n_features)
    weights, bias, lower = (tensor.unfold(-1, run, step).flatten(-2) for tensor in (W_enc, b_enc, lower))
    hidden_pre = x[:: max(1, len(x) // n_tokens)] @ weights + bias
    return float((hidden_pre > lower).double().mean())
