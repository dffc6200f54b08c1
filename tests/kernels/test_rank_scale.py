"""A top-k that looks at scaled pre-activations: every backend against fp64, and what SAELens' rescaling amounts to."""

from __future__ import annotations

from dataclasses import replace

import gpu_helpers
import problems
import pytest
import test_cpu
import test_graph
import torch
from gpu_helpers import needs_kernels
from torch import Tensor

import fastsae_kernels as kernels
from fastsae_kernels import AutoencodeSpec, reference

SPECS = {name: spec for name, spec in problems.SPECS.items() if spec.k is not None and spec.bandwidth == 0}
scoring = test_cpu.scoring


def scales(d_sae: int, *, exact: bool) -> Tensor:
    """Scales of several sizes, some of them 0; powers of two with `exact`, which round nothing."""
    g = torch.Generator().manual_seed(7)
    powers = 2.0 ** torch.randint(-2, 3, (d_sae,), generator=g)
    scale = powers if exact else powers * (1 + torch.rand(d_sae, generator=g))
    return torch.where(torch.arange(d_sae) % 7 == 3, 0.0, scale)


def scaled(problem: problems.Problem, *, exact: bool = False) -> problems.Problem:
    return replace(problem, rank_scale=scales(len(problem.threshold), exact=exact))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_matches_reference(spec: AutoencodeSpec, scoring: str) -> None:
    problem = scaled(problems.make(d_sae=300, spec=spec, with_scale=spec.penalty != "l0"))
    problems.assert_matches(test_cpu.run(problem, "cpu"), problem)


@pytest.mark.parametrize("batch_topk", [False, True], ids=["token", "batch"])
def test_ties_and_gates_hit_exactly(batch_topk: bool, scoring: str) -> None:
    edges = problems.on_the_edges(AutoencodeSpec(k=4, batch_topk=True))
    problem = scaled(replace(edges, spec=AutoencodeSpec(k=4, batch_topk=batch_topk)), exact=True)
    problems.assert_matches(test_cpu.run(problem, "cpu"), problem)


@pytest.mark.parametrize("batch_topk", [False, True], ids=["token", "batch"])
@pytest.mark.parametrize("name", [name for name, p in problems.HOSTILE.items() if len(p.threshold) > 5])
def test_hostile_inputs(name: str, batch_topk: bool, scoring: str) -> None:
    spec = AutoencodeSpec(k=5, batch_topk=batch_topk)
    problem = scaled(replace(problems.HOSTILE[name], spec=spec), exact=True)
    problems.assert_matches(test_cpu.run(problem, "cpu"), problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    problem = scaled(problems.make(64, 32, 96, spec=AutoencodeSpec(k=5)), exact=True).to(dtype)
    got = test_cpu.run(problem, "cpu")
    truth, eager = problems.run_reference(problem.to(torch.float64)), problems.run_reference(problem)
    for theirs in ("outputs", "grads"):
        values, exact, rounded = (getattr(result, theirs) for result in (got, truth, eager))
        for name in exact:
            problems.assert_within_budget(name, values[name], exact[name], rounded[name])


@needs_kernels
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_kernels_match_reference(spec: AutoencodeSpec) -> None:
    problem = scaled(problems.make(spec=spec, with_scale=spec.penalty != "l0"))
    problems.assert_matches(gpu_helpers.run(problem, 64), problem)


@pytest.mark.parametrize("name", ["top-5 of everything", "batch top-3"])
def test_compiled(name: str) -> None:
    problem = scaled(problems.make(spec=problems.SPECS[name]))
    problems.assert_matches(test_graph.run_compiled(problem), problem)


@pytest.mark.parametrize("batch_topk", [False, True], ids=["token", "batch"])
def test_is_the_rescaling_by_decoder_norms_whose_gradient_cancels(batch_topk: bool) -> None:
    """SAELens multiplies pre-activations by the decoder's norms, with their gradient, and divides by them in the decoder."""
    problem = problems.make(spec=AutoencodeSpec(k=5, batch_topk=batch_topk)).to(torch.float64)
    leaves = problems.leaves(problem)
    x, W_enc, b_enc, threshold, W_dec, b_dec, _ = (torch.zeros(()) if leaf is None else leaf for leaf in leaves)
    norms = W_dec.norm(dim=1)
    acts = reference.encode(x, W_enc * norms, b_enc * norms, threshold, k=5, batch_topk=batch_topk)
    sae_out = reference.decode(acts * (1 / norms), W_dec, b_dec)
    l0 = (acts > 0).double().sum(1) + 0 * sae_out.sum(1)
    expected = problems.collect(leaves, {"sae_out": sae_out, "penalty": l0}, problem)
    got = test_cpu.run(replace(problem, rank_scale=norms.detach()), "cpu")
    torch.testing.assert_close(got.outputs["sae_out"], expected.outputs["sae_out"])
    for name, grad in expected.grads.items():
        torch.testing.assert_close(got.grads[name], grad, msg=name)


def test_smallest_of_the_batch_is_a_scaled_one() -> None:
    problem = scaled(problems.make(spec=AutoencodeSpec(k=3, batch_topk=True)))
    tensors, scale = problem.tensors()[:6], problem.rank_scale
    output = kernels.autoencode(*tensors, spec=problem.spec, rank_scale=scale)  # type: ignore[arg-type]
    assert output.acts is not None
    assert output.min_active is not None
    assert scale is not None
    torch.testing.assert_close(output.min_active, (output.acts.values * scale[output.acts.indices.long()]).min())


@pytest.mark.parametrize("spec", [AutoencodeSpec(), AutoencodeSpec(bandwidth=0.3, k=3)], ids=["no k", "a window"])
def test_is_refused_without_k_and_with_a_window(spec: AutoencodeSpec) -> None:
    with pytest.raises(ValueError, match="rank_scale: expected None"):
        test_cpu.run(scaled(problems.make(spec=spec)))
