"""One forward pass of the model for the streams of several layers, each of which goes on as if it were alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsae.data.dropped import Dropped
from fastsae.data.prefetch import Prefetch
from fastsae.data.sequencing import Sequencer, TokenBatch


@dataclass(frozen=True)
class _Computed:
    """A batch, the activations [B, T, d_in] of each layer, and the sequencer's state and drops behind it.

    Attributes:
        seconds: What it took, tokenising included.
    """

    batch: TokenBatch
    acts: Mapping[int, Tensor]
    state: dict[str, Any]
    drops: Dropped
    n_tokens: int
    seconds: float


@dataclass
class ForwardTimes:
    """What was computed, and how long that took.

    Attributes:
        tokens: Tokens that are no padding.
        seconds: Time of tokenising them and of the model, wherever it ran.
        waited: Time in which the SAEs had to wait for it.
    """

    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0


class SharedForward:
    """Run the model once over each batch of tokens, for several layers.

    A layer gets ahead of another one where more of its tokens are sinks, which no buffer holds. What the others have still to
    take waits here: a few batches at most.

    Args:
        read: Maps a batch to the activations [B, T, d_in] of each layer.
        sequencer: Yields the batches.
        layers: The numbers of the layers.
        waiting: Is entered while a layer waits for a batch; an exception may leave it.

    Attributes:
        layers: For each layer what an `ActivationStream` reads: batches, and their activations.
        drops: The dialogues that could not be used, up to the last batch that a layer has taken.
        times: Since this was made.
    """

    def __init__(
        self,
        read: Callable[[TokenBatch], Mapping[int, Tensor]],
        sequencer: Sequencer,
        layers: Sequence[int],
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.sequencer, self._read, self._waiting = sequencer, read, waiting
        self.times, self.drops = ForwardTimes(), sequencer.drops
        self._computed: deque[_Computed] = deque()
        self._n_forgotten = 0
        self._ahead: Prefetch[_Computed] | None = None
        self.layers = {layer: LayerOfMany(self, layer) for layer in layers}

    def batch(self, number: int) -> _Computed:
        """The batch of that number, counted from 0; forgets first what every layer has taken, as it takes memory."""
        while self._n_forgotten < min(layer.n_taken for layer in self.layers.values()):
            self._computed.popleft()
            self._n_forgotten += 1
        while number >= self._n_forgotten + len(self._computed):
            started = time.perf_counter()
            with self._waiting():
                computed = self._next()
            self.times.waited += time.perf_counter() - started
            self.times.tokens += computed.n_tokens
            self.times.seconds += computed.seconds
            self.drops = computed.drops
            self._computed.append(computed)
        return self._computed[number - self._n_forgotten]

    def _next(self) -> _Computed:
        if self._ahead is not None:
            for computed in self._ahead:
                return computed
            self._ahead = None
        return self._compute()

    def _compute(self) -> _Computed:
        started = time.perf_counter()
        batch = next(self.sequencer)
        acts = self._read(batch)
        n_tokens, seconds = int(batch.attention_mask.sum()), time.perf_counter() - started
        return _Computed(batch, acts, self.sequencer.state_dict(), self.sequencer.drops, n_tokens, seconds)

    def start(self, n_ahead: int, n_wanted: Mapping[int, int], device: torch.device) -> None:
        """Runs ahead of the layers from here on, in a thread, as far as is certain to be needed.

        Args:
            n_ahead: Batches that are computed at most while no layer has taken them.
            n_wanted: Tokens that each layer will still take. Where some turn out to be sinks it takes more, and waits for
                those.
            device: Where the model is.
        """
        self._computed.extend(self._ahead or ())
        n_tokens = max(n_wanted[layer] - self._n_waiting(taker) for layer, taker in self.layers.items())
        self._ahead = Prefetch(self._as_far_as(n_tokens), n_ahead, device, lambda computed: [*computed.acts.values()])

    def _n_waiting(self, layer: LayerOfMany) -> int:
        """How many tokens a layer has still to take of what is computed."""
        return sum(computed.n_tokens for computed in list(self._computed)[layer.n_taken - self._n_forgotten :])

    def _as_far_as(self, n_tokens: int) -> Iterator[_Computed]:
        while n_tokens > 0:
            try:
                computed = self._compute()
            except StopIteration:  # the caller finds that out by itself
                return
            n_tokens -= computed.n_tokens
            yield computed
            del computed

    def stop(self) -> bool:
        """Runs ahead no more; returns whether it did. What is computed by then is taken before anything else."""
        if self._ahead is None or self._ahead.is_closed:
            return False
        self._ahead.close()
        return True

    def drop(self, layer: int) -> None:
        """Serves a layer no more; nothing may run ahead meanwhile."""
        del self.layers[layer]

    def rewind(self) -> None:
        """Goes back to the layer that is behind all others, after their states were loaded."""
        behind = min(self.layers.values(), key=lambda layer: layer.n_taken)
        self._computed.clear()
        self._n_forgotten = behind.n_taken
        self.sequencer.load_state_dict(behind.state_dict()["at"])
        self.drops = self.sequencer.drops


class LayerOfMany(Iterator[TokenBatch]):
    """What one layer takes of a `SharedForward`: batches in order, and by `residual` the activations of the last one.

    Args:
        shared: The forward passes.
        layer: Its number.
    """

    def __init__(self, shared: SharedForward, layer: int) -> None:
        self._shared, self._layer = shared, layer
        self.n_taken = 0
        self._now: _Computed | None = None
        self._state = shared.sequencer.state_dict()

    def __next__(self) -> TokenBatch:
        self._now = self._shared.batch(self.n_taken)
        self.n_taken += 1
        self._state = self._now.state
        return self._now.batch

    def residual(self, *_: Tensor) -> Tensor:
        """The activations [B, T, d_in] of the last batch, once: nothing holds them longer than the caller."""
        assert self._now is not None
        acts, self._now = self._now.acts[self._layer], None
        return acts

    def state_dict(self) -> dict[str, Any]:
        """Where this layer is, whatever the others have taken."""
        return {"at": self._state, "taken": self.n_taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, once all layers have theirs and the forward was rewound."""
        self._state, self.n_taken = state["at"], state["taken"]
