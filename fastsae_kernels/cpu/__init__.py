"""The CPU backend: PyTorch's own matrix products, sampled products and `embedding_bag`, in cache-sized feature chunks."""

import warnings

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

# one notice per process that says nothing to a user of this library: the products used are tested here
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
