"""The SAEs of a run and the stream of activations that they learn from: trained in step, saved and restored together."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae.data.activations import ResidualStream, read_layers
from fastsae.data.buffer import ActivationBatch, MixingBuffer
from fastsae.data.progress import bar
from fastsae.data.sequencing import TokenBatch
from fastsae.data.shared_forward import SharedForward
from fastsae.data.stream import ActivationStream, StreamCounts
from fastsae.errors import FastsaeError, UsageError
from fastsae.fields import Fields, is_finite
from fastsae.interrupt import Interrupted, Postponed
from fastsae.sae import FusedBatchTopKSAE, SparseAutoencoder
from fastsae.train import checkpoint
from fastsae.train.caching import open_cache
from fastsae.train.config import TrainConfig
from fastsae.train.curves import Row
from fastsae.train.folder import kept_options
from fastsae.train.init_from import Source
from fastsae.train.initialize import SAMPLE
from fastsae.train.pipeline import Pipeline
from fastsae.train.saved_state import check_buffer, check_options, check_stream, check_trainer
from fastsae.train.trainer import Trainer, build_sae

logger = logging.getLogger(__name__)


class Session:
    """SAEs that are trained together, each as if it were alone.

    One forward pass of the model serves all layers, one buffer all SAEs of a layer. An SAE that fails is dropped, unless it
    is the last one. A signal that comes while a buffer fills up ends that at once, and what is saved then is the state before.

    Args:
        pipeline: Model and data.
        configs: The SAEs' options by name, resolved; they agree in all that the stream decides.
        progress: Show progress bars.
        agree: With several processes, agrees on the signal that one of them has got; see `Postponed`.

    Attributes:
        trainers: Of the SAEs that have not failed.
        origins: The files of the SAEs that training went on from, by name; see `fastsae.train.init_from`.
        failures: What went wrong with the others.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        configs: Mapping[str, TrainConfig],
        progress: bool = False,
        agree: Callable[[int], int] | None = None,
    ) -> None:
        self.pipeline, self.configs, self._progress = pipeline, dict(configs), progress
        self.common = next(iter(self.configs.values()))
        self.postponed = Postponed(agree)
        self.failures: dict[str, str] = {}
        self.origins: dict[str, list[dict[str, str]]] = {}
        model, own = pipeline.residual.model, pipeline.residual
        layers = sorted({_layer(config) for config in configs.values()})
        self.residuals = {
            layer: own if layer == own.layer else ResidualStream(model, layer, self.common.hook) for layer in layers
        }
        self._cache = open_cache(pipeline, layers)
        self.forward = SharedForward(self._read, pipeline.sequencer(), layers, self.postponed.at_once)
        self.streams = {
            layer: ActivationStream(
                source.residual, source, self.common.drop_first_position, self.common.max_norm_multiple
            )
            for layer, source in self.forward.layers.items()
        }
        self.buffers = {layer: self._buffer(stream) for layer, stream in self.streams.items()}
        self.trainers = {name: self._trainer(config) for name, config in configs.items()}
        self._stream_states = {layer: stream.state_dict() for layer, stream in self.streams.items()}
        self._batches: dict[int, ActivationBatch] = {}
        self._started = (0, 0.0, 0.0)  # tokens trained on, the time and how long was waited when training began

    @property
    def step(self) -> int:
        """Steps that were made."""
        return next(iter(self.trainers.values())).step

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether this step ends with a checkpoint."""
        return next(iter(self.trainers.values())).checkpoint_is_due

    def sae_now(self, name: str) -> SparseAutoencoder:
        """A copy of an SAE in training, on activations as the model gives them, a BatchTopK one calibrated by the last batch."""
        trainer = self.trainers[name]
        sae = copy.deepcopy(trainer.sae)
        if isinstance(sae, FusedBatchTopKSAE):
            acts = self._batches[_layer(trainer.config)].acts
            sae.calibrate_threshold_(acts.to(sae.device, sae.dtype) * trainer.scale)
        sae.fold_activation_scale_(trainer.scale)
        return sae

    def _buffer(self, stream: ActivationStream) -> MixingBuffer:
        config = self.common
        n_wanted = config.steps * config.batch_size
        device = self.pipeline.residual.device
        return MixingBuffer(
            stream, config.buffer_tokens, config.batch_size, config.order_seed, device, self._progress, n_wanted
        )

    def _trainer(self, config: TrainConfig) -> Trainer:
        sae = build_sae(config, self.pipeline.residual.d_in, self.pipeline.residual.device)
        return Trainer(sae, self._batches_of(_layer(config)), config)

    def _read(self, batch: TokenBatch) -> dict[int, Tensor]:
        """The activations of each layer; another thread may call this while training runs."""
        if self._cache is not None:
            return dict(zip(self._cache.layers, self._cache.read(batch), strict=True))
        positions = (batch.positions,) if batch.is_packed else ()
        acts = read_layers(list(self.residuals.values()), batch.input_ids, batch.attention_mask, *positions)
        return dict(zip(self.residuals, acts, strict=True))

    def _run_ahead(self) -> None:
        """Lets the model compute while the SAEs are trained."""
        device = self.pipeline.residual.device
        if n_ahead := self.common.batches_ahead(device.type):
            self.forward.start(n_ahead, {layer: buffer.n_missing for layer, buffer in self.buffers.items()}, device)

    def _batches_of(self, layer: int) -> Iterator[ActivationBatch]:
        while True:
            yield self._batches[layer]

    def _serve(self) -> None:
        """Takes the next batch of each layer, or none of any."""
        for layer, buffer in self.buffers.items():
            buffer.prepare()
            self._stream_states[layer] = self.streams[layer].state_dict()
        self._batches = {layer: next(buffer) for layer, buffer in self.buffers.items()}

    def initialize(self, sources: Mapping[str, Source] | None = None) -> None:
        """Fills the buffers, and gives each SAE its start from what they hold, or from the source of its name.

        Raises:
            UsageError: A source is of another width.
        """
        sources = sources or {}
        d_in = self.pipeline.residual.d_in
        for name, source in sources.items():
            self.origins[name] = source.files
            if source.sae.d_in != d_in:
                raise UsageError(
                    f"init_from: expected an SAE of the model's width {d_in}, got {source.sae.d_in} of "
                    f"{self.configs[name].init_from}"
                )
        n_first = min(self.common.buffer_tokens, self.common.steps * self.common.batch_size)
        logger.info("filling the buffer with the activations of %d tokens", n_first)
        for name, trainer in self.trainers.items():
            start = sources[name].sae if name in sources else None
            trainer.initialize(self.buffers[_layer(trainer.config)].sample(SAMPLE), start)

    def train(self, save: Callable[[], None], on_rows: Callable[[dict[str, Row]], object]) -> None:
        """Trains to the last step; nothing else may use the model meanwhile.

        Args:
            save: Is called where a checkpoint is due, and before a signal ends the run.
            on_rows: Gets new points of the SAEs' curves, by name.

        Raises:
            Interrupted: By a signal.
            FastsaeError: A number of the only SAE that is left is not finite.
        """
        with self.postponed:
            try:
                self._run_ahead()
                self._train(save, on_rows)
                self.postponed.check()
            except Interrupted:
                self.forward.stop()
                if self.common.checkpoint_every:
                    save()
                raise
            finally:
                self.forward.stop()
        self.drop_what_is_not_finite()

    def _train(self, save: Callable[[], None], on_rows: Callable[[dict[str, Row]], object]) -> None:
        steps, size = self.common.steps, self.common.batch_size
        for trainer in self.trainers.values():
            trainer.start_clock()
        done, total = self.step * size, steps * size
        self._started = done, time.perf_counter(), self.forward.times.waited
        with bar(
            "training", "tok", total=total, progress=self._progress, done=done, delay=0
        ) as advance:  # rarely called
            while self.step < steps:
                self._serve()
                rows = {name: row for name in list(self.trainers) if (row := self._advance(name)) is not None}
                if rows:
                    for row in rows.values():
                        row |= self.speeds()
                    on_rows(rows)
                    n_new, done = self.step * size - done, self.step * size
                    advance(n_new, **_beside(list(rows.values())))
                if self.checkpoint_is_due:
                    save()
                self.postponed.check()  # between two steps

    def speeds(self) -> dict[str, float | None]:
        """Tokens per second of the language model, and of all SAEs together in the time in which none waits for it.

        Without a thread that runs ahead the two take turns. With one, the run is as fast as the slower of them.
        """
        times, (done, began, waited_before) = self.forward.times, self._started
        seconds = time.perf_counter() - began - (times.waited - waited_before)
        trained = self.step * self.common.batch_size - done
        return {
            "model_tokens_per_second": times.tokens / times.seconds if times.seconds else None,
            "sae_tokens_per_second": trained / seconds if trained and seconds > 0 else None,
        }

    def _advance(self, name: str) -> Row | None:
        """One step of one SAE; drops it if it fails."""
        trainer = self.trainers[name]
        try:
            return trainer.advance()
        except FastsaeError as error:
            self.drop(name, error)
        except ValueError:  # the ops refuse some of what a step with NaN left
            bad = _not_finite(trainer)
            if bad is None:
                raise
            self.drop(name, bad)
        return None

    def drop(self, name: str, error: FastsaeError) -> None:
        """Goes on without an SAE.

        Raises:
            FastsaeError: It is the only one that is left.
        """
        if len(self.trainers) == 1:
            raise error
        del self.trainers[name]
        self._drop_unused_layers()
        self.failures[name] = str(error)
        logger.warning("%s is dropped, the others go on: %s", name, error)

    def _drop_unused_layers(self) -> None:
        """Computes nothing for a layer all of whose SAEs have failed."""
        unused = self.buffers.keys() - {_layer(trainer.config) for trainer in self.trainers.values()}
        if not unused:
            return
        ran_ahead = self.forward.stop()
        for layer in unused:
            del self.residuals[layer], self.streams[layer], self.buffers[layer], self._stream_states[layer]
            self.forward.drop(layer)
        if self._cache is not None:
            self._cache.layers = list(self.residuals)
        if ran_ahead:
            self._run_ahead()

    def drop_what_is_not_finite(self) -> None:
        """No file shall hold NaN or infinity.

        Raises:
            FastsaeError: The only SAE that is left does.
        """
        for name, trainer in list(self.trainers.items()):
            if (bad := _not_finite(trainer)) is not None:
                self.drop(name, bad)

    def calibrate(self) -> None:
        """Sets the thresholds of BatchTopK SAEs after the last step, by activations that no step has seen."""
        learners = [trainer for trainer in self.trainers.values() if trainer.config.architecture == "batchtopk"]
        for layer in dict.fromkeys(_layer(trainer.config) for trainer in learners):
            stream = self.streams[layer]
            pieces = [next(stream)]
            while sum(map(len, pieces)) < SAMPLE:
                pieces.append(next(stream))
            sample = ActivationBatch.joined(pieces).acts[:SAMPLE]
            for trainer in learners:
                if _layer(trainer.config) == layer:
                    trainer.calibrate(sample)

    def view(self, name: str) -> Pipeline:
        """The pipeline as one SAE sees it: its options, its layer."""
        config = self.configs[name]
        return replace(self.pipeline, config=config, residual=self.residuals[_layer(config)])

    def counts(self, name: str) -> StreamCounts:
        """What was computed and left out until the last batch that an SAE was trained on."""
        return StreamCounts(**self._stream_states[_layer(self.configs[name])]["counts"])

    def save(self, output: Path, seconds: float) -> None:
        """Writes a checkpoint of the whole session."""
        if len(self.trainers) > 1:
            self.drop_what_is_not_finite()
        numbers = {
            name: str(i) for i, name in enumerate(self.configs)
        }  # a name may have dots, which part names of tensors
        state = {
            "options": {numbers[name]: kept_options(config) for name, config in self.configs.items()},
            "streams": {str(layer): state for layer, state in self._stream_states.items()},
            "buffers": {str(layer): buffer.state_dict() for layer, buffer in self.buffers.items()},
            "trainers": {numbers[name]: trainer.state_dict() for name, trainer in self.trainers.items()},
            "failures": {numbers[name]: text for name, text in self.failures.items()},
            "seconds": seconds,
        }
        checkpoint.save(output, self.step, state)

    def restore(self, saved: dict[str, Any], output: Path) -> float:
        """Goes on where `saved` was taken; returns the seconds that the run had taken until then.

        Raises:
            UsageError: It was made with other options.
            FastsaeError: It is corrupt.
        """
        try:
            found = Fields(saved)
            self._check(found)
            for i, name in enumerate(self.configs):
                if str(i) in saved["failures"]:
                    self.failures[name] = saved["failures"][str(i)]
                    del self.trainers[name]
            self._drop_unused_layers()
            for layer, stream in self.streams.items():
                stream.load_state_dict(saved["streams"][str(layer)])
                self._stream_states[layer] = stream.state_dict()
            self.forward.rewind()  # finds out whether there are such batches, before anything else is changed
            for layer, buffer in self.buffers.items():
                buffer.load_state_dict(saved["buffers"][str(layer)])
            for i, name in enumerate(self.configs):
                if name in self.trainers:
                    self.trainers[name].load_state_dict(saved["trainers"][str(i)])
            return float(saved["seconds"])
        except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise checkpoint.corrupt(output / checkpoint.FOLDER, error) from None

    def _check(self, found: Fields) -> None:
        """Raises ValueError unless `found` is a state of this session."""
        found.check_names(("options", "streams", "buffers", "trainers", "failures", "seconds"))
        found.number("seconds", 0)
        parts = {name: found.fields(name) for name in ("options", "streams", "buffers", "trainers", "failures")}
        numbers = [str(i) for i in range(len(self.configs))]
        parts["options"].check_names(numbers)
        parts["failures"].check_names([i for i in numbers if i in parts["failures"]])
        for i, text in parts["failures"].values.items():
            if not isinstance(text, str):
                raise parts["failures"].wrong(i, "a text")
        parts["trainers"].check_names([i for i in numbers if i not in parts["failures"]])
        for i, (name, config) in zip(numbers, self.configs.items(), strict=True):
            check_options(parts["options"].fields(i), kept_options(config))
            if i not in parts["failures"]:
                check_trainer(parts["trainers"].fields(i), self.trainers[name])
        configs = zip(numbers, self.configs.values(), strict=True)
        layers = {_layer(config) for i, config in configs if i not in parts["failures"]}
        if not layers:
            raise found.wrong("failures", "one SAE at least that has not failed")
        for what in ("streams", "buffers"):
            parts[what].check_names([str(layer) for layer in sorted(layers)])
        for layer in layers:
            n_rows = len(self.pipeline.trained_on)
            check_buffer(parts["buffers"].fields(str(layer)), self.buffers[layer], self.pipeline.residual.d_in, n_rows)
            check_stream(parts["streams"].fields(str(layer)), self.streams[layer])


def _layer(config: TrainConfig) -> int:
    assert config.layer is not None  # the pipeline has resolved it
    return config.layer


def _not_finite(trainer: Trainer) -> FastsaeError | None:
    """The error for a weight that is NaN or infinite."""
    for name, tensor in trainer.sae.state_dict().items():
        if not is_finite(tensor):
            return checkpoint.not_finite(trainer.step, f"{name} holds NaN or infinity")
    return None


def _beside(rows: Sequence[Row]) -> dict[str, str]:
    """What a progress bar shows of the newest rows of the curves: of one SAE, or the range of all."""
    shown = {"model": rows[0]["model_tokens_per_second"], "sae": rows[0]["sae_tokens_per_second"]}
    speeds = {what: f"{speed:,.0f}tok/s" for what, speed in shown.items() if speed}
    fvus = sorted(row["fvu"] for row in rows if row["fvu"] is not None)
    if len(rows) > 1:
        fvu = f"{fvus[0]:.3f} to {fvus[-1]:.3f}" if fvus else "undefined"
        return {"saes": str(len(rows)), "fvu": fvu, **speeds}
    fvu = f"{fvus[0]:.3f}" if fvus else "undefined"
    return {"loss": f"{rows[0]['loss']:.4g}", "l0": f"{rows[0]['l0']:.1f}", "fvu": fvu, **speeds}
