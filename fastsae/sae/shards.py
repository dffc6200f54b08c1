"""An SAE is divided into parts that several processes hold, and put together again."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch

from fastsae.distributed import Sharding, groups_of
from fastsae.distributed.sharding import FEATURE_DIMS
from fastsae.sae.base import SparseAutoencoder

SAE = TypeVar("SAE", bound=SparseAutoencoder)


@torch.no_grad()
def shard(
    sae: SAE,
    mesh: Any,
    *,
    reduce_dtype: torch.dtype = torch.float32,
    overlap_chunks: int = 1,
) -> SAE:
    """Keeps this process's part of an SAE's features, in place, and returns the SAE, whose results are those of the whole one.

        sae_out[n] = b_dec + sum over processes of feature_acts[n, own] @ W_dec[own]

    Every process calls each method with the same tokens, and gets the same result. Parameters, their gradients, the state of
    an optimiser, `feature_counts` and `dead_mask` are those of its own features; `b_dec` is whole in every process.
    `FusedSAEAdam` clips by the norm of all gradients. Only training passes are differentiable. `fastsae.unshard` returns the
    whole SAE, and `sae.save` writes it.

    `FusedJumpReLUSAE(..., mesh=mesh)` makes a new SAE of which no process ever holds the whole.

    Args:
        sae: The same SAE in every process; where parameters differ, those of the first process that holds them count.
        mesh: A DeviceMesh with the dimensions `data` and `feature`, or one of them, or a process group that shares the features.
            Along `data` processes hold the same features and see different tokens: call
            `sae.sharding.average_gradients(sae.parameters(), n_tokens)` between the backward pass and the optimiser's step.
        reduce_dtype: The number format in which processes send each other parts of a reconstruction, float32 or bfloat16.
        overlap_chunks: The number of chunks of a batch; the reconstruction of one is summed while the next is computed.

    Raises:
        UsageError: An argument is none of these.
        ValueError: The SAE is shared already, a parametrization computes its weights, or it has a `k` and is neither a TopK
            nor a BatchTopK SAE.
    """
    if sae.sharding is not None:
        raise ValueError("sae: expected one that one process holds, got one that is shared already")
    names = [name for name, _ in sae.named_parameters() if name not in (*FEATURE_DIMS, "b_dec")]
    if names:
        raise ValueError(f"sae: expected weights that are parameters, got {names[0]}; remove the parametrization")
    sharding = Sharding(sae.d_sae, groups_of(mesh), reduce_dtype=reduce_dtype, n_chunks=overlap_chunks)
    sae.use_sharding(sharding)
    for name, p in sae.named_parameters():
        p.grad = None  # it is the gradient of all features
        p.data = sharding.part_of_first(name, p.data)
    for buffer in sae.buffers():
        sharding.world.broadcast_(buffer, "weights")
    return sae


@torch.no_grad()
def unshard(sae: SAE) -> SAE:
    """The whole SAE in every process, as a copy; every process that shares the features calls it.

    Raises:
        ValueError: The SAE is not shared.
    """
    sharding = sae.sharding
    if sharding is None:
        raise ValueError("sae: expected one that several processes share, got one that is whole")
    whole = copy.deepcopy(sae)
    whole.sharding = None
    for name, p in whole.named_parameters():
        p.grad = None
        p.data = sharding.whole(name, p.data)
    return whole
