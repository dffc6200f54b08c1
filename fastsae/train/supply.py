"""What the SAEs of a run learn from: for each layer a stream of activations, a buffer that mixes it, and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastsae.data.activations import ResidualStream, read_layers
from fastsae.data.buffer import ActivationBatch, MixingBuffer
from fastsae.data.sequencing import TokenBatch
from fastsae.data.shared_forward import SharedForward
from fastsae.data.stream import ActivationStream, StreamCounts
from fastsae.distributed import Group, Groups
from fastsae.train.caching import open_cache
from fastsae.train.initialize import SAMPLE
from fastsae.train.pipeline import Pipeline


class Supply:
    """Runs the model once for all layers, and serves each layer's activations in batches.

    Each of several processes has its own dialogues and buffers, and serves its part of every batch.

    Args:
        pipeline: Model and data.
        layers: The decoder blocks.
        groups: The processes of the run.
        batch_group: The processes whose parts make up the batches that this one trains on: all of the run, or those that share
            the features of an SAE.
        waiting: A context that is entered while a layer waits for a batch of the model.
        progress: Show progress bars.

    Attributes:
        residuals: The place in the model, by layer.
        forward: The forward passes that all layers share.
        streams: The streams of activations, by layer.
        buffers: The buffers that mix them, by layer.
        batches: The last batch of each layer, `[b, d_in]`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        layers: list[int],
        groups: Groups,
        batch_group: Group,
        waiting: Callable[[], AbstractContextManager[None]],
        progress: bool = False,
    ) -> None:
        self.pipeline, self._config, self._progress = pipeline, pipeline.config, progress
        self._groups, self._batch_group = groups, batch_group
        model, own = pipeline.residual.model, pipeline.residual
        self.residuals = {
            layer: own if layer == own.layer else ResidualStream(model, layer, self._config.hook) for layer in layers
        }
        self._cache = open_cache(pipeline, layers)
        self.forward = SharedForward(self._read, pipeline.sequencer(), layers, waiting)
        drops_first, max_norm = self._config.drop_first_position, self._config.max_norm_multiple
        self.streams = {
            layer: ActivationStream(source.residual, source, drops_first, max_norm)
            for layer, source in self.forward.layers.items()
        }
        # how many rows of a batch each process of the run serves, and each process of the group
        self._rows = groups.rows_of_batch(self._config.batch_size)
        is_whole = batch_group.size == groups.world.size
        self._rows_of_group = self._rows if is_whole else groups.rows_of_group(self._config.batch_size)
        self.buffers = {layer: self._buffer(stream) for layer, stream in self.streams.items()}
        self.batches: dict[int, Tensor] = {}
        self._states = {layer: stream.state_dict() for layer, stream in self.streams.items()}

    def _buffer(self, stream: ActivationStream) -> MixingBuffer:
        config, world, device = self._config, self._groups.world, self.pipeline.residual.device
        n_rows = self._rows[world.rank]
        n_held = max(2 * n_rows, -(-config.buffer_tokens // world.size))
        seed = (config.order_seed + world.rank) % 2**63  # each process shuffles its own rows
        return MixingBuffer(stream, n_held, n_rows, seed, device, self._progress, config.steps * n_rows)

    def _read(self, batch: TokenBatch) -> dict[int, Tensor]:
        """The activations of each layer; another thread may call this while training runs."""
        if self._cache is not None:
            return dict(zip(self._cache.layers, self._cache.read(batch), strict=True))
        positions = (batch.positions,) if batch.is_packed else ()
        acts = read_layers(list(self.residuals.values()), batch.input_ids, batch.attention_mask, *positions)
        return dict(zip(self.residuals, acts, strict=True))

    def run_ahead(self) -> None:
        """Lets the model compute while the SAEs are trained."""
        device = self.pipeline.residual.device
        if n_ahead := self._config.batches_ahead(device.type, self._groups.world.size):
            self.forward.start(n_ahead, {layer: buffer.n_missing for layer, buffer in self.buffers.items()}, device)

    def serve(self) -> None:
        """Takes the next batch of each layer, or none of any."""
        for layer, buffer in self.buffers.items():
            buffer.prepare()
            self._states[layer] = self.streams[layer].state_dict()
        own = {layer: next(buffer).acts for layer, buffer in self.buffers.items()}
        self.batches = {
            layer: self._batch_group.gather_rows(acts, self._rows_of_group, "rows") for layer, acts in own.items()
        }

    def of(self, layer: int) -> Iterator[Tensor]:
        """The batch of a layer that was served last, again and again."""
        while True:
            yield self.batches[layer]

    @property
    def _n_sampled(self) -> int:
        return -(-SAMPLE // self._groups.world.size)

    def sample(self, layer: int) -> Tensor:
        """Activations `[n, d_in]` that are still to be served, the same in all processes; fills an empty buffer."""
        return self._groups.world.gather_rows(self.buffers[layer].sample(self._n_sampled), None, "start")

    def unseen(self, layer: int) -> Tensor:
        """Activations `[n, d_in]` of the stream that no step has seen, the same in all processes; after the last step."""
        pieces = [next(self.streams[layer])]
        while sum(map(len, pieces)) < self._n_sampled:
            pieces.append(next(self.streams[layer]))
        own = ActivationBatch.joined(pieces).acts[: self._n_sampled]
        return self._groups.world.gather_rows(own, None, "start")

    def counts(self, layer: int) -> StreamCounts:
        """What all processes have computed and left out until the last batch that was served."""
        own = self._states[layer]["counts"]
        numbers = torch.tensor(list(own.values()), device=self.pipeline.residual.device)
        return StreamCounts(**dict(zip(own, self._groups.world.sum_(numbers, "counts").tolist(), strict=True)))

    def drop(self, layers: Sequence[int]) -> None:
        """Computes nothing for these layers any more."""
        ran_ahead = self.forward.stop()
        for layer in layers:
            del self.residuals[layer], self.streams[layer], self.buffers[layer], self._states[layer]
            self.forward.drop(layer)
        if self._cache is not None:
            self._cache.layers = list(self.residuals)
        if ran_ahead:
            self.run_ahead()

    def state_dict(self) -> dict[str, Any]:
        """Where streams and buffers of this process are, by layer."""
        return {
            "streams": {str(layer): state for layer, state in self._states.items()},
            "buffers": {str(layer): buffer.state_dict() for layer, buffer in self.buffers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        for layer, stream in self.streams.items():
            stream.load_state_dict(state["streams"][str(layer)])
            self._states[layer] = stream.state_dict()
        self.forward.rewind()  # finds out whether there are such batches, before anything else is changed
        for layer, buffer in self.buffers.items():
            buffer.load_state_dict(state["buffers"][str(layer)])
