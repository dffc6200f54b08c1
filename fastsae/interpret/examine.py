"""What is read of an SAE before anybody judges it: its examples, a choice of features, and what these write to the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastsae.data.activations import ResidualStream
from fastsae.data.sequencing import TokenBatch
from fastsae.data.special_tokens import SpecialTokens
from fastsae.errors import UsageError
from fastsae.interpret.collect import collect_examples
from fastsae.interpret.page_data import PageFeature, describe
from fastsae.interpret.scores import draw_features
from fastsae.interpret.store import ExampleStore
from fastsae.sae import SparseAutoencoder

EXAMPLES = "examples"


class DataOfSAE(Protocol):
    """Model and held-out dialogues of an SAE, as `fastsae.train.pipeline.Pipeline` has them."""

    @property
    def residual(self) -> ResidualStream: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def special_tokens(self) -> SpecialTokens: ...
    @property
    def held_out(self) -> list[int]: ...
    @property
    def max_norm_multiple(self) -> float: ...
    def held_out_batches(self) -> Iterable[TokenBatch]: ...
    def facts(self) -> dict[str, Any]:
        """What tells these data apart from others, and says what they are."""
        ...


@dataclass(frozen=True)
class Subject:
    """An SAE that is to be interpreted.

    Attributes:
        name: What it is called beside others.
        sae: The SAE.
        data: Loads model and dialogues.
        folder: Where its examples and its page are written.
        training_seed: The seed from which its weights were drawn, None where it is not known.
    """

    name: str
    sae: SparseAutoencoder
    data: Callable[[], DataOfSAE]
    folder: Path
    training_seed: int | None = None


@dataclass(frozen=True)
class Examined:
    """What was read of a subject.

    Attributes:
        subject: The SAE.
        store: Its examples.
        tokenizer: The model's.
        scored: The features that are scored, ascending.
        shown: The features of its page, the scored ones among them, ascending.
    """

    subject: Subject
    store: ExampleStore
    tokenizer: Any
    scored: list[int]
    shown: list[PageFeature]


def examine(
    subject: Subject, *, seed: int, scored: Sequence[int] | int, n_shown: int, progress: bool = True
) -> Examined:
    """Collects the examples of an SAE, unless they lie in its folder, and chooses features.

    Args:
        subject: The SAE.
        seed: Determines the samples of examples, and the features that are drawn.
        scored: Features that are scored, or how many are drawn at random of those with five contexts.
        n_shown: Number of features on the page: those that are scored, others with the largest mean on special tokens, and others
            at random.
        progress: Show progress bars.

    Raises:
        UsageError: The SAE does not fit the model, or a feature does not exist or fires nowhere.
        FastsaeError: A file is damaged, or an activation is NaN or infinite.
    """
    sae, folder = subject.sae, subject.folder
    for feature in () if isinstance(scored, int) else scored:  # before minutes are spent
        if not 0 <= feature < sae.d_sae:
            raise UsageError(f"feature {feature}: expected 0 to {sae.d_sae - 1} (the SAE has {sae.d_sae:,} features)")
    data = subject.data()
    store = examples_of(sae, data, folder, seed=seed, progress=progress)
    if not store.counts.any():
        raise UsageError(
            f"{subject.name}: none of its {store.d_sae:,} features fires on the {store.n_tokens:,} tokens that were read, so "
            "there is nothing to show; check that the SAE belongs to this model and layer"
        )
    features = draw_features(store, scored, seed) if isinstance(scored, int) else sorted(set(scored))
    shown = sorted({*features, *_others(store, n_shown - len(features), set(features), seed)})
    examples = [store.examples(feature) for feature in shown]
    described = describe(examples, sae.W_dec.detach(), data.residual.model)
    return Examined(subject, store, data.tokenizer, features, described)


def examples_of(
    sae: SparseAutoencoder, data: DataOfSAE, folder: Path, *, seed: int, progress: bool = True
) -> ExampleStore:
    """The examples of an SAE on its held-out dialogues: those in its folder, or collected in one pass and kept there.

    Raises:
        UsageError: The SAE does not fit the model.
        FastsaeError: A file is damaged, or an activation is NaN or infinite.
    """
    return collect_examples(
        sae.to(data.residual.device),
        data.residual,
        data.tokenizer,
        data.held_out_batches(),
        folder / EXAMPLES,
        special_tokens=data.special_tokens,
        seed=seed,
        facts=data.facts(),
        n_dialogues=len(data.held_out),
        max_norm_multiple=data.max_norm_multiple,
        progress=progress,
    )


def _others(store: ExampleStore, n: int, taken: set[int], seed: int) -> list[int]:
    """Up to `n` features that fire: half of them by their mean on special tokens, the others at random."""
    by_special = [f for f in store.mean_special.argsort(descending=True).tolist() if store.counts[f] and f not in taken]
    first = [f for f in by_special[: max(n, 0) // 2] if store.mean_special[f] > 0]
    rest = sorted(set(by_special) - set(first))
    drawn = np.random.default_rng(seed).permutation(rest)[: max(n - len(first), 0)]
    return [*first, *drawn.tolist()]
