"""Whether a model computes packed dialogues as it computes each of them alone, found out on a short pair of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.data.activations import ResidualStream
from fastsae.data.splicing import TOLERANCE, token_difference
from fastsae.errors import FastsaeError, UsageError, is_out_of_memory

# A model that mixes two dialogues little, as one of small random weights does, is told by what they do to each other in one
# context: of that, a model that keeps them apart leaves rounding alone, which is at most so many units in the last place.
_SHARE_OF_MIXED, _ROUNDING = 0.1, 64


@torch.no_grad()
def check_packing(residual: ResidualStream, first: list[int], second: list[int]) -> None:
    """Runs two dialogues packed, alone and as one context; packed must give what each gives alone.

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
        packed, alone, mixed = _runs(residual, first, second)
    except FastsaeError:
        raise
    except Exception as error:  # whatever the model's own code raises
        if is_out_of_memory(error):
            raise
        raise _refused(residual, f"it fails on positions that begin anew ({type(error).__name__})") from error
    difference, most = (max(map(token_difference, found, alone)) for found in (packed, mixed))
    dtype = residual.model.get_input_embeddings().weight.dtype
    if not difference <= max(
        _ROUNDING * torch.finfo(dtype).eps, min(TOLERANCE.get(dtype, 1e-1), _SHARE_OF_MIXED * most)
    ):
        raise _refused(
            residual, f"the activations of a dialogue differ by {100 * difference:.2g} % where another one precedes it"
        )


def _runs(residual: ResidualStream, first: list[int], second: list[int]) -> list[list[Tensor]]:
    """The activations of each dialogue packed with the other, alone, and with the other as one context."""
    input_ids = torch.tensor([[*first, *second]])
    positions = torch.tensor([[*range(len(first)), *range(len(second))]])
    real = torch.ones_like(input_ids, dtype=torch.bool)
    packed, mixed = (
        residual(input_ids, real, *places)[0].split([len(first), len(second)]) for places in ((positions,), ())
    )
    alone = []
    for ids in (first, second):
        alone.append(residual(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))[0])
    return [list(packed), alone, list(mixed)]


def _refused(residual: ResidualStream, reason: str) -> UsageError:
    model = residual.model
    return UsageError(
        f"sequencing: expected a model that keeps packed dialogues apart, got {type(model).__name__} (type "
        f"{model.config.model_type!r}): {reason}; take --sequencing fast"
    )
