"""Every option of a training run: one dataclass, whose fields are the flags of `fastsae train`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastsae.errors import UsageError

Architecture = Literal["jumprelu", "relu", "topk", "batchtopk"]
TOPK_FAMILY = ("topk", "batchtopk")
Sparsity = Literal["step", "quadratic", "tanh"]


def option(default: Any, group: str, text: str) -> Any:
    """A field with the help text and the heading under which the command line shows it."""
    return field(default=default, metadata={"help": text, "group": group})


@dataclass(frozen=True)
class TrainConfig:
    """A training run; the defaults are the embedded demo, trained by the `recommended` recipe.

    Activation units: with `normalize_activations` the SAE sees activations scaled to a mean norm of sqrt(d_in), so
    `bandwidth` and `init_threshold` mean the same for every model; the scale is folded into the weights at the end.

    Raises:
        UsageError: A value is out of its range.
    """

    model: str = option(
        "demo", "data", "hub id or folder of a causal language model; 'demo' is the embedded chat model"
    )
    dataset: str = option(
        "demo", "data", "hub id, .jsonl/.json/.parquet file, or folder saved by datasets; 'demo' is made here"
    )
    split: str = option("train", "data", "split of the dataset")
    layer: int | None = option(
        None, "data", "residual stream after this decoder block, from 0 (default: the middle one)"
    )
    model_dtype: str | None = option(
        None, "data", "float32, bfloat16 or float16 for the language model (default: as stored)"
    )
    max_length: int = option(8192, "data", "tokens after which a dialogue is cut off")
    max_dialogues: int | None = option(None, "data", "use only the first dialogues of the dataset")
    dedup_words: int = option(20, "data", "drop a dialogue that repeats this many words of an earlier one; 0 keeps all")
    eval_dialogues: int = option(500, "data", "dialogues held out for the evaluation")
    drop_first_position: bool = option(True, "data", "train without position 0, whose activation is often an outlier")

    architecture: Architecture = option(
        "jumprelu", "sae", "jumprelu (L0 penalty), relu (L1 penalty), topk or batchtopk (no penalty; give k)"
    )
    d_sae: int | None = option(None, "sae", "number of features (default: expansion * d_in)")
    expansion: int = option(8, "sae", "features per dimension of the residual stream")
    k: int | None = option(
        None,
        "sae",
        "keep at most this many features of a token (default: no limit); topk and batchtopk need it, "
        "and for batchtopk it is an average",
    )
    bandwidth: float = option(0.05, "sae", "width of the straight-through window, in activation units")
    init_threshold: float = option(0.01, "sae", "initial threshold, in activation units")
    log_threshold: bool = option(False, "sae", "jumprelu: train the threshold's logarithm, which moves far slower")
    apply_b_dec_to_input: bool | None = option(
        None, "sae", "subtract b_dec before the encoder (default: with topk and batchtopk, whose b_enc starts at 0)"
    )
    ste_to_input: bool = option(False, "sae", "straight-through gradients to the encoder too (Anthropic 2025)")
    normalize_activations: bool = option(True, "sae", "scale activations to a mean norm of sqrt(d_in) while training")
    b_dec_init: Literal["geometric_median", "mean", "zero"] = option("geometric_median", "sae", "start value of b_dec")
    init_l0: float | None = option(
        200.0, "sae", "jumprelu, relu: set b_enc so that this many features fire at the start (none: b_enc = 0)"
    )

    tokens: int = option(1_500_000, "training", "tokens to train on")
    batch_size: int = option(1024, "training", "tokens of a step")
    lr: float = option(3e-3, "training", "peak learning rate of Adam")
    lr_end: float = option(0.1, "training", "share of the peak at the end of the cosine")
    beta1: float = option(0.9, "training", "Adam's first decay rate")
    beta2: float = option(0.999, "training", "Adam's second decay rate")
    warm_up: float = option(0.05, "training", "share of the steps in which the learning rate rises")
    decay: float = option(0.2, "training", "share of the steps, at the end, in which the learning rate falls to 0")
    sparsity: Sparsity = option(
        "quadratic", "training", "L0 penalty: quadratic aims at target_l0; step and tanh use the coefficient"
    )
    l0_coefficient: float = option(1.0, "training", "weight of the L0 penalty")
    l1_coefficient: float = option(5.0, "training", "weight of the L1 penalty (relu)")
    target_l0: float = option(32.0, "training", "active features per token that the quadratic penalty aims at")
    sparsity_warm_up: float = option(0.1, "training", "share of the steps in which the sparsity weight rises from 0")
    normalize_decoder: bool = option(
        True, "training", "keep unit-norm decoder rows; their parallel gradient is removed before Adam"
    )
    clip_norm: float = option(1.0, "training", "clip the global gradient norm; 0 does not clip")
    dead_tokens: int = option(200_000, "training", "a feature silent for this many tokens is dead")
    pre_act_loss_coefficient: float = option(0.0, "training", "jumprelu: pull of dead features back to their threshold")
    aux_loss_coefficient: float = option(
        1.0, "training", "topk, batchtopk: weight of the loss by which dead features learn what is left over (AuxK)"
    )
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "training", "of the SAE's products; the weights stay float32"
    )

    buffer_tokens: int = option(131_072, "running", "activations held and mixed")
    forward_tokens: int = option(8192, "running", "tokens of one forward pass of the language model, padding included")
    device: str = option("auto", "running", "cpu, cuda, cuda:0 or auto")
    seed: int = option(42, "running", "of weights, order and mixing")
    log_every: int = option(25, "running", "steps between two points of the curves")
    checkpoint_every: int = option(500, "running", "steps between two checkpoints; 0 writes none")

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            _require(f.name, value, not isinstance(value, float) or math.isfinite(value), "a finite number")
        positive = (
            "eval_dialogues expansion bandwidth tokens batch_size lr target_l0 buffer_tokens forward_tokens log_every"
        )
        _require("max_length", self.max_length, self.max_length >= 2, "a number >= 2")
        for name in positive.split():
            _require(name, getattr(self, name), getattr(self, name) > 0, "a number > 0")
        not_negative = (
            "dedup_words seed init_threshold l0_coefficient l1_coefficient clip_norm dead_tokens "
            "pre_act_loss_coefficient aux_loss_coefficient checkpoint_every"
        )
        for name in not_negative.split():
            _require(name, getattr(self, name), getattr(self, name) >= 0, "a number >= 0")
        _require(
            "init_threshold",
            self.init_threshold,
            self.init_threshold > 0 or not self.log_threshold,
            "a number > 0 with log_threshold",
        )
        for name in ("lr_end", "warm_up", "decay", "sparsity_warm_up"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "a share from 0 to 1")
        for name in ("beta1", "beta2"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "a number from 0 to below 1")
        for name in ("d_sae", "k", "max_dialogues", "init_l0"):
            value = getattr(self, name)
            _require(name, value, value is None or value > 0, "a number > 0")
        _require("warm_up + decay", self.warm_up + self.decay, self.warm_up + self.decay <= 1, "at most 1")
        for name, kind in get_type_hints(TrainConfig).items():
            if get_origin(kind) is Literal:
                _require(name, getattr(self, name), getattr(self, name) in get_args(kind), " or ".join(get_args(kind)))
        if self.architecture in TOPK_FAMILY and self.k is None:
            raise UsageError(
                f"k: expected the number of active features per token, which {self.architecture} needs, got none"
            )
        if self.d_sae is not None and self.k is not None:
            _require("k", self.k, self.k <= self.d_sae, f"at most d_sae = {self.d_sae}")
        if self.buffer_tokens < 2 * self.batch_size:
            raise UsageError(
                f"buffer_tokens: expected at least twice batch_size = {self.batch_size}, got {self.buffer_tokens}"
            )
        if self.tokens < self.batch_size:
            raise UsageError(f"tokens: expected at least one batch of {self.batch_size}, got {self.tokens}")

    @property
    def subtracts_b_dec(self) -> bool:
        """`apply_b_dec_to_input`, its default resolved."""
        chosen = self.apply_b_dec_to_input
        return self.architecture in TOPK_FAMILY if chosen is None else chosen

    @property
    def dead_features_learn(self) -> bool:
        """Whether the loss has a term for dead features, so that training must know them."""
        if self.architecture in TOPK_FAMILY:
            return self.aux_loss_coefficient > 0
        return self.architecture == "jumprelu" and self.pre_act_loss_coefficient > 0

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return self.tokens // self.batch_size


def _require(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise UsageError(f"{name}: expected {expected}, got {value}")


PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {},
    # arXiv:2506.07691, appendices A and C; see the warning about its sparsity in the README
    "fast-paper": {
        "bandwidth": 0.001,
        "init_threshold": 0.001,
        "normalize_activations": False,
        "drop_first_position": False,
        "init_l0": None,
        "tokens": 40_960_000,
        "batch_size": 128,
        "lr": 7e-5,
        "warm_up": 0.05,
        "decay": 0.2,
        "sparsity": "step",
        "l0_coefficient": 0.01,
        "sparsity_warm_up": 10_000 / 320_000,
    },
}


def field_names() -> list[str]:
    """Names of all options."""
    return [f.name for f in fields(TrainConfig)]
