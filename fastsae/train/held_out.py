"""Which dialogues are kept for the evaluation, and how many of them a run can afford."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastsae.data.activations import decoder_layers
from fastsae.data.chat import Dialogue
from fastsae.data.dedup import dedup_ngrams
from fastsae.data.progress import with_bar
from fastsae.data.tokens import TokenRows
from fastsae.errors import UsageError
from fastsae.train.config import TrainConfig

SHARE_OF_THE_RUN = 0.1  # that the evaluation takes of a run's time
_FEWEST, _MOST = 16, 500  # dialogues
_SAMPLE = 256  # dialogues whose mean length is taken

logger = logging.getLogger(__name__)


def split_dialogues(
    dialogues: Sequence[Dialogue],
    config: TrainConfig,
    n_affordable: Callable[[Sequence[int]], int] = lambda order: _MOST,
    *,
    progress: bool = False,
) -> tuple[list[int], list[int]]:
    """Indices `(train, held_out)` of the dialogues that survive the n-gram dedup, drawn by `config.seed`.

    Fewer that are held out are the first of more that are.

    Args:
        dialogues: The dataset.
        config: The run.
        n_affordable: Says how many of the dialogues, given in a random order, to hold out where the options don't; a tenth of
            them at most are.
        progress: Show a progress bar.

    Raises:
        UsageError: There are no more dialogues than are to be held out.
    """
    n_used = min(len(dialogues), config.max_dialogues or len(dialogues))
    kept = np.arange(n_used)
    if config.dedup_words:
        used = (dialogues[i] for i in range(n_used))
        bar = with_bar(used, "removing repeated dialogues", "dialogue", total=n_used, progress=progress)
        indices, report = dedup_ngrams(bar, config.dedup_words)
        kept = np.asarray(indices, dtype=np.int64)
        logger.info("dedup: kept %d, dropped %d (%d too short to judge)", report.kept, report.dropped, report.too_short)
    order = np.random.default_rng(config.order_seed).permutation(kept).tolist()
    n_held_out = config.eval_dialogues or min(n_affordable(order), max(1, len(order) // 10))
    if n_held_out >= len(order):
        raise UsageError(
            f"eval_dialogues: expected fewer than the dialogues of {config.dataset!r} that are left after dedup, "
            f"{len(kept)} of {n_used}, got {n_held_out}; lower it, use more dialogues "
            "(--max-dialogues), or keep repeated ones with --dedup-words 0"
        )
    return order[n_held_out:], order[:n_held_out]


def n_affordable_dialogues(
    model: Any, layers: Sequence[int], rows: TokenRows, order: Sequence[int], training_tokens: int
) -> int:
    """How many of the dialogues `order` an evaluation can read in a tenth of the run's time, from 16 to 500.

    The time is counted in products of the language model and not measured, so that a run has one answer on any machine:
    in training a token goes through the blocks up to the deepest layer; in the evaluation through all of them and the head,
    and again through what follows a layer, once for the layer and once for each of its SAEs. What the SAEs themselves cost is
    left out, which makes the estimate a careful one.

    Args:
        model: The language model.
        layers: The layer of each SAE.
        rows: The dataset as tokens.
        order: Indices into it, in a random order.
        training_tokens: Tokens that the run trains on.
    """
    tokens = SHARE_OF_THE_RUN * training_tokens / cost_of_evaluation(model, layers)
    lengths = [len(ids) for _, ids in rows.read(order[:_SAMPLE])[0]]
    mean_length = sum(lengths) / len(lengths) if lengths else 1.0
    return int(min(max(tokens / mean_length, _FEWEST), _MOST))


def cost_of_evaluation(model: Any, layers: Sequence[int]) -> float:
    """Products of the language model for a token of the evaluation, as a multiple of those for a token of training.

    Args:
        model: The language model.
        layers: The layer of each SAE.
    """
    blocks = [sum(weight.numel() for weight in block.parameters()) for block in decoder_layers(model)]
    head = (model.get_output_embeddings() or model.get_input_embeddings()).weight.numel()
    behind = [sum(blocks[layer + 1 :]) + head for layer in (*layers, *set(layers))]
    return (sum(blocks) + head + sum(behind)) / sum(blocks[: max(layers) + 1])
