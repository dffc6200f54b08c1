"""The contract between the ops and what runs them, and the choice of who does.

A backend is a module with the functions of `Backend`: `cpu`, `gpu` (Triton) and `dense`. The first two list the entries of
a pass and fulfil `SparseBackend` too. `autograd.py` drives a backend in eager code, `graph.py` and `graph_pair.py` do in
compiled graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from importlib import import_module
from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch
from torch import Tensor

from fastsae_kernels.activity import DENSE, MAX_DENSITY, ActivityHint
from fastsae_kernels.types import (
    AutoencodeGrads,
    AutoencodeNeeds,
    AutoencodeOutput,
    AutoencodeSpec,
    Capacity,
    Kept,
    KeptSize,
    OutputGrads,
    PassInputs,
    SparseActs,
)

if TYPE_CHECKING:
    from fastsae_kernels import cpu, dense, gpu
    from fastsae_kernels.weight_gradients import WeightGradients

BackendName = Literal["cpu", "triton", "dense"]
_MODULES: dict[BackendName, str] = {"cpu": "cpu", "triton": "gpu", "dense": "dense"}

_forced: ContextVar[BackendName | None] = ContextVar("fastsae_backend", default=None)


class Backend(Protocol):
    """Runs the training pass."""

    def forward(
        self, inputs: PassInputs, spec: AutoencodeSpec, capacity: Capacity, keeps_dense: bool = False
    ) -> tuple[AutoencodeOutput, Kept]:
        """`reference.autoencode`, exact whatever the capacity.

        Args:
            inputs: The tensors.
            spec: The options.
            capacity: For how many entries there is room.
            keeps_dense: Whether the dense backend may keep the pre-activations of a small pass for its backward.
        """

    def backward(
        self,
        inputs: PassInputs,
        kept: Kept,
        spec: AutoencodeSpec,
        grads: OutputGrads,
        needs: AutoencodeNeeds,
        collected: WeightGradients | None = None,
    ) -> AutoencodeGrads:
        """Every gradient that is asked for; those of the weight matrices not, where `collected` takes what they are sums of."""

    def kept_size(self, n_tokens: int, d_sae: int, spec: AutoencodeSpec, capacity: Capacity) -> KeptSize:
        """What `forward` keeps at most."""


class SparseBackend(Backend, Protocol):
    """Lists the entries of a pass, for `encode` and `decode` as ops of their own."""

    def encode(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, spec: AutoencodeSpec
    ) -> SparseActs | None:
        """`reference.encode` as entries, with those of the window; None where NaN or Inf makes a selection meaningless."""

    def encode_backward(
        self, acts: SparseActs, x: Tensor, W_enc: Tensor, grad_hidden_pre: Tensor, needs_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients of x (on demand), `W_enc` and `b_enc` (in at least fp32) from those of the entries."""

    def decode(self, acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
        """`reference.decode` of entries."""

    def decode_backward(self, acts: SparseActs, W_dec: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the values, one per entry, and of `W_dec`."""


@contextlib.contextmanager
def use_backend(backend: BackendName | None) -> Iterator[None]:
    """Runs ops on one backend inside the `with` block instead of choosing by device; None restores the choice.

    `cpu` and `triton` name the sparse backends (Triton on CPU tensors needs its interpreter), `dense` the products
    in tiles.
    """
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


if TYPE_CHECKING:  # the type checker holds the modules to the contract
    _sparse_backends: tuple[SparseBackend, SparseBackend] = (cpu, gpu)
    _dense_backend: Backend = dense


def backend_module(name: BackendName) -> Backend:
    """The backend of that name; Triton is optional, so its kernels are imported on first use."""
    return cast(Backend, import_module(f"fastsae_kernels.{_MODULES[name]}"))


def choose(
    inputs: PassInputs, spec: AutoencodeSpec, capacity: Capacity | ActivityHint | None
) -> tuple[BackendName, Capacity]:
    """Who runs a pass, and with which capacity.

    Args:
        inputs: The tensors.
        spec: The options.
        capacity: What is known of the activity, or the capacity that a graph was compiled for (`DENSE` for the dense backend).
            A CPU looks at the activity itself.

    Raises:
        RuntimeError: x is on a GPU and Triton is not installed.
    """
    d_sae, forced = inputs.d_sae, _forced.get()
    name = forced or _name_for(inputs.x)
    if capacity == DENSE and forced is None:
        return "dense", DENSE
    if name == "cpu":  # rounded up, so that no feature is too few
        return name, Capacity(d_sae, d_sae if forced else int(MAX_DENSITY["cpu"] * d_sae) + 1)
    if isinstance(capacity, ActivityHint):
        if forced is None and spec.k is None and capacity.is_dense(d_sae, inputs.device.type):
            return "dense", DENSE
        capacity = capacity.capacity(d_sae)
    return name, capacity if capacity and capacity != DENSE else ActivityHint.UNKNOWN


def sparse_backend(x: Tensor) -> SparseBackend:
    """The backend that lists entries where `x` lies.

    Raises:
        RuntimeError: `x` is on a GPU and Triton is not installed; a GPU tensor never falls back in silence.
    """
    name = _forced.get()
    if name is None or name == "dense" or x.is_cuda:
        name = _name_for(x)
    return cast(SparseBackend, backend_module(name))


def _name_for(x: Tensor) -> BackendName:
    if x.device.type == "cpu":
        return "cpu"
    try:
        import triton  # noqa: F401
    except ImportError:
        raise RuntimeError(
            f"x is on {x.device}, whose kernels need Triton, and Triton is not installed: pip install triton"
        ) from None
    return "triton"


def list_entries(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, spec: AutoencodeSpec) -> SparseActs:
    """The entries by the backend of x.

    Raises:
        ValueError: A value is NaN or Inf (CPU; a GPU lists NaN with its value).
    """
    acts = sparse_backend(x).encode(x, W_enc, b_enc, threshold, spec)
    if acts is None:
        share = 1 - torch.isfinite(x).double().mean().item()
        raise ValueError(
            f"x, W_enc, b_enc, threshold: expected finite values, got NaN or Inf ({share:.2%} of x is not finite)"
        )
    return acts


def encode_gradients(
    backend: SparseBackend,
    acts: SparseActs,
    x: Tensor,
    W_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
    grad_values: Tensor,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Gradients of `encode` by the backend of its forward: x (on demand), `W_enc`, `b_enc` (in at least fp32), `threshold`.

    The last is None without a bandwidth.
    """
    grad_hidden_pre = grad_values * (acts.values > 0)
    grad_x, grad_W_enc, grad_b_enc = backend.encode_backward(acts, x, W_enc, grad_hidden_pre, needs_x)
    grad_threshold = None
    if bandwidth:
        threshold_of_entry = threshold[acts.indices.long()]
        window = (acts.values == 0) | (acts.values - threshold_of_entry < bandwidth / 2)
        valid = acts.valid()
        estimate = torch.where(window if valid is None else window & valid, threshold_of_entry * grad_values, 0)
        grad_threshold = torch.zeros_like(threshold)
        grad_threshold.index_add_(0, acts.indices.long(), -estimate.to(threshold.dtype) / bandwidth)
    grad_x = None if grad_x is None else grad_x.to(x.dtype)
    return grad_x, grad_W_enc.to(W_enc.dtype), grad_b_enc, grad_threshold


def decode_gradients(
    backend: SparseBackend, acts: SparseActs, W_dec: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor]:
    """By the backend of the forward, gradients of `decode` for the values and `W_dec`, in their dtypes."""
    grad_values, grad_W_dec = backend.decode_backward(acts, W_dec, grad_out.contiguous())
    return grad_values.to(acts.values.dtype), grad_W_dec.to(W_dec.dtype)
