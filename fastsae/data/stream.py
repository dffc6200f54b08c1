"""The stream of activations that an SAE is trained on: the model run over batches of tokens, attention sinks left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from fastsae.data.buffer import ActivationBatch
from fastsae.data.sequencing import TokenBatch
from fastsae.data.sinks import SAMPLE_TOKENS, SinkRule
from fastsae.machine import to_device


class Batches(Protocol):
    """Batches of tokens in order: a `Sequencer`, or what one layer takes of a `SharedForward`."""

    def __next__(self) -> TokenBatch:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """Where it is, ready for JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""


@dataclass
class StreamCounts:
    """Tokens that the model has computed for training.

    Attributes:
        computed: All of them, padding included.
        padding: Those of them that are none.
        first: Real tokens left out because a context begins with them.
        sinks: Others that were left out because they are too long.
    """

    computed: int = 0
    padding: int = 0
    first: int = 0
    sinks: int = 0

    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` says of them."""
        return {
            "tokens_computed": self.computed,
            "padding_share": self.padding / max(self.computed, 1),
            "first_tokens_left_out": self.first,
            "sinks_left_out": self.sinks,
        }


class ActivationStream(Iterator[ActivationBatch]):
    """Run the model over batches of tokens and yield the activations of those to train on, row by row.

    Left out are padding, the first token of each context, where asked for, and attention sinks wherever they stand. These
    are told by the median norm of the first 2,048 tokens or a few more, so the first piece comes from as many batches as
    hold those. Every other piece comes from one batch. Nothing is read ahead beyond a piece, so that the states of stream and
    buffer, saved together, are the whole state.

    Args:
        residual: Maps `input_ids` and `attention_mask` [B, T], and positions where rows are packed, to activations
            [B, T, d_in]: a `ResidualStream`.
        sequencer: Yields the batches.
        drop_first_position: Leave out the first token of each context, whose activation is often an outlier.
        max_norm_multiple: Leave out tokens that are so many times longer than the median; None leaves out none.

    Attributes:
        rule: What a sink is; without a median until the first piece.
        counts: What was computed and left out.
    """

    def __init__(
        self,
        residual: Callable[..., Tensor],
        sequencer: Batches,
        drop_first_position: bool = True,
        max_norm_multiple: float | None = None,
    ) -> None:
        self.sequencer, self.rule, self.counts = sequencer, SinkRule(None, max_norm_multiple), StreamCounts()
        self._residual, self._drops_first = residual, drop_first_position

    @property
    def _knows_sinks(self) -> bool:
        return self.rule.max_norm_multiple is None or self.rule.median_norm is not None

    def __next__(self) -> ActivationBatch:
        if self._knows_sinks:
            return self._without_sinks(self._next()[0])
        pieces, norms = list[ActivationBatch](), list[Tensor]()
        while not pieces or sum(map(len, norms)) < SAMPLE_TOKENS:
            try:
                piece, is_late = self._next()
            except StopIteration:
                if pieces:
                    break
                raise
            pieces.append(piece)
            norms.append(piece.acts.float().norm(dim=-1)[is_late.to(piece.acts.device)].cpu())
        self.rule = SinkRule.of_norms(norms, self.rule.max_norm_multiple)
        return self._without_sinks(ActivationBatch.joined(pieces))

    def _next(self) -> tuple[ActivationBatch, Tensor]:
        """The activations of one batch, and which of them are not the first of their context."""
        batch = next(self.sequencer)
        acts = self._residual(batch.input_ids, batch.attention_mask, *((batch.positions,) if batch.is_packed else ()))
        real, is_late = batch.attention_mask.bool(), batch.context_positions > 0
        served = real & is_late if self._drops_first else real
        rows, columns = served.nonzero(as_tuple=True)
        n_real = int(real.sum())
        self.counts.computed += real.numel()
        self.counts.padding += real.numel() - n_real
        self.counts.first += n_real - len(rows)
        places = batch.input_ids, batch.positions, batch.dialogue_ids
        piece = ActivationBatch(
            acts[to_device(rows, acts.device), to_device(columns, acts.device)],
            *(tensor[rows, columns] for tensor in places),
        )
        return piece, is_late[rows, columns]

    def _without_sinks(self, piece: ActivationBatch) -> ActivationBatch:
        is_sink = self.rule.is_too_long(piece.acts).cpu()
        self.counts.sinks += int(is_sink.sum())
        return piece[~is_sink] if is_sink.any() else piece

    def state_dict(self) -> dict[str, Any]:
        """A few numbers, the sequencer's among them, ready for JSON."""
        return {
            "sequencer": self.sequencer.state_dict(),
            "median_norm": self.rule.median_norm or 0.0,
            "counts": asdict(self.counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.sequencer.load_state_dict(state["sequencer"])
        self.rule = SinkRule(state["median_norm"], self.rule.max_norm_multiple)
        self.counts = StreamCounts(**state["counts"])
