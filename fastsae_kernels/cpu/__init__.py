"""The CPU backend: PyTorch's own matrix products, sampled products and `embedding_bag`, in cache-sized feature chunks."""

from fastsae_kernels.cpu.autoencode import autoencode_backward, autoencode_forward
from fastsae_kernels.cpu.backward import decode_backward, encode_backward
from fastsae_kernels.cpu.decode import decode
from fastsae_kernels.cpu.encode import encode

__all__ = [
    "autoencode_backward",
    "autoencode_forward",
    "decode",
    "decode_backward",
    "encode",
    "encode_backward",
]
