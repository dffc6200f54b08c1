"""Which backend runs an op, and whether activity is sparse enough for it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, ClassVar, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor

Backend = Literal["cpu", "triton", "dense"]

# Share of entries above which a gather costs more than the product that it replaces. CPU: forward and backward, forced to
# either path on one thread of a Zen 5 with bf16 units, take as long at 0.16 in fp32 and at 0.11 in bf16 (d_in 768, d_sae
# 16384, 512 tokens; 512, 4096 and 256 tokens alike); other CPUs 0.1 to 0.3. CUDA: bandwidth over arithmetic rate of an H200
# with gathers half from L2, not yet measured.
MAX_DENSITY = {"cpu": 0.125, "cuda": 0.006}

_forced: ContextVar[Backend | None] = ContextVar("fastsae_backend", default=None)


@contextlib.contextmanager
def use_backend(backend: Backend | None) -> Iterator[None]:
    """Runs ops on one backend inside the `with` block instead of choosing by device; None restores the choice.

    `cpu` and `triton` name the sparse backends (Triton on CPU tensors needs its interpreter), `dense` the chunked dense
    path.
    """
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> Backend | None:
    """The backend of the enclosing `use_backend`, if any."""
    return _forced.get()


def backend_of(x: Tensor) -> Backend:
    """The backend for tensors where `x` lies: `cpu`, or `triton` on a GPU.

    Raises:
        RuntimeError: `x` is on a GPU and Triton is not installed; a GPU tensor never falls back in silence.
    """
    forced = _forced.get()
    if forced is not None:
        return forced
    if x.device.type == "cpu":
        return "cpu"
    try:
        import triton  # noqa: F401
    except ImportError:
        raise RuntimeError(
            f"x is on {x.device}, whose kernels need Triton, and Triton is not installed: pip install triton"
        ) from None
    return "triton"


class ActivityHint:
    """How many features were active lately, known without waiting for the GPU.

    After each pass the per-token counts are reduced on the device and copied to pinned memory behind an event; a later
    pass reads the newest copy that has arrived. A stale hint costs time, never exactness: a row that outgrows its
    capacity is computed by the device-side overflow path.
    """

    HEADROOM = 1.25  # capacity over the largest count seen, outliers left out
    MEAN_HEADROOM = 1.5  # capacity of the whole batch over the mean of the counts
    OUTLIERS = 1024  # one token in so many may have more entries than its capacity: it is computed exactly, and slower
    UNKNOWN = 256  # capacity before any: more than most SAEs have active, 2 KiB a token
    _known: ClassVar[WeakValueDictionary[int, ActivityHint]] = WeakValueDictionary()
    _keys: ClassVar[Iterator[int]] = itertools.count(1)

    def __init__(self) -> None:
        self.mean: float | None = None
        self.largest: int | None = None
        self.plan = 0  # what a graph does next: entries to reserve per row, 0 for the dense path; changes seldom
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

    def update(self, l0: Tensor) -> None:
        """Takes how many entries each token of a pass had, `[N]`; nothing while a CUDA graph is captured."""
        if l0.numel() == 0 or self._pending is not None:
            return
        if not l0.is_cuda:
            summary = self._mean_and_largest(l0)
            self.mean, self.largest = float(summary[0]), int(summary[1])
            return
        with torch.cuda.device(l0.device):  # an event is recorded on the stream of the current device
            if torch.cuda.is_current_stream_capturing():
                return
            host = torch.empty(2, dtype=torch.float64, pin_memory=True)
            host.copy_(self._mean_and_largest(l0), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = (host, event, l0.device)

    def poll(self) -> None:
        """Reads the pending counts if they have arrived; a query would end the capture of a CUDA graph."""
        if self._pending is None:
            return
        host, event, device = self._pending
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing() or not event.query():
                return
        self.mean, self.largest, self._pending = float(host[0]), int(host[1]), None

    def plan_next(self, counts: Tensor, d_sae: int) -> None:
        """`update` of a compiled graph, which is compiled again where the plan changes."""
        self.update(counts)
        if self.mean is not None:
            self.plan = 0 if self.is_dense(d_sae, counts.device.type) else max(self.plan, self.capacity(d_sae))

    def is_dense(self, d_sae: int, device_type: str) -> bool:
        """Whether the dense path is the faster one; True while nothing is known."""
        self.poll()
        return self.mean is None or self.mean > MAX_DENSITY.get(device_type, MAX_DENSITY["cuda"]) * d_sae

    def capacity(self, d_sae: int) -> int:
        """Entries to reserve per row: a power of two above the largest count seen, outliers left out."""
        self.poll()
        wanted = self.UNKNOWN if self.largest is None else max(32, int(self.largest * self.HEADROOM))
        return min(1 << (wanted - 1).bit_length(), d_sae)

    def mean_capacity(self, d_sae: int) -> int:
        """Entries to reserve for all rows together, per row: so one token with many raises nothing for the others."""
        capacity = self.capacity(d_sae)
        if self.mean is None:
            return capacity
        return min(32 * (int(self.MEAN_HEADROOM * self.mean) // 32 + 1), capacity)

    def _mean_and_largest(self, counts: Tensor) -> Tensor:
        largest = counts.topk(counts.numel() // self.OUTLIERS + 1).values[-1]
        return torch.stack([counts.double().mean(), largest.double()])
