"""Sparse autoencoders on fused ops."""

from fastsae.sae.base import SparseAutoencoder
from fastsae.sae.batch_topk import FusedBatchTopKSAE
from fastsae.sae.inference import TopActivations
from fastsae.sae.jumprelu import FusedJumpReLUSAE
from fastsae.sae.outputs import TrainOutput
from fastsae.sae.relu import FusedReLUSAE
from fastsae.sae.shards import shard, unshard
from fastsae.sae.topk import FusedTopKSAE

__all__ = [
    "FusedBatchTopKSAE",
    "FusedJumpReLUSAE",
    "FusedReLUSAE",
    "FusedTopKSAE",
    "SparseAutoencoder",
    "TopActivations",
    "TrainOutput",
    "shard",
    "unshard",
]
