"""Masks of dead features: checked, and looked up once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae_kernels import ActivityHint
from fastsae_kernels.memory import version_of


def checked_mask(dead_mask: Tensor, d_sae: int) -> Tensor:
    """`[d_sae]` bool; a mask of numbers is taken where each is 0 or 1, and looking at them waits for a GPU.

    Raises:
        TypeError: `dead_mask` is no tensor.
        ValueError: `dead_mask` is not of shape `[d_sae]`, or holds numbers other than 0 and 1.
    """
    if not isinstance(dead_mask, Tensor):
        raise TypeError(f"dead_mask: expected a torch.Tensor, got {type(dead_mask).__name__}")
    expected = f"dead_mask: expected bool, or zeros and ones, of shape [d_sae] = ({d_sae},)"
    if dead_mask.shape != (d_sae,):
        raise ValueError(f"{expected}, got {dead_mask.dtype} {tuple(dead_mask.shape)}")
    if dead_mask.dtype == torch.bool:
        return dead_mask
    is_dead = dead_mask == 1
    if not (is_dead | (dead_mask == 0)).all():
        raise ValueError(f"{expected}, got other numbers in a mask of {dead_mask.dtype}")
    return is_dead


class DeadFeatures:
    """Ids of the features in a mask, looked up once per mask, because looking waits for a GPU."""

    def __init__(self) -> None:
        self.activity = ActivityHint()  # of the dead features' own passes
        self._seen: tuple[Tensor, int | None, Tensor] | None = None  # mask, its version, its ids

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}

    def ids(self, dead_mask: Tensor, d_sae: int, device: torch.device) -> Tensor:
        """`[n_dead]` int64 on `device`.

        Raises:
            TypeError: `dead_mask` is no tensor.
            ValueError: `dead_mask` is not of shape `[d_sae]`, or holds numbers other than 0 and 1.
        """
        version = version_of(dead_mask) if isinstance(dead_mask, Tensor) else None
        if self._seen is not None and version is not None:
            mask, seen_version, ids = self._seen
            if mask is dead_mask and seen_version == version and ids.device == device:
                return ids
        ids = checked_mask(dead_mask, d_sae).nonzero().squeeze(1).to(device)
        self._seen = (dead_mask, version, ids)
        return ids
