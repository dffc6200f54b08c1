"""Parts of a peer's update in fewer passes over memory: the decoder's gradient, its unit norm, and a plain Adam's step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**18  # of rows that stay in a CPU's cache between the passes over them


def _chunks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of matrices `[F, D]`: all on a GPU, else some at a time."""
    n_rows, width = matrices[0].shape
    size = n_rows if matrices[0].is_cuda else CHUNK_ELEMENTS // max(1, width)
    return zip(*(matrix.split(max(1, size)) for matrix in matrices), strict=True)


@torch.no_grad()
def remove_parallel_(grad: Tensor, rows: Tensor, added: float | None) -> None:
    """`grad -= (grad . w) w` for each row `w` of `[F, D]`: divided by its norm plus `added`, or with None as it is."""
    for of_grad, of_rows in _chunks(grad, rows):
        along = (of_grad * of_rows).sum(1, keepdim=True)
        if added is not None:
            along /= (torch.linalg.vector_norm(of_rows, dim=1, keepdim=True) + added).square()
        of_grad.addcmul_(along, of_rows, value=-1)


@torch.no_grad()
def set_unit_norm_(rows: Tensor) -> None:
    """Divides each row of `[F, D]` by its norm plus the dtype's epsilon; uncounted, as peers do it through `.data`."""
    rows = rows.data
    for part in _chunks(rows):
        part[0].div_(torch.linalg.vector_norm(part[0], dim=1, keepdim=True) + torch.finfo(rows.dtype).eps)


@contextmanager
def fused(optimizer: Any) -> Iterator[None]:
    """Lets a plain Adam on a CPU make its step by PyTorch's fused kernel, in one pass over memory instead of eight."""
    groups = optimizer.param_groups if type(optimizer) is torch.optim.Adam and _can_fuse(optimizer) else []
    for group in groups:
        group["fused"] = True
    try:
        yield
    finally:
        for group in groups:
            group["fused"] = None
            for p in group["params"]:
                torch.autograd.graph.increment_version(p)  # which the kernel does not


def _can_fuse(optimizer: torch.optim.Adam) -> bool:
    for group in optimizer.param_groups:
        options = ("fused", "foreach", "capturable", "differentiable", "maximize")
        if any(group.get(name) for name in options) or group.get("fused") is False or isinstance(group["lr"], Tensor):
            return False
        if not all(p.grad is None or _lie_alike(p, p.grad, optimizer.state.get(p, {})) for p in group["params"]):
            return False
    return True


def _lie_alike(p: Tensor, grad: Tensor, state: dict[str, Any]) -> bool:
    """Whether the kernel, which knows no strides, may walk over a parameter, its gradient and its moments."""
    if p.device.type != "cpu" or grad.layout != torch.strided or not (p.is_contiguous() or p.t().is_contiguous()):
        return False
    moments = [value for name, value in state.items() if name != "step"]
    return all((other.dtype, other.stride()) == (p.dtype, p.stride()) for other in (grad, *moments))
