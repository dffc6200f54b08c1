"""What an evaluation sums up for each dialogue, so that two SAEs can be compared dialogue by dialogue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastsae.disk import write_tensors
from fastsae.errors import FastsaeError
from fastsae.evaluate.token_classes import CLASSES

DIALOGUES_FILE = "dialogues.safetensors"
SUMS = ("tokens", "squared_error", "l0", "targets", "ce", "ce_spliced", "ce_zero", "kl")


@dataclass(frozen=True)
class DialogueTable:
    """Sums over the tokens of each dialogue.

    Attributes:
        dialogues: `[n]` int64, indices into the dataset, ascending.
        sums: `[n, len(CLASSES), len(SUMS)]` fp64: number of tokens, squared error per element, active features; and over the
            tokens that are predicted (all but the first of a dialogue): their number, cross-entropies of the clean model, with
            the reconstruction and with zeros in the place of the activations, and KL(clean || reconstruction), in nats. A
            predicted token counts in its own class.
        variance: `[n]` fp64, sum of ||x - mean x||^2 / d_in over the tokens of the class `all`; the mean is over all dialogues.
    """

    dialogues: Tensor
    sums: Tensor
    variance: Tensor

    def column(self, name: str, token_class: str = "all") -> Tensor:
        """`[n]`, one sum of one class."""
        return self.sums[:, CLASSES.index(token_class), SUMS.index(name)]

    def save(self, folder: Path) -> None:
        """Writes `dialogues.safetensors`."""
        tensors = {"dialogues": self.dialogues, "sums": self.sums.contiguous(), "variance": self.variance}
        write_tensors(folder / DIALOGUES_FILE, tensors)

    @classmethod
    def load(cls, folder: Path) -> DialogueTable:
        """Reads what `save` wrote.

        Raises:
            FastsaeError: The file is missing or damaged.
        """
        path = folder / DIALOGUES_FILE
        try:
            found = load_file(path)
            table = cls(*(found[name] for name in ("dialogues", "sums", "variance")))
            n = len(table.dialogues)
            if table.sums.shape != (n, len(CLASSES), len(SUMS)) or table.variance.shape != (n,):
                raise ValueError(f"sums of shape {tuple(table.sums.shape)}")
        except Exception as error:  # whatever safetensors raises
            raise FastsaeError(
                f"{path}: expected the sums of each dialogue, got none or a damaged file ({error})"
            ) from None
        return table


class DialogueSums:
    """Gathers a `DialogueTable`; each dialogue comes whole, in one call.

    Args:
        d_in: Width of the activations.
    """

    def __init__(self, d_in: int) -> None:
        self.d_in = d_in
        self._dialogues: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._vectors: list[Tensor] = []
        self._squares: list[Tensor] = []

    def add(
        self,
        dialogues: Tensor,
        x: Tensor,
        squared_error: Tensor,
        l0: Tensor,
        losses: Tensor,
        *,
        rows: Tensor,
        positions: Tensor,
        classes: Tensor,
    ) -> None:
        """Adds the real tokens of whole dialogues.

        Args:
            dialogues: `[B]` indices into the dataset.
            x: `[n, d_in]` activations.
            squared_error: `[n]`, ||x^ - x||^2.
            l0: `[n]` active features.
            losses: `[4, n]`: cross-entropies of each token, clean, with the reconstruction and with zeros, and the KL
                divergence of its prediction; the first token of a dialogue, which nothing predicts, is not looked at.
            rows: `[n]` dialogue of each token, counted from 0 inside this call.
            positions: `[n]`, 0 for the first token of a dialogue.
            classes: `[len(CLASSES), n]` bool.
        """
        predicted = (positions > 0).double()
        per_token = torch.stack(
            [
                torch.ones_like(predicted),
                squared_error.double() / self.d_in,
                l0.double(),
                predicted,
                *torch.where(predicted.bool(), losses.double(), 0),
            ],
            dim=1,
        )
        sums = torch.zeros(len(dialogues), len(CLASSES), len(SUMS), dtype=torch.float64)
        for i, chosen in enumerate(classes):
            sums[:, i].index_add_(0, rows[chosen], per_token[chosen])
        kept = classes[CLASSES.index("all")]
        x = x.double()[kept]
        empty = torch.zeros(len(dialogues), self.d_in, dtype=torch.float64)
        self._vectors.append(empty.index_add(0, rows[kept], x))
        self._squares.append(
            torch.zeros(len(dialogues), dtype=torch.float64).index_add(0, rows[kept], x.square().sum(1))
        )
        self._dialogues.append(dialogues.clone())
        self._sums.append(sums)

    def table(self) -> DialogueTable:
        """The sums, with the dialogues in ascending order."""
        dialogues, sums, vectors, squares = map(torch.cat, (self._dialogues, self._sums, self._vectors, self._squares))
        count = sums[:, CLASSES.index("all"), SUMS.index("tokens")]
        mean = vectors.sum(0) / count.sum().clamp_min(1)
        variance = (squares - 2 * vectors @ mean + count * mean.square().sum()).clamp_min(0) / self.d_in
        order = dialogues.argsort()
        return DialogueTable(dialogues[order], sums[order], variance[order])
