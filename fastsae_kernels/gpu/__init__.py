"""The Triton backend. Imported by the dispatcher, never by `import fastsae_kernels`: Triton is optional."""

from fastsae_kernels.gpu.autoencode import Saved, autoencode_backward, autoencode_forward
from fastsae_kernels.gpu.backward import decode_backward, encode_backward
from fastsae_kernels.gpu.decode import decode
from fastsae_kernels.gpu.encode import encode

__all__ = [
    "Saved",
    "autoencode_backward",
    "autoencode_forward",
    "decode",
    "decode_backward",
    "encode",
    "encode_backward",
]
