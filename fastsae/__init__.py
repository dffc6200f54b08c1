"""Sparse autoencoders for language models: fused, exact, trained dialogue by dialogue.

Names are imported when they are first used: torch takes seconds to import, which `fastsae --help` does not need.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsae import foreign
from fastsae.errors import FastsaeError, UsageError
from fastsae.version import __version__

if TYPE_CHECKING:
    from fastsae import optim as optim
    from fastsae import sae as sae
    from fastsae.comparison.run import compare
    from fastsae.optim import FusedSAEAdam
    from fastsae.peers import accelerate
    from fastsae.sae import (
        FusedBatchTopKSAE,
        FusedJumpReLUSAE,
        FusedReLUSAE,
        FusedTopKSAE,
        SparseAutoencoder,
        TopActivations,
        TrainOutput,
        shard,
        unshard,
    )
    from fastsae.steering import Edit, steer
    from fastsae_kernels import SparseActs

__all__ = [
    "Edit",
    "FastsaeError",
    "FusedBatchTopKSAE",
    "FusedJumpReLUSAE",
    "FusedReLUSAE",
    "FusedSAEAdam",
    "FusedTopKSAE",
    "SparseActs",
    "SparseAutoencoder",
    "TopActivations",
    "TrainOutput",
    "UsageError",
    "__version__",
    "accelerate",
    "compare",
    "shard",
    "steer",
    "unshard",
]

_MODULES = {  # the other names: fastsae.sae
    "Edit": "fastsae.steering",
    "FusedSAEAdam": "fastsae.optim",
    "SparseActs": "fastsae_kernels",
    "accelerate": "fastsae.peers",
    "compare": "fastsae.comparison.run",
    "steer": "fastsae.steering",
}
_SUBMODULES = ("optim", "sae")


def _read_foreign(path: Path) -> Any:
    from fastsae.peers import formats  # once a file of another library is read

    return formats.load_content(path)


foreign.readers.append(_read_foreign)


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"fastsae.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'fastsae' has no attribute {name!r}")
    value = getattr(import_module(_MODULES.get(name, "fastsae.sae")), name)
    globals()[name] = value  # found at once the next time
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
