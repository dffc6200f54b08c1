"""Evaluate an SAE on held-out dialogues: one streaming pass, never more than a few thousand tokens in memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsae.data.activations import ResidualStream, text_config
from fastsae.data.progress import bar
from fastsae.data.sequencing import TokenBatch
from fastsae.data.sinks import MAX_NORM_MULTIPLE, SinkRule
from fastsae.data.special_tokens import SpecialTokens
from fastsae.data.splicing import SplicedModel, check_logits
from fastsae.errors import FastsaeError, UsageError
from fastsae.evaluate.contexts import TopDialogues, top_contexts
from fastsae.evaluate.losses import LossSums
from fastsae.evaluate.metrics import Metrics, ReconstructionSums, ratio
from fastsae.sae import SparseAutoencoder
from fastsae_kernels import SparseActs

N_TOP_FEATURES = 10
_GROUP_TOKENS = 4096  # run through model and SAE together
_GROUP_LOGITS = 2**28  # elements; two such tensors are held at a time
_HEAD_FLOP = 5e10  # largest product that gives logits: on a CPU an interrupt is heard only once it is done


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        metrics: Name to number, None where a metric is undefined on this data. Reconstruction and sparsity are defined at
            `fastsae.evaluate.metrics.ReconstructionSums.metrics`, losses at `fastsae.evaluate.losses.LossSums.metrics`.
            `norm_median` is the one by which sinks were told apart, see `fastsae.data.sinks`.
        feature_counts: `[d_sae]` int64, tokens on which each feature fires, attention sinks left out.
        special_tokens: Rows of the token table, see `ReconstructionSums.token_table`.
        top_special_features: The ten features with the largest mean activation over all special tokens that are no sinks
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
    special_tokens: SpecialTokens,
    n_dialogues: int | None = None,
    max_norm_multiple: float = MAX_NORM_MULTIPLE,
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
        special_tokens: From `fastsae.data.special_tokens.find_special_tokens`; may be empty.
        n_dialogues: Number of dialogues in `batches`, for the progress bar. None where it is not known.
        max_norm_multiple: How many times longer than the median token an attention sink is.
        progress: Show progress bars.

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
    names = special_tokens.names
    sums = ReconstructionSums(sae.d_in, sae.d_sae, len(names), sae.device)
    top = TopDialogues(sae.d_sae, device=sae.device)
    losses, model = LossSums(), SplicedModel(residual)
    with bar("evaluating", "dialogue", total=n_dialogues, progress=progress) as advance:
        first, served = itertools.tee(batches)
        is_sink = SinkRule.of(residual, first, max_norm_multiple)
        del first  # so that `tee` does not keep the batches that follow
        for batch in served:
            for group in _row_groups(batch, residual):
                _add_group(sae, model, group, special_tokens, is_sink, sums, top, losses)
                advance(len(group.input_ids))
    if not top.tokens:
        raise UsageError("no dialogues to evaluate: expected at least one batch, got none")
    return Evaluation(
        metrics={**sums.metrics(), "norm_median": is_sink.median_norm, **losses.metrics()},
        feature_counts=sums.feature_counts.cpu(),
        special_tokens=sums.token_table(names),
        top_special_features=_top_special_features(sae, residual, is_sink, tokenizer, sums, top, names, progress),
    )


def _row_groups(batch: TokenBatch, residual: ResidualStream) -> Iterator[TokenBatch]:
    """Cuts a batch into groups of rows that fit in memory with their logits; a row is never cut."""
    n_logits = text_config(residual.model.config).vocab_size
    limit = min(_GROUP_TOKENS, _GROUP_LOGITS // n_logits)
    if residual.device.type == "cpu":
        limit = min(limit, int(_HEAD_FLOP / (2 * residual.d_in * n_logits)))
    size = max(1, limit // max(1, batch.input_ids.shape[1]))
    for start in range(0, len(batch.input_ids), size):
        rows = slice(start, start + size)
        longest = int(batch.attention_mask[rows].sum(1).max())
        yield batch[rows, :longest]


def _add_group(
    sae: SparseAutoencoder,
    model: SplicedModel,
    batch: TokenBatch,
    special_tokens: SpecialTokens,
    is_sink: SinkRule,
    sums: ReconstructionSums,
    top: TopDialogues,
    losses: LossSums,
) -> None:
    input_ids, attention_mask = batch.input_ids, batch.attention_mask.bool()
    hidden, logits = model.clean(input_ids, attention_mask)
    rows, positions = attention_mask.nonzero(as_tuple=True)
    x = hidden[rows.to(hidden.device), positions.to(hidden.device)]
    if not torch.isfinite(x).all():
        model.residual(input_ids, attention_mask)  # raises, and names the layer and the share
    check_logits(logits, attention_mask)
    sae_out, acts = _reconstruct(sae, x.to(sae.device))

    sinks = is_sink(x, positions.to(x.device)).cpu()
    for replacement in (sae_out, None):  # sinks keep their own activation: no SAE is asked to reconstruct them
        spliced = hidden.clone()
        where = rows[~sinks].to(hidden.device), positions[~sinks].to(hidden.device)
        spliced[where] = 0 if replacement is None else replacement[~sinks.to(sae.device)].to(hidden)
        new_logits = model.spliced(input_ids, attention_mask, spliced)
        if replacement is None:
            losses.add_zero(new_logits, input_ids, attention_mask)
        else:
            losses.add_spliced(logits, new_logits, input_ids, attention_mask)
            del logits

    token_rows = [ids[mask] for ids, mask in zip(input_ids, attention_mask, strict=True)]
    special = special_tokens.classes(input_ids)[attention_mask]
    special, sinks, rows, positions = (t.to(sae.device) for t in (special, sinks, rows, positions))
    sums.add(x.to(sae.device), sae_out, acts, special=special, sinks=sinks, positions=positions, rows=rows)
    top.add(acts, sinks, rows, token_rows, batch.dialogue_ids[:, 0].tolist())


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
    is_sink: SinkRule,
    tokenizer: Any,
    sums: ReconstructionSums,
    top: TopDialogues,
    names: list[str],
    progress: bool,
) -> list[dict[str, Any]]:
    counts = sums.count[0]
    n_special, n_other = counts[:-1].sum().item(), counts[-1].item()
    strength = sums.special_acts.sum(0)
    order = strength.argsort(descending=True, stable=True)[:N_TOP_FEATURES]
    features = order[strength[order] > 0].tolist()
    contexts = top_contexts(sae, residual, is_sink, tokenizer, top, features, progress) if features else []
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
