"""The backend of GPUs, in Triton. Imported on first use, never by `import fastsae_kernels`: Triton is optional."""

from fastsae_kernels.gpu.autoencode import backward, encode, forward, kept_size
from fastsae_kernels.gpu.choice import use_listing
from fastsae_kernels.gpu.decode import decode
from fastsae_kernels.gpu.encode import chosen_listing
from fastsae_kernels.gpu.gradients import decode_backward, encode_backward

__all__ = [
    "backward",
    "chosen_listing",
    "decode",
    "decode_backward",
    "encode",
    "encode_backward",
    "forward",
    "kept_size",
    "use_listing",
]
