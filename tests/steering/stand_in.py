"""A small stand-in for Steering: adds `scale * vector` to what one decoder block returns, at every token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastsae.data.activations import decoder_layers


class Push:
    """Its feature's activation is the product of the hidden state before the edit with `vector`, where positive."""

    def __init__(self, model: Any, vector: Tensor, layer: int = 0) -> None:
        self.scale: Any = 1.0
        self.feature_acts: Tensor | None = None
        self.by_column: Tensor | None = None  # a strength for each column, which takes the place of the scale
        self.passes = 0
        self._vector = vector
        self._is_paused = False
        self._handle = decoder_layers(model)[layer].register_forward_hook(self._edit)

    def _edit(self, _module: Any, _args: Any, output: Any) -> Any:
        if self._is_paused:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        self.passes += 1
        self.feature_acts = (hidden[:, -1] @ self._vector).relu()[:, None]
        scale = torch.as_tensor(self.scale, dtype=hidden.dtype).expand(hidden.shape[0])[:, None, None]
        pushed = hidden + (scale if self.by_column is None else self.by_column[:, None]) * self._vector
        return (pushed, *output[1:]) if isinstance(output, tuple) else pushed

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def remove(self) -> None:
        self._handle.remove()
