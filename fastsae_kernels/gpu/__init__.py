"""The backend of GPUs, in Triton. Imported on first use, never by `import fastsae_kernels`: Triton is optional."""

from fastsae_kernels.gpu.autoencode import backward, encode, forward, kept_size
from fastsae_kernels.gpu.backward import decode_backward, encode_backward
from fastsae_kernels.gpu.decode import decode
from fastsae_kernels.gpu.encode import chosen_path
from fastsae_kernels.gpu.rivals import use_rival

__all__ = [
    "backward",
    "chosen_path",
    "decode",
    "decode_backward",
    "encode",
    "encode_backward",
    "forward",
    "kept_size",
    "use_rival",
]
