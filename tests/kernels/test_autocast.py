"""Autocast narrows the factors of products and leaves biases and their gradients alone, as in the dense formula."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import problems
import pytest
import torch
from gpu_helpers import DEVICE, few_programs_here, needs_kernels
from torch import Tensor

import fastsae_kernels as kernels
from fastsae_kernels import ActivityHint, SparseActs, reference

DENSITIES = pytest.mark.parametrize("density", [0.02, 0.5], ids=["sparse", "half active"])
GRAPHS = pytest.mark.parametrize("whole_graph", [False, True], ids=["eager", "whole graph"])
Loss = Callable[..., Tensor]


def make(density: float, n_tokens: int = 512, d_in: int = 64, d_sae: int = 512) -> problems.Problem:
    """A problem whose gates do not hang on rounding, which would outweigh what a bias loses."""
    problem = problems.make(n_tokens, d_in, d_sae, density=density)
    g = torch.Generator().manual_seed(5)
    active = torch.rand(d_sae, generator=g) < density
    b_enc = torch.where(active, 8.0, -8.0) + 0.3 * torch.randn(d_sae, generator=g)
    return replace(problem, b_enc=b_enc, threshold=torch.full((d_sae,), 0.5))


def dense(problem: problems.Problem) -> Loss:
    def loss(pre_bias: Tensor, x: Tensor, *others: Tensor) -> Tensor:
        output = reference.autoencode(x - pre_bias, *others, None, problem.spec)
        return (output.sae_out - x.detach()).square().sum(-1).mean() + output.penalty.mean()

    return loss


def fused(problem: problems.Problem) -> Loss:
    def loss(pre_bias: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, *others: Tensor) -> Tensor:
        sae_in, b_enc = kernels.subtract_pre_bias(x, pre_bias, W_enc, b_enc)
        output = kernels.autoencode(sae_in, W_enc, b_enc, *others, spec=problem.spec, target=x.detach())
        assert output.squared_error is not None
        return output.squared_error.mean() + output.penalty.mean()

    return loss


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def bias_gradients(
    problem: problems.Problem, loss: Loss, dtype: torch.dtype | None, *, inside: bool = False, device: str = "cpu"
) -> dict[str, Tensor]:
    """Under autocast to `dtype` on a device; the backward is called `inside` of it, too, or outside."""
    pre_bias = torch.linspace(-1, 1, problem.x.shape[1], dtype=problem.x.dtype).requires_grad_()
    _, _, b_enc, _, _, b_dec = inputs = problems.leaves(problem)[:6]
    moved = [tensor.to(device) for tensor in (pre_bias, *inputs)]  # type: ignore[union-attr]
    with torch.autocast(device, dtype, enabled=dtype is not None):
        value = loss(*moved)
        if inside:
            value.backward()
    if not inside:
        value.backward()
    grads = {"pre_bias": pre_bias.grad, "b_enc": b_enc.grad, "b_dec": b_dec.grad}  # type: ignore[union-attr]
    assert all(grad.dtype == problem.x.dtype for grad in grads.values())  # type: ignore[union-attr]
    return grads  # type: ignore[return-value]


def assert_as_exact(
    problem: problems.Problem, loss: Loss, dtype: torch.dtype, *, inside: bool = False, device: str = "cpu"
) -> None:
    """Each bias's gradient is at most 1.05 times as far from fp64, in norm, as that of the dense formula."""
    truth = bias_gradients(problem.to(torch.float64), dense(problem), None)
    errors = [
        {name: float((grad - truth[name]).norm() / truth[name].norm()) for name, grad in grads.items()}
        for grads in (
            bias_gradients(problem, loss, dtype, inside=inside, device=device),
            bias_gradients(problem, dense(problem), dtype, device=device),
        )
    ]
    for name, error in errors[0].items():
        assert error <= 1.05 * errors[1][name], f"grad of {name}: {error:.3g}, {errors[1][name]:.3g} of the dense"


@GRAPHS
@pytest.mark.parametrize("backend", ["cpu", "dense"])
@DENSITIES
def test_gradients_of_biases_are_as_exact_as_dense_ones(density: float, backend: Any, whole_graph: bool) -> None:
    problem = make(density)
    with kernels.use_backend(backend):
        loss = compiled(fused(problem)) if whole_graph else fused(problem)
        assert_as_exact(problem, loss, torch.bfloat16)


def test_a_backward_inside_of_autocast_is_as_exact() -> None:
    problem = make(0.02)
    assert_as_exact(problem, fused(problem), torch.bfloat16, inside=True)


@DENSITIES
def test_gradients_of_weights_are_not_rounded(density: float) -> None:
    """Of one token, a gradient is a product of two numbers, and so mostly not a number of bf16."""
    problem = make(density, n_tokens=1)
    inputs = problems.leaves(problem)[:6]
    with torch.autocast("cpu", torch.bfloat16), kernels.use_backend("cpu"):
        kernels.autoencode(*inputs, spec=problem.spec).sae_out.backward(problem.grad_out.bfloat16())
    for weight in (inputs[1], inputs[4]):
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
        assert weight.grad.stride() == weight.stride()
        given = weight.grad[weight.grad != 0]
        assert given.numel() > 0
        assert (given != given.bfloat16()).float().mean() > 0.5


def test_gradients_of_fp16_weights_keep_the_range_of_bf16() -> None:
    """Inputs of 2^-30 are zero in fp16; times output gradients of 2^30 they are not."""
    problem = make(0.02, n_tokens=4)
    x, W_enc, b_enc, threshold, W_dec, b_dec = problems.leaves(replace(problem, x=problem.x * 2.0**-30))[:6]
    assert W_enc is not None
    assert W_dec is not None
    W_enc, W_dec = W_enc.detach().half().requires_grad_(), W_dec.detach().half().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), kernels.use_backend("cpu"):
        output = kernels.autoencode(x, W_enc, b_enc, threshold, W_dec, b_dec, spec=problem.spec)  # type: ignore[arg-type]
    output.sae_out.backward(problem.grad_out.bfloat16() * 2.0**30)
    assert W_enc.grad is not None
    assert W_enc.grad.isfinite().all()
    assert W_enc.grad.count_nonzero() > 0


@needs_kernels
@pytest.mark.parametrize("capacity", [64, 2], ids=["fits", "overflows"])
@DENSITIES
def test_triton_kernels_take_wide_biases(density: float, capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ActivityHint, "capacity", lambda *_: capacity)
    problem = make(max(density, 0.1), 48, 20, 43)
    with kernels.use_backend("triton"), few_programs_here():
        assert_as_exact(problem, fused(problem), torch.float16, device=DEVICE)  # the interpreter has no bf16


@GRAPHS
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_gradients_of_encode_and_decode_are_not_rounded(whole_graph: bool) -> None:
    problem = make(0.02)

    def forward(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        return kernels.decode(kernels.encode(x, W_enc, b_enc, threshold), W_dec, b_dec)

    _, _, b_enc, _, _, b_dec = inputs = problems.leaves(problem)[:6]
    with torch.autocast("cpu", torch.bfloat16):
        out = (compiled(forward) if whole_graph else forward)(*inputs)
    assert out.dtype == torch.bfloat16
    out.backward(problem.grad_out.bfloat16())
    torch.testing.assert_close(b_dec.grad, problem.grad_out.bfloat16().float().sum(0))  # type: ignore[union-attr]
    grad_acts = problem.grad_out.bfloat16().float() @ problem.W_dec.bfloat16().float().t()
    exact = torch.where(problem.b_enc > 0, grad_acts.sum(0), 0)
    error, eager = ((b_enc.grad.to(dtype) - exact).norm() for dtype in (torch.float32, torch.bfloat16))  # type: ignore[union-attr]
    assert error < eager / 2


@pytest.mark.parametrize("in_chunks", [False, True], ids=["few tokens", "chunks"])
@pytest.mark.parametrize("options", [{}, {"k": 3}, {"k": 3, "batch_topk": True}], ids=["all", "k", "batch"])
def test_a_bias_that_outweighs_products_is_not_rounded(
    options: dict[str, Any], in_chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_chunks:
        monkeypatch.setattr(importlib.import_module("fastsae_kernels.cpu.encode"), "MAX_ELEMENTS", 0)
        monkeypatch.setattr(importlib.import_module("fastsae_kernels.cpu.topk"), "DENSE_ELEMENTS", 0)
    x, W_enc, _, threshold, *_ = problems.make(64, 24, 83, density=0.5).tensors()
    assert x is not None
    assert W_enc is not None
    assert threshold is not None
    operands = (x.bfloat16().float(), W_enc.bfloat16().float(), 50 + torch.arange(83) * 0.3, threshold)
    with torch.autocast("cpu", torch.bfloat16):
        acts = kernels.encode(*operands, **options)
    truth = reference.hidden_pre(*[tensor.double() for tensor in operands[:3]])
    listed = truth[acts.row_ids(), acts.indices.long()]
    assert acts.values.numel() == (64 * 3 if "k" in options else 64 * 83)
    assert (acts.values - listed).abs().max() < 2.0**-8 * (truth - operands[2]).abs().max() + 1e-5


def test_decode_adds_the_bias_itself() -> None:
    acts = SparseActs(torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.ones(1), (1, 1))
    W_dec, b_dec = torch.full((1, 1), -256.0), torch.full((1,), 257.0)  # 8 bits do not hold 257
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.decode(acts, W_dec, b_dec).item() == 1.0


def test_narrow_biases_stay_narrow() -> None:
    problem = make(0.02).to(torch.bfloat16)
    outside, within = (bias_gradients(problem, fused(problem), dtype) for dtype in (None, torch.bfloat16))
    for name, grad in outside.items():
        assert torch.equal(grad, within[name])


def test_wide_biases_beside_narrow_factors_are_those_of_autocast() -> None:
    wide = make(0.02)
    narrow = wide.to(torch.bfloat16)
    biases = {"b_enc": wide.b_enc, "b_dec": wide.b_dec}
    with torch.autocast("cpu", torch.bfloat16):
        expected = kernels.autoencode(*wide.tensors()[:6], spec=wide.spec).sae_out  # type: ignore[arg-type]
    got = kernels.autoencode(*replace(narrow, **biases).tensors()[:6], spec=wide.spec).sae_out  # type: ignore[arg-type]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)
    of_other_dtype = replace(wide, b_enc=wide.b_enc.half(), b_dec=wide.b_dec.double())
    with torch.autocast("cpu", torch.bfloat16):
        kernels.autoencode(*of_other_dtype.tensors()[:6], spec=wide.spec)  # type: ignore[arg-type]
