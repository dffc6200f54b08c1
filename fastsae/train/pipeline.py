"""From names to the objects of a run: dialogues, model, residual stream, held-out split."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

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
from fastsae.data.dropped import Dropped
from fastsae.data.language_model import load_model
from fastsae.data.model_dtype import dtype_name
from fastsae.data.packing import check_packing
from fastsae.data.random_model import with_random_weights
from fastsae.data.sequencing import BlockSequencer, FastSequencer, PackedSequencer, Sequencer
from fastsae.data.sinks import MAX_NORM_MULTIPLE
from fastsae.data.special_tokens import SpecialTokens, find_special_tokens
from fastsae.data.splicing import SplicedModel
from fastsae.data.texts import load_texts
from fastsae.data.tokens import TokenRows, doubles_bos, render
from fastsae.disk import name_of
from fastsae.environment import n_processes_here
from fastsae.errors import FastsaeError, UsageError, is_out_of_memory
from fastsae.sae import SparseAutoencoder
from fastsae.train import fingerprint
from fastsae.train.config import ModelDtype, Sequencing, TrainConfig
from fastsae.train.held_out import n_affordable_dialogues, split_dialogues
from fastsae.train.limits import check_memory
from fastsae.train.validate import model_options

_CHECKED: Dialogue = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
]
_ALSO_CHECKED: Dialogue = [
    {"role": "user", "content": "Name three colours of the rainbow, and the order they come in, please."},
    {"role": "assistant", "content": "Red, orange and yellow, in this order from the outside."},
]

_ROLES_REPORTED = 20
GIVEN = "given-as-an-object"  # the name of a model or data that the caller has in hand

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pipeline:
    """Model and data of a run.

    Attributes:
        config: The options, with those resolved that only model and data can tell: `layer`, `model_dtype`, `eval_dialogues`.
        residual: Model and layer.
        tokenizer: The model's.
        max_length: Tokens after which a dialogue is cut off: `config.max_length`, or fewer where the model has fewer positions.
        dialogues: The dataset.
        train: Indices into `dialogues`, or into `texts` where there are any.
        held_out: Indices into `dialogues`.
        special_tokens: What the chat template writes around turns.
        texts: Plain texts to train on in the place of dialogues; None where there are none.
        part: The number of this process among those that train on the dialogues together, and how many there are.
    """

    config: TrainConfig
    residual: ResidualStream
    tokenizer: Any
    max_length: int
    dialogues: Sequence[Dialogue]
    train: list[int]
    held_out: list[int]
    special_tokens: SpecialTokens
    texts: Sequence[str] | None = None
    part: tuple[int, int] = (0, 1)

    def resolved(self, config: TrainConfig) -> TrainConfig:
        """A config of this pipeline with those options resolved that only model and data can tell."""
        layer = self.config.layer if config.layer is None else config.layer
        own = self.config
        return replace(config, layer=layer, model_dtype=own.model_dtype, eval_dialogues=own.eval_dialogues)

    def fingerprints(self) -> dict[str, str]:
        """By which a resumed run notices that dataset, model or plain texts are others."""
        found = {
            "dataset": fingerprint.of_dialogues(self.dialogues, self.config.max_dialogues),
            "model": fingerprint.of_model(self.residual.model, self.tokenizer),
        }
        return found if self.texts is None else {**found, "text": fingerprint.of_dialogues(self.texts)}

    def facts(self) -> dict[str, Any]:
        """What tells the held-out dialogues, as this model reads them, apart from others, and says what they are."""
        config, found = self.config, self.fingerprints()
        held_out = json.dumps([found["dataset"], self.held_out, self.max_length])
        return {
            "model": name_of(config.model),
            "random_model": config.random_model,
            "model_fingerprint": found["model"],
            "layer": config.layer,
            "hook": config.hook,
            "dataset": name_of(config.dataset),
            "split": config.split,
            "held_out": hashlib.sha256(held_out.encode()).hexdigest(),
        }

    @property
    def max_norm_multiple(self) -> float:
        """How many times longer than the median token an attention sink is."""
        return self.config.max_norm_multiple or MAX_NORM_MULTIPLE

    @property
    def trained_on(self) -> Sequence[Dialogue] | Sequence[str]:
        """The dataset that `train` chooses from."""
        return self.dialogues if self.texts is None else self.texts

    @property
    def unknown_roles(self) -> dict[str, int]:
        """The most frequent role words that no chat template is known to know, with their numbers of dialogues."""
        if not isinstance(self.dialogues, ChatDataset):
            return {}
        return {word[:40]: n for word, n in self.dialogues.unknown_roles.most_common(_ROLES_REPORTED)}

    def all_drops(self, *of_sequencers: Dropped) -> Dropped:
        """The dialogues that could not be used: rows of the dataset, and what sequencers then dropped."""
        at_load = self.dialogues.drops if isinstance(self.dialogues, ChatDataset) else Dropped(len(self.dialogues))
        return sum((replace(drops, seen=0) for drops in of_sequencers), at_load)

    def begins_with_bos(self) -> bool:
        """Whether the model sees a BOS token before the text of a context."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and _short_context(self.tokenizer, self.max_length)[:1] == [bos]

    def sequencer(self) -> Sequencer:
        """Endless shuffled training batches, of this process's part of the dialogues."""
        config = self.config
        # texts are no dialogues that the evaluation reads as well, so the model's limit does not cut them
        max_length = self.max_length if self.texts is None else config.max_length
        items = self.trained_on, self.train, self.tokenizer, max_length
        return self._sequencer(config.sequencing, *items, seed=config.order_seed, part=self.part)

    def held_out_batches(self, sequencing: Sequencing = "fast") -> Sequencer:
        """One pass over the held-out dialogues, each whole and alone whatever the sequencing of the training, or as said."""
        items = self.dialogues, self.held_out, self.tokenizer, self.max_length
        return self._sequencer(sequencing, *items, shuffle=False, endless=False)

    def _sequencer(self, sequencing: Sequencing, *items: Any, **options: Any) -> Sequencer:
        options |= {"batch_tokens": self.config.forward_tokens, "n_embeddings": n_embeddings(self.residual.model)}
        if sequencing == "block":
            return BlockSequencer(*items, block_length=self.config.block_length, **options)
        return PackedSequencer(*items, **options) if sequencing == "packed" else FastSequencer(*items, **options)


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


@dataclass(frozen=True)
class Given:
    """What the caller of a run has in hand, in the place of what the options name.

    Attributes:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer; given together with the model.
        dialogues: Any iterable of dialogues, each a list of `{"role", "content"}` messages.
        texts: Any iterable of plain texts, or of lists of token ids, to train on.
    """

    model: Any = None
    tokenizer: Any = None
    dialogues: Iterable[Dialogue] | None = None
    texts: Iterable[Any] | None = None

    def named(self, config: TrainConfig) -> TrainConfig:
        """The options with names for what is given.

        Raises:
            UsageError: A model without its tokenizer, or the other way round, or in training mode.
        """
        if (self.model is None) != (self.tokenizer is None):
            raise UsageError("model: expected a model and its tokenizer together, got one of them")
        if getattr(self.model, "training", False):
            raise UsageError("model: expected a model in evaluation mode, got one in training mode; call its eval()")
        names = {"dataset": self.dialogues, "text": self.texts}
        changes = {name: GIVEN for name, value in names.items() if value is not None}
        if self.model is not None:
            changes["model"] = str(getattr(self.model, "name_or_path", "") or GIVEN)
        return replace(config, **changes)  # type: ignore[arg-type]


def build_pipeline(
    config: TrainConfig,
    trained: Sequence[TrainConfig] = (),
    *,
    progress: bool = False,
    evaluated: SparseAutoencoder | None = None,
    given: Given | None = None,
    part: tuple[int, int] = (0, 1),
) -> Pipeline:
    """Loads and tests the model, loads the dialogues, drops repeated ones and splits the rest by `config.seed`.

    The model comes first: a wrong name or layer, or a model that cannot be evaluated rightly, then costs seconds, not a
    dataset.

    Args:
        config: The run.
        trained: The options of all SAEs that are trained together, where there are several.
        progress: Show progress bars.
        evaluated: The SAE that the pipeline is for; None where it is to train one, which takes more memory.
        given: Objects in the place of what the options name.
        part: The number of this process among those that train together, and how many there are.

    Raises:
        UsageError: Model, dataset, layer or split do not exist, the model is of a kind that is not supported, `evaluated` is
            not of its width, or training would need more memory than there is.
        FastsaeError: A download failed or a file is damaged.
    """
    given = given or Given()
    model, tokenizer = given.model, given.tokenizer
    if model is None:
        model, tokenizer = load_model(
            model_location(config.model),
            config.model_dtype,
            resolve_device(config.device),
            options=model_options(config.model_kwargs),
            progress=progress,
        )
    if config.random_model:
        model = with_random_weights(model, config.order_seed)
    layer = len(decoder_layers(model)) // 2 if config.layer is None else config.layer
    found: Any = dtype_name(model.dtype)
    model_dtype = config.model_dtype or (found if found in get_args(ModelDtype) else None)
    config = replace(config, layer=layer, model_dtype=model_dtype)
    check_layer(model, layer)
    residual = ResidualStream(model, layer, config.hook)
    if evaluated is None:
        n_sharing = n_processes_here() if residual.device.type == "cpu" else 1
        itemsize = model.dtype.itemsize
        check_memory(trained or [config], residual.d_in, itemsize, residual.device, part[1], n_sharing)
        for sae in trained or [config]:
            check_layer(model, layer if sae.layer is None else sae.layer)
            check_k(sae, residual.d_in)
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
    if config.hook in ("attn_out", "mlp_out"):  # which blocks of one model may differ in
        for other in sorted({sae.layer for sae in trained if sae.layer is not None} - {layer}):
            _check_model(ResidualStream(model, other, config.hook), tokenizer, max_length)
    _tell_of_doubled_bos(tokenizer)
    if evaluated is None:
        check_sequencing(residual, tokenizer, config, max_length)
    if given.dialogues is not None:
        dialogues: Sequence[Dialogue] = ChatDataset(list(given.dialogues), GIVEN, progress=progress)
    else:
        dialogues = load_chats(config.dataset, config.split, limit=config.max_dialogues, progress=progress)

    def n_affordable(order: Sequence[int]) -> int:
        rows = TokenRows(dialogues, tokenizer, max_length, None)
        layers = [layer if sae.layer is None else sae.layer for sae in trained or [config]]
        return n_affordable_dialogues(model, layers, rows, order, config.tokens)

    options = {} if evaluated is not None else {"n_affordable": n_affordable}
    train, held_out = split_dialogues(dialogues, config, **options, progress=progress)
    config = replace(config, eval_dialogues=len(held_out))
    texts: Sequence[Any] | None = None
    if given.texts is not None:
        texts = list(given.texts)
    elif config.text is not None and evaluated is None:
        texts = load_texts(config.text, n_tokens=config.tokens, progress=progress)
    if texts is not None:
        if not len(texts):
            raise UsageError(f"text: expected at least one text, got none in {config.text}")
        train = list(range(len(texts)))
    what = "dialogues" if texts is None else "texts"
    logger.info("%d %s to train on, %d dialogues held out", len(train), what, len(held_out))
    return Pipeline(config, residual, tokenizer, max_length, dialogues, train, held_out, special_tokens, texts, part)


def check_k(config: TrainConfig, d_in: int) -> None:
    """Raises UsageError where more features are to be active than there are."""
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


def _tell_of_doubled_bos(tokenizer: Any) -> None:
    try:
        if doubles_bos(tokenizer, _CHECKED):
            logger.info(
                "the chat template writes the BOS token twice at the start of a dialogue; one of them is left out"
            )
    except FastsaeError:  # a template that refuses this dialogue
        pass


def check_sequencing(residual: ResidualStream, tokenizer: Any, config: TrainConfig, max_length: int) -> None:
    """Raises UsageError where the model cannot take the rows that the sequencing makes."""
    limit = position_limit(residual.model)
    if config.sequencing == "block" and limit is not None and config.block_length > limit:
        raise UsageError(
            f"block_length: expected at most the {limit:,} positions of the model, got {config.block_length:,}"
        )
    if config.sequencing == "packed":
        first, second = (_short_context(tokenizer, max_length, chat) for chat in (_CHECKED, _ALSO_CHECKED))
        check_packing(residual, first, second)


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


def _short_context(tokenizer: Any, max_length: int, dialogue: Dialogue = _CHECKED) -> list[int]:
    """The token ids of a short dialogue; of its text alone where the chat template wants other roles."""
    try:
        return render(tokenizer, dialogue, max_length)
    except FastsaeError:
        ids: list[int] = tokenizer(dialogue[0]["content"], add_special_tokens=False)["input_ids"]
        return ids[:max_length]
