"""Sparse autoencoders for language models: fused, exact, trained dialogue by dialogue."""

from fastsae.errors import FastsaeError, UsageError
from fastsae.optimizer import FusedSAEAdam
from fastsae.sae import (
    FusedBatchTopKSAE,
    FusedJumpReLUSAE,
    FusedReLUSAE,
    FusedTopKSAE,
    SparseAutoencoder,
    TopActivations,
    TrainOutput,
)
from fastsae.version import __version__
from fastsae_kernels import SparseActs

__all__ = [
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
]
