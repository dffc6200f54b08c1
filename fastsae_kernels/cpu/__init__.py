"""The backend of CPUs: PyTorch's own matrix products, sampled products and `embedding_bag`, in cache-sized feature chunks."""

from fastsae_kernels.cpu.autoencode import backward, forward, kept_size
from fastsae_kernels.cpu.backward import decode_backward, encode_backward
from fastsae_kernels.cpu.decode import decode
from fastsae_kernels.cpu.encode import encode

__all__ = [
    "backward",
    "decode",
    "decode_backward",
    "encode",
    "encode_backward",
    "forward",
    "kept_size",
]
