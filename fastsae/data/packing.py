"""Whether a model computes packed dialogues as it computes each of them alone, found out on a short pair of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.data.activations import ResidualStream
from fastsae.data.splicing import TOLERANCE, token_difference
from fastsae.errors import FastsaeError, UsageError, is_out_of_memory


@torch.no_grad()
def check_packing(residual: ResidualStream, first: list[int], second: list[int]) -> None:
    """Runs two dialogues packed and alone; both must give the same activations.

    They do not where a model's blocks carry a state from token to token, take their positions from the place in the row, or
    build their own attention mask.

    Args:
        residual: Model and layer.
        first: Token ids of a dialogue.
        second: Token ids of another one.

    Raises:
        UsageError: They do not agree.
    """
    try:
        packed, alone = _both(residual, first, second)
    except FastsaeError:
        raise
    except Exception as error:  # whatever the model's own code raises
        if is_out_of_memory(error):
            raise
        raise _refused(residual, f"it fails on positions that begin anew ({type(error).__name__})") from error
    difference = max(token_difference(a, b) for a, b in zip(packed, alone, strict=True))
    if not difference <= TOLERANCE.get(residual.model.get_input_embeddings().weight.dtype, 1e-1):
        raise _refused(
            residual, f"the activations of a dialogue differ by {difference:.1%} where another one precedes it"
        )


def _both(residual: ResidualStream, first: list[int], second: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The activations of each dialogue in a row with the other, and alone."""
    input_ids = torch.tensor([[*first, *second]])
    positions = torch.tensor([[*range(len(first)), *range(len(second))]])
    row = residual(input_ids, torch.ones_like(input_ids, dtype=torch.bool), positions)[0]
    alone = []
    for ids in (first, second):
        alone.append(residual(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))[0])
    return list(row.split([len(first), len(second)])), alone


def _refused(residual: ResidualStream, reason: str) -> UsageError:
    model = residual.model
    return UsageError(
        f"sequencing: expected a model that keeps packed dialogues apart, got {type(model).__name__} (type "
        f"{model.config.model_type!r}): {reason}; take --sequencing fast"
    )
