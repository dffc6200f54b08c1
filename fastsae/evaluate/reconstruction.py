"""Evaluate an SAE on held-out dialogues: one streaming pass, never more than a few thousand tokens in memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsae.data.activations import ResidualStream, text_config
from fastsae.data.progress import bar
from fastsae.data.sequencing import TokenBatch
from fastsae.data.sinks import MAX_NORM_MULTIPLE, SinkRule
from fastsae.data.special_tokens import SpecialTokens
from fastsae.data.splicing import SplicedModel, check_logits, clean_pass
from fastsae.errors import FastsaeError, UsageError
from fastsae.evaluate.contexts import TopDialogues, top_contexts
from fastsae.evaluate.dialogues import ActivationRecorder, DialogueRecorder, DialogueSums
from fastsae.evaluate.losses import LossSums, cross_entropies, token_losses
from fastsae.evaluate.metrics import Metrics, ReconstructionSums, ratio
from fastsae.evaluate.token_kinds import TokenKinds
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
        dialogues: Sums of each dialogue, by which two SAEs can be compared.
        seconds: The time that was spent on this SAE alone, beside what it shares with others.
    """

    metrics: Metrics
    feature_counts: Tensor
    special_tokens: list[dict[str, str | int | float | None]]
    top_special_features: list[dict[str, Any]]
    dialogues: DialogueSums
    seconds: float = 0.0


class _Place:
    """A layer of the model: what all SAEs of that layer share.

    Attributes:
        hidden, x: The residual stream of the present rows `[B, T, d_in]`, and that of their real tokens `[N, d_in]`.
        sinks, kinds: `[N]` on the CPU, True for an attention sink, and the kind of each token.
        ce_zero: `[N]` losses with zeros in the place of the residual stream.
    """

    def __init__(self, residual: ResidualStream, is_sink: SinkRule) -> None:
        self.model, self.is_sink, self.recorder = SplicedModel(residual), is_sink, ActivationRecorder(residual.d_in)
        self.hidden = self.x = self.sinks = self.kinds = self.ce_zero = torch.empty(0)

    def read(self, hidden: Tensor, rows: _Rows) -> None:
        """Takes the residual stream of the next rows."""
        where = rows.rows.to(hidden.device), rows.positions.to(hidden.device)
        self.hidden, self.x = hidden, hidden[where]
        if not torch.isfinite(self.x).all():
            self.model.residual(rows.input_ids, rows.mask)  # raises, and names the layer and the share
        self.sinks = self.is_sink(self.x, rows.positions.to(self.x.device)).cpu()
        self.kinds = rows.kinds_of(rows.input_ids, rows.mask, self.sinks)
        self.recorder.add(rows.dialogues, self.x.cpu(), rows=rows.rows, kinds=self.kinds)
        self.ce_zero = cross_entropies(self.spliced(None, rows), rows.input_ids, rows.mask)

    def spliced(self, replacement: Tensor | None, rows: _Rows) -> Tensor:
        """The logits with `replacement` `[N, d_in]` spliced in, or zeros.

        Sinks keep their own activation: no SAE is asked to reconstruct them.
        """
        spliced, others = self.hidden.clone(), ~self.sinks
        where = rows.rows[others].to(spliced.device), rows.positions[others].to(spliced.device)
        spliced[where] = 0 if replacement is None else replacement[others.to(replacement.device)].to(spliced)
        return self.model.spliced(rows.input_ids, rows.mask, spliced)


class _Rows:
    """Whole dialogues that run through the model together, and the places of their real tokens: `rows` and `positions` [N]."""

    def __init__(self, batch: TokenBatch, special_tokens: SpecialTokens, kinds_of: TokenKinds) -> None:
        self.input_ids, self.mask, self.kinds_of = batch.input_ids, batch.attention_mask.bool(), kinds_of
        self.rows, self.positions = self.mask.nonzero(as_tuple=True)
        self.tokens = [ids[mask] for ids, mask in zip(self.input_ids, self.mask, strict=True)]
        self.special = special_tokens.classes(self.input_ids)[self.mask]
        self.dialogues = batch.dialogue_ids[:, 0]


class _Measured:
    """What is summed up for one SAE."""

    def __init__(self, sae: SparseAutoencoder, place: _Place, n_special: int) -> None:
        self.sae, self.place, self.losses, self.seconds = sae, place, LossSums(), 0.0
        self.sums = ReconstructionSums(sae.d_in, sae.d_sae, n_special, sae.device)
        self.top, self.recorder = TopDialogues(sae.d_sae, device=sae.device), DialogueRecorder(place.recorder)

    def add(self, logits: Tensor, rows: _Rows) -> None:
        """Adds the rows that its place has read, whose own logits are `logits`."""
        started = time.perf_counter()
        device, place = self.sae.device, self.place
        x = place.x.to(device)
        sae_out, acts = _reconstruct(self.sae, x)
        spliced = place.spliced(sae_out, rows)
        losses = token_losses(logits, spliced, place.ce_zero, rows.input_ids, rows.mask)
        self.losses.add(losses)
        parts = rows.special, place.sinks, rows.rows, rows.positions
        special, sinks, dialogues, positions = (part.to(device) for part in parts)
        error = self.sums.add(x, sae_out, acts, special=special, sinks=sinks, positions=positions, rows=dialogues)
        self.top.add(acts, sinks, dialogues, rows.tokens, rows.dialogues.tolist())
        of_tokens = error.cpu(), acts.l0().cpu(), losses.cpu()
        self.recorder.add(len(rows.dialogues), *of_tokens, rows=rows.rows, kinds=place.kinds)
        self.seconds += time.perf_counter() - started

    def result(self, tokenizer: Any, names: list[str], progress: bool) -> Evaluation:
        """What was measured, with the contexts of a few features, which run a few dialogues through the model again."""
        started = time.perf_counter()
        is_sink, sums = self.place.is_sink, self.sums
        residual = self.place.model.residual
        top_features = _top_special_features(self.sae, residual, is_sink, tokenizer, sums, self.top, names, progress)
        return Evaluation(
            metrics={**sums.metrics(), "norm_median": is_sink.median_norm, **self.losses.metrics()},
            feature_counts=sums.feature_counts.cpu(),
            special_tokens=sums.token_table(names),
            top_special_features=top_features,
            dialogues=self.recorder.finish(),
            seconds=self.seconds + time.perf_counter() - started,
        )


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

    Args:
        sae: The SAE; its features are never made dense.
        residual: Model and layer that the SAE belongs to.
        tokenizer: As for `evaluate_many`, and so are all that follow.
        batches: Dialogues.
        special_tokens: What the chat template writes around turns.
        n_dialogues: Their number.
        max_norm_multiple: How many times longer than the median token an attention sink is.
        progress: Show progress bars.

    Raises:
        UsageError: The SAE's width is not that of the residual stream, or there are no dialogues.
        FastsaeError: An activation or a reconstruction is NaN or infinite.
    """
    found = evaluate_many(
        {"": (sae, residual)},
        tokenizer,
        batches,
        special_tokens=special_tokens,
        n_dialogues=n_dialogues,
        max_norm_multiple=max_norm_multiple,
        progress=progress,
    )
    return found[""]


@torch.no_grad()
def evaluate_many(
    saes: Mapping[str, tuple[SparseAutoencoder, ResidualStream]],
    tokenizer: Any,
    batches: Iterable[TokenBatch],
    *,
    special_tokens: SpecialTokens,
    n_dialogues: int | None = None,
    max_norm_multiple: float = MAX_NORM_MULTIPLE,
    progress: bool = True,
    on_failure: Callable[[str, FastsaeError], object] | None = None,
) -> dict[str, Evaluation]:
    """Measures several SAEs of one model on the same dialogues, each as if it were alone.

    All of them share a clean pass of the model per dialogue, and those of a layer one from there on with zeros in the place of
    the residual stream. Each has one of its own with its reconstruction there. Memory: the logits of a few thousand tokens,
    twice, in the model's dtype.

    Args:
        saes: By name, each with model and layer that it belongs to: one `ResidualStream` for all SAEs of a layer.
        tokenizer: Writes the tokens of the contexts.
        batches: Dialogues, one per row, each of them once (an endless sequencer never ends here).
        special_tokens: From `fastsae.data.special_tokens.find_special_tokens`; may be empty.
        n_dialogues: Number of dialogues in `batches`, for the progress bar. None where it is not known.
        max_norm_multiple: How many times longer than the median token an attention sink is.
        progress: Show progress bars.
        on_failure: Is told of an SAE that fails, and why; the others go on without it. None raises the error.

    Raises:
        UsageError: An SAE's width is not that of the residual stream, or there are no dialogues.
        FastsaeError: An activation or a reconstruction is NaN or infinite.

    Numerics:
        Features in the SAE's dtype, errors and all sums in fp64, log-probabilities in fp32.
    """
    for sae, residual in saes.values():
        check_width(sae, residual)
    names, kinds_of = special_tokens.names, TokenKinds(tokenizer, special_tokens)
    residuals = list(dict.fromkeys(residual for _, residual in saes.values()))
    n_rows = 0
    with bar("evaluating", "dialogue", total=n_dialogues, progress=progress) as advance:
        first, served = itertools.tee(batches)
        rules = SinkRule.of_layers(residuals, first, max_norm_multiple)
        del first  # so that `tee` does not keep the batches that follow
        places = {residual: _Place(residual, rule) for residual, rule in zip(residuals, rules, strict=True)}
        measured = {name: _Measured(sae, places[residual], len(names)) for name, (sae, residual) in saes.items()}
        for batch in served:
            for group in _row_groups(batch, residuals[0]):
                _add_group(measured, _Rows(group, special_tokens, kinds_of), on_failure)
                n_rows += len(group.input_ids)
                advance(len(group.input_ids))
    if not n_rows:
        raise UsageError("no dialogues to evaluate: expected at least one batch, got none")
    return {name: one.result(tokenizer, names, progress) for name, one in measured.items()}


def check_width(sae: SparseAutoencoder, residual: ResidualStream) -> None:
    """Raise UsageError where the SAE's width is not that of the residual stream."""
    if sae.d_in != residual.d_in:
        raise UsageError(
            f"the SAE reads activations of width {sae.d_in}, but layer {residual.layer} of the model gives "
            f"{residual.d_in}; take the model it was trained on"
        )


def _add_group(
    measured: dict[str, _Measured], rows: _Rows, on_failure: Callable[[str, FastsaeError], object] | None
) -> None:
    """Adds rows to what is measured of each SAE; takes out those that fail."""
    places = list(dict.fromkeys(one.place for one in measured.values()))
    if not places:
        return
    hidden, logits = clean_pass([place.model for place in places], rows.input_ids, rows.mask)
    for place in places:
        place.read(hidden.pop(0), rows)
    check_logits(logits, rows.mask)
    for name, one in list(measured.items()):
        try:
            one.add(logits, rows)
        except FastsaeError as error:
            if on_failure is None:
                raise
            on_failure(name, error)
            del measured[name]


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


def features_of(sae: SparseAutoencoder, x: Tensor) -> SparseActs:
    """Return the features `[N, d_sae]` of finite activations, packed.

    Raises:
        FastsaeError: The SAE's weights are damaged.
    """
    try:
        return sae.encode_sparse(x).packed()
    except ValueError as error:  # finite x of the right width: the weights are NaN or Inf, or overflow
        raise FastsaeError(f"the SAE cannot encode finite activations: {error}. Its weights are damaged") from error


def _reconstruct(sae: SparseAutoencoder, x: Tensor) -> tuple[Tensor, SparseActs]:
    """The reconstruction `[N, d_in]` and the features `[N, d_sae]`, packed."""
    acts = features_of(sae, x)
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
