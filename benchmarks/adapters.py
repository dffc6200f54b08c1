"""An SAE with given weights and what is timed or compared of it: the interface of ours and of the peers, and their check."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.baselines import (
    L0_COEFFICIENT,
    SPEC,
    Parameters,
    checked,
    clear_tokens,
    in_fp64,
    relative_errors,
    worst,
)
from benchmarks.shapes import BANDWIDTH, DEVICE, Shape, parameters
from fastsae import FusedJumpReLUSAE, FusedSAEAdam, FusedTopKSAE, SparseAutoencoder
from fastsae_kernels import reference

LR = 1e-4
FLOOR = 2e-6  # a relative error this large comes from adding 4,096 tokens in another order
SAME_NAMES = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
LINEAR_ENCODER = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias"}
WITH_THRESHOLD = {**SAME_NAMES, "threshold": "threshold"}


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
    """

    name: ClassVar[str]
    architecture: str  # "jumprelu" or "topk"
    trains_in_bf16: ClassVar[bool] = False  # whatever it is asked for
    names: dict[str, str]  # ours -> a parameter of the module, with .T where that is stored transposed

    def __init__(self, parameters: Parameters, shape: Shape) -> None:
        self.shape, self.k = shape, round(shape.l0)
        self.device, self.dtype = parameters["W_enc"].device, parameters["W_enc"].dtype
        self.module: Any = self._make()
        with torch.no_grad():
            for name, parameter, is_transposed in self._weights():
                parameter.copy_(parameters[name].t() if is_transposed else parameters[name])

    def _weights(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        for name, theirs in self.names.items():
            yield name, self.module.get_parameter(theirs.removesuffix(".T")), theirs.endswith(".T")

    def weights(self) -> Parameters:
        """Returns views of the weights, in our names and layout."""
        return {name: (p.t() if is_transposed else p).detach() for name, p, is_transposed in self._weights()}

    @abstractmethod
    def _make(self) -> nn.Module: ...

    @abstractmethod
    def _loss(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _make_step(self) -> Callable[[Tensor], object]: ...

    def loss_and_backward(self, x: Tensor) -> Parameters:
        """Returns gradients of the training loss without terms for dead features, in our names and layout."""
        self.module.zero_grad()
        self._loss(x).backward()
        return {name: p.grad.t() if is_transposed else p.grad for name, p, is_transposed in self._weights()}

    def loss_scale(self, x: Tensor) -> float:
        """Returns the factor by which its gradients are those of `reference(...).loss`."""
        return 1.0

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Returns activations as at inference, `[N, d_sae]`."""
        return self.module.encode(x)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Returns `[N, d_in]` as at inference."""
        return self.module(x)

    @cached_property
    def train_step(self) -> Callable[[Tensor], object]:
        """One step of its own trainer on a batch; the trainer is made when this is first looked up."""
        return self._make_step()

    def reference(self, x: Tensor, p: Parameters) -> Expected:
        """Returns what its numbers may be compared with, in our words; in fp64 where `x` and `p` are."""
        if self.architecture == "jumprelu":
            weights = (p[name] for name in ("W_enc", "b_enc", "threshold", "W_dec", "b_dec"))
            sae_out, l0, acts = reference.autoencode(x, *weights, None, SPEC)
            return Expected(acts, sae_out, squared_error(sae_out, x) + L0_COEFFICIENT * l0.mean())
        threshold = torch.zeros_like(p["b_enc"])
        acts = reference.encode(x - p["b_dec"], p["W_enc"], p["b_enc"], threshold, k=self.k)
        sae_out = reference.decode(acts, p["W_dec"], p["b_dec"])
        return Expected(acts, sae_out, squared_error(sae_out, x))


class Fused(Adapter):
    """Our SAE of an architecture with `FusedSAEAdam`; made by `Peer.ours`."""

    name = "fused"

    def __init__(self, architecture: str, adam: dict[str, Any], *args: Any) -> None:
        self.architecture, self.adam = architecture, adam
        self.names = WITH_THRESHOLD if architecture == "jumprelu" else SAME_NAMES
        super().__init__(*args)

    def _make(self) -> SparseAutoencoder:
        sizes, options = (self.shape.d_in, self.shape.d_sae), {"dtype": self.dtype, "device": self.device}
        if self.architecture == "jumprelu":
            return FusedJumpReLUSAE(*sizes, bandwidth=BANDWIDTH, **options)
        return FusedTopKSAE(*sizes, self.k, rescale_acts_by_decoder_norm=False, **options)

    def _loss(self, x: Tensor) -> Tensor:
        return self.module.training_forward(x, *([L0_COEFFICIENT] if self.architecture == "jumprelu" else [])).loss

    def _make_step(self) -> Callable[[Tensor], object]:
        optimizer = FusedSAEAdam(self.module, lr=LR, **self.adam)

        def step(x: Tensor) -> None:
            optimizer.zero_grad()
            optimizer.backward(self._loss(x))
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
        return {"acts": adapter.encode(x), "sae_out": adapter.reconstruct(x)}
    scale = adapter.loss_scale(x)
    return {name: grad * scale for name, grad in adapter.loss_and_backward(x).items()}


class Kind(NamedTuple):
    """What adapters with the same truth share."""

    reference: Callable[..., Expected]
    architecture: str
    shape: Shape


_ADAPTERS: dict[Kind, Adapter] = {}  # the last kind's, for its reference


@lru_cache(1)  # in fp64 it takes longer than all checks that share it, and the next would not fit beside it
def _truth(kind: Kind) -> tuple[Tensor, Parameters, Parameters]:
    """Tokens that can be compared, weights, and what is expected of them, in fp64."""
    adapter = _ADAPTERS[kind]
    x, p = in_fp64(kind.shape)
    x = x[clear_tokens(x, p, kind.architecture, adapter.k)]
    return x, p, expected(adapter, x, p)


@lru_cache(2)
def _eager_errors(kind: Kind, in_bf16: bool) -> dict[str, float]:
    x, p, exact = _truth(kind)
    with torch.autocast(DEVICE, torch.bfloat16, in_bf16):
        eager = expected(_ADAPTERS[kind], x.float(), {name: tensor.float() for name, tensor in p.items()})
    return relative_errors(eager, exact)


def check(make: Callable[..., Adapter], shape: Shape, *, training: bool) -> tuple[float, float]:
    """Returns the worst error against fp64, and twice that of the dense eager `reference` in that dtype.

    Args:
        make: A peer, or its `ours`.
        shape: The shape, of which a part is compared where it is large.
        training: Whether gradients are compared, or else activations and reconstruction.
    """
    part = checked(shape)
    adapter = make(parameters(part), part)
    kind = Kind(type(adapter).reference, adapter.architecture, part)
    if kind not in _ADAPTERS:
        _ADAPTERS.clear()
        _ADAPTERS[kind] = adapter
    x, _, exact = _truth(kind)
    if training and DEVICE == "cuda":  # or our first pass would be dense, which is not what is timed
        adapter.loss_and_backward(x.float())
        torch.cuda.synchronize()
    got = computed(adapter, x.float(), training=training)
    limits = {name: 2 * _eager_errors(kind, training and adapter.trains_in_bf16)[name] + FLOOR for name in got}
    return worst(relative_errors(got, {name: exact[name] for name in got}), limits)
