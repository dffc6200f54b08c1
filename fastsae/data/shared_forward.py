"""One forward pass of the model for the streams of several layers, each of which goes on as if it were alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastsae.data.dropped import Dropped
from fastsae.data.sequencing import Sequencer, TokenBatch


@dataclass(frozen=True)
class _Computed:
    """A batch, the activations [B, T, d_in] of each layer, and the state of the sequencer behind it."""

    batch: TokenBatch
    acts: Sequence[Tensor]
    state: dict[str, Any]


class SharedForward:
    """Run the model once over each batch of tokens, for several layers.

    A layer gets ahead of another one where more of its tokens are sinks, which no buffer holds. What the others have still to
    take waits here: a few batches at most.

    Args:
        read: Maps a batch to the activations [B, T, d_in] of each layer.
        sequencer: Yields the batches.
        n_layers: How many layers there are.

    Attributes:
        layers: For each layer what an `ActivationStream` reads: batches, and their activations.
    """

    def __init__(self, read: Callable[[TokenBatch], Sequence[Tensor]], sequencer: Sequencer, n_layers: int) -> None:
        self.sequencer, self._read = sequencer, read
        self._computed: deque[_Computed] = deque()
        self._n_forgotten = 0
        self.layers = [LayerOfMany(self, index) for index in range(n_layers)]

    def batch(self, number: int) -> _Computed:
        """The batch of that number, counted from 0; forgets first what every layer has taken, as it takes memory."""
        while self._n_forgotten < min(layer.n_taken for layer in self.layers):
            self._computed.popleft()
            self._n_forgotten += 1
        while number >= self._n_forgotten + len(self._computed):
            batch = next(self.sequencer)
            self._computed.append(_Computed(batch, self._read(batch), self.sequencer.state_dict()))
        return self._computed[number - self._n_forgotten]

    def rewind(self) -> None:
        """Goes back to the layer that is behind all others, after their states were loaded."""
        behind = min(self.layers, key=lambda layer: layer.n_taken)
        self._computed.clear()
        self._n_forgotten = behind.n_taken
        self.sequencer.load_state_dict(behind.state_dict()["at"])


class LayerOfMany(Iterator[TokenBatch]):
    """What one layer takes of a `SharedForward`: batches in order, and by `residual` the activations of the last one.

    Args:
        shared: The forward passes.
        index: Which of the layers this is.
    """

    def __init__(self, shared: SharedForward, index: int) -> None:
        self._shared, self._index = shared, index
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
        acts, self._now = self._now.acts[self._index], None
        return acts

    @property
    def drops(self) -> Dropped:
        return self._shared.sequencer.drops

    def state_dict(self) -> dict[str, Any]:
        """Where this layer is, whatever the others have taken."""
        return {"at": self._state, "taken": self.n_taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, once all layers have theirs and the forward was rewound."""
        self._state, self.n_taken = state["at"], state["taken"]
