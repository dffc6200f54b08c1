"""Collecting examples: one pass over dialogues, in which the model runs up to the SAE's layer and features stay sparse."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.data.activations import ResidualStream
from fastsae.data.progress import bar
from fastsae.data.sequencing import TokenBatch
from fastsae.data.sinks import MAX_NORM_MULTIPLE, SinkRule
from fastsae.data.special_tokens import SpecialTokens
from fastsae.errors import FastsaeError, UsageError, shown
from fastsae.evaluate.reconstruction import check_width, features_of
from fastsae.evaluate.token_kinds import KINDS, TokenKinds
from fastsae.interpret.per_feature import Gathered, Rows
from fastsae.interpret.store import ExampleStore, open_examples, write_examples
from fastsae.interrupt import Interrupted, Postponed
from fastsae.sae import SparseAutoencoder
from fastsae_kernels import SparseActs

SAVE_SECONDS = 60.0  # between two states that are saved
_SAVE_SHARE = 0.05  # saving a large state takes no more than this share of the time
_VALUES = 64  # numbers that are read of each weight

logger = logging.getLogger(__name__)

_WHY = {
    "seed": "the seed",
    "d_sae": "the number of features",
    "sae": "the SAE's weights",
    "max_norm_multiple": "max_norm_multiple",
}


@torch.no_grad()
def collect_examples(
    sae: SparseAutoencoder,
    residual: ResidualStream,
    tokenizer: Any,
    batches: Iterable[TokenBatch],
    folder: Path,
    *,
    special_tokens: SpecialTokens,
    seed: int,
    facts: Mapping[str, Any],
    n_dialogues: int | None = None,
    max_norm_multiple: float = MAX_NORM_MULTIPLE,
    progress: bool = True,
) -> ExampleStore:
    """Writes an example store; memory and disk are bounded as `fastsae.interpret.per_feature` says.

    Args:
        sae: The SAE, of any architecture.
        residual: Model and layer that it belongs to.
        tokenizer: The model's.
        batches: Dialogues, one per row, each of them whole and once, from the first on also where a pass was stopped before.
        folder: Where the store is written. A finished store of the same SAE, seed and data is returned as it is, and a stopped
            pass goes on from the state that it saved, to the same result. What belongs to others is replaced, as the log says.
        special_tokens: From `fastsae.data.special_tokens.find_special_tokens`; may be empty.
        seed: Determines the samples and the pool of silent windows.
        facts: What readers are to know of model, SAE and data, as JSON can hold it.
        n_dialogues: Number of dialogues in `batches`, for the progress bar. None where it is not known.
        max_norm_multiple: How many times longer than the median token an attention sink is.
        progress: Show a progress bar.

    Raises:
        UsageError: The SAE's width is not that of the residual stream, or there are no dialogues.
        FastsaeError: An activation is NaN or infinite, or what lies in the folder is damaged.
        Interrupted: Ctrl-C or SIGTERM, once the state is saved.
        OSError: The disk is full, or the folder cannot be written; the state saved before stays.
    """
    check_width(sae, residual)
    own = {"seed": seed, "d_sae": sae.d_sae, "sae": fingerprint(sae), "max_norm_multiple": max_norm_multiple}
    own["kinds"] = list(KINDS)  # which the examples hold as indices
    header = {**own, "facts": json.loads(json.dumps(facts))}
    earlier = open_examples(folder)
    if earlier is not None and (differ := _differences(earlier[0].values, header)):
        logger.info("examples in %s are collected anew: they have another value of %s", folder, ", ".join(differ))
        earlier = None
    gathered, rule = Gathered(sae.d_sae, seed, sae.device), None
    if earlier is not None:
        found, tensors = earlier
        if found.get("is_complete"):
            return ExampleStore.load(folder)
        gathered.restore({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118 - no mapping
        rule = SinkRule(found.get("median_norm"), max_norm_multiple)
    if rule is None:
        first, batches = itertools.tee(batches)
        (rule,) = SinkRule.of_layers([residual], first, max_norm_multiple)
        del first  # so that `tee` does not keep the batches that follow
    states = _States(folder, {**header, "median_norm": rule.median_norm}, gathered)
    reading = _Reading(sae, residual, rule, special_tokens, TokenKinds(tokenizer, special_tokens))
    with bar(
        "collecting examples", "dialogue", total=n_dialogues, progress=progress, done=len(gathered.seen)
    ) as advance:
        _read_all(batches, reading, gathered, states, advance)
    if not gathered.seen:
        raise UsageError("no dialogues to collect examples from: expected at least one batch, got none")
    states.save(is_complete=True)
    return ExampleStore.load(folder)


def fingerprint(sae: SparseAutoencoder) -> str:
    """Tells SAEs apart by their shapes and some values of each weight."""
    found = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(sae.state_dict().items()):
        values = weight.reshape(-1)[:: max(1, weight.numel() // _VALUES)][:_VALUES]
        found.update(f"{name} {tuple(weight.shape)} {values.double().tolist()}".encode())
    return found.hexdigest()


def _differences(found: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """In what a store or state was made with something else than this pass has."""
    there, here = (dict(header.get("facts") or {}) for header in (found, own))
    differ = [why for name, why in _WHY.items() if found.get(name) != own[name]]
    return differ + [
        f"{name} ({shown(there.get(name))}, now {shown(here.get(name))})"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]


class _States:
    """Saves what was gathered, every minute or so."""

    def __init__(self, folder: Path, header: Mapping[str, Any], gathered: Gathered) -> None:
        self.folder, self._header, self._gathered = folder, header, gathered
        self._next = time.monotonic() + SAVE_SECONDS

    def save(self, *, is_complete: bool = False) -> None:
        started = time.monotonic()
        write_examples(self.folder, {**self._header, "is_complete": is_complete}, self._gathered.tensors())
        now = time.monotonic()
        self._next = now + max(SAVE_SECONDS, (now - started) / _SAVE_SHARE)

    def save_if_due(self) -> None:
        if time.monotonic() >= self._next:
            self.save()


class _Reading:
    """From token ids to features."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        residual: ResidualStream,
        is_sink: SinkRule,
        special_tokens: SpecialTokens,
        kinds_of: TokenKinds,
    ) -> None:
        self.sae, self.residual, self.is_sink = sae, residual, is_sink
        self.special_tokens, self.kinds_of = special_tokens, kinds_of

    def __call__(self, batch: TokenBatch) -> tuple[Rows, SparseActs]:
        """The real tokens of whole dialogues, and their features."""
        mask = batch.attention_mask.bool()
        x = self.residual(batch.input_ids, mask)
        x = x[mask.to(x.device)].to(self.sae.device)
        positions = mask.nonzero(as_tuple=True)[1]
        sinks = self.is_sink(x, positions.to(x.device)).cpu()
        acts = features_of(self.sae, x)
        if not torch.isfinite(acts.values).all():
            raise FastsaeError(
                "the SAE's activations are infinite. Its weights are damaged, or too large for their dtype"
            )
        kinds = self.kinds_of(batch.input_ids, mask, sinks)
        columns: tuple[Tensor, ...] = (batch.dialogue_ids[:, 0], mask.sum(1), batch.input_ids[mask], kinds)
        return Rows(*(column.to(acts.device) for column in columns)), acts


def _read_all(
    batches: Iterable[TokenBatch], reading: _Reading, gathered: Gathered, states: _States, advance: Any
) -> None:
    """Gathers the dialogues that are not there yet; a signal waits until what was gathered is saved."""
    with Postponed() as postponed:
        try:
            for batch in batches:
                new = _new_rows(batch, gathered.seen)
                if new is None:
                    continue
                with postponed.at_once():
                    rows, acts = reading(new)
                gathered.add(rows, acts)
                advance(len(new.input_ids))
                states.save_if_due()
                postponed.check()
        except Interrupted as interruption:
            states.save()
            message = f"interrupted; what was read stays in {states.folder}, and the same command goes on from there"
            raise Interrupted(message, interruption.number) from None


def _new_rows(batch: TokenBatch, seen: set[int]) -> TokenBatch | None:
    """The rows of a batch whose dialogues are not among those seen; None where all are."""
    ids = batch.dialogue_ids[:, 0].tolist()
    first = {dialogue: row for row, dialogue in reversed(list(enumerate(ids))) if dialogue not in seen}
    if len(first) == len(ids):
        return batch
    rows = torch.tensor(sorted(first.values()), dtype=torch.int64)
    return batch[rows] if first else None
