"""An SAE with given weights and what is timed or compared of it: the interface of ours and of the peers, and their check."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.baselines import L0_COEFFICIENT, SPEC, checked, clear_tokens, in_fp64, relative_errors, worst
from benchmarks.shapes import BANDWIDTH, DEVICE, Shape, parameters
from fastsae import FusedJumpReLUSAE, FusedSAEAdam, FusedTopKSAE, SparseAutoencoder
from fastsae_kernels import reference

LR = 1e-4
MANY_STEPS = 2**30  # of a run: no schedule ends while it is timed
FLOOR = 2e-6  # of a relative error: sums over 4,096 tokens in another order
Parameters = dict[str, Tensor]


class Expected(NamedTuple):
    """What a training pass computes, from plain differentiable PyTorch."""

    acts: Tensor
    sae_out: Tensor
    loss: Tensor


def squared_error(sae_out: Tensor, x: Tensor) -> Tensor:
    return (sae_out - x).square().sum(-1).mean()


class Adapter(ABC):
    """An SAE with given weights, in their dtype, and everything that is timed or compared of it.

    Args:
        parameters: The weights, as `benchmarks.shapes.parameters` names them; they are copied.
        shape: The shape, whose L0 is `k` for TopK.
        l0_coefficient: The factor of JumpReLU's penalty.
        bf16: Whether it runs under bf16 autocast, the way the peer's trainer does.
    """

    name: ClassVar[str]
    architecture: str  # "jumprelu" or "topk"
    always_bf16: ClassVar[bool] = False  # in training, whatever it is asked for
    names: dict[str, str]  # ours -> a parameter of the module, with .T where that is stored transposed

    def __init__(
        self, parameters: Parameters, shape: Shape, l0_coefficient: float = L0_COEFFICIENT, bf16: bool = False
    ) -> None:
        self.shape, self.k, self.l0_coefficient, self.bf16 = shape, round(shape.l0), l0_coefficient, bf16
        self.device, self.dtype = parameters["W_enc"].device, parameters["W_enc"].dtype
        self.module: Any = self._make()
        with torch.no_grad():
            for name, parameter, is_transposed in self._weights():
                parameter.copy_(parameters[name].t() if is_transposed else parameters[name])

    def _weights(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        for name, theirs in self.names.items():
            yield name, self.module.get_parameter(theirs.removesuffix(".T")), theirs.endswith(".T")

    def weights(self) -> Parameters:
        """Views of the weights, in our names and layout."""
        return {name: (p.t() if is_transposed else p).detach() for name, p, is_transposed in self._weights()}

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, self.bf16)

    @abstractmethod
    def _make(self) -> nn.Module: ...

    @abstractmethod
    def _loss(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _encode(self, x: Tensor) -> Any: ...

    @abstractmethod
    def _make_step(self) -> Callable[[Tensor], object]: ...

    def _reconstruct(self, x: Tensor) -> Tensor:
        return self.module(x)

    def loss_and_backward(self, x: Tensor) -> Parameters:
        """Forward and backward of the training loss without terms for dead features; gradients in our names and layout."""
        self.module.zero_grad()
        with self.autocast():
            loss = self._loss(x)
        loss.backward()
        return {name: p.grad.t() if is_transposed else p.grad for name, p, is_transposed in self._weights()}

    def loss_scale(self, x: Tensor) -> float:
        """Gradients times this are those of `reference(...).loss`."""
        return 1.0

    def encode(self, x: Tensor) -> Any:
        """Activations as it returns them at inference; `densify` makes `[N, d_sae]` of them."""
        with torch.no_grad(), self.autocast():
            return self._encode(x)

    def densify(self, encoded: Any) -> Tensor:
        return encoded

    def reconstruct(self, x: Tensor) -> Tensor:
        """`[N, d_in]`, at inference."""
        with torch.no_grad(), self.autocast():
            return self._reconstruct(x)

    @cached_property
    def train_step(self) -> Callable[[Tensor], object]:
        """One step of its own trainer on a batch; the trainer is made when this is first looked up."""
        return self._make_step()

    def reference(self, x: Tensor, p: Parameters) -> Expected:
        """What its numbers may be compared with, in our words; in fp64 where `x` and `p` are."""
        if self.architecture == "jumprelu":
            weights = (p[name] for name in ("W_enc", "b_enc", "threshold", "W_dec", "b_dec"))
            sae_out, l0, acts = reference.autoencode(x, *weights, None, SPEC)
            return Expected(acts, sae_out, squared_error(sae_out, x) + self.l0_coefficient * l0.mean())
        threshold = torch.zeros_like(p["b_enc"])
        acts = reference.encode(x - p["b_dec"], p["W_enc"], p["b_enc"], threshold, k=self.k)
        sae_out = reference.decode(acts, p["W_dec"], p["b_dec"])
        return Expected(acts, sae_out, squared_error(sae_out, x))


SAME_NAMES = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
LINEAR_ENCODER = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias"}
WITH_THRESHOLD = {**SAME_NAMES, "threshold": "threshold"}


class Fused(Adapter):
    """Our SAE of an architecture with `FusedSAEAdam`; made by `Peer.ours`."""

    name = "fused"

    def __init__(self, architecture: str, adam: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self.architecture, self.adam = architecture, adam
        self.names = WITH_THRESHOLD if architecture == "jumprelu" else SAME_NAMES
        super().__init__(*args, **kwargs)

    def _make(self) -> SparseAutoencoder:
        sizes, options = (self.shape.d_in, self.shape.d_sae), {"dtype": self.dtype, "device": self.device}
        if self.architecture == "jumprelu":
            return FusedJumpReLUSAE(*sizes, bandwidth=BANDWIDTH, **options)
        return FusedTopKSAE(*sizes, self.k, rescale_acts_by_decoder_norm=False, **options)

    def _loss(self, x: Tensor) -> Tensor:
        coefficient = (self.l0_coefficient,) if self.architecture == "jumprelu" else ()
        return self.module.training_forward(x, *coefficient).loss

    def _encode(self, x: Tensor) -> Any:
        return self.module.encode_sparse(x)

    def densify(self, encoded: Any) -> Tensor:
        return encoded.to_dense()

    def _make_step(self) -> Callable[[Tensor], object]:
        optimizer = FusedSAEAdam(self.module, lr=LR, **self.adam)

        def step(x: Tensor) -> None:
            optimizer.zero_grad()
            with self.autocast():
                loss = self._loss(x)
            optimizer.backward(loss)
            optimizer.step()

        return step


def expected(adapter: Adapter, x: Tensor, p: Parameters) -> Parameters:
    """Returns `acts`, `sae_out` and each gradient by name, as `reference` has them."""
    leaves = {name: p[name].detach().requires_grad_() for name in p}
    result = adapter.reference(x, leaves)
    grads = torch.autograd.grad(result.loss, [leaves[name] for name in adapter.names])
    forward = {"acts": result.acts.detach(), "sae_out": result.sae_out.detach()}
    return forward | dict(zip(adapter.names, grads, strict=True))


def computed(adapter: Adapter, x: Tensor, *, training: bool) -> Parameters:
    """Returns the adapter's own gradients, scaled to be those of `reference`'s loss, or else its `acts` and `sae_out`."""
    if not training:
        return {"acts": adapter.densify(adapter.encode(x)), "sae_out": adapter.reconstruct(x)}
    scale = adapter.loss_scale(x)
    return {name: grad * scale for name, grad in adapter.loss_and_backward(x).items()}


@dataclass(frozen=True)
class Truth:
    """Tokens that can be compared, weights, and what is expected of them in fp64; and the errors of dense PyTorch."""

    x: Tensor
    p: Parameters
    exact: Parameters
    eager_errors: dict[bool, dict[str, float]] = field(default_factory=dict)  # by whether it runs under bf16 autocast


_TRUTHS: dict[
    tuple, Truth
] = {}  # the last one, which takes longer than all checks that share it: the next would not fit beside it


def _truth(adapter: Adapter, shape: Shape) -> Truth:
    key = (type(adapter).reference, adapter.architecture, adapter.l0_coefficient, shape)
    if key not in _TRUTHS:
        _TRUTHS.clear()
        x, p = in_fp64(shape)
        x = x[clear_tokens(x, p, adapter.architecture, adapter.k)]
        _TRUTHS[key] = Truth(x, p, expected(adapter, x, p))
    return _TRUTHS[key]


def _eager_errors(adapter: Adapter, truth: Truth, bf16: bool) -> dict[str, float]:
    if bf16 not in truth.eager_errors:
        with torch.autocast(DEVICE, torch.bfloat16, bf16):
            eager = expected(adapter, truth.x.float(), {name: tensor.float() for name, tensor in truth.p.items()})
        truth.eager_errors[bf16] = relative_errors(eager, truth.exact)
    return truth.eager_errors[bf16]


def check(make: Callable[..., Adapter], shape: Shape, *, training: bool, bf16: bool = False) -> tuple[float, float]:
    """Returns the worst error against fp64, and twice that of the dense eager `reference` in that dtype.

    Args:
        make: A peer, or its `ours`.
        shape: The shape, of which a part is compared where it is large.
        training: Whether gradients are compared, or else activations and reconstruction.
        bf16: Whether it runs under autocast; a peer may be in bf16 without it, see `SparsifyTopK`.
    """
    part = checked(shape)
    adapter = make(parameters(part), part)
    truth = _truth(adapter, part)
    eager_errors = _eager_errors(adapter, truth, bf16 or (training and adapter.always_bf16))
    adapter.bf16 = bf16
    if training and DEVICE == "cuda":  # or our first pass would be dense, which is not what is timed
        adapter.loss_and_backward(truth.x.float())
        torch.cuda.synchronize()
    got = computed(adapter, truth.x.float(), training=training)
    errors = relative_errors(got, {name: truth.exact[name] for name in got})
    return worst(errors, {name: 2 * eager_errors[name] + FLOOR for name in got})
