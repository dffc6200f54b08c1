"""Dialogues with dense features, packed as the SAE gives them, and by brute force what a store must say of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae.evaluate.token_kinds import KINDS
from fastsae.interpret.per_feature import N_SAMPLED, N_TOP, SPECIAL, Gathered, Rows
from fastsae.interpret.sampling import hashed
from fastsae.interpret.windows import WINDOW, FeatureExamples, Window
from fastsae_kernels import SparseActs


@dataclass
class Talk:
    """A dialogue: its index, token ids, kinds, and features `[T, d_sae]`, those of sinks among them."""

    dialogue: int
    tokens: list[int]
    kinds: list[int]
    acts: Tensor

    @property
    def counted(self) -> Tensor:
        """The features without those of sinks."""
        return self.acts * (torch.tensor(self.kinds) <= SPECIAL)[:, None]


def sparse(dense: Tensor) -> SparseActs:
    rows, indices = dense.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)])
    return SparseActs(offsets, indices.int(), dense[rows, indices], tuple(dense.shape))


def make_talks(lengths: list[int], d_sae: int, share: float = 0.1, levels: int = 40, seed: int = 0) -> list[Talk]:
    """Random dialogues; few levels make ties. Feature 0 is dead, 1 fires on sinks alone, 2 everywhere, 3 in one dialogue."""
    generator = torch.Generator().manual_seed(seed)
    talks = []
    for n, length in enumerate(lengths):
        acts = torch.randint(1, levels + 1, (length, d_sae), generator=generator) * 0.37
        acts *= torch.rand(length, d_sae, generator=generator) < share
        kinds = torch.randint(0, SPECIAL + 1, (length,), generator=generator)
        kinds[torch.rand(length, generator=generator) < 0.05] = KINDS.index("late_sink")
        kinds[0] = KINDS.index("position_0")
        acts[:, :4] = 0
        acts[kinds > SPECIAL, 1] = 7
        acts[:, 2] = 1 + torch.arange(length) % 3
        acts[:, 3] = float(n == 4)
        tokens = torch.randint(5, 61, (length,), generator=generator)
        talks.append(Talk(1000 - 7 * n, tokens.tolist(), kinds.tolist(), acts))
    return talks


def gather(gathered: Gathered, talks: list[Talk], size: int = 7) -> Gathered:
    for start in range(0, len(talks), size):
        part = talks[start : start + size]
        gathered.add(
            Rows(
                torch.tensor([talk.dialogue for talk in part]),
                torch.tensor([len(talk.tokens) for talk in part]),
                torch.tensor([token for talk in part for token in talk.tokens]),
                torch.tensor([kind for talk in part for kind in talk.kinds]),
            ),
            sparse(torch.cat([talk.acts for talk in part])),
        )
    return gathered


def window(talk: Talk, feature: int, position: int) -> Window:
    length = len(talk.tokens)
    start = min(max(0, position - WINDOW // 2), max(0, length - WINDOW))
    part = slice(start, start + WINDOW)
    return Window(
        talk.dialogue,
        start,
        tuple(talk.tokens[part]),
        tuple(KINDS[kind] for kind in talk.kinds[part]),
        tuple(talk.counted[part, feature].tolist()),
        position - start,
    )


def expected(talks: list[Talk], feature: int, seed: int, found: FeatureExamples) -> FeatureExamples:
    """What is known of a feature that fires; the borders of the histogram are taken from `found`."""
    best, drawn, values, special = [], [], [], []
    for talk in talks:
        acts = talk.counted[:, feature]
        special += acts[torch.tensor(talk.kinds) == SPECIAL].tolist()
        positions = acts.nonzero()[:, 0]
        values += acts[positions].tolist()
        if len(positions):
            peak = int(acts.argmax())  # the first of equals
            best.append((-float(acts[peak]), talk.dialogue, window(talk, feature, peak)))
            keys = hashed(hashed(seed, torch.tensor(talk.dialogue), positions) + hashed(feature))
            drawn.append((int(keys.min()), window(talk, feature, int(positions[keys.argmin()]))))
    sampled = [one for _, one in sorted(drawn, key=lambda pair: pair[0])[:N_SAMPLED]]
    of_bins = torch.bucketize(torch.tensor(values), torch.tensor(found.edges), right=True) - 1
    n_tokens = sum(kind <= SPECIAL for talk in talks for kind in talk.kinds)
    return FeatureExamples(
        feature=feature,
        count=len(values),
        density=len(values) / n_tokens,
        maximum=max(values),
        mean_special=torch.tensor(special).double().mean().float().item(),
        edges=found.edges,
        histogram=tuple(of_bins.bincount(minlength=len(found.histogram)).tolist()),
        top=tuple(one for *_, one in sorted(best, key=lambda row: row[:2])[:N_TOP]),
        sampled=tuple(sorted(sampled, key=lambda one: (-one.value, one.dialogue))),
    )
