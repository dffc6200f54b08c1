"""The thin trainer: one loop over batches of activations, all state in one place, nothing read back per step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastsae.distributed import Groups
from fastsae.fields import DTYPES
from fastsae.optim import FusedSAEAdam
from fastsae.sae import (
    FusedBatchTopKSAE,
    FusedJumpReLUSAE,
    FusedReLUSAE,
    FusedTopKSAE,
    SparseAutoencoder,
    TrainOutput,
)
from fastsae.train import checkpoint
from fastsae.train.config import TrainConfig
from fastsae.train.initialize import SAMPLE, activation_scale, initialize_from_data, start_from
from fastsae.train.l0_control import L0Control
from fastsae.train.schedules import learning_rate, sparsity_share

SAE_CLASSES: dict[str, type[SparseAutoencoder]] = {
    "jumprelu": FusedJumpReLUSAE,
    "relu": FusedReLUSAE,
    "topk": FusedTopKSAE,
    "batchtopk": FusedBatchTopKSAE,
}
DEAD_MASK_EVERY = 25  # steps; looking who is dead waits for the device


def build_sae(config: TrainConfig, d_in: int, device: torch.device, groups: Groups | None = None) -> SparseAutoencoder:
    """A fresh SAE of the configured architecture, drawn from `config.seed`; with several processes, this one's part of it."""
    torch.manual_seed(config.seed)
    options: dict[str, Any] = {"k": config.k, "apply_b_dec_to_input": config.subtracts_b_dec, "device": device}
    # with groups of one too, where other processes train other SAEs: the optimiser is told that nobody averages its gradients
    if groups is not None and groups.world.processes is not None:
        options["mesh"] = groups
    if config.architecture == "jumprelu":
        options |= {
            name: getattr(config, name) for name in ("bandwidth", "init_threshold", "ste_to_input", "log_threshold")
        }
    if config.is_topk:
        # rows kept at unit norm have nothing to rescale, and their gradient's parallel part is removed either way
        options["rescale_acts_by_decoder_norm"] = not config.normalize_decoder
    sae = SAE_CLASSES[config.architecture](d_in, config.n_features(d_in), **options)
    if sae.sharding is not None:
        sae.sharding.reduce_dtype = DTYPES[config.reduce_dtype]
        sae.sharding.n_chunks = config.overlap_chunks
    if config.frozen is not None:
        (sae.W_enc if config.frozen == "encoder" else sae.W_dec).requires_grad_(False)
    return sae


class Trainer:
    """Trains an SAE on batches of activations.

    Args:
        sae: A fresh SAE on its device; with several processes, this one's part.
        batches: Activations `[b, d_in]`, endless or long enough for `config.steps`; with several processes, of those tokens of a
            batch on which the processes that share this SAE's features train.
        config: The run.
        groups: The groups of this process.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        batches: Iterator[Tensor],
        config: TrainConfig,
        groups: Groups | None = None,
    ) -> None:
        self.sae, self.batches, self.config = sae, batches, config
        self._n_tokens = 0  # of the last batch
        self.groups = groups or Groups.alone()
        self.step, self.scale = 0, 1.0
        self.optimizer = FusedSAEAdam(
            sae,
            lr=config.lr,
            betas=(float(config.beta1), float(config.beta2)),  # PyTorch refuses a whole number
            max_grad_norm=config.clip_norm or None,
            normalize_decoder=config.normalize_decoder,
            compute_dtype=torch.bfloat16 if config.dtype == "bfloat16" else None,
        )
        self.l0_control: L0Control | None = None
        if config.controls_l0:
            assert isinstance(sae, FusedJumpReLUSAE | FusedReLUSAE)
            self.l0_control = L0Control(sae, config)
        self.silent_tokens = torch.zeros(sae.d_shard, dtype=torch.int64, device=sae.device)
        self.dead_mask: Tensor | None = None
        self.history: list[dict[str, float | None]] = []
        self.log_every = min(config.log_every, max(1, config.steps // 40))  # a short run has curves too
        self._sums: dict[str, Tensor] = {}
        self._clock = time.perf_counter()

    def initialize(self, sample: Tensor, source: SparseAutoencoder | None = None) -> None:
        """Sets scale, `b_dec` and `b_enc` from activations `[N, d_in]`, or takes the weights of a `source`, which it uses up."""
        scale = activation_scale(sample)
        if self.config.normalize_activations:
            self.scale = scale
        if self.l0_control is not None:
            self.l0_control.unit = self.scale / scale
        if source is not None:
            start_from(self.sae, source, self.scale)
            if self.l0_control is not None:
                x = sample[:SAMPLE].to(self.sae.device, self.sae.dtype) * self.scale
                self.l0_control.start = max(self._l0(x), 1e-3)
            return
        # a count needs no help to be sparse: its b_enc starts at 0, as in the literature
        init_l0 = None if self.config.is_topk else self.config.init_l0
        initialize_from_data(self.sae, sample * self.scale, self.config.b_dec_init, init_l0)

    @torch.no_grad()
    def _l0(self, x: Tensor) -> float:
        return self.sae.encode_sparse(x).packed().values.numel() / len(x)

    def run(
        self,
        on_log: Callable[[dict[str, float | None]], None] = lambda row: None,
        on_checkpoint: Callable[[], None] = lambda: None,
    ) -> None:
        """Trains to the last step; calls back after each row of the curves and where a checkpoint is due."""
        self.start_clock()
        while self.step < self.config.steps:
            row = self.advance()
            if row is not None:
                on_log(row)
            if self.checkpoint_is_due:
                on_checkpoint()

    def start_clock(self) -> None:
        """From here on the time counts of which the curves tell."""
        self._clock = time.perf_counter()

    def advance(self) -> dict[str, float | None] | None:
        """One step on the next batch; returns a row of the curves where one is due."""
        self._accumulate(self.train_step(next(self.batches)))
        is_due = self.step % self.log_every == 0 or self.step == self.config.steps
        return self._log() if is_due else None

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether this step ends with a checkpoint: each `checkpoint_every`, and the last, as an evaluation may fail."""
        every = self.config.checkpoint_every
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    @property
    def sparsity_coefficient(self) -> float | Tensor | None:
        """The weight of the penalty behind its warm-up, on activations times `scale`; None for the TopK family."""
        return self.config.sparsity_coefficient if self.l0_control is None else self.l0_control.coefficient

    def train_step(self, acts: Tensor) -> TrainOutput:
        """One step of Adam on one batch, `[b, d_in]`."""
        config, sae = self.config, self.sae
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        x = acts.to(sae.device, sae.dtype) * self.scale
        with torch.autocast(sae.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            output = sae.training_forward(x, **self.loss_options())
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.backward(output.loss)
        if sae.sharding is not None:
            sae.sharding.average_gradients(sae.parameters(), len(x))
        self.optimizer.step()
        self._n_tokens = len(x)
        self.silent_tokens = torch.where(output.feature_counts > 0, 0, self.silent_tokens + config.batch_size)
        if self.l0_control is not None:
            self.l0_control.update(self.step, self._of_batch(output.l0.reshape(1), len(x))[0])
        self.step += 1
        if config.dead_features_learn and self.step % DEAD_MASK_EVERY == 0:
            dead = self._dead()
            self.dead_mask = dead if self._n_features(dead) else None
        return output

    def _of_batch(self, means: Tensor, n_tokens: int) -> Tensor:
        """Means `[n]` over this process's tokens, as means over the whole batch."""
        return means if self.sae.sharding is None else self.sae.sharding.mean_over_data(means, n_tokens)

    def _dead(self) -> Tensor:
        """`[d_shard]` bool: which features are dead; one that fires on the tokens of another process is not."""
        return self.groups.data.smallest_(self.silent_tokens.clone(), "counts") >= self.config.dead_tokens

    def _n_features(self, mask: Tensor) -> int:
        """How many features a mask has, in all processes."""
        n = mask.sum().item()
        return int(n) if self.sae.sharding is None else self.sae.sharding.total(int(n), mask.device)

    def loss_options(self) -> dict[str, Any]:
        """What `training_forward` takes beside x at this step."""
        config, control, coefficient = self.config, self.l0_control, self.sparsity_coefficient
        if config.is_topk:
            return {"dead_mask": self.dead_mask, "aux_loss_coefficient": config.aux_loss_coefficient}
        assert coefficient is not None  # where the options give none, the control has one
        coefficient = coefficient * sparsity_share(self.step, config)
        if config.architecture == "relu":
            return {"l1_coefficient": coefficient}
        return {
            "l0_coefficient": coefficient,
            "sparsity": config.sparsity,
            "target_l0": config.target_l0 if control is None else control.target(self.step),
            "dead_mask": self.dead_mask,
            "pre_act_loss_coefficient": config.pre_act_loss_coefficient,
        }

    def _accumulate(self, output: TrainOutput) -> None:
        """Sums on the device; the host reads them when a row is logged, not per step."""
        has_fvu = ~output.fvu.isnan()  # a batch without variance has none
        fvu = torch.where(has_fvu, output.fvu, 0)
        values = {"loss": output.loss, "l0": output.l0, "fvu": fvu, "fvu_steps": has_fvu, **output.losses}
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _log(self) -> dict[str, float | None]:
        config = self.config
        n_steps = self.step - (int(self.history[-1]["step"] or 0) if self.history else 0)
        totals = self._of_batch(torch.stack(list(self._sums.values())), self._n_tokens)
        sums = dict(zip(self._sums, totals.tolist(), strict=True))
        n_fvu = sums.pop("fvu_steps")
        means: dict[str, float | None] = {name: total / n_steps for name, total in sums.items()}
        means["fvu"] = sums["fvu"] / n_fvu if n_fvu else None
        if not math.isfinite(sums["loss"]):
            raise checkpoint.not_finite(self.step, f"the loss is not finite ({sums['loss']})")
        now = time.perf_counter()
        row: dict[str, float | None] = {
            "step": self.step,
            "tokens": self.step * config.batch_size,
            **means,
            "lr": self.optimizer.param_groups[0]["lr"],
            "dead_share": self._n_features(self._dead()) / self.sae.d_sae,
            "tokens_per_second": n_steps * config.batch_size / max(now - self._clock, 1e-9),
        }
        self._clock, self._sums = now, {}
        self.history.append(row)
        return row

    def calibrate(self, sample: Tensor) -> None:
        """Sets the threshold of a BatchTopK SAE from activations `[N, d_in]` after the last step; others stay as they are."""
        if isinstance(self.sae, FusedBatchTopKSAE):
            self.sae.calibrate_threshold_(sample.to(self.sae.device, self.sae.dtype) * self.scale)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the data; see `load_state_dict`."""
        return {
            "step": self.step,
            "scale": self.scale,
            "sae": dict(self.sae.state_dict()),
            "optimizer": checkpoint.optimizer_state(self.optimizer),
            "l0_control": self.l0_control.state_dict() if self.l0_control else {},
            "silent_tokens": self.silent_tokens,
            "dead_mask": torch.empty(0, dtype=torch.bool) if self.dead_mask is None else self.dead_mask,
            "sums": dict(self._sums),
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken, bit for bit on a CPU."""
        self.step, self.scale, self.history = state["step"], state["scale"], state["history"]
        self.sae.load_state_dict(state["sae"])
        checkpoint.load_optimizer_state(self.optimizer, state["optimizer"])
        if self.l0_control is not None:
            self.l0_control.load_state_dict(state["l0_control"])
        device = self.sae.device
        self.silent_tokens = state["silent_tokens"].to(device)
        mask = state["dead_mask"].to(device)  # of this process's features, of which it may have none
        self.dead_mask = mask if self._n_features(mask) else None
        self._sums = {name: total.to(device) for name, total in state["sums"].items()}
