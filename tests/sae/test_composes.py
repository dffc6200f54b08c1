"""The modules among PyTorch's own tools: what works as with any module, and what is refused with one message."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fastsae_kernels as kernels
from fastsae import (
    FusedBatchTopKSAE,
    FusedJumpReLUSAE,
    FusedReLUSAE,
    FusedSAEAdam,
    FusedTopKSAE,
    SparseAutoencoder,
)
from fastsae_kernels import reference

D_IN, D_SAE = 16, 64
MAKERS: dict[str, Callable[..., SparseAutoencoder]] = {
    "jumprelu": lambda **options: FusedJumpReLUSAE(D_IN, D_SAE, init_threshold=0.5, **options),
    "log threshold": lambda **options: FusedJumpReLUSAE(D_IN, D_SAE, init_threshold=0.5, log_threshold=True, **options),
    "relu": lambda **options: FusedReLUSAE(D_IN, D_SAE, **options),
    "topk": lambda **options: FusedTopKSAE(D_IN, D_SAE, k=6, **options),
    "batchtopk": lambda **options: FusedBatchTopKSAE(D_IN, D_SAE, k=6, **options),
}
every_sae = pytest.mark.parametrize("kind", MAKERS)


def make(kind: str, **options: Any) -> SparseAutoencoder:
    torch.manual_seed(0)
    return MAKERS[kind](**options)


def batch(n: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def error_of(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    return (sae(x) - x).square().sum(1).mean()


@every_sae
def test_a_new_module_is_stored_as_every_other(kind: str) -> None:
    sae = make(kind)
    assert all(p.is_contiguous() for p in sae.parameters())
    out = sae(batch())
    W_enc = sae.W_enc
    sae.store_by_feature_()
    assert sae.W_enc is W_enc
    assert sae.W_enc.shape == (D_IN, D_SAE)
    assert sae.W_enc.t().is_contiguous()
    torch.testing.assert_close(sae(batch()), out)


@every_sae
@pytest.mark.parametrize("trained", [False, True], ids=["new", "with FusedSAEAdam"])
def test_state_dict_goes_through_safetensors(kind: str, trained: bool, tmp_path: Path) -> None:
    sae, other = make(kind), make(kind)
    if trained:
        optimizer = FusedSAEAdam(sae)
        optimizer.backward(error_of(sae, batch()))
        optimizer.step()
    save_file(sae.state_dict(), tmp_path / "sae.safetensors")
    other.load_state_dict(load_file(tmp_path / "sae.safetensors"))
    torch.testing.assert_close(other(batch()), sae(batch()))
    assert all(torch.equal(a, b) for a, b in zip(sae.state_dict().values(), other.state_dict().values(), strict=True))


@every_sae
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_an_assigned_state_of_another_dtype_runs(kind: str, dtype: torch.dtype) -> None:
    moved = make(kind).to(dtype)
    state = {name: tensor.to(dtype) for name, tensor in moved.state_dict().items()}
    before = dict(state)
    assigned = make(kind)
    assigned.load_state_dict(state, assign=True)
    assert all(state[name] is tensor for name, tensor in before.items())  # the caller's dict is left alone
    for (name, a), (_, b) in zip(assigned.state_dict().items(), moved.state_dict().items(), strict=True):
        assert a.dtype == b.dtype, name
    x = batch(dtype=dtype)
    torch.testing.assert_close(assigned(x), moved(x))
    assigned.training_forward(x).loss.backward()  # type: ignore[attr-defined]
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in assigned.parameters())


@every_sae
def test_lbfgs_trains(kind: str) -> None:
    sae, x = make(kind), batch()
    if isinstance(sae, FusedBatchTopKSAE):
        sae.calibrate_threshold_(x)
    optimizer = torch.optim.LBFGS(sae.parameters(), lr=0.1, max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = error_of(sae, x)
        loss.backward()
        return loss

    before = error_of(sae, x).item()
    for _ in range(3):
        optimizer.step(closure)  # type: ignore[arg-type]
    assert error_of(sae, x).item() < before


@every_sae
def test_parameters_go_through_a_vector(kind: str) -> None:
    sae, twin = make(kind), make(kind)
    vector = parameters_to_vector(sae.parameters())
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    vector_to_parameters(vector, twin.parameters())
    assert torch.equal(twin(batch()), sae(batch()))


@every_sae
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_float64_alone(kind: str, autocast: torch.dtype) -> None:
    sae, twin = make(kind, dtype=torch.float64), make(kind, dtype=torch.float64)
    x = batch(dtype=torch.float64)
    dead = torch.arange(D_SAE) % 3 == 0

    def everything(module: Any) -> list[Tensor]:
        acts = module.encode_sparse(x)
        options = {} if isinstance(module, FusedReLUSAE) else {"dead_mask": dead}
        output = module.training_forward(x, **options)
        output.loss.backward()
        grads = [p.grad for p in module.parameters()]
        return [module(x), module.encode(x), acts.values, module.decode(acts), output.loss, output.fvu, *grads]

    plain = everything(twin)
    with torch.autocast("cpu", autocast):
        under = everything(sae)
    for got, want in zip(under, plain, strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


@every_sae
def test_float64_is_float64_throughout(kind: str) -> None:
    """Numbers that differ by parts in 1e12 give gradients that differ so: nothing on the way was rounded to fp32."""
    x = batch(dtype=torch.float64)
    found = []
    for shift in (0.0, 1e-11):
        sae = make(kind, dtype=torch.float64)
        with torch.no_grad():
            for p in sae.parameters():
                p.mul_(1 + shift)
        output = sae.training_forward(x)  # type: ignore[attr-defined]
        output.loss.backward()
        found.append([output.loss, sae(x), *(p.grad for p in sae.parameters() if p.grad.any())])
    for a, b in zip(*found, strict=True):
        step = ((a - b).abs().max() / a.abs().max()).item()
        assert 1e-13 < step < 1e-9, step


def test_functional_call_takes_other_parameters() -> None:
    sae, other, x = make("jumprelu"), make("jumprelu").requires_grad_(False), batch()
    with torch.no_grad():
        other.b_dec.fill_(0.5)
    parameters = {name: p.clone().requires_grad_() for name, p in other.named_parameters()}
    out = torch.func.functional_call(sae, parameters, (x,))
    torch.testing.assert_close(out, other(x))
    grads = torch.autograd.grad(out.square().sum(), list(parameters.values()), allow_unused=True)
    assert all(grad is not None for grad in grads[:4])


TRANSFORMS: dict[str, Callable[[SparseAutoencoder, Tensor], object]] = {
    "grad": lambda sae, x: torch.func.grad(lambda x: sae(x).sum())(x),
    "vmap": lambda sae, x: torch.func.vmap(sae)(x[:, None]),
    "jvp": lambda sae, x: torch.func.jvp(sae, (x,), (x,)),
    "encode": lambda sae, x: torch.func.vmap(lambda x: sae.encode_sparse(x).values)(x[:, None]),
    "decode": lambda sae, x: torch.func.grad(lambda v: kernels.decode(_entries(v), sae.W_dec).sum())(torch.ones(4)),
}


def _entries(values: Tensor) -> kernels.SparseActs:
    offsets, indices = torch.tensor([0, 4], dtype=torch.int32), torch.arange(4, dtype=torch.int32)
    return kernels.SparseActs(offsets, indices, values, (1, D_SAE))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_are_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"x: expected no transform of torch\.func"):
        TRANSFORMS[name](make("jumprelu"), batch())


PENALISED: dict[str, Callable[[SparseAutoencoder, Tensor], Tensor]] = {
    "forward": lambda sae, x: sae(x).sum(),
    "training": lambda sae, x: sae.training_forward(x).loss,  # type: ignore[attr-defined]
    "encode": lambda sae, x: sae.encode_sparse(x).values.sum(),
    "decode": lambda sae, x: sae.decode(sae.encode_sparse(x)).square().sum(),
}


@pytest.mark.parametrize("name", PENALISED)
def test_a_second_derivative_is_refused(name: str) -> None:
    """A gradient penalty would else reach no weight, in silence."""
    sae, x = make("jumprelu"), batch().requires_grad_()
    value = PENALISED[name](sae, x)
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    torch.testing.assert_close(grad.detach(), torch.autograd.grad(PENALISED[name](sae, x), x)[0])
    with pytest.raises(RuntimeError, match="second derivative"):
        (PENALISED[name](sae, x) + grad.square().sum()).backward()


def test_the_reference_has_second_derivatives() -> None:
    sae, x = make("relu", dtype=torch.float64), batch(dtype=torch.float64).requires_grad_()
    weights = (sae.W_enc, sae.b_enc, sae.gate_threshold(), sae.W_dec, sae.b_dec)
    out, _, _ = reference.autoencode(x, *weights, None, sae._spec())
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert sae.W_enc.grad is not None
    assert sae.W_enc.grad.any()


@every_sae
def test_copies_and_checkpoints(kind: str) -> None:
    sae, x = make(kind), batch()
    twin = copy.deepcopy(sae)
    for reentrant in (False, True):
        for module in (sae, twin):
            module.zero_grad()
        out = torch.utils.checkpoint.checkpoint(sae, x.clone().requires_grad_(), use_reentrant=reentrant)
        out.square().sum().backward()
        twin(x).square().sum().backward()
        for a, b in zip(sae.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
