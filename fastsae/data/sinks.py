"""Attention sinks: tokens whose activation is many times longer than all others and says nothing about the text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae.data.activations import ResidualStream, read_layers
from fastsae.data.sequencing import TokenBatch

MAX_NORM_MULTIPLE = 10.0
SAMPLE_TOKENS = 2048  # whose median is taken


@dataclass(frozen=True)
class SinkRule:
    """Says which tokens are attention sinks: position 0, and whatever is many times longer than the median token.

    Attributes:
        median_norm: Median of ||x|| beyond position 0; None where it is unknown, and then no token is too long.
        max_norm_multiple: How many times longer a sink is than the median; None where no token is too long.
    """

    median_norm: float | None
    max_norm_multiple: float | None = MAX_NORM_MULTIPLE

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return `[N]` bool, True for a sink.

        Args:
            x: `[N, d_in]` activations.
            positions: `[N]`, 0 for the first token of a dialogue.
        """
        return (positions == 0) | self.is_too_long(x).to(positions.device)

    def is_too_long(self, x: Tensor) -> Tensor:
        """Return `[N]` bool, True for what is a sink wherever it stands."""
        multiple, median = self.max_norm_multiple, self.median_norm
        return x.float().norm(dim=-1) > (multiple * median if multiple and median else math.inf)

    @classmethod
    def of_norms(cls, norms: Sequence[Tensor], max_norm_multiple: float | None = MAX_NORM_MULTIPLE) -> SinkRule:
        """The rule for data of which some norms ||x||, beyond position 0, are known."""
        found = torch.cat(list(norms)) if norms else torch.empty(0)
        return cls(found.median().item() if len(found) else None, max_norm_multiple)

    @classmethod
    def of_layers(
        cls,
        residuals: Sequence[ResidualStream],
        batches: Iterable[TokenBatch],
        max_norm_multiple: float | None = MAX_NORM_MULTIPLE,
    ) -> list[SinkRule]:
        """The rule of each layer of a model, which computes them together.

        The median is taken over the first dialogues, 2,048 tokens or a few more, so that it is the same in any batching.

        Raises:
            FastsaeError: An activation is NaN or infinite.
        """
        norms: list[list[Tensor]] = [[] for _ in residuals]
        missing = SAMPLE_TOKENS
        for batch in batches:
            mask = batch.attention_mask.bool()
            late_counts = (mask.sum(1) - 1).clamp_min(0).cumsum(0)
            n_rows = 1 + int((late_counts < missing).sum())
            mask = mask[:n_rows]
            for found, x in zip(norms, read_layers(residuals, batch.input_ids[:n_rows], mask), strict=True):
                found.append(x[:, 1:][mask[:, 1:].to(x.device)].float().norm(dim=-1).cpu())
            missing -= int(mask[:, 1:].sum())
            if missing <= 0:
                break
        return [cls.of_norms(found, max_norm_multiple) for found in norms]
