"""What an SAE did on each held-out dialogue, so that two SAEs can be compared dialogue by dialogue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsae.disk import write_atomically
from fastsae.errors import FastsaeError
from fastsae.evaluate.token_kinds import KINDS

DIALOGUES_FILE = "dialogues.npz"
FloatArray: TypeAlias = NDArray[np.float64]

CLASSES = {
    "all": "every token but the attention sinks",
    "special": "tokens that the chat template writes around turns, role names among them, but no sinks",
    "user": "tokens of the user's messages, but no sinks",
    "assistant": "tokens of the assistant's messages, but no sinks",
    "template": "whatever the chat template writes, special or not, and system prompts, but no sinks",
    "sinks": "attention sinks: position 0, and tokens many times as long as the median token",
    "position_0": "the first token of each dialogue",
    "all_with_sinks": "every token, as the FAST paper counts",
    "special_with_sinks": "every special token, as the FAST paper counts",
}
"""Classes of tokens. A token may be in several; a loss belongs to the classes of the token that is predicted."""

_SPOKEN = ("user", "assistant", "system", "template", "special")
_KINDS_OF = {
    "all": _SPOKEN,
    "special": ("special",),
    "user": ("user",),
    "assistant": ("assistant",),
    "template": ("system", "template", "special"),
    "sinks": KINDS[len(_SPOKEN) :],
    "position_0": ("position_0", "special_position_0"),
    "all_with_sinks": KINDS,
    "special_with_sinks": ("special", "special_position_0", "special_late_sink"),
}

FIELDS = {
    "tokens": "number of tokens n of the class",
    "squared_error": "sum of ||x^ - x||^2",
    "variance": "sum of ||x - m||^2, with one m for the whole held-out set: the mean x of the class `all`",
    "l0": "sum of the numbers of active features",
    "targets": "number of tokens of the class that are predicted: all but the first of a dialogue",
    "ce": "sum of -log p(token) over the targets, in nats",
    "ce_spliced": "the same with the reconstruction in place of the activations, sinks keeping their own",
    "ce_zero": "the same with zeros in their place, sinks keeping their own",
    "kl": "sum of KL(p || p spliced) over the predictions of the targets",
}
"""Sums over the tokens of one class in one dialogue; x^ is the reconstruction of the activation x, p the clean model."""

_FIELD = {name: i for i, name in enumerate(FIELDS)}


@dataclass(frozen=True)
class DialogueSums:
    """The sums of one SAE on the held-out dialogues.

    Attributes:
        d_in: Width of the activations.
        values: `[n, len(CLASSES), len(FIELDS)]` fp64, in the order of these two tables.
        dialogues: `[n]`, the dialogues' indices in the dataset, ascending.

    Raises:
        FastsaeError: The shapes are others, or a number is NaN or infinite, or a count is negative.
    """

    d_in: int
    values: FloatArray
    dialogues: NDArray[np.int64]

    def __post_init__(self) -> None:
        n = len(self.dialogues)
        if not n or self.values.shape != (n, len(CLASSES), len(FIELDS)):
            raise FastsaeError(
                f"sums of dialogues: expected the shape [dialogues, {len(CLASSES)}, {len(FIELDS)}] with at least one dialogue, "
                f"got {list(self.values.shape)} for {n}"
            )
        bad = ~np.isfinite(self.values)
        if bad.any():
            dialogue, token_class, name = (int(i[0]) for i in np.nonzero(bad))
            raise FastsaeError(
                f"the sum {list(FIELDS)[name]!r} over the tokens {list(CLASSES)[token_class]!r} of held-out dialogue "
                f"{dialogue} is {self.values[dialogue, token_class, name]}; expected a finite number"
            )
        if (self.get("tokens") < 0).any() or (self.get("targets") < 0).any():
            raise FastsaeError("sums of dialogues: expected counts of tokens of at least 0, got a negative one")

    def __len__(self) -> int:
        return len(self.dialogues)

    def get(self, name: str, token_class: str | None = None) -> FloatArray:
        """The sums `[n]` of a field over one class, or `[n, len(CLASSES)]` over each."""
        of_field: FloatArray = self.values[:, :, _FIELD[name]]
        return of_field if token_class is None else of_field[:, list(CLASSES).index(token_class)]

    def save(self, folder: Path) -> None:
        """Writes `dialogues.npz`."""

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, d_in=np.array(self.d_in), values=self.values, dialogues=self.dialogues)

        write_atomically(folder / DIALOGUES_FILE, write)

    @classmethod
    def load(cls, folder: Path) -> DialogueSums:
        """Reads what `save` wrote.

        Raises:
            FastsaeError: The file is missing or damaged.
        """
        path = folder / DIALOGUES_FILE
        try:
            with np.load(path) as found:
                return cls(int(found["d_in"]), found["values"], found["dialogues"])
        except Exception as error:  # whatever NumPy raises
            raise FastsaeError(
                f"{path}: expected the sums of each dialogue, found none or a damaged file ({error})"
            ) from None


class ActivationRecorder:
    """Gathers what the activations of each dialogue are, whatever an SAE makes of them; each dialogue comes whole, in one call.

    Each kind of token in a dialogue keeps one vector of the activations' width until the end, in fp32, because only then the
    mean is known about which the variance is taken. So all SAEs of a layer share one such recorder.

    Args:
        d_in: Width of the activations.
    """

    def __init__(self, d_in: int) -> None:
        self.d_in = d_in
        self._dialogues: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._vectors: list[Tensor] = []

    def add(self, dialogues: Tensor, x: Tensor, *, rows: Tensor, kinds: Tensor) -> None:
        """Adds the real tokens of whole dialogues, all of them on the CPU.

        Args:
            dialogues: `[B]`, indices in the dataset.
            x: `[N, d_in]` activations.
            rows: `[N]`, dialogue of each token, counted from 0 inside this call.
            kinds: `[N]`, see `TokenKinds`.
        """
        x = x.double()
        cells = rows * len(KINDS) + kinds
        for gathered, values in ((self._counts, torch.ones(len(x))), (self._squares, x.square().sum(1))):
            gathered.append(_sums_of_cells(values[:, None], cells, len(dialogues))[..., 0])
        self._vectors.append(_sums_of_cells(x, cells, len(dialogues)).float())
        self._dialogues.append(dialogues.clone())

    @property
    def dialogues(self) -> Tensor:
        """`[n]`, the dialogues' indices in the dataset, in the order in which they came."""
        return torch.cat(self._dialogues)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Numbers of tokens and variances of the kinds of each dialogue, `[n, len(KINDS)]` each."""
        counts, squares = torch.cat(self._counts), torch.cat(self._squares)
        spoken = [KINDS.index(kind) for kind in _SPOKEN]
        total = sum(vectors[:, spoken].sum((0, 1), dtype=torch.float64) for vectors in self._vectors)
        mean = total / counts[:, spoken].sum().clamp_min(1)
        projections = torch.cat([vectors.double() @ mean for vectors in self._vectors])
        return counts, (squares - 2 * projections + counts * mean.square().sum()).clamp_min(0)


class DialogueRecorder:
    """Gathers what an SAE does on each dialogue, in the calls in which `activations` gets the same tokens.

    Args:
        activations: The recorder of the activations that the SAE reads.
    """

    def __init__(self, activations: ActivationRecorder) -> None:
        self._activations = activations
        self._sums: list[Tensor] = []

    def add(
        self, n_dialogues: int, squared_error: Tensor, l0: Tensor, losses: Tensor, *, rows: Tensor, kinds: Tensor
    ) -> None:
        """Adds the real tokens of whole dialogues, all of them on the CPU.

        Args:
            n_dialogues: Number of the dialogues.
            squared_error: `[N]`, ||x^ - x||^2.
            l0: `[N]`, active features.
            losses: `[len(LOSSES), N]`, see `fastsae.evaluate.losses.token_losses`.
            rows: `[N]`, dialogue of each token, counted from 0 inside this call.
            kinds: `[N]`, see `TokenKinds`.
        """
        columns = torch.stack([column.double() for column in (squared_error, l0, *losses)], dim=1)
        self._sums.append(_sums_of_cells(columns, rows * len(KINDS) + kinds, n_dialogues))

    def finish(self) -> DialogueSums:
        """The sums over classes, with the dialogues in ascending order."""
        counts, variance = self._activations.finish()
        squared_error, l0, *losses = torch.cat(self._sums).unbind(-1)
        sums = torch.stack([counts, squared_error, variance, l0, *losses], dim=-1)  # as `FIELDS` lists them
        kinds_of = torch.tensor([[float(kind in _KINDS_OF[name]) for kind in KINDS] for name in CLASSES])
        dialogues = self._activations.dialogues
        order = dialogues.argsort()
        values = (kinds_of.double() @ sums)[order].numpy()
        return DialogueSums(self._activations.d_in, values, dialogues[order].numpy())


def _sums_of_cells(values: Tensor, cells: Tensor, n_dialogues: int) -> Tensor:
    """Sums `[n_dialogues, len(KINDS), C]` in fp64 of the rows of `values` `[N, C]` by dialogue and kind."""
    sums = torch.zeros(n_dialogues * len(KINDS), values.shape[1], dtype=torch.float64)
    return sums.index_add_(0, cells, values.double()).view(n_dialogues, len(KINDS), -1)
