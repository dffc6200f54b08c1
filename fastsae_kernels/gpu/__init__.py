"""The Triton backend. Imported by the dispatcher, never by `import fastsae_kernels`: Triton is optional."""

from fastsae_kernels.gpu.autoencode import Saved, autoencode_backward, autoencode_forward
from fastsae_kernels.gpu.backward import decode_backward, encode_backward
from fastsae_kernels.gpu.batch_topk import encode_batch_topk
from fastsae_kernels.gpu.decode import decode
from fastsae_kernels.gpu.encode import chosen_path, encode
from fastsae_kernels.gpu.overflow_tile import Overflow
from fastsae_kernels.gpu.rivals import use_rival
from fastsae_kernels.gpu.row_topk import encode_topk
from fastsae_kernels.gpu.topk import flag_rows

__all__ = [
    "Overflow",
    "Saved",
    "autoencode_backward",
    "autoencode_forward",
    "chosen_path",
    "decode",
    "decode_backward",
    "encode",
    "encode_backward",
    "encode_batch_topk",
    "encode_topk",
    "flag_rows",
    "use_rival",
]
