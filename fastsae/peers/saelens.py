"""SAELens: its SAEs and trainers on the fused ops, by a class of ours in the place of theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from sae_lens import llm_sae_training_runner, registry
from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUTrainingSAE
from sae_lens.saes.sae import SAE, TrainStepInput, TrainStepOutput
from sae_lens.saes.standard_sae import StandardSAE, StandardTrainingSAE
from sae_lens.saes.topk_sae import TopK, TopKSAE, TopKTrainingSAE
from sae_lens.training import multi_sae_trainer, sae_trainer
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from fastsae.distributed import Groups
from fastsae.distributed.selection import among_largest
from fastsae.errors import UsageError
from fastsae.peers.handle import Accelerated, Handle, Options, store_transposed
from fastsae.peers.saelens_base import FusedSAE, FusedStepOutput, FusedTrainingSAE
from fastsae.peers.saelens_trainer import MAX_GRAD_NORM, FusedSAETrainer, ScheduledAdam
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
        n_below = int((self.threshold < 0).sum())
        if self.sharding is not None:  # where one process raises, all do
            n_below = self.sharding.total(n_below, self.threshold.device)
        return "a threshold is below 0" if n_below else None  # until the next step

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
        x = self._sae_in(step_input.sae_in)
        loss = pre_act_loss(x, self.W_enc, self.b_enc, self._gate(), norms, self._own(mask))
        return self.cfg.pre_act_loss_coefficient * self._sum_of_parts(loss, x)


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
        n_dead = 0 if mask is None else int(mask.sum())
        if mask is None or n_dead == 0:
            return residual.new_zeros(())
        dead = self._own(mask).nonzero().squeeze(1)
        k_aux = step_input.sae_in.shape[-1] // 2
        W_dec = self.W_dec.index_select(0, dead)
        W_enc = self.W_enc.t().index_select(0, dead)
        x = self._sae_in(step_input.sae_in)
        acts = x @ W_enc.t() + self.b_enc.index_select(0, dead)
        if n_dead > k_aux:
            ranked = acts.detach() if rescaling is None else acts.detach() * rescaling[dead]
            acts = self._largest(acts, ranked, k_aux)
        wide = self._wide()  # under autocast a sum in 16 bits would be off by half a per cent
        recons = self._sum_of_parts((acts @ W_dec).to(wide), x)
        loss = (recons - residual.to(wide)).pow(2).sum(-1).mean()
        return self.cfg.aux_loss_coefficient * min(n_dead / k_aux, 1.0) * loss

    def _largest(self, acts: Tensor, ranked: Tensor, k: int) -> Tensor:
        """`acts` where `ranked` is among the `k` largest of its row, in all processes, and 0 elsewhere."""
        if self._is_shared:
            assert self.sharding is not None
            return acts * among_largest(ranked, k, self.sharding.features)
        chosen = ranked.topk(k, sorted=False).indices
        return torch.zeros_like(acts).scatter(-1, chosen, acts.gather(-1, chosen))


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


def check_shareable(obj: Any, groups: Groups) -> None:
    """Raises UsageError where processes cannot share the SAEs of an object of SAELens; nothing is changed."""
    trainers = list(obj.trainers.values()) if isinstance(obj, MultiSAETrainer) else [obj] * isinstance(obj, SAETrainer)
    saes = [trainer.sae for trainer in trainers] or list(getattr(obj, "acts_to_saes", {}).values()) or [obj]
    for sae in saes:
        reason = _why_not_shareable(sae)
        if reason is not None:
            raise UsageError(f"mesh: expected an SAE that processes can share, got {type(sae).__qualname__}: {reason}")
    for trainer in trainers:
        if type(trainer) is not SAETrainer:
            raise UsageError(f"mesh: expected SAELens' own SAETrainer, got {type(trainer).__qualname__}")
        if groups.data.size > 1:
            raise UsageError(
                f"mesh: expected no processes that see other tokens with an SAETrainer, got {groups.data.size} of them; share "
                "its SAE, and write the loop"
            )
    for trainer in [obj] * bool(trainers):
        if trainer.cfg.n_checkpoints or trainer.cfg.save_final_checkpoint:
            raise UsageError(
                "mesh: expected n_checkpoints=0 and save_final_checkpoint=False, since a process has a part of the SAE; save "
                "the trainer after handle.undo()"
            )


def _why_not_shareable(sae: Any) -> str | None:
    if isinstance(sae, Accelerated):
        return "it is accelerated already"
    if type(sae) not in CLASSES:
        return "no class that accelerate() knows"
    if any(type(p.data) is not Tensor or p.is_meta for p in sae.parameters()):
        return "its parameters are no plain tensors in memory"
    if set(dict(sae.named_parameters())) != sae._parameters.keys():
        return "its parameters are made of others"
    with Handle(sae, Options()) as trial:  # in its fast class it knows what that covers
        trial.swap(sae, CLASSES[type(sae)])
        x = sae.b_dec.new_zeros(0, sae.cfg.d_in)
        reason: str | None = sae._why_not(x)
        if reason is None and isinstance(sae, FusedTrainingSAE):
            reason = sae._why_not_step(TrainStepInput(x, {}, None, n_training_steps=0, is_logging_step=False))
    return reason


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
    handle.share(sae, sae.cfg.d_sae, optimizers)
    stored = handle.store_transposed(sae, "W_enc", optimizers)
    if sae.sharding is not None:
        name += f", of which this process has the features from {sae.sharding.start} to {sae.sharding.end - 1}"
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
    ours = ScheduledAdam(trainer.sae, max_grad_norm=MAX_GRAD_NORM)

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
