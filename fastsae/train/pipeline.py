"""From names to the objects of a run: dialogues, model, residual stream, held-out split."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch

from fastsae.data.activations import (
    ResidualStream,
    check_layer,
    check_vocabulary,
    decoder_layers,
    n_embeddings,
    position_limit,
    unsupported,
)
from fastsae.data.chat import ChatDataset, Dialogue, load_chats
from fastsae.data.chat_template import ChatTemplate
from fastsae.data.dedup import dedup_ngrams
from fastsae.data.dropped import Dropped
from fastsae.data.language_model import load_model
from fastsae.data.model_dtype import dtype_name
from fastsae.data.progress import with_bar
from fastsae.data.sequencing import FastSequencer, render
from fastsae.data.special_tokens import SpecialTokens, find_special_tokens
from fastsae.data.splicing import SplicedModel
from fastsae.errors import FastsaeError, UsageError, is_out_of_memory
from fastsae.sae import SparseAutoencoder
from fastsae.train.config import ModelDtype, TrainConfig
from fastsae.train.limits import check_memory

_CHECKED: Dialogue = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
]

_ROLES_REPORTED = 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pipeline:
    """Model and data of a run.

    Attributes:
        config: The options, with those resolved that only the model can tell: `layer` and `model_dtype`.
        residual: Model and layer.
        tokenizer: The model's.
        max_length: Tokens after which a dialogue is cut off: `config.max_length`, or fewer where the model has fewer positions.
        dialogues: The dataset.
        train: Indices into `dialogues`.
        held_out: Indices into `dialogues`.
        special_tokens: What the chat template writes around turns.
    """

    config: TrainConfig
    residual: ResidualStream
    tokenizer: Any
    max_length: int
    dialogues: Sequence[Dialogue]
    train: list[int]
    held_out: list[int]
    special_tokens: SpecialTokens

    @property
    def unknown_roles(self) -> dict[str, int]:
        """The most frequent role words that no chat template is known to know, with their numbers of dialogues."""
        if not isinstance(self.dialogues, ChatDataset):
            return {}
        return {word[:40]: n for word, n in self.dialogues.unknown_roles.most_common(_ROLES_REPORTED)}

    def all_drops(self, *sequencers: FastSequencer) -> Dropped:
        """The dialogues that could not be used: rows of the dataset, and what the sequencers then dropped."""
        at_load = self.dialogues.drops if isinstance(self.dialogues, ChatDataset) else Dropped(len(self.dialogues))
        return sum((replace(sequencer.drops, seen=0) for sequencer in sequencers), at_load)

    def begins_with_bos(self) -> bool:
        """Whether the model sees a BOS token before the text of a context."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and _short_context(self.tokenizer, self.max_length)[:1] == [bos]

    def sequencer(self) -> FastSequencer:
        """Endless shuffled training batches."""
        return self._sequencer(self.train, seed=self.config.seed)

    def held_out_batches(self) -> FastSequencer:
        """One pass over the held-out dialogues."""
        return self._sequencer(self.held_out, shuffle=False, endless=False)

    def _sequencer(self, indices: list[int], **options: Any) -> FastSequencer:
        return FastSequencer(
            self.dialogues,
            indices,
            self.tokenizer,
            self.max_length,
            self.config.forward_tokens,
            n_embeddings=n_embeddings(self.residual.model),
            **options,
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


def build_pipeline(
    config: TrainConfig, *, progress: bool = False, evaluated: SparseAutoencoder | None = None
) -> Pipeline:
    """Loads and tests the model, loads the dialogues, drops repeated ones and splits the rest by `config.seed`.

    The model comes first: a wrong name or layer, or a model that cannot be evaluated rightly, then costs seconds, not a
    dataset.

    Args:
        config: The run.
        progress: Show progress bars.
        evaluated: The SAE that the pipeline is for; None where it is to train one, which takes more memory.

    Raises:
        UsageError: Model, dataset, layer or split do not exist, the model is of a kind that is not supported, `evaluated` is
            not of its width, or training would need more memory than there is.
        FastsaeError: A download failed or a file is damaged.
    """
    device = resolve_device(config.device)
    model, tokenizer = load_model(model_location(config.model), config.model_dtype, device, progress=progress)
    layer = len(decoder_layers(model)) // 2 if config.layer is None else config.layer
    found: Any = dtype_name(model.dtype)
    model_dtype = config.model_dtype or (found if found in get_args(ModelDtype) else None)
    config = replace(config, layer=layer, model_dtype=model_dtype)
    check_layer(model, layer)
    residual = ResidualStream(model, layer)
    if evaluated is None:
        check_memory(config, residual.d_in, model.dtype.itemsize, residual.device)
        _check_k(config, residual.d_in)
    elif evaluated.d_in != residual.d_in:
        raise UsageError(
            f"model {config.model!r}: expected activations of the SAE's width d_in = {evaluated.d_in}, got "
            f"{residual.d_in}; name the model that the SAE was trained on"
        )
    check_vocabulary(model, tokenizer)
    ChatTemplate(tokenizer).warn_of_lost_text()
    special_tokens = find_special_tokens(tokenizer)
    max_length = _max_length(model, config)
    _check_model(residual, tokenizer, max_length)
    dialogues = load_chats(config.dataset, config.split, progress=progress)
    train, held_out = split_dialogues(dialogues, config, progress=progress)
    logger.info("%d dialogues to train on, %d held out", len(train), len(held_out))
    return Pipeline(config, residual, tokenizer, max_length, dialogues, train, held_out, special_tokens)


def _check_k(config: TrainConfig, d_in: int) -> None:
    d_sae = config.n_features(d_in)
    if config.k is not None and config.k > d_sae:
        raise UsageError(
            f"k: expected at most the {d_sae:,} features of the SAE (--d-sae, --expansion), got {config.k:,}"
        )


def _max_length(model: Any, config: TrainConfig) -> int:
    limit = position_limit(model)
    if limit is None or limit >= config.max_length:
        return config.max_length
    logger.info(
        "dialogues are cut off at %d tokens, the model's own limit, below max_length %d", limit, config.max_length
    )
    return limit


def _check_model(residual: ResidualStream, tokenizer: Any, max_length: int) -> None:
    """Raises UsageError unless one short dialogue shows that the model is read and spliced rightly."""
    input_ids = torch.tensor([_short_context(tokenizer, max_length)])
    try:
        SplicedModel(residual).check(input_ids, torch.ones_like(input_ids))
    except FastsaeError:
        raise
    except Exception as error:  # whatever the model's own code raises
        if is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())[:300]
        raise unsupported(residual.model, f"it fails on a short dialogue ({type(error).__name__}: {text})") from error


def _short_context(tokenizer: Any, max_length: int) -> list[int]:
    """The token ids of a short dialogue; of its text alone where the chat template wants other roles."""
    try:
        return render(tokenizer, _CHECKED, max_length)
    except FastsaeError:
        ids: list[int] = tokenizer(_CHECKED[0]["content"], add_special_tokens=False)["input_ids"]
        return ids[:max_length]


def split_dialogues(
    dialogues: Sequence[Dialogue], config: TrainConfig, *, progress: bool = False
) -> tuple[list[int], list[int]]:
    """Indices `(train, held_out)` of the dialogues that survive the n-gram dedup, drawn by `config.seed`."""
    n_used = min(len(dialogues), config.max_dialogues or len(dialogues))
    kept = np.arange(n_used)
    if config.dedup_words:
        used = (dialogues[i] for i in range(n_used))
        bar = with_bar(used, "removing repeated dialogues", "dialogue", total=n_used, progress=progress)
        indices, report = dedup_ngrams(bar, config.dedup_words)
        kept = np.asarray(indices, dtype=np.int64)
        logger.info("dedup: kept %d, dropped %d (%d too short to judge)", report.kept, report.dropped, report.too_short)
    if config.eval_dialogues >= len(kept):
        raise UsageError(
            f"eval_dialogues: expected fewer than the dialogues of {config.dataset!r} that are left after dedup, "
            f"{len(kept)} of {n_used}, got {config.eval_dialogues}; lower it, use more dialogues "
            "(--max-dialogues), or keep repeated ones with --dedup-words 0"
        )
    order = np.random.default_rng(config.seed).permutation(kept)
    return order[config.eval_dialogues :].tolist(), order[: config.eval_dialogues].tolist()
