"""The example store: a folder with what one pass over dialogues found of every feature, and its reading.

`examples.json` says what the store is and names the file of its tensors, which is written first, under a name of its own. So a
pass that is killed leaves the state that it saved before.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastsae.disk import digest, is_temporary, write_json, write_tensors
from fastsae.errors import FastsaeError, UsageError
from fastsae.evaluate.token_kinds import KINDS
from fastsae.fields import Fields, read_json
from fastsae.interpret.per_feature import EDGES, N_BINS, N_TOP, SPECIAL, window_starts
from fastsae.interpret.sampling import EMPTY, hashed
from fastsae.interpret.windows import WINDOW, FeatureExamples, Window

HEADER = "examples.json"
TENSORS = ("examples-0.safetensors", "examples-1.safetensors")  # the header names one, the next state goes to the other
FORMAT = 1


def write_examples(folder: Path, header: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes the state of a pass, or a finished store, in the place of what is there.

    Raises:
        OSError: The disk is full, or the folder cannot be written; what was there stays.
    """
    names = (HEADER, *TENSORS)
    folder.mkdir(parents=True, exist_ok=True)
    for left in [path for path in folder.iterdir() if is_temporary(path.name, names)]:
        left.unlink(missing_ok=True)  # by a pass that was killed
    try:
        current = read_json(folder / HEADER)["tensors"]
    except (OSError, ValueError, TypeError, KeyError):
        current = None
    name, other = TENSORS if current != TENSORS[0] else TENSORS[::-1]
    write_tensors(folder / name, tensors)
    write_json(folder / HEADER, {**header, "format": FORMAT, "tensors": name, "sha256": digest(folder / name)})
    (folder / other).unlink(missing_ok=True)


def open_examples(folder: Path) -> tuple[Fields, Any] | None:
    """The header of a store or of the state of a pass, and its tensors as `safe_open` gives them; None where there is none.

    Raises:
        FastsaeError: It is damaged.
    """
    try:
        header = Fields(read_json(folder / HEADER))
        if header.get("format") != FORMAT:
            raise header.wrong("format", str(FORMAT))
        header.boolean("is_complete")
        header.integer("d_sae", 1)
        path = folder / header.choice("tensors", TENSORS)
        if header.get("sha256") != digest(path):
            raise ValueError(f"{path.name} is not the file that {HEADER} describes")
        return header, safe_open(path, "pt")
    except (FileNotFoundError, NotADirectoryError) as error:
        if not (folder / HEADER).exists():
            return None
        raise _damaged(folder, error) from None
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(folder, error) from None


def _damaged(folder: Path, reason: object) -> FastsaeError:
    return FastsaeError(
        f"{folder}: expected whole examples of features, found damaged ones ({reason}). Delete the folder, and collect them again"
    )


class ExampleStore:
    """A finished store, read-only: what is small is held in memory, windows are read when they are asked for.

    Args:
        header: What `examples.json` says.
        tensors: The file of tensors, open.

    Attributes:
        d_sae: Number of features.
        n_tokens: Tokens that were read, attention sinks left out.
        n_dialogues: Dialogues.
        seed: By which samples and the pool were drawn.
        facts: What the caller of `collect_examples` said of model, SAE and data.
        counts: `[d_sae]` int64, tokens on which each feature fires.
        mean_special: `[d_sae]` fp32, its mean over all special tokens; 0 where there are none.
    """

    def __init__(self, header: Fields, tensors: Any) -> None:
        self._tensors = tensors
        self.d_sae: int = header.get("d_sae")
        self.seed: int = header.get("seed")
        self.facts: dict[str, Any] = header.get("facts")
        self._dialogues, self._lengths, self._tokens, self._kinds = (
            tensors.get_tensor(name) for name in ("dialogues", "lengths", "tokens", "kinds")
        )
        self._starts = self._lengths.cumsum(0) - self._lengths
        self._row = {dialogue: row for row, dialogue in enumerate(self._dialogues.tolist())}
        self.n_dialogues = len(self._row)
        self.n_tokens = int((self._kinds <= SPECIAL).sum())
        self._histogram = tensors.get_tensor("histogram")
        self.counts = self._histogram.sum(1, dtype=torch.int64)
        n_special = int((self._kinds == SPECIAL).sum())
        self.mean_special = (tensors.get_tensor("special_sum") / max(n_special, 1)).float()
        self._n_top = (tensors.get_tensor("top.keys") < EMPTY).sum(1)
        self._fires = tensors.get_tensor("pool.fires")
        keys, dialogues, positions = (
            tensors.get_tensor(f"pool.{name}")[0] for name in ("keys", "dialogues", "positions")
        )
        (self._pool,) = (keys < EMPTY).nonzero(as_tuple=True)
        self._pool_draws = keys[self._pool] >> 60
        self._pool_dialogues, self._pool_positions = (column[self._pool].long() for column in (dialogues, positions))

    @classmethod
    def load(cls, folder: Path) -> ExampleStore:
        """Opens a store.

        Raises:
            UsageError: There is none in the folder, or its pass has not finished.
            FastsaeError: It is damaged.
        """
        found = open_examples(folder)
        if found is None:
            raise UsageError(
                f"{folder}: expected a folder of examples that `fastsae interpret` writes, {HEADER} is missing"
            )
        header, tensors = found
        try:
            store = cls(header, tensors)
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise _damaged(folder, error) from None
        if not header.get("is_complete"):
            raise UsageError(
                f"{folder}: the pass that collects these examples has not finished, it was stopped after {store.n_dialogues:,} "
                "dialogues; the same command goes on from there"
            )
        return store

    def alive(self, min_windows: int = 5) -> list[int]:
        """The features with at least `min_windows` top windows, of which each is in another dialogue.

        Raises:
            UsageError: No feature can have as many.
        """
        if not 1 <= min_windows <= N_TOP:
            raise UsageError(f"min_windows: expected 1 to {N_TOP}, the most that a store keeps, got {min_windows}")
        found: list[int] = (self._n_top >= min_windows).nonzero()[:, 0].tolist()
        return found

    def examples(self, feature: int) -> FeatureExamples:
        """Everything about one feature.

        Raises:
            UsageError: There is no such feature, or it fires nowhere.
        """
        feature = self._checked(feature)
        count = int(self.counts[feature])
        if not count:
            raise UsageError(
                f"feature {feature} fires on none of the {self.n_tokens:,} tokens of these {self.n_dialogues:,} dialogues, so "
                f"there is no example of it; choose one of the {len(self.alive(1)):,} features that do, or read more dialogues"
            )
        top = self._windows_of("top", feature)  # with the smallest key, which is the largest value, in front
        sampled = sorted(self._windows_of("sampled", feature), key=lambda window: (-window.value, window.dialogue))
        maximum = top[0].value
        edges, histogram = self._histogram_of(feature, maximum)
        return FeatureExamples(
            feature=feature,
            count=count,
            density=count / self.n_tokens,
            maximum=maximum,
            mean_special=float(self.mean_special[feature]),
            edges=edges,
            histogram=histogram,
            top=tuple(top),
            sampled=tuple(sampled),
        )

    def silent(self, feature: int, n: int, *, seed: int = 0, exclude: Collection[int] = ()) -> list[Window]:
        """Windows of the pool in which a feature fires nowhere, attention sinks left out.

        Those of different dialogues come first, in an order that the seed and the dialogues alone determine. So different
        features, and SAEs, have the same windows as far as they are silent in them.

        Args:
            feature: The feature.
            n: How many windows; there are fewer where the pool has no more.
            seed: Determines the order.
            exclude: Dialogues that are left out.

        Raises:
            UsageError: There is no such feature.
        """
        feature = self._checked(feature)
        fires = (self._fires[self._pool, feature // 8] >> (feature % 8)) & 1
        left_out = torch.isin(self._pool_dialogues, torch.tensor(list(exclude), dtype=torch.int64))
        (free,) = ((fires == 0) & ~left_out).nonzero(as_tuple=True)
        order = hashed(seed, self._pool_dialogues[free], self._pool_positions[free]).argsort(stable=True)
        order = order[self._pool_draws[free[order]].argsort(stable=True)][:n]
        dialogues, positions = self._pool_dialogues[free[order]], self._pool_positions[free[order]]
        return self._windows(dialogues, positions, torch.zeros(len(order), WINDOW))

    def _checked(self, feature: int) -> int:
        feature = operator.index(feature)
        if not 0 <= feature < self.d_sae:
            raise UsageError(f"feature {feature}: expected 0 to {self.d_sae - 1} (the SAE has {self.d_sae:,} features)")
        return feature

    def _windows_of(self, kind: str, feature: int) -> list[Window]:
        """The feature's windows by ascending key."""
        names = ("keys", "dialogues", "positions", "activations")
        keys, *columns = (self._tensors.get_slice(f"{kind}.{name}")[feature] for name in names)
        order = keys.argsort()[: int((keys < EMPTY).sum())]
        return self._windows(*(column[order] for column in columns))

    def _windows(self, dialogues: Tensor, positions: Tensor, activations: Tensor) -> list[Window]:
        rows = [self._row[dialogue] for dialogue in dialogues.tolist()]
        lengths = self._lengths[rows]
        starts = window_starts(positions.long(), lengths).tolist()
        found = []
        for i, (row, start, position) in enumerate(zip(rows, starts, positions.tolist(), strict=True)):
            n = min(WINDOW, int(lengths[i]))
            part = slice(int(self._starts[row]) + start, int(self._starts[row]) + start + n)
            found.append(
                Window(
                    dialogue=int(dialogues[i]),
                    start=start,
                    tokens=tuple(self._tokens[part].tolist()),
                    kinds=tuple(KINDS[kind] for kind in self._kinds[part].tolist()),
                    activations=tuple(activations[i, :n].tolist()),
                    peak=position - start,
                )
            )
        return found

    def _histogram_of(self, feature: int, maximum: float) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """The borders and counts of the bins from the lowest to the highest that is not empty."""
        counts = self._histogram[feature]
        used = counts.nonzero()[:, 0]
        lowest, highest = int(used[0]), int(used[-1])
        edges = list(EDGES[lowest : highest + 2])
        if lowest == 0:
            edges[0] = 0.0  # the bins at either end hold whatever lies beyond, too
        if highest == N_BINS - 1:
            edges[-1] = max(edges[-1], maximum)
        return tuple(edges), tuple(counts[lowest : highest + 1].tolist())
