"""Sparse autoencoders on fused ops."""

from fastsae.sae.base import SparseAutoencoder
from fastsae.sae.jumprelu import FusedJumpReLUSAE
from fastsae.sae.outputs import TrainOutput
from fastsae.sae.relu import FusedReLUSAE

__all__ = ["FusedJumpReLUSAE", "FusedReLUSAE", "SparseAutoencoder", "TrainOutput"]
