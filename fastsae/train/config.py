"""Every option of a training run: one dataclass, whose fields are the flags of `fastsae train`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from fastsae.train.option import ANY_WHOLE, COUNT, DECAY_RATE, SHARE, WEIGHT, option
from fastsae.train.validate import validate

ModelDtype = Literal["float32", "bfloat16", "float16"]
Sequencing = Literal["fast", "packed", "block"]
Hook = Literal["resid_post", "resid_pre", "attn_out", "mlp_out"]
Architecture = Literal["jumprelu", "relu", "topk", "batchtopk"]
TOPK_FAMILY = ("topk", "batchtopk")
OF_THE_SOURCE = ("d_sae", "k", "apply_b_dec_to_input")  # what `init_from` decides where the options say nothing
Sparsity = Literal["step", "quadratic", "tanh"]


@dataclass(frozen=True)
class TrainConfig:
    """A training run; the defaults are the embedded demo, trained by the `recommended` recipe.

    Activation units: with `normalize_activations` the SAE sees activations scaled to a mean norm of sqrt(d_in), so
    `bandwidth` and `init_threshold` mean the same for every model; the scale is folded into the weights at the end.

    Raises:
        UsageError: A value has the wrong type, is out of its range, or contradicts another one.
    """

    model: str = option(
        "demo",
        "data",
        "language model: a folder, a .gguf file or the id of a model on the Hugging Face hub; 'demo' is the small chat "
        "model that comes with fastsae",
    )
    dataset: str = option(
        "demo",
        "data",
        "chat dialogues: a .jsonl, .ndjson, .json (each also as .gz) or .parquet file, a folder, or the id of a dataset on "
        "the hub; 'demo' makes dialogues from the documentation of the installed Python",
    )
    split: str = option("train", "data", "split of the dataset")
    text: str | None = option(
        None,
        "data",
        "plain text to train on in the place of the dialogues, which are then for the evaluation alone: a .txt, .jsonl, .json "
        "(each also as .gz) or .parquet file, a folder of them, the id of a dataset on the hub with a column 'text', or 'demo'",
    )
    sequencing: Sequencing = option(
        "fast",
        "data",
        "what the model reads at once: fast gives each dialogue a row of its own; packed puts several into one row, where "
        "they do not see each other; block, the baseline, concatenates them and cuts that into blocks, in which a token sees "
        "whatever stands before it. The evaluation always reads whole dialogues",
    )
    block_length: int = option(
        2048, "data", "number of tokens in a block, with --sequencing block or --leakage", (2, 10**9)
    )
    activations: str | None = option(
        None,
        "data",
        "folder that `fastsae cache` wrote, read in the place of the model's forward passes; options of model and data that are "
        "not given are those of the cache",
    )
    layer: int | None = option(
        None,
        "data",
        "decoder block whose activations the SAE learns, counted from 0 (default: the middle one)",
        (0, 9999),
    )
    hook: Hook = option(
        "resid_post",
        "data",
        "where in the block: the residual stream after it (resid_post) or before it (resid_pre), or what its attention "
        "(attn_out) or its MLP or experts (mlp_out) add to the stream, behind the norm that Gemma 2 and 3 put there",
    )
    model_dtype: ModelDtype | None = option(
        None,
        "data",
        "number format of the language model (default: the one in which this machine computes it fastest, of the format "
        "of its files and float32)",
    )
    model_kwargs: str | None = option(
        None,
        "data",
        'more arguments for transformers\' from_pretrained, as JSON, such as \'{"revision": "main", '
        '"attn_implementation": "eager"}\', device_map or quantization_config',
    )
    random_model: bool = option(
        False,
        "data",
        "draw the language model's weights anew, by --data-seed: a control, as what an SAE finds there no model has learnt",
    )
    max_length: int = option(8192, "data", "longest dialogue in tokens; what comes after is cut off", (2, 10**9))
    max_dialogues: int | None = option(
        None,
        "data",
        "number of dialogues to use, from the start of the dataset (default: all); only these are then read from the hub",
        COUNT,
    )
    dedup_words: int = option(
        20,
        "data",
        "length of a repeated passage, in words, for which a dialogue is dropped; 0 keeps all dialogues",
        (0, 10_000),
    )
    eval_dialogues: int | None = option(
        None,
        "data",
        "number of dialogues that are kept for the evaluation (default: as many as it reads in a tenth of the run's time, "
        "from 16 to 500)",
        COUNT,
    )
    drop_first_position: bool = option(
        True,
        "data",
        "leave the first token of each dialogue (of each block, with --sequencing block) out of training: its activation is "
        "often an outlier",
    )
    max_norm_multiple: float | None = option(
        10.0,
        "data",
        "leave tokens out of training, wherever they stand, that are so many times longer than the median token: attention "
        "sinks, which the evaluation keeps apart by the same rule ('none' trains on them; the evaluation then takes 10)",
        (1, 1e9),
    )

    architecture: Architecture = option(
        "jumprelu",
        "sae",
        "kind of SAE: jumprelu (L0 penalty), relu (L1 penalty), topk or batchtopk (no penalty, need --k)",
    )
    init_from: str | None = option(
        None,
        "sae",
        "saved SAE whose weights training goes on from, with a fresh optimiser: a folder, of this or another library, or a hub "
        "id; architecture, size and k are then its own, and no start is computed from the data",
    )
    d_sae: int | None = option(None, "sae", "number of features (default: --expansion times d_in)", (1, 2**31 - 1))
    expansion: int = option(
        8, "sae", "number of features per dimension of the activations; --d-sae overrides it", (1, 10**6)
    )
    k: int | None = option(
        None,
        "sae",
        "largest number of active features per token (default: no limit); topk and batchtopk need it, for batchtopk it "
        "is the average over a batch",
        (1, 2**31 - 1),
    )
    frozen: Literal["encoder", "decoder"] | None = option(
        None,
        "sae",
        "weight matrix that stays as it was drawn, W_enc or W_dec, while all else is trained: a control (default: none)",
    )
    bandwidth: float = option(
        0.05,
        "sae",
        "width of the window around the threshold in which it receives gradients, in activation units",
        (1e-6, 1e6),
        used_by=("jumprelu",),
    )
    init_threshold: float = option(
        0.01, "sae", "threshold at the start, in activation units", (0, 1e6), used_by=("jumprelu",)
    )
    log_threshold: bool = option(
        False, "sae", "train the logarithm of the threshold, which then moves far more slowly", used_by=("jumprelu",)
    )
    apply_b_dec_to_input: bool | None = option(
        None, "sae", "subtract b_dec from the activations before the encoder (default: only for topk and batchtopk)"
    )
    ste_to_input: bool = option(
        False,
        "sae",
        "let the gradients of the threshold's window reach the encoder too (Anthropic 2025)",
        used_by=("jumprelu",),
    )
    normalize_activations: bool = option(
        True, "sae", "scale the activations to a mean norm of sqrt(d_in) while training"
    )
    b_dec_init: Literal["geometric_median", "mean", "zero"] = option(
        "geometric_median", "sae", "value of b_dec at the start, computed from the first activations"
    )
    init_l0: float | None = option(
        200.0,
        "sae",
        "number of active features per token at the start, reached by setting b_enc ('none': b_enc starts at 0)",
        (1e-3, 1e9),
        used_by=("jumprelu", "relu"),
    )

    tokens: int = option(1_500_000, "training", "number of tokens to train on", COUNT)
    batch_size: int = option(1024, "training", "number of tokens per training step", COUNT)
    lr: float = option(3e-3, "training", "highest learning rate of Adam", (1e-12, 1e3))
    lr_end: float = option(
        0.1, "training", "learning rate before the final decay, as a share of --lr; a cosine leads down to it", SHARE
    )
    beta1: float = option(0.9, "training", "decay rate of Adam's mean of the gradient", DECAY_RATE)
    beta2: float = option(0.999, "training", "decay rate of Adam's mean of the squared gradient", DECAY_RATE)
    warm_up: float = option(0.05, "training", "share of the steps in which the learning rate rises to --lr", SHARE)
    decay: float = option(
        0.2,
        "training",
        "share of the steps, at the end, in which the learning rate falls from its share --lr-end to 0",
        SHARE,
    )
    sparsity: Sparsity = option(
        "step",
        "training",
        "form of the L0 penalty: step counts the active features, tanh saturates with their activations, quadratic grows "
        "with the square of L0's distance to --target-l0",
        used_by=("jumprelu",),
    )
    l0_coefficient: float | None = option(
        None,
        "training",
        "weight of the L0 penalty (default: adapted in every step so that L0 reaches --target-l0)",
        WEIGHT,
        used_by=("jumprelu",),
    )
    l1_coefficient: float | None = option(
        None,
        "training",
        "weight of the L1 penalty (default: adapted in every step so that L0 reaches --target-l0)",
        WEIGHT,
        used_by=("relu",),
    )
    target_l0: float = option(
        32.0,
        "training",
        "number of active features per token that training reaches and keeps, unless a coefficient is given",
        (1e-3, 1e9),
        used_by=("jumprelu", "relu"),
    )
    sparsity_warm_up: float = option(
        0.05,
        "training",
        "share of the steps in which the weight of the penalty rises from 0, and L0 goes from its start to --target-l0",
        SHARE,
        used_by=("jumprelu", "relu"),
    )
    normalize_decoder: bool = option(
        True, "training", "keep each decoder row at norm 1; the part of its gradient along the row is removed"
    )
    clip_norm: float = option(1.0, "training", "largest norm of the whole gradient; 0 does not clip", WEIGHT)
    dead_tokens: int = option(
        200_000, "training", "number of tokens after which a feature that did not fire counts as dead", ANY_WHOLE
    )
    pre_act_loss_coefficient: float = option(
        0.0,
        "training",
        "weight of the loss that moves dead features back towards their threshold",
        WEIGHT,
        used_by=("jumprelu",),
    )
    aux_loss_coefficient: float = option(
        1.0,
        "training",
        "weight of the loss that lets dead features learn what the others leave unexplained (AuxK)",
        WEIGHT,
        used_by=TOPK_FAMILY,
    )
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "training", "number format of the SAE's matrix products; its weights are always float32"
    )

    buffer_tokens: int = option(
        131_072, "running", "number of activations held in memory, from which batches are drawn at random", COUNT
    )
    forward_tokens: int = option(
        8192, "running", "number of tokens, with padding, that the language model computes at a time", COUNT
    )
    prefetch: int | None = option(
        None,
        "running",
        "number of times --forward-tokens that the language model computes ahead while the SAE is trained (default: on a GPU "
        "half of --buffer-tokens, on a CPU 0, where both need the same cores)",
        (0, 10**6),
    )
    device: str = option("auto", "running", "where to compute: cpu, cuda, cuda:N, or auto for a GPU where there is one")
    seed: int = option(42, "running", "seed of all random numbers: weights, order of the dialogues, batches", ANY_WHOLE)
    data_seed: int | None = option(
        None, "running", "seed of the order of the dialogues and of the batches alone (default: --seed)", ANY_WHOLE
    )
    log_every: int = option(25, "running", "number of steps between two points of the training curves", COUNT)
    log: Literal["wandb", "tensorboard"] | None = option(
        None,
        "running",
        "logger that gets the training curves as the run goes, beside metrics.jsonl; its package must be installed (default: "
        "none)",
    )
    checkpoint_every: int = option(
        500, "running", "number of steps between two checkpoints; 0 writes none", (0, 10**12)
    )
    keep_checkpoints: int | None = option(
        None,
        "running",
        "number of the newest checkpoints of which the SAE stays in the folder, also at the end: checkpoints/sae-step-N, which "
        "fastsae evaluate and load read (default: none; --resume needs the newest checkpoint alone, which the end removes)",
        COUNT,
    )
    shard_features: int = option(
        1,
        "processes",
        "number of processes that share the features of an SAE, each holding its part of the weights; the number of processes "
        "that torchrun starts is a multiple of it, and groups of so many train on different tokens",
        (1, 10**6),
    )
    reduce_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "processes",
        "number format in which processes send each other their parts of a reconstruction; sums are float32 in either",
    )
    overlap_chunks: int = option(
        1,
        "processes",
        "number of parts of a batch; the reconstruction of one is summed over the processes while the next is computed",
        (1, 1000),
    )
    process_timeout: float = option(
        600.0, "processes", "number of seconds after which a process that waits for another one gives up", (1, 10**6)
    )

    def __post_init__(self) -> None:
        validate(self)

    @property
    def is_topk(self) -> bool:
        """Whether a number of active features, `k`, takes the place of a penalty."""
        return self.architecture in TOPK_FAMILY

    def n_features(self, d_in: int) -> int:
        """`d_sae` for activations of width `d_in`, its default resolved."""
        return self.d_sae or self.expansion * d_in

    @property
    def subtracts_b_dec(self) -> bool:
        """`apply_b_dec_to_input`, its default resolved."""
        chosen = self.apply_b_dec_to_input
        return self.is_topk if chosen is None else chosen

    @property
    def sparsity_coefficient(self) -> float | None:
        """The given weight of the penalty; None where it adapts, and for the TopK family."""
        return {"jumprelu": self.l0_coefficient, "relu": self.l1_coefficient}.get(self.architecture)

    @property
    def controls_l0(self) -> bool:
        """Whether training keeps L0 at `target_l0`."""
        return not self.is_topk and self.sparsity_coefficient is None

    @property
    def expected_l0(self) -> float | None:
        """Active features per token that the run should end with: `k`, or `target_l0` where that has an effect, or None."""
        if self.is_topk:
            return self.k
        aims = self.controls_l0 or (self.architecture == "jumprelu" and self.sparsity == "quadratic")
        return self.target_l0 if aims else None

    @property
    def dead_features_learn(self) -> bool:
        """Whether the loss has a term for dead features, so that training must know them."""
        if self.is_topk:
            return self.aux_loss_coefficient > 0
        return self.architecture == "jumprelu" and self.pre_act_loss_coefficient > 0

    @property
    def order_seed(self) -> int:
        """`data_seed`, its default resolved."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return self.tokens // self.batch_size

    def batches_ahead(self, device_type: str, n_processes: int = 1) -> int:
        """`prefetch`, its default resolved: on a GPU as many batches of the model as a refill of a process's buffer takes."""
        if self.prefetch is not None:
            return self.prefetch
        return 0 if device_type == "cpu" else -(-self.buffer_tokens // (2 * n_processes * self.forward_tokens))


def field_names() -> list[str]:
    """Names of all options."""
    return [f.name for f in fields(TrainConfig)]
