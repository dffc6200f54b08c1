"""Evaluate an SAE on held-out dialogues: one streaming pass, never more than a few thousand tokens in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsae.data.activations import ResidualStream
from fastsae.data.sequencing import TokenBatch
from fastsae.errors import FastsaeError, UsageError
from fastsae.evaluate.contexts import TopDialogues, top_contexts
from fastsae.evaluate.losses import LossSums, SplicedModel
from fastsae.evaluate.metrics import Metrics, ReconstructionSums, ratio
from fastsae.sae import SparseAutoencoder
from fastsae_kernels import SparseActs

N_TOP_FEATURES = 10
_GROUP_TOKENS = 4096  # run through model and SAE together
_GROUP_LOGITS = 2**28  # elements; two such tensors are held at a time


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        metrics: Name to number, None where a metric is undefined on this data. Reconstruction and sparsity are defined at
            `fastsae.evaluate.metrics.ReconstructionSums.metrics`, losses at `fastsae.evaluate.losses.LossSums.metrics`.
        feature_counts: `[d_sae]` int64, tokens on which each feature fires, position 0 left out.
        special_tokens: Rows of the token table, see `ReconstructionSums.token_table`.
        top_special_features: The ten features with the largest mean activation over all special tokens beyond position 0
            (those on which they do not fire count as 0), largest first. Each row: `feature`, `mean_activation` (that
            mean), `mean_activation_by_token` (the same for each special token), `share_special` and `share_other` (of
            special and other tokens, on which it fires), `contexts` (top 5, see `fastsae.evaluate.contexts`).
    """

    metrics: Metrics
    feature_counts: Tensor
    special_tokens: list[dict[str, str | int | float | None]]
    top_special_features: list[dict[str, Any]]


@torch.no_grad()
def evaluate(
    sae: SparseAutoencoder,
    residual: ResidualStream,
    tokenizer: Any,
    batches: Iterable[TokenBatch],
    *,
    special_ids: dict[str, int],
    progress: bool = True,
) -> Evaluation:
    """Measures reconstruction, sparsity, special tokens and the model's loss with the SAE spliced in.

    Three passes of the model per dialogue: a clean one, and from the SAE's layer on one with the reconstruction and one
    with zeros in its place. Memory: the logits of a few thousand tokens, twice, in the model's dtype.

    Args:
        sae: The SAE; its features are never made dense.
        residual: Model and layer that the SAE belongs to.
        tokenizer: Writes the tokens of the contexts.
        batches: Dialogues, one per row, each of them once (an endless sequencer never ends here).
        special_ids: Token to id, from `fastsae.data.sequencing.special_token_ids`; may be empty.
        progress: Show a progress bar.

    Raises:
        UsageError: The SAE's width is not that of the residual stream, or there are no dialogues.
        FastsaeError: An activation or a reconstruction is NaN or infinite.

    Numerics:
        Features in the SAE's dtype, errors and all sums in fp64, log-probabilities in fp32.
    """
    if sae.d_in != residual.d_in:
        raise UsageError(
            f"the SAE reads activations of width {sae.d_in}, but layer {residual.layer} of the model gives {residual.d_in}; "
            "evaluate it with the model it was trained on"
        )
    from tqdm import tqdm

    sums = ReconstructionSums(sae.d_in, sae.d_sae, list(special_ids.values()), sae.device)
    top = TopDialogues(sae.d_sae, device=sae.device)
    losses, model = LossSums(), SplicedModel(residual)
    for batch in tqdm(batches, desc="evaluating", unit="batch", disable=not progress):
        for group in _row_groups(batch, residual.model.config):
            _add_group(sae, model, group, sums, top, losses)
    if not top.tokens:
        raise UsageError("no dialogues to evaluate: expected at least one batch, got none")
    return Evaluation(
        metrics={**sums.metrics(), **losses.metrics()},
        feature_counts=sums.feature_counts.cpu(),
        special_tokens=sums.token_table(list(special_ids)),
        top_special_features=_top_special_features(sae, residual, tokenizer, sums, top, list(special_ids)),
    )


def _row_groups(batch: TokenBatch, config: Any) -> Iterator[TokenBatch]:
    """Cuts a batch into groups of rows that fit in memory with their logits; a row is never cut."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = min(_GROUP_TOKENS, _GROUP_LOGITS // text_config.vocab_size)
    size = max(1, limit // max(1, batch.input_ids.shape[1]))
    for start in range(0, len(batch.input_ids), size):
        rows = slice(start, start + size)
        mask = batch.attention_mask[rows].bool()
        longest = int(mask.sum(1).max())
        yield TokenBatch(batch.input_ids[rows, :longest], mask[:, :longest], batch.dialogue_ids[rows])


def _add_group(
    sae: SparseAutoencoder,
    model: SplicedModel,
    batch: TokenBatch,
    sums: ReconstructionSums,
    top: TopDialogues,
    losses: LossSums,
) -> None:
    input_ids, attention_mask = batch.input_ids, batch.attention_mask
    hidden, logits = model.clean(input_ids, attention_mask)
    rows, positions = attention_mask.nonzero(as_tuple=True)
    x = hidden[rows.to(hidden.device), positions.to(hidden.device)]
    if not torch.isfinite(x).all():
        model.residual(input_ids, attention_mask)  # raises, and names the layer and the share
    if not torch.isfinite(logits.amax(-1)[attention_mask.to(logits.device)]).all():  # -inf for some tokens is fine
        raise FastsaeError(
            "the language model's own logits hold NaN or Inf although this layer does not: a later layer is broken. "
            "Get the model's files again, or try --model-dtype float32"
        )
    sae_out, acts = _reconstruct(sae, x.to(sae.device))

    late = positions > 0
    for replacement in (sae_out, None):
        spliced = hidden.clone()
        where = rows[late].to(hidden.device), positions[late].to(hidden.device)
        spliced[where] = 0 if replacement is None else replacement[late.to(sae.device)].to(hidden)
        new_logits = model.spliced(input_ids, attention_mask, spliced)
        if replacement is None:
            losses.add_zero(new_logits, input_ids, attention_mask)
        else:
            losses.add_spliced(logits, new_logits, input_ids, attention_mask)
            del logits

    token_rows = [ids[mask] for ids, mask in zip(input_ids, attention_mask, strict=True)]
    token_ids, rows, positions = (t.to(sae.device) for t in (input_ids[attention_mask], rows, positions))
    sums.add(x.to(sae.device), sae_out, acts, token_ids, positions, rows)
    top.add(acts, positions, rows, token_rows, batch.dialogue_ids.tolist())


def _reconstruct(sae: SparseAutoencoder, x: Tensor) -> tuple[Tensor, SparseActs]:
    """The reconstruction `[N, d_in]` and the features `[N, d_sae]`, packed."""
    try:
        acts = sae.encode_sparse(x).packed()
    except ValueError as error:  # finite x of the right width: the weights are NaN or Inf, or overflow
        raise FastsaeError(f"the SAE cannot encode finite activations: {error}. Its weights are damaged") from error
    sae_out = sae.decode(acts)
    bad = ~torch.isfinite(sae_out).all(-1)
    if bad.any():
        raise FastsaeError(
            f"the SAE's reconstruction of {100 * bad.double().mean().item():.3g} % of the tokens is NaN or infinite, in "
            f"{str(sae.dtype).removeprefix('torch.')}. Its weights are damaged, or too large for this dtype"
        )
    return sae_out, acts


def _top_special_features(
    sae: SparseAutoencoder,
    residual: ResidualStream,
    tokenizer: Any,
    sums: ReconstructionSums,
    top: TopDialogues,
    names: list[str],
) -> list[dict[str, Any]]:
    counts = sums.count[0]
    n_special, n_other = counts[:-1].sum().item(), counts[-1].item()
    strength = sums.special_acts.sum(0)
    order = strength.argsort(descending=True, stable=True)[:N_TOP_FEATURES]
    features = order[strength[order] > 0].tolist()
    contexts = top_contexts(sae, residual, tokenizer, top, features) if features else []
    rows = []
    for feature, examples in zip(features, contexts, strict=True):
        by_token = zip(names, sums.special_acts[:, feature].tolist(), counts.tolist(), strict=False)
        on_special = int(sums.special_counts[feature])
        rows.append(
            {
                "feature": feature,
                "mean_activation": ratio(strength[feature].item(), n_special),
                "mean_activation_by_token": {name: ratio(total, count) for name, total, count in by_token},
                "share_special": ratio(on_special, n_special),
                "share_other": ratio(int(sums.feature_counts[feature]) - on_special, n_other),
                "contexts": examples,
            }
        )
    return rows
