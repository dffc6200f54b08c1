"""SAELens' trainer, whose own step reads the activations densely for counts that the pass has anyway."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from fastsae.optim import FusedSAEAdam
from fastsae.peers.handle import Accelerated
from fastsae.peers.saelens_base import FusedStepOutput, FusedTrainingSAE
from fastsae.peers.updates import fused

MAX_GRAD_NORM = 1.0  # theirs, a constant in `_train_step`


class FusedSAETrainer(SAETrainer, Accelerated):
    """`SAETrainer` with counts of firing features from the pass."""

    def __class_getitem__(cls, parameters: Any) -> type[FusedSAETrainer]:
        """The class itself: who imports it in the place of theirs may annotate with `SAETrainer[...]`."""
        return cls

    def _train_step(self, sae: TrainingSAE, sae_in: Tensor) -> TrainStepOutput:
        sae.train()
        with self.autocast_if_enabled:
            step = self.sae.training_forward_pass(
                step_input=TrainStepInput(
                    sae_in=sae_in,
                    coefficients=self.get_coefficients(),
                    dead_neuron_mask=self.dead_neurons,
                    n_training_steps=self.n_training_steps,
                    is_logging_step=self._is_logging_step(),
                )
            )
        is_fused = isinstance(step, FusedStepOutput)
        self._fastsae.tally.count("_train_step", None if is_fused else "the SAE's step was left to the peer")
        self._count_firing(step.feature_counts if is_fused else _firing_counts(step.feature_acts))
        self._update(sae, step.loss)
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return step

    def build_train_step_log_dict(self, output: TrainStepOutput, n_training_samples: int) -> dict[str, Any]:
        if (
            isinstance(output, FusedStepOutput)
            and isinstance(self.sae, FusedTrainingSAE)
            and self.sae.sharding is not None
        ):
            output = copy.copy(output)  # with as many active entries of each token, which is all that is read of them
            output.feature_acts = torch.arange(int(output.l0.max()), device=output.l0.device) < output.l0[:, None]
        return super().build_train_step_log_dict(output, n_training_samples)

    def save_trainer_state(self, checkpoint_path: Path) -> None:
        self._check_whole("save_trainer_state")
        super().save_trainer_state(checkpoint_path)

    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        self._check_whole("load_trainer_state")
        super().load_trainer_state(checkpoint_path)

    def _check_whole(self, method: str) -> None:
        if isinstance(self.sae, FusedTrainingSAE):
            self.sae._check_whole(method, "a checkpoint holds the moments of all features")

    @torch.no_grad()
    def _count_firing(self, counts: Tensor) -> None:
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[counts > 0] = 0
        self.act_freq_scores += counts
        self.n_frac_active_samples += self.cfg.train_batch_size_samples

    def _update(self, sae: TrainingSAE, loss: Tensor) -> None:
        if isinstance(self.optimizer, FusedSAEAdam):  # which clips
            self.optimizer.backward(loss)
        else:
            loss.backward()
            if isinstance(sae, FusedTrainingSAE) and sae.sharding is not None:
                sae.sharding.clip_grad_norm_(sae.named_parameters(), MAX_GRAD_NORM)
            else:
                torch.nn.utils.clip_grad_norm_(sae.parameters(), MAX_GRAD_NORM)
        with fused(self.optimizer):
            self.optimizer.step()
        self.optimizer.zero_grad()


class ScheduledAdam(FusedSAEAdam):
    """`FusedSAEAdam` under a scheduler that was made for another optimiser, and asks whether `step` tells it of its calls."""

    def step(self, closure: Any = None) -> Any:
        self._opt_called = True
        return super().step(closure)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def _firing_counts(feature_acts: Tensor) -> Tensor:
    """`[d_sae]`, of dense or sparse activations."""
    counts = feature_acts.bool().float().sum(0)
    return counts.to_dense() if counts.is_sparse else counts
