"""SAELens: its SAEs and trainers on the fused ops, by a class of ours in the place of theirs.

`SAETrainer._train_step` is ours too: theirs reads the activations densely in every step, for counts that the pass has anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from sae_lens import llm_sae_training_runner, registry
from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUTrainingSAE
from sae_lens.saes.sae import SAE, TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.saes.standard_sae import StandardSAE, StandardTrainingSAE
from sae_lens.saes.topk_sae import TopK, TopKSAE, TopKTrainingSAE
from sae_lens.training import multi_sae_trainer, sae_trainer
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from fastsae.errors import UsageError
from fastsae.optim import FusedSAEAdam
from fastsae.peers.handle import Accelerated, Handle, store_transposed
from fastsae.peers.saelens_base import FusedSAE, FusedStepOutput, FusedTrainingSAE
from fastsae.peers.updates import fused
from fastsae_kernels import AutoencodeOutput, AutoencodeSpec
from fastsae_kernels.pre_act import pre_act_loss


class FusedJumpReLUSAE(FusedSAE, JumpReLUSAE):
    """`JumpReLUSAE` on the fused ops."""

    def _gate(self) -> Tensor:
        # a ReLU stands before theirs; and their threshold, a bool by then, has no gradient
        return self.threshold.detach().to(self._wide()).clamp(min=0)


class FusedStandardSAE(FusedSAE, StandardSAE):
    """`StandardSAE` on the fused ops."""


class FusedJumpReLUTrainingSAE(FusedTrainingSAE, JumpReLUTrainingSAE):
    """`JumpReLUTrainingSAE` on the fused ops."""

    def _gate(self) -> Tensor:
        return self.threshold.to(self._wide())

    def _spec(self, **options: Any) -> AutoencodeSpec:
        bandwidth = self.bandwidth if torch.is_grad_enabled() else 0.0
        return AutoencodeSpec(bandwidth, ste_to_input=self.cfg.jumprelu_ste_to_input, **options)

    def _why_not_options(self) -> str | None:
        return None if 0 < self.bandwidth < float("inf") else "the bandwidth is not above 0"

    def _why_not_now(self) -> str | None:
        return "a threshold is below 0" if bool((self.threshold < 0).any()) else None  # until the next step

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        with torch.no_grad():
            self.threshold.data.clamp_(min=0)  # as theirs, where gradients go on to threshold all the same
        return super().training_forward_pass(step_input)

    def _why_not_step(self, step_input: TrainStepInput) -> str | None:
        mode = self.cfg.jumprelu_sparsity_loss_mode
        if mode not in ("step", "quadratic", "tanh") or (mode == "quadratic" and not self.cfg.target_l0):
            return f"jumprelu_sparsity_loss_mode is {mode!r} without what it needs"
        return super()._why_not_step(step_input)

    def _step(self, step_input: TrainStepInput) -> TrainStepOutput:
        cfg, norms = self.cfg, self.W_dec.to(self._wide()).norm(dim=1)
        if cfg.jumprelu_sparsity_loss_mode == "tanh":
            spec = self._spec(penalty="tanh", tanh_scale=cfg.jumprelu_tanh_scale)
            out = self._pass(step_input, spec, feature_scale=norms)
            sparsity = out.penalty
        else:
            out = self._pass(step_input, self._spec())
            sparsity = out.penalty
            if cfg.jumprelu_sparsity_loss_mode == "quadratic":
                sparsity = 2 / cfg.target_l0 * (sparsity - cfg.target_l0) ** 2
        losses = {"l0_loss": (step_input.coefficients["l0"] * sparsity).mean()}
        if cfg.pre_act_loss_coefficient is not None:
            losses["pre_act_loss"] = self._pre_act_loss(step_input, norms)
        return self._output(step_input, out, losses)

    def _pre_act_loss(self, step_input: TrainStepInput, norms: Tensor) -> Tensor:
        mask = step_input.dead_neuron_mask
        if mask is None or not mask.any():
            return norms.new_zeros(())
        x = self.process_sae_in(step_input.sae_in)
        loss = pre_act_loss(x, self.W_enc, self.b_enc, self._gate(), norms, mask)
        return self.cfg.pre_act_loss_coefficient * loss


class FusedStandardTrainingSAE(FusedTrainingSAE, StandardTrainingSAE):
    """`StandardTrainingSAE` on the fused ops."""

    def _why_not_step(self, step_input: TrainStepInput) -> str | None:
        return super()._why_not_step(step_input) if self.cfg.lp_norm == 1 else "lp_norm is not 1"

    def _step(self, step_input: TrainStepInput) -> TrainStepOutput:
        norms = self.W_dec.to(self._wide()).norm(dim=1)
        out = self._pass(step_input, AutoencodeSpec(penalty="l1"), feature_scale=norms)
        return self._output(step_input, out, {"l1_loss": (step_input.coefficients["l1"] * out.penalty).mean()})


class _LargestFeatures(FusedSAE):
    """What TopK has at inference and in training."""

    activation = TopK

    def _spec(self) -> AutoencodeSpec:
        return AutoencodeSpec(k=self.activation_fn.k)

    def _why_not_options(self) -> str | None:
        k = self.activation_fn.k
        return None if isinstance(k, int) and 1 <= k <= self.cfg.d_sae else "k is no number of features"


class FusedTopKSAE(_LargestFeatures, TopKSAE):
    """`TopKSAE` on the fused ops."""


class FusedTopKTrainingSAE(_LargestFeatures, FusedTrainingSAE, TopKTrainingSAE):
    """`TopKTrainingSAE` on the fused ops."""

    def _step(self, step_input: TrainStepInput) -> FusedStepOutput:
        step, _ = self._step_and_pass(step_input)
        return step

    def _step_and_pass(self, step_input: TrainStepInput) -> tuple[FusedStepOutput, AutoencodeOutput]:
        rescaling = self._rescaling()
        out = self._pass(step_input, self._spec(), rank_scale=rescaling)
        loss = self._aux_k_loss(step_input, -out.sae_out.detach(), rescaling)
        return self._output(step_input, out, {"auxiliary_reconstruction_loss": loss}, rescaling), out

    def _aux_k_loss(self, step_input: TrainStepInput, residual: Tensor, rescaling: Tensor | None) -> Tensor:
        """The dead features' reconstruction of what the others leave over, `[N, n_dead]` dense.

        It fills up with negative pre-activations where few are positive, as SAELens does, which the ops cannot.
        """
        mask = step_input.dead_neuron_mask
        dead = residual.new_empty(0) if mask is None else mask.nonzero().squeeze(1)
        if len(dead) == 0:
            return residual.new_zeros(())
        k_aux = step_input.sae_in.shape[-1] // 2
        W_dec = self.W_dec.index_select(0, dead)
        W_enc = self.W_enc.t().index_select(0, dead)
        hidden_pre = self.process_sae_in(step_input.sae_in) @ W_enc.t() + self.b_enc.index_select(0, dead)
        acts = hidden_pre
        if len(dead) > k_aux:
            ranked = hidden_pre.detach() if rescaling is None else hidden_pre.detach() * rescaling[dead]
            chosen = ranked.topk(k_aux, sorted=False).indices
            acts = torch.zeros_like(hidden_pre).scatter(-1, chosen, hidden_pre.gather(-1, chosen))
        wide = self._wide()  # under autocast a sum in 16 bits would be off by half a per cent
        loss = ((acts @ W_dec).to(wide) - residual.to(wide)).pow(2).sum(-1).mean()
        return self.cfg.aux_loss_coefficient * min(len(dead) / k_aux, 1.0) * loss


class FusedBatchTopKTrainingSAE(FusedTopKTrainingSAE, BatchTopKTrainingSAE):
    """`BatchTopKTrainingSAE` on the fused ops."""

    activation = BatchTopK

    def _spec(self) -> AutoencodeSpec:
        return AutoencodeSpec(k=int(self.activation_fn.k), batch_topk=True)

    def _why_not_options(self) -> str | None:
        k = self.activation_fn.k
        return None if 1 <= k <= self.cfg.d_sae and k == int(k) else "k is no number of features"

    def _step(self, step_input: TrainStepInput) -> FusedStepOutput:
        step, out = self._step_and_pass(step_input)
        assert out.min_active is not None
        self._move_threshold(out.min_active)
        step.metrics["topk_threshold"] = self.topk_threshold
        return step

    @torch.no_grad()
    def _move_threshold(self, min_active: Tensor) -> None:
        rate, before = self.cfg.topk_threshold_lr, self.topk_threshold
        smallest = min_active.to(before.dtype)
        moved = (1 - rate) * before + rate * smallest
        self.topk_threshold: Tensor = torch.where(torch.isfinite(smallest), moved, before)


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
            torch.nn.utils.clip_grad_norm_(sae.parameters(), MAX_GRAD_NORM)
        with fused(self.optimizer):
            self.optimizer.step()
        self.optimizer.zero_grad()


class _ScheduledAdam(FusedSAEAdam):
    """`FusedSAEAdam` under a scheduler that was made for another optimiser, and asks whether `step` tells it of its calls."""

    def step(self, closure: Any = None) -> Any:
        self._opt_called = True
        return super().step(closure)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def _firing_counts(feature_acts: Tensor) -> Tensor:
    """`[d_sae]`, of dense or sparse activations."""
    counts = feature_acts.bool().float().sum(0)
    return counts.to_dense() if counts.is_sparse else counts


MAX_GRAD_NORM = 1.0  # theirs, a constant in `_train_step`

CLASSES: dict[type, type] = {
    JumpReLUSAE: FusedJumpReLUSAE,
    StandardSAE: FusedStandardSAE,
    TopKSAE: FusedTopKSAE,
    JumpReLUTrainingSAE: FusedJumpReLUTrainingSAE,
    StandardTrainingSAE: FusedStandardTrainingSAE,
    TopKTrainingSAE: FusedTopKTrainingSAE,
    BatchTopKTrainingSAE: FusedBatchTopKTrainingSAE,
}


def accelerate(obj: Any, handle: Handle) -> None:
    """`fastsae.accelerate` for an object of SAELens."""
    if isinstance(obj, SAETrainer):
        _accelerate_trainer(obj, handle)
    elif isinstance(obj, MultiSAETrainer):
        for trainer in obj.trainers.values():
            _accelerate_trainer(trainer, handle)
    elif handle.options.optimizer:
        raise UsageError(f"optimizer: expected False but for an SAETrainer, got True for {type(obj).__qualname__}")
    elif isinstance(obj, ModuleType):
        _accelerate_package(handle)
    elif isinstance(obj, SAE):
        _accelerate_sae(obj, handle, tuple)
    elif hasattr(obj, "acts_to_saes"):  # a model with SAEs
        for sae in obj.acts_to_saes.values():
            _accelerate_sae(sae, handle, tuple)
    else:
        raise UsageError(f"obj: expected an SAE or a trainer of sae-lens, got {type(obj).__qualname__}")


def _accelerate_sae(sae: SAE, handle: Handle, optimizers: Callable[[], Iterable[Any]]) -> bool:
    """Whether the SAE is of a class that was known."""
    cls = CLASSES.get(type(sae))
    name = f"{type(sae).__qualname__} of sae-lens"
    if isinstance(sae, Accelerated):
        handle.left_alone.append(f"{name}: it is accelerated already")
        return True
    if cls is None:
        handle.left_alone.append(f"{name}: no class that accelerate() knows")
        return False
    handle.swap(sae, cls)
    stored = handle.store_transposed(sae, "W_enc", optimizers)
    handle.changes.append(name + (", with W_enc stored feature by feature" if stored else ""))
    return True


def _accelerate_trainer(trainer: SAETrainer, handle: Handle) -> None:
    known = _accelerate_sae(trainer.sae, handle, lambda: [trainer.optimizer])
    name = f"{type(trainer).__qualname__} of sae-lens"
    if type(trainer) is SAETrainer and known:
        handle.swap(trainer, FusedSAETrainer)
        if handle.options.optimizer:
            _replace_optimizer(trainer, handle)
        handle.changes.append(name + (", with FusedSAEAdam" if handle.options.optimizer else ""))
    elif not isinstance(trainer, Accelerated):
        reason = "its SAE is left alone" if type(trainer) is SAETrainer else "no class that accelerate() knows"
        handle.left_alone.append(f"{name}: {reason}")


def _replace_optimizer(trainer: SAETrainer, handle: Handle) -> None:
    """Puts `FusedSAEAdam` in the place of the trainer's Adam, whose moments and learning rate it takes over."""
    theirs = trainer.optimizer
    if type(theirs) is not torch.optim.Adam or len(theirs.param_groups) != 1:
        raise UsageError(f"optimizer: expected the trainer's own Adam to replace, got {type(theirs).__qualname__}")
    ours = _ScheduledAdam(trainer.sae, max_grad_norm=MAX_GRAD_NORM)

    def use(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        optimizer.load_state_dict(state)
        trainer.optimizer = trainer.lr_scheduler.optimizer = optimizer
        for scheduler in getattr(trainer.lr_scheduler, "_schedulers", []):
            scheduler.optimizer = optimizer

    use(ours, theirs.state_dict())
    handle.on_undo(lambda: use(theirs, {**ours.state_dict(), "param_groups": [_like(ours, theirs)]}))


def _like(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> dict[str, Any]:
    """The options of our Adam as a state dict holds them, but for how theirs is to compute."""
    (group,), (before,) = ours.state_dict()["param_groups"], theirs.param_groups
    return {**group, **{name: before[name] for name in ("fused", "foreach") if name in before}}


def _accelerate_package(handle: Handle) -> None:
    """Every SAE and every trainer that SAELens makes from now on."""

    def prepare_sae(sae: SAE) -> None:
        store_transposed(sae, "W_enc")

    for classes in (registry.SAE_CLASS_REGISTRY, registry.SAE_TRAINING_CLASS_REGISTRY):
        for architecture, (cls, config) in list(classes.items()):
            if cls in CLASSES:
                handle.replace(classes, architecture, (handle.subclass(CLASSES[cls], prepare_sae), config))
                handle.changes.append(f"{cls.__qualname__} of sae-lens, wherever its registry makes one")
            elif not issubclass(cls, Accelerated):
                handle.left_alone.append(f"{cls.__qualname__} of sae-lens: no class that accelerate() knows")
    trainer = handle.subclass(FusedSAETrainer, lambda _: None)
    for module in (sae_trainer, multi_sae_trainer, llm_sae_training_runner):
        handle.replace(module, "SAETrainer", trainer)
    handle.changes.append("SAETrainer of sae-lens, wherever one of its runners makes one")
