"""The ops as PyTorch's custom ops, for graphs: `torch.compile(fullgraph=True)`, `torch.export`, CUDA graphs."""

from fastsae_kernels.graph import autoencode, entries
from fastsae_kernels.graph.autoencode import BY_ACTIVITY

__all__ = ["BY_ACTIVITY", "autoencode", "entries"]
