"""Which features are worth pushing: those of special tokens, those that change what is said, or those of a text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae.data.activations import ResidualStream
from fastsae.data.progress import bar
from fastsae.data.sequencing import TokenBatch
from fastsae.data.sinks import SinkRule
from fastsae.data.special_tokens import SpecialTokens
from fastsae.errors import UsageError
from fastsae.interpret.examine import DataOfSAE, examples_of
from fastsae.interpret.logits import feature_logits
from fastsae.interpret.run import explanations_in
from fastsae.interpret.store import ExampleStore
from fastsae.sae import SparseAutoencoder

NEUTRAL = "In my opinion,"  # after which much may be said
_LENS_TOKENS = 20
_CANDIDATES = 256  # features whose output score is measured
_ROWS = 32


@dataclass(frozen=True)
class Chosen:
    """A feature that is to be pushed.

    Attributes:
        feature: Its index.
        chosen_by: Why, in words.
        score: By which it was chosen; None where somebody named it.
    """

    feature: int
    chosen_by: str
    score: float | None = None


@torch.no_grad()
def by_special_tokens(
    sae: SparseAutoencoder,
    residual: ResidualStream,
    special_tokens: SpecialTokens,
    batches: Iterable[TokenBatch],
    sinks: SinkRule,
    *,
    n: int = 5,
    n_dialogues: int | None = None,
    progress: bool = True,
) -> list[Chosen]:
    """The features that are strongest at special tokens, the strongest first: `n` of each special token, each feature once.

        score[s, k] = mean over the dialogues with special token s of max over its places of f_k

    Unlike the paper's, it leaves attention sinks out: the first token of a dialogue often is a special token, and an SAE that is
    not trained on sinks does not mean anything there.

    Args:
        sae: The SAE.
        residual: Model and layer.
        special_tokens: What the model's chat template writes around turns.
        batches: Whole dialogues.
        sinks: Which tokens are attention sinks.
        n: How many features of each special token.
        n_dialogues: Number of dialogues, for the progress bar.
        progress: Show a progress bar.

    Raises:
        UsageError: The chat template has no special tokens, or no feature fires on one.

    Source: arXiv:2506.07691, section 6 and appendix F.
    """
    names = special_tokens.names
    if not names:
        raise UsageError(
            "select: expected a chat template that writes special tokens, this one writes none; name features"
        )
    totals = torch.zeros(len(names), sae.d_sae, dtype=torch.float64, device=residual.device)
    counts = torch.zeros(len(names), 1, dtype=torch.float64, device=residual.device)
    with bar("reading special tokens", "dialogue", total=n_dialogues, progress=progress) as advance:
        for batch in batches:
            x = residual(batch.input_ids, batch.attention_mask)
            mask = batch.attention_mask.bool()
            classes = special_tokens.classes(batch.input_ids)
            is_sink = torch.zeros_like(mask)
            is_sink[mask] = sinks(x[mask.to(x.device)], batch.positions[mask]).cpu()
            wanted = mask & (classes < len(names)) & ~is_sink
            for row, chosen, kinds in zip(x, wanted, classes, strict=True):
                if chosen.any():
                    largest, seen = _largest(sae, row[chosen.to(x.device)], kinds[chosen].to(x.device), len(names))
                    totals += largest
                    counts += seen
            advance(len(batch.input_ids))
    means = totals / counts.clamp_min(1)
    best: dict[int, Chosen] = {}
    for name, row in zip(names, means, strict=True):
        values, features = row.topk(min(n, sae.d_sae))
        for value, feature in zip(values.tolist(), features.tolist(), strict=True):
            if value > 0 and (feature not in best or (best[feature].score or 0.0) < value):
                best[feature] = Chosen(feature, f"strongest at {name}", value)
    if not best:
        raise UsageError(
            "select: no feature fires on a special token, attention sinks left out; name features with --feature"
        )
    return sorted(best.values(), key=lambda one: -(one.score or 0.0))


def _largest(sae: SparseAutoencoder, x: Tensor, kinds: Tensor, n_kinds: int) -> tuple[Tensor, Tensor]:
    """The largest activations of one dialogue at each kind of token, `[n_kinds, d_sae]`, and which kinds there are."""
    acts = sae.encode_sparse(x)
    found = torch.zeros(n_kinds * sae.d_sae, device=x.device)
    found.scatter_reduce_(0, kinds[acts.row_ids()] * sae.d_sae + acts.indices.long(), acts.values.float(), "amax")
    seen = torch.zeros(n_kinds, 1, dtype=torch.float64, device=x.device)
    seen[kinds] = 1
    return found.view(n_kinds, sae.d_sae).double(), seen


@torch.no_grad()
def by_output_score(
    sae: SparseAutoencoder,
    residual: ResidualStream,
    tokenizer: Any,
    store: ExampleStore,
    *,
    seed: int = 0,
    progress: bool = True,
) -> list[Chosen]:
    """The features that change what is said next most in their own direction, the best first.

        score[k] = (1 - best rank / vocabulary) * largest probability

    over the 20 tokens that the feature raises most by its decoder row alone, after a neutral sentence with the row added at its
    last position, as long as the residual stream is there. At most 256 features are tried, drawn at random of those that fire in
    five dialogues.

    Args:
        sae: The SAE.
        residual: Model and layer.
        tokenizer: The model's.
        store: The examples of the features.
        seed: Determines which features are tried.
        progress: Show a progress bar.

    Raises:
        UsageError: The model has no output embeddings that a feature's direction can be read through, or no feature fires.

    Source: arXiv:2505.20063; the neutral sentence and the length are ours.
    """
    candidates = np.random.default_rng(seed).permutation(store.alive(5))[:_CANDIDATES].tolist()
    directions = sae.W_dec.detach()[candidates].float()
    lens = feature_logits(residual.model, directions, _LENS_TOKENS)
    if not candidates or lens is None:
        raise UsageError(
            "select: output-score needs features that fire in five dialogues, and a model whose head is known; name features"
        )
    ids = torch.tensor([tokenizer(NEUTRAL)["input_ids"]])
    found = []
    with bar("measuring output scores", "feature", total=len(candidates), progress=progress) as advance:
        for start in range(0, len(candidates), _ROWS):
            part = slice(start, start + _ROWS)
            unit = torch.nn.functional.normalize(directions[part], dim=1).to(residual.device)
            rows = ids.expand(len(unit), -1)

            def pushed(hidden: Tensor, unit: Tensor = unit) -> Tensor:
                last = hidden[:, -1].float()
                return torch.cat(
                    [hidden[:, :-1], (last + last.norm(dim=1, keepdim=True) * unit)[:, None].to(hidden.dtype)], 1
                )

            logits = residual.splice(rows, torch.ones_like(rows), pushed)[:, -1].float()
            for feature, row, words in zip(candidates[part], logits, lens[part], strict=True):
                tokens = torch.tensor([token for token, _ in words.positive], device=row.device)
                rank = int((row > row[tokens].max()).sum())
                found.append(
                    Chosen(feature, "output score", (1 - rank / len(row)) * float(row.softmax(0)[tokens].max()))
                )
            advance(len(unit))
    return sorted(found, key=lambda one: -(one.score or 0.0))


@torch.no_grad()
def by_text(
    text: str,
    sae: SparseAutoencoder,
    residual: ResidualStream,
    tokenizer: Any,
    store: ExampleStore,
    explanations: Mapping[int, str],
) -> list[Chosen]:
    """The features of a text: those whose explanation has its words, then those that fire on it more than they usually do.

        score[k] = log(N / n_k) * sum over the text's tokens but the first of f_k / m_k

    with n_k the number of the N tokens of the store on which k fires, and m_k its maximum there.

    Args:
        text: A word, or more.
        sae: The SAE.
        residual: Model and layer.
        tokenizer: The model's.
        store: The examples of the features.
        explanations: What `fastsae interpret` calls features, by their index.

    Raises:
        UsageError: No feature fires on the text.
    """
    wanted = text.casefold().strip()
    named = [
        Chosen(k, f"explained as {name!r}")
        for k, name in sorted(explanations.items())
        if wanted and wanted in name.casefold()
    ]
    ids = torch.tensor([tokenizer(text)["input_ids"]], dtype=torch.long)
    scored: list[Chosen] = []
    if ids.shape[1]:
        x = residual(ids, torch.ones_like(ids))[0]
        first = 1 if len(x) > 1 else 0  # an attention sink, unless it is all there is
        acts = sae.encode_sparse(x[first:])
        sums = torch.zeros(sae.d_sae).index_add_(0, acts.indices.long().cpu(), acts.values.float().cpu())
        for feature in (sums * (store.counts > 0)).nonzero()[:, 0].tolist():
            one = store.examples(feature)
            score = float(sums[feature]) / one.maximum * -float(np.log(one.density))
            scored.append(Chosen(feature, f"fires on {text!r}", score))
    seen = {one.feature for one in named}
    found = [*named, *sorted((one for one in scored if one.feature not in seen), key=lambda one: -(one.score or 0.0))]
    if not found:
        raise UsageError(
            f"select: no feature that is known fires on {text!r}, and no explanation has it; give another text"
        )
    return found


def choose(
    how: str, n: int, sae: SparseAutoencoder, data: DataOfSAE, folder: Path, *, progress: bool = True
) -> list[Chosen]:
    """The first `n` features by `special`, `output-score`, or a text.

    Args:
        how: One of the two words, or a text.
        n: How many.
        sae: The SAE.
        data: Its model and dialogues.
        folder: Where the SAE's examples and explanations lie, or examples are written.
        progress: Show progress bars.

    Raises:
        UsageError: No feature is found.
        FastsaeError: A file is damaged.
    """
    residual, tokenizer = data.residual, data.tokenizer
    if how == "special":
        first, batches = itertools.tee(data.held_out_batches())
        (sinks,) = SinkRule.of_layers([residual], first, data.max_norm_multiple)
        del first
        options: dict[str, Any] = {"n_dialogues": len(data.held_out), "progress": progress}
        found = by_special_tokens(sae, residual, data.special_tokens, batches, sinks, **options)
    else:
        store = examples_of(sae, data, folder, seed=0, progress=progress)
        if how == "output-score":
            found = by_output_score(sae, residual, tokenizer, store, progress=progress)
        else:
            found = by_text(how, sae, residual, tokenizer, store, explanations_in(folder))
    return found[:n]
