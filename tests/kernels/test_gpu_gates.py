"""The dense backend with the gates of a GPU, against the fp64 reference: outputs, counts and every gradient by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import problems
import pytest
import torch
from gpu_helpers import NARROW, few_programs_here, needs_kernels, on_device

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


@pytest.mark.parametrize("name", ["x", "b_enc", "W_dec", "grad_out"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_kept(name: str, value: float) -> None:
    problem = problems.make(d_sae=100, spec=problems.SPECS["ste to input"])
    getattr(problem, name).view(-1)[-3] = value
    got, expected = run(problem), problems.run_reference(problem)
    for output in ("sae_out", "penalty"):
        assert not got.outputs[output][~expected.outputs[output].isfinite()].isfinite().any(), output
    for tensor, grad in expected.grads.items():
        assert not got.grads[tensor][~grad.isfinite()].isfinite().any(), tensor


def test_a_gpu_takes_them_but_for_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsae_kernels import gates
    from fastsae_kernels.gpu import gates as of_gpu

    monkeypatch.undo()
    cpu, gpu = torch.empty(0), torch.empty(0)
    monkeypatch.setattr(type(gpu), "is_cuda", property(lambda tensor: tensor is not cpu), raising=False)
    assert dense._gates(gpu) is of_gpu
    assert dense._gates(gpu.double()) is gates
    assert dense._gates(cpu) is gates
    monkeypatch.setattr(dense, "find_spec", lambda name: None)
    assert dense._gates(gpu) is gates
