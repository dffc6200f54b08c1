"""The ops as `torch.library` has them, for graphs: `torch.compile(fullgraph=True)`, `torch.export`, CUDA graphs."""

from fastsae_kernels.library import autoencode, entries
from fastsae_kernels.library.autoencode import BY_ACTIVITY

__all__ = ["BY_ACTIVITY", "autoencode", "entries"]
