"""The pair of `encode` and `decode`: a dense tensor, as every peer wants it, that remembers the entries it was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastsae_kernels import AutoencodeOutput, SparseActs
from fastsae_kernels.activity import MAX_DENSITY, sampled_share
from fastsae_kernels.memory import Spare

# not an attribute of the tensor, which would be copied and saved with it
_entries = WeakTensorKeyDictionary()


def wants_gradient(tensors: Iterable[Tensor]) -> bool:
    """Whether autograd follows a call on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def is_dense(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> bool:
    """Whether a sample lets expect so many active features that a dense product is faster; waits for a GPU."""
    return sampled_share(x, W_enc, b_enc, threshold) > MAX_DENSITY.get(x.device.type, MAX_DENSITY["cuda"])


def to_dense(acts: SparseActs, shape: tuple[int, ...], dtype: torch.dtype, spare: Spare | None = None) -> Tensor:
    """Activations as a dense tensor that remembers its entries.

    Args:
        acts: Active entries alone.
        shape: `[..., d_sae]`, of as many tokens.
        dtype: The dtype of the dense tensor; the entries are rounded to it, too.
        spare: Where a CPU's memory comes from, and is used again.
    """
    acts = acts.packed()
    values = acts.values.to(dtype)
    if spare is None or values.device.type != "cpu":
        dense = values.new_zeros(acts.shape)
    else:
        dense = spare.zeros(acts.shape, dtype)
    dense[acts.row_ids(), acts.indices.long()] = values
    dense = dense.reshape(shape)
    _entries[dense] = replace(acts, values=values.to(acts.values.dtype))
    return dense


def entries_of(dense: Tensor) -> SparseActs | None:
    """The entries of a tensor from `to_dense`; None for any other, and for one that was edited since.

    One look at every number finds an edit, even one that PyTorch does not count, as through `.data` or NumPy.
    """
    acts: SparseActs | None = _entries.get(dense)
    if acts is None or dense.numel() != acts.shape[0] * acts.shape[1]:
        return None
    flat = dense.reshape(acts.shape)
    found = flat[acts.row_ids(), acts.indices.long()].to(acts.values.dtype)
    # every entry is above 0, so that with as many numbers beside 0 there are no others
    is_unchanged = (torch.count_nonzero(flat) == found.numel()) & (found == acts.values).all()
    return acts if bool(is_unchanged) else None


def finite(run: Callable[[], AutoencodeOutput]) -> tuple[AutoencodeOutput | None, str | None]:
    """A pass, or why there is none: among NaN and Inf no k are the largest."""
    try:
        return run(), None
    except ValueError:
        return None, "the input or a weight is NaN or Inf"


@torch.no_grad()
def smallest_of_rows(acts: SparseActs) -> Tensor:
    """`[N]`: the smallest positive activation of each token, Inf where there is none."""
    values = torch.where(acts.values > 0, acts.values, torch.inf)
    none = values.new_full((acts.shape[0],), torch.inf)
    return none.scatter_reduce(0, acts.row_ids(), values, "amin")
