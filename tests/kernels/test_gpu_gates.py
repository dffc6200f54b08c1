"""The dense backend with the gates of a GPU, against the fp64 reference: outputs, counts and every gradient by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import problems
import pytest
import torch
from gpu_helpers import DEVICE, NARROW, few_programs_here, needs_kernels, on_device, reserved

import fastsae_kernels as kernels
from fastsae_kernels import AutoencodeSpec, dense

pytestmark = needs_kernels

SPECS = {name: spec for name, spec in problems.SPECS.items() if spec.k is None}


@pytest.fixture(autouse=True)
def gates_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from fastsae_kernels.gpu import gates

    monkeypatch.setattr(dense, "_gates", lambda x: gates)
    monkeypatch.setattr(gates, "SPLITS", 2)
    with few_programs_here():
        yield


@pytest.fixture(params=["kept", "kept, tiles", "tiles"])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether a pass keeps its pre-activations, and one tile or several both ways."""
    if "kept" not in request.param:
        monkeypatch.setattr(dense, "KEPT_ELEMENTS", 0)
    if "tiles" in request.param:
        for name, value in {"TILE": 256, "KEPT_TILE": 256, "FEATURES": 16, "MIN_CHUNK": 16, "MAX_CHUNK": 32}.items():
            monkeypatch.setattr(dense, name, value)
    return str(request.param)


def run(problem: problems.Problem) -> problems.Result:
    inputs = [None if leaf is None else on_device(leaf.detach()).requires_grad_() for leaf in problem.tensors()]
    *tensors, scale = inputs
    options: dict[str, Any] = {"spec": problem.spec, "feature_scale": scale}
    with kernels.use_backend("dense"):
        output = kernels.autoencode(*tensors, **options)  # type: ignore[arg-type]
        named = {name: getattr(output, name) for name in ("sae_out", "penalty", "l0", "feature_counts")}
        back = replace(problem, grad_out=on_device(problem.grad_out), grad_penalty=on_device(problem.grad_penalty))
        found = problems.collect(inputs, named, back)
    cpu = [{name: value.cpu() for name, value in values.items()} for values in (found.outputs, found.grads)]
    return problems.Result(*cpu)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_matches_reference(spec: AutoencodeSpec, tiling: str) -> None:
    problem = problems.make(d_sae=101, spec=spec, with_scale=spec.penalty != "l0")
    problems.assert_matches(run(problem), problem)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_values_on_the_threshold_and_the_edges_of_the_window(
    spec: AutoencodeSpec, dtype: torch.dtype, tiling: str
) -> None:
    edges = problems.on_the_edges(spec).to(dtype)
    problems.assert_matches(run(edges), edges)


@pytest.mark.parametrize("tiling", ["tiles"], indirect=True)
@pytest.mark.parametrize("problem", problems.HOSTILE.values(), ids=problems.HOSTILE)
def test_hostile_inputs(problem: problems.Problem, tiling: str) -> None:
    problems.assert_matches(run(problem), problem)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["x", "b_enc", "threshold", "W_dec", "feature_scale", "grad_out", "grad_penalty"])
@pytest.mark.parametrize("spec", ["l0", "ste to input", "l1", "tanh, ste to input"])
def test_what_is_not_finite_is_kept(spec: str, name: str, value: float) -> None:
    """Whatever is NaN or Inf in dense PyTorch, outputs and gradients, is not finite here."""
    problem = problems.make(5, 8, 20, spec=problems.SPECS[spec], with_scale=True)
    getattr(problem, name).view(-1)[-3] = value
    got, expected = run(problem), problems.run_reference(problem)
    for output in ("sae_out", "penalty"):
        assert not got.outputs[output][~expected.outputs[output].isfinite()].isfinite().any(), output
    for tensor, grad in expected.grads.items():
        assert not got.grads[tensor][~grad.isfinite()].isfinite().any(), tensor


def test_a_window_of_no_width_adds_nothing_to_the_input() -> None:
    problem = problems.make(5, 8, 20, spec=AutoencodeSpec(ste_to_input=True))
    problem.threshold[3] = float("inf")
    problems.assert_matches(run(problem), problem)


@pytest.mark.parametrize("tiling", ["kept, tiles", "tiles"], indirect=True)
def test_non_contiguous_and_expanded_inputs(tiling: str) -> None:
    base = problems.make(9, 24, 43, spec=SPECS["tanh, ste to input"], with_scale=True)
    vectors = {name: getattr(base, name) for name in ("b_enc", "threshold", "b_dec", "feature_scale", "grad_penalty")}
    strided = replace(
        base,
        **{name: vector.repeat_interleave(2)[::2] for name, vector in vectors.items()},
        x=base.x[:1].expand(9, 24),
        W_enc=base.W_enc.contiguous(),  # [d_in, d_sae] row-major: the other storage
        W_dec=base.W_dec.t().contiguous().t(),
        grad_out=torch.ones(()).expand(9, 24),
    )
    problems.assert_matches(run(strided), strided)
    expanded = replace(base, **{name: vector[:1].expand_as(vector) for name, vector in vectors.items()})
    problems.assert_matches(run(expanded), expanded)


def test_a_penalty_of_tanh_may_weigh_features_by_negative_numbers() -> None:
    """The exponential of twice a product below -44 is more than fp32 holds."""
    problem = problems.make(9, 24, 43, spec=SPECS["tanh"], with_scale=True)
    assert problem.feature_scale is not None
    problem.feature_scale.mul_(-50)
    problems.assert_matches(run(problem), problem)


def test_uninitialised_memory_never_shows(tiling: str, poisoned_memory: None) -> None:
    problem = problems.make(9, 20, 43, spec=SPECS["tanh, ste to input"], with_scale=True)
    problems.assert_matches(run(problem), problem)


@pytest.mark.skipif(DEVICE == "cuda", reason="reserves host memory; the offsets are the same code on a GPU")
def test_offsets_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsae_kernels.gates import Features
    from fastsae_kernels.gpu import gates

    near = torch.tensor([1.0, 2.0, 3.0])
    far = reserved(2**32 + 2, monkeypatch).view(torch.float32).as_strided((3,), (2**30,)).copy_(near)
    features = Features(torch.ones(5), torch.zeros(5), torch.ones(5))
    found = [
        gates.gate_tile_backward(
            torch.ones(5, 3), torch.zeros(5, 4), torch.zeros(3, 4), penalty, features, SPECS["l1"], False
        )
        for penalty in (near, far)
    ]
    assert torch.equal(found[0].b_enc, torch.full((5,), 6.0))
    assert torch.equal(found[1].b_enc, found[0].b_enc)


def test_a_gpu_takes_them_but_for_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsae_kernels import gates
    from fastsae_kernels.gpu import gates as of_gpu

    monkeypatch.undo()
    cpu, gpu = torch.empty(0), torch.empty(0)
    monkeypatch.setattr(type(gpu), "is_cuda", property(lambda tensor: tensor is not cpu), raising=False)
    assert dense._gates(gpu) is of_gpu
    assert dense._gates(gpu.double()) is gates
    assert dense._gates(cpu) is gates
    monkeypatch.setattr(dense, "_has_kernels", lambda device: False)
    assert dense._gates(gpu) is gates


@pytest.mark.parametrize("missing", ["nothing", "Triton", "a newer Triton", "a newer GPU"])
def test_where_the_kernels_cannot_run_pytorch_gates(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`use_backend("dense")` is what is left to an old GPU."""
    import triton

    from fastsae_kernels.gpu import config

    monkeypatch.setattr(config, "_arch_of", config._arch_of.__wrapped__)
    monkeypatch.setattr(config, "capability", lambda index: (7, 5) if missing == "a newer GPU" else (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "some GPU")
    if "Triton" in missing:
        monkeypatch.delitem(sys.modules, "fastsae_kernels.gpu.config")  # it is imported again
    if missing == "Triton":
        monkeypatch.setitem(sys.modules, "triton", None)
    elif missing == "a newer Triton":
        monkeypatch.setattr(triton, "__version__", "3.4.0")
    assert dense._has_kernels.__wrapped__(torch.device("cuda", 0)) is (missing == "nothing")
