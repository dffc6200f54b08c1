"""The SAEs of a run and the stream of activations that they learn from: trained in step, saved and restored together."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastsae.data.progress import bar
from fastsae.distributed import Group, Groups
from fastsae.distributed.launch import Processes
from fastsae.errors import FastsaeError, UsageError
from fastsae.fields import Fields, is_finite
from fastsae.interrupt import Interrupted, Postponed
from fastsae.sae import FusedBatchTopKSAE, SparseAutoencoder
from fastsae.train import checkpoint, joint_checkpoint
from fastsae.train.config import TrainConfig
from fastsae.train.curves import Row
from fastsae.train.folder import kept_options
from fastsae.train.init_from import Source
from fastsae.train.joint_checkpoint import Saved, reading
from fastsae.train.pipeline import Pipeline
from fastsae.train.placement import placed
from fastsae.train.saved_state import check_buffer, check_options, check_stream, check_trainer
from fastsae.train.supply import Supply
from fastsae.train.trainer import Trainer, build_sae

logger = logging.getLogger(__name__)


class Session:
    """SAEs that are trained together, each as if it were alone.

    One forward pass of the model serves all layers, one buffer all SAEs of a layer. An SAE that fails is dropped, unless it is
    the last one; where SAEs are placed, a process without any still reads for the others. A signal that comes while a buffer
    fills up ends that at once, and what is saved then is the state before.

    Args:
        pipeline: Model and data.
        configs: The SAEs' options by name, resolved; they agree in all that the stream decides.
        progress: Show progress bars.
        processes: The processes of the run. Each has its own dialogues, its own buffer, and its part of each batch.

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
        processes: Processes | None = None,
    ) -> None:
        self.pipeline, self.configs, self._progress = pipeline, dict(configs), progress
        self.groups = Groups.alone() if processes is None else processes.groups
        self.common = next(iter(self.configs.values()))
        self.postponed = Postponed(None if self.groups.world.size == 1 or processes is None else processes.agree)
        self.failures: dict[str, str] = {}
        self.origins: dict[str, list[dict[str, str]]] = {}
        layers = sorted({_layer(config) for config in configs.values()})
        self._owners = self._place()
        batch_group = self.groups.world if self.is_placed else self.groups.features
        self.supply = Supply(pipeline, layers, self.groups, batch_group, self.postponed.at_once, progress)
        self.trainers = {name: self._trainer(config) for name, config in configs.items() if self._trains(name)}
        self.step = 0
        self._started = (0, 0.0, 0.0)  # tokens trained on, the time and how long was waited when training began

    def _place(self) -> dict[str, int] | None:
        """The group of processes that trains each SAE; None where the SAEs are too few, so that all groups train each of them."""
        n_groups, d_in = self.groups.data.size, self.pipeline.residual.d_in
        if n_groups == 1 or len(self.configs) < n_groups:
            return None
        return placed({name: config.n_features(d_in) for name, config in self.configs.items()}, n_groups)

    def _trains(self, name: str) -> bool:
        """Whether this process trains an SAE."""
        return self._owners is None or self._owners[name] == self.groups.data.rank

    @property
    def is_placed(self) -> bool:
        """Whether each SAE is trained by one group of processes, and not by all of them."""
        return self._owners is not None

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of the SAEs that it trains."""
        return self.groups.features.rank == 0 and (self.is_placed or self.groups.data.rank == 0)

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether this step ends with a checkpoint."""
        every = self.common.checkpoint_every
        return every > 0 and (self.step % every == 0 or self.step == self.common.steps)

    def sae_now(self, name: str) -> SparseAutoencoder:
        """A copy of an SAE in training, on activations as the model gives them, a BatchTopK one calibrated by the last batch."""
        trainer = self.trainers[name]
        sae = copy.deepcopy(trainer.sae)
        if isinstance(sae, FusedBatchTopKSAE):
            acts = self.supply.batches[_layer(trainer.config)]
            sae.calibrate_threshold_(acts.to(sae.device, sae.dtype) * trainer.scale)
        sae.fold_activation_scale_(trainer.scale)
        return sae

    def _trainer(self, config: TrainConfig) -> Trainer:
        # processes that train different SAEs have no tokens to average over
        groups = self.groups
        if self.is_placed:
            groups = groups._replace(data=Group(), world=groups.features)
        sae = build_sae(config, self.pipeline.residual.d_in, self.pipeline.residual.device, groups)
        return Trainer(sae, self.supply.of(_layer(config)), config, groups)

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
        for layer in self.supply.buffers:
            sample = self.supply.sample(layer)
            for name, trainer in self.trainers.items():
                if _layer(trainer.config) == layer:
                    trainer.initialize(sample, sources[name].sae if name in sources else None)

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
                self.supply.run_ahead()
                self._train(save, on_rows)
                self.postponed.check()
            except Interrupted:
                self.supply.forward.stop()
                if self.common.checkpoint_every:
                    save()
                raise
            finally:
                self.supply.forward.stop()
        self.drop_what_is_not_finite()
        self._check_that_some_are_left()

    def _train(self, save: Callable[[], None], on_rows: Callable[[dict[str, Row]], object]) -> None:
        steps, size = self.common.steps, self.common.batch_size
        for trainer in self.trainers.values():
            trainer.start_clock()
        done, total = self.step * size, steps * size
        self._started = done, time.perf_counter(), self.supply.forward.times.waited
        with bar(
            "training", "tok", total=total, progress=self._progress, done=done, delay=0
        ) as advance:  # rarely called
            while self.step < steps:
                self.supply.serve()
                self.step += 1
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
        times, (done, began, waited_before) = self.supply.forward.times, self._started
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
        if len(self.trainers) == 1 and not self.is_placed:
            raise error
        del self.trainers[name]
        self._drop_unused_layers()
        self.failures[name] = str(error)
        logger.warning("%s is dropped, the others go on: %s", name, error)

    def _drop_unused_layers(self) -> None:
        """Computes nothing for a layer all of whose SAEs have failed."""
        if self.is_placed:
            return  # other processes may train on them
        unused = self.supply.buffers.keys() - {_layer(trainer.config) for trainer in self.trainers.values()}
        if unused:
            self.supply.drop(list(unused))

    def drop_what_is_not_finite(self) -> None:
        """No file shall hold NaN or infinity.

        Raises:
            FastsaeError: The only SAE that is left does.
        """
        for name, trainer in list(self.trainers.items()):
            bad = _not_finite(trainer)
            n_bad = torch.tensor([bad is not None], dtype=torch.int32, device=trainer.sae.device)
            if int(trainer.groups.world.sum_(n_bad, "counts")):
                self.drop(name, bad or checkpoint.not_finite(trainer.step, "another process holds NaN or infinity"))

    def _check_that_some_are_left(self) -> None:
        """Raises FastsaeError where SAEs are placed and all have failed, in all processes."""
        if not self.is_placed:
            return
        n_left = torch.tensor([len(self.trainers)], device=self.pipeline.residual.device)
        if not int(self.groups.world.sum_(n_left, "counts")):
            every = {
                name: text for one in self.groups.world.gather_objects(self.failures) for name, text in one.items()
            }
            raise FastsaeError("all SAEs failed. " + " ".join(f"{name}: {text}." for name, text in every.items()))

    def calibrate(self) -> None:
        """Sets the thresholds of BatchTopK SAEs after the last step, by activations that no step has seen."""
        learners = [config for config in self.configs.values() if config.architecture == "batchtopk"]
        for layer in dict.fromkeys(_layer(config) for config in learners):
            if layer not in self.supply.streams:  # all of its SAEs have failed
                continue
            sample = self.supply.unseen(layer)
            for trainer in self.trainers.values():
                if _layer(trainer.config) == layer:
                    trainer.calibrate(sample)

    def view(self, name: str) -> Pipeline:
        """The pipeline as one SAE sees it: its options, its layer."""
        config = self.configs[name]
        return replace(self.pipeline, config=config, residual=self.supply.residuals[_layer(config)])

    def save(self, output: Path, seconds: float) -> None:
        """Writes a checkpoint of the whole session."""
        if len(self.trainers) > 1 or self.is_placed:
            self.drop_what_is_not_finite()
            self._check_that_some_are_left()
        state = {
            "options": {number: kept_options(self.configs[name]) for name, number in self._numbers.items()},
            **self.supply.state_dict(),
            "trainers": {number: trainer.state_dict() for number, trainer in self._numbered_trainers.items()},
            "failures": {self._numbers[name]: text for name, text in self.failures.items()},
            "seconds": seconds,
        }
        if self.groups.world.size == 1:
            checkpoint.save(output, self.step, state)
        else:
            joint_checkpoint.save(output, self.step, state, self._numbered_trainers, self.groups)

    @property
    def _numbers(self) -> dict[str, str]:
        """What stands for each SAE in a checkpoint: a name may have dots, which part names of tensors."""
        return {name: str(i) for i, name in enumerate(self.configs)}

    @property
    def _numbered_trainers(self) -> dict[str, Trainer]:
        return {self._numbers[name]: trainer for name, trainer in self.trainers.items()}

    def resume(self, saved: Saved, output: Path) -> float:
        """Goes on where a checkpoint was saved, by this many processes or by others; returns as `restore`.

        Raises:
            UsageError: It was made with other options.
            FastsaeError: It is corrupt.
        """
        capacity = next(iter(self.supply.buffers.values())).capacity
        return self.restore(saved.state(self._numbered_trainers, self.common, capacity), output)

    def restore(self, saved: dict[str, Any], output: Path) -> float:
        """Goes on where `saved` was taken; returns the seconds that the run had taken until then.

        Raises:
            UsageError: It was made with other options.
            FastsaeError: It is corrupt.
        """
        with reading(output / checkpoint.FOLDER, self.groups.world):
            self._check(Fields(saved))
            for name, number in self._numbers.items():
                if number in saved["failures"]:
                    self.failures[name] = saved["failures"][number]
                    self.trainers.pop(name, None)
            self._drop_unused_layers()
            self.supply.load_state_dict(saved)
        with reading(output / checkpoint.FOLDER, self.groups.world):
            for number, trainer in self._numbered_trainers.items():
                trainer.load_state_dict(saved["trainers"][number])
        step = max((trainer.step for trainer in self.trainers.values()), default=0)
        own = torch.tensor([-step], device=self.pipeline.residual.device)
        self.step = -int(self.groups.world.smallest_(own, "counts"))  # a process may have no SAE left that tells
        return float(saved["seconds"])

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
        here = [number for number in self._numbered_trainers if number not in parts["failures"]]
        parts["trainers"].check_names(here)
        for i, (name, config) in zip(numbers, self.configs.items(), strict=True):
            check_options(parts["options"].fields(i), kept_options(config))
            if i in here:
                check_trainer(parts["trainers"].fields(i), self.trainers[name])
        configs = zip(numbers, self.configs.values(), strict=True)
        # where SAEs are placed, other processes may train on a layer
        layers = {_layer(config) for i, config in configs if self.is_placed or i not in parts["failures"]}
        if not layers:
            raise found.wrong("failures", "one SAE at least that has not failed")
        for what in ("streams", "buffers"):
            parts[what].check_names([str(layer) for layer in sorted(layers)])
        for layer in layers:
            n_rows = len(self.pipeline.trained_on)
            check_buffer(
                parts["buffers"].fields(str(layer)), self.supply.buffers[layer], self.pipeline.residual.d_in, n_rows
            )
            check_stream(parts["streams"].fields(str(layer)), self.supply.streams[layer])


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
