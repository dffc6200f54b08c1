"""Attention sinks: tokens whose activation is many times longer than all others and says nothing about the text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae.data.activations import ResidualStream
from fastsae.data.sequencing import TokenBatch

MAX_NORM_MULTIPLE = 10.0
_SAMPLE_TOKENS = 2048


@dataclass(frozen=True)
class SinkRule:
    """Says which tokens are attention sinks: position 0, and whatever is longer than ten times the median token.

    Attributes:
        median_norm: Median of ||x|| beyond position 0; None where it is unknown, and then only position 0 is a sink.
    """

    median_norm: float | None

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return `[N]` bool, True for a sink.

        Args:
            x: `[N, d_in]` activations.
            positions: `[N]`, 0 for the first token of a dialogue.
        """
        limit = MAX_NORM_MULTIPLE * self.median_norm if self.median_norm else math.inf
        return (positions == 0) | (x.float().norm(dim=-1) > limit).to(positions.device)

    @classmethod
    def of(cls, residual: ResidualStream, batches: Iterable[TokenBatch]) -> SinkRule:
        """Take the median over the first dialogues, 2,048 tokens or a few more, so that it is the same in any batching.

        Raises:
            FastsaeError: An activation is NaN or infinite.
        """
        norms: list[Tensor] = []
        missing = _SAMPLE_TOKENS
        for batch in batches:
            mask = batch.attention_mask.bool()
            late_counts = (mask.sum(1) - 1).clamp_min(0).cumsum(0)
            n_rows = 1 + int((late_counts < missing).sum())
            mask = mask[:n_rows]
            x = residual(batch.input_ids[:n_rows], mask)[:, 1:]
            norms.append(x[mask[:, 1:].to(x.device)].float().norm(dim=-1).cpu())
            missing -= len(norms[-1])
            if missing <= 0:
                break
        found = torch.cat(norms) if norms else torch.empty(0)
        return cls(found.median().item() if len(found) else None)
