"""Sparse autoencoders for language models: fused, exact, trained dialogue by dialogue."""

from fastsae.errors import FastsaeError, UsageError
from fastsae.sae import FusedJumpReLUSAE, FusedReLUSAE, SparseAutoencoder, TrainOutput
from fastsae.version import __version__
from fastsae_kernels import SparseActs

__all__ = [
    "FastsaeError",
    "FusedJumpReLUSAE",
    "FusedReLUSAE",
    "SparseActs",
    "SparseAutoencoder",
    "TrainOutput",
    "UsageError",
    "__version__",
]
