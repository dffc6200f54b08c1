"""The Triton encode, decode and their backward, one by one and through the public ops."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import problems
import pytest
import torch
from gpu_helpers import DEVICE, NEEDS_GPU, few_programs_here, needs_kernels, run

import fastsae_kernels as kernels
from fastsae_kernels import AutoencodeSpec, SparseActs, reference
from fastsae_kernels.types import AutoencodeNeeds, Capacity, OutputGrads, PassInputs

pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    with few_programs_here():
        yield


def entries_of(acts: SparseActs) -> list[list[int]]:
    """Listed features of each row, in their order."""
    counts = acts.row_offsets.diff() if acts.row_counts is None else acts.row_counts
    rows = zip(acts.row_offsets.tolist(), counts.tolist(), strict=False)
    return [acts.indices[start : start + count].tolist() for start, count in rows]


@pytest.mark.parametrize("capacity", [256, 4], ids=["fits", "is repeated"])
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("bandwidth", [0.0, 0.4])
def test_encode_lists_what_the_reference_has(
    capacity: int, k: int | None, bandwidth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsae_kernels import gpu

    # the module's name is taken by the function of that name
    monkeypatch.setattr(importlib.import_module("fastsae_kernels.gpu.encode"), "DEFAULT_CAPACITY", capacity)
    p = problems.make(9, 20, 43, density=0.2)
    x, W_enc, b_enc, threshold = (tensor.to(DEVICE) for tensor in (p.x, p.W_enc, p.b_enc, p.threshold))
    acts = gpu.encode(x, W_enc, b_enc, threshold, AutoencodeSpec(bandwidth, k))
    dense = reference.encode(p.x.double(), p.W_enc.double(), p.b_enc.double(), p.threshold.double(), k=k)
    torch.testing.assert_close(acts.to_dense().cpu().double(), dense, rtol=1e-5, atol=1e-6)
    pre = reference.hidden_pre(p.x.double(), p.W_enc.double(), p.b_enc.double())
    window = (pre - p.threshold).abs() < bandwidth / 2
    whole = torch.ones(9, dtype=torch.bool) if k is None else (pre > p.threshold).sum(1) <= k
    listed = (dense > 0) | (window & whole[:, None])
    assert entries_of(acts) == [row.nonzero().flatten().tolist() for row in listed]


def test_encode_of_no_tokens() -> None:
    from fastsae_kernels import gpu

    p = problems.make(0, 5, 9)
    acts = gpu.encode(*(tensor.to(DEVICE) for tensor in (p.x, p.W_enc, p.b_enc, p.threshold)), AutoencodeSpec())
    assert acts.shape == (0, 9)
    assert gpu.decode(acts, p.W_dec.to(DEVICE)).shape == (0, 5)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
def test_decode_and_its_backward(padded: bool) -> None:
    from fastsae_kernels import gpu

    p = problems.make(9, 20, 43, density=0.2)
    x, W_enc, b_enc, threshold = (tensor.to(DEVICE) for tensor in (p.x, p.W_enc, p.b_enc, p.threshold))
    W_dec, b_dec, grad_out = p.W_dec.to(DEVICE), p.b_dec.to(DEVICE), p.grad_out.to(DEVICE)
    acts = gpu.encode(x, W_enc, b_enc, threshold, AutoencodeSpec())
    acts = acts if padded else acts.packed()
    dense = acts.to_dense().double().cpu()
    sae_out = gpu.decode(acts, W_dec, b_dec).cpu().double()
    torch.testing.assert_close(sae_out, dense @ p.W_dec.double() + p.b_dec, rtol=1e-5, atol=1e-5)

    grad_values, grad_W_dec = gpu.decode_backward(acts, W_dec, grad_out)
    torch.testing.assert_close(grad_W_dec.cpu().double(), dense.T @ p.grad_out.double(), rtol=1e-5, atol=1e-5)
    rows, columns = acts.row_ids().cpu(), acts.indices.long().cpu()
    expected = (p.grad_out.double() @ p.W_dec.double().T)[rows, columns]
    valid = acts.valid()
    expected = expected if valid is None else expected * valid.cpu()
    torch.testing.assert_close(grad_values.cpu().double(), expected, rtol=1e-5, atol=1e-5)

    grad_hidden_pre = grad_values * 0.5
    grads = torch.zeros(9, 43, dtype=torch.float64)
    grads.index_put_((rows, columns), grad_hidden_pre.cpu().double(), accumulate=True)
    grad_x, grad_W_enc, grad_b_enc = gpu.encode_backward(acts, x, W_enc, grad_hidden_pre, AutoencodeNeeds())
    torch.testing.assert_close(grad_x.cpu().double(), grads @ p.W_enc.double().T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_W_enc.cpu().double(), p.x.double().T @ grads, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_b_enc.cpu().double(), grads.sum(0), rtol=1e-5, atol=1e-5)
    assert gpu.encode_backward(acts, x, W_enc, grad_hidden_pre, needs_x=False)[0] is None


def test_public_ops_run_on_the_triton_backend() -> None:
    p = problems.make(9, 20, 43, spec=problems.SPECS["tanh"], with_scale=True)
    inputs = problems.leaves(p)
    with kernels.use_backend("triton"):
        *tensors, scale = (None if leaf is None else leaf.to(DEVICE) for leaf in inputs)
        output = kernels.autoencode(*tensors, spec=p.spec, feature_scale=scale)  # type: ignore[arg-type]
        named = {name: getattr(output, name).cpu() for name in ("sae_out", "penalty", "l0", "feature_counts")}
        problems.assert_matches(problems.collect(inputs, named, p), p)


def test_public_encode_and_decode_are_differentiable() -> None:
    p = problems.make(9, 20, 43, density=0.2)
    x, W_enc, b_enc, threshold, W_dec, b_dec, _ = problems.leaves(p)
    with kernels.use_backend("triton"):
        moved = [tensor.to(DEVICE) for tensor in (x, W_enc, b_enc, threshold, W_dec, b_dec)]
        acts = kernels.encode(*moved[:4])
        sae_out = kernels.decode(acts, *moved[4:])
    sae_out.backward(p.grad_out.to(DEVICE))  # by the same backend, also out here
    truth = [leaf.double().detach().requires_grad_() for leaf in (x, W_enc, b_enc, threshold, W_dec, b_dec)]
    dense = reference.encode(*truth[:4])
    reference.decode(dense, *truth[4:]).backward(p.grad_out.double())
    for name, leaf, exact in zip(problems.NAMES, (x, W_enc, b_enc, threshold, W_dec, b_dec), truth, strict=False):
        if name != "threshold":  # no window, no estimate
            torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-5, msg=name)


@NEEDS_GPU
def test_training_pass_never_synchronises() -> None:
    problem = problems.make(64, 32, 256, spec=problems.SPECS["l0"])
    tensors = [None if tensor is None else tensor.to(DEVICE) for tensor in problem.tensors()]
    run(problem, 16)  # compiles
    from fastsae_kernels import gpu

    grad_out, grad_penalty = problem.grad_out.to(DEVICE), problem.grad_penalty.to(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs = PassInputs(*tensors)  # type: ignore[arg-type]
        _, kept = gpu.forward(inputs, problem.spec, Capacity(16, 16))
        gpu.backward(inputs, kept, problem.spec, OutputGrads(grad_out, None, grad_penalty), AutoencodeNeeds())
    finally:
        torch.cuda.set_sync_debug_mode("default")
