"""From names to the objects of a run: dialogues, model, residual stream, held-out split."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastsae.data.activations import ResidualStream, check_layer, decoder_layers, load_model
from fastsae.data.chat import Dialogue, load_chats
from fastsae.data.dedup import dedup_ngrams
from fastsae.data.sequencing import FastSequencer, special_token_ids
from fastsae.errors import UsageError
from fastsae.train.config import TrainConfig
from fastsae.train.limits import check_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pipeline:
    """Model and data of a run; `train` and `held_out` are indices into `dialogues`."""

    residual: ResidualStream
    tokenizer: Any
    dialogues: Sequence[Dialogue]
    train: list[int]
    held_out: list[int]
    special_ids: dict[str, int]

    def sequencer(self, config: TrainConfig) -> FastSequencer:
        """Endless shuffled training batches."""
        return FastSequencer(
            self.dialogues, self.train, self.tokenizer, config.max_length, config.forward_tokens, seed=config.seed
        )

    def held_out_batches(self, config: TrainConfig) -> FastSequencer:
        """One pass over the held-out dialogues."""
        return FastSequencer(
            self.dialogues,
            self.held_out,
            self.tokenizer,
            config.max_length,
            config.forward_tokens,
            shuffle=False,
            endless=False,
        )


def resolve_device(name: str) -> str:
    """`auto` is the GPU where there is one.

    Raises:
        UsageError: This machine has no such GPU.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    _, _, number = name.partition("cuda:")
    count = torch.cuda.device_count()
    if name.startswith("cuda") and int(number or 0) >= count:
        raise UsageError(
            f"device: expected one that PyTorch finds here, cpu or one of {count} CUDA devices, got {name!r}"
        )
    return name


def model_location(name: str) -> str:
    """The folder of the embedded model for `demo`, else the name itself."""
    if name != "demo":
        return name
    from fastsae.data import demo

    return str(demo.model_path())


def build_pipeline(config: TrainConfig, *, for_training: bool = True) -> Pipeline:
    """Loads model and dialogues, drops repeated dialogues and splits the rest by `config.seed`.

    The model comes first: a wrong name or layer then costs seconds, not a dataset.

    Raises:
        UsageError: Model, dataset, layer or split do not exist, or training would need more memory than there is.
        FastsaeError: A download failed or a file is damaged.
    """
    model, tokenizer = load_model(model_location(config.model), config.model_dtype, resolve_device(config.device))
    layer = len(decoder_layers(model)) // 2 if config.layer is None else config.layer
    check_layer(model, layer)
    residual = ResidualStream(model, layer)
    if for_training:
        check_memory(config, residual.d_in, model.dtype.itemsize, residual.device)
    d_sae = config.d_sae or config.expansion * residual.d_in
    if config.k is not None and config.k > d_sae:
        raise UsageError(
            f"k: expected at most the {d_sae:,} features of the SAE (--d-sae, --expansion), got {config.k:,}"
        )
    special_ids = special_token_ids(tokenizer)
    dialogues = load_chats(config.dataset, config.split)
    train, held_out = split_dialogues(dialogues, config)
    logger.info("%d dialogues to train on, %d held out", len(train), len(held_out))
    return Pipeline(residual, tokenizer, dialogues, train, held_out, special_ids)


def split_dialogues(dialogues: Sequence[Dialogue], config: TrainConfig) -> tuple[list[int], list[int]]:
    """Indices `(train, held_out)` of the dialogues that survive the n-gram dedup, drawn by `config.seed`."""
    n_used = min(len(dialogues), config.max_dialogues or len(dialogues))
    kept = np.arange(n_used)
    if config.dedup_words:
        indices, report = dedup_ngrams((dialogues[i] for i in range(n_used)), config.dedup_words)
        kept = np.asarray(indices, dtype=np.int64)
        logger.info("dedup: kept %d, dropped %d (%d too short to judge)", report.kept, report.dropped, report.too_short)
    if config.eval_dialogues >= len(kept):
        raise UsageError(
            f"eval_dialogues: expected fewer than the dialogues of {config.dataset!r} that are left after dedup, "
            f"{len(kept)} of {n_used}, got {config.eval_dialogues}; lower it, use more dialogues (--max-dialogues), or keep repeated ones with --dedup-words 0"
        )
    order = np.random.default_rng(config.seed).permutation(kept)
    return order[config.eval_dialogues :].tolist(), order[: config.eval_dialogues].tolist()
