"""Who reads other libraries' files: the SAEs' `load` asks them, who stand on a floor above it and are entered at the top."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

readers: list[Callable[[Path], tuple[dict[str, Any], dict[str, Any]] | None]] = []
"""Functions that return what `cfg.json` and `sae_weights.safetensors` would hold, None for files that they do not know."""
