"""Fused sparse autoencoder ops for PyTorch: encode, JumpReLU, top-k, decode and every gradient, without a dense tensor."""

from fastsae_kernels.activity import ActivityHint
from fastsae_kernels.backend import use_backend
from fastsae_kernels.ops import autoencode, decode, encode
from fastsae_kernels.pre_bias import subtract_pre_bias
from fastsae_kernels.types import AutoencodeOutput, AutoencodeSpec, FeatureMajor, SparseActs
from fastsae_kernels.weight_gradients import Collector, WeightGradients

__all__ = [
    "ActivityHint",
    "AutoencodeOutput",
    "AutoencodeSpec",
    "Collector",
    "FeatureMajor",
    "SparseActs",
    "WeightGradients",
    "autoencode",
    "decode",
    "encode",
    "subtract_pre_bias",
    "use_backend",
]
