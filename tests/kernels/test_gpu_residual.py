"""The loss inside the Triton decode: residual, squared errors and what `row_scale * residual` sends back.

The truth is the fp64 reference with the loss written out; eager in the problem's dtype sets the error budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module

import problems
import pytest
import torch
from gpu_helpers import NARROW, ON_GPU, few_programs_here, first, needs_kernels, run, transcoder
from torch import Tensor

from fastsae_kernels import AutoencodeSpec

pytestmark = needs_kernels
SPECS = problems.SPECS
# through the list of entries; as an overflowing row whose features are split over programs, or are not
EVERY_WAY = pytest.mark.parametrize(
    ("n_tokens", "capacity"), [(5, 43), (5, 1), (20, 1)], ids=["fits", "overflows", "many overflow"]
)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles that suit the interpreter, several of them even on small problems; a GPU runs what is shipped."""
    from fastsae_kernels.gpu import overflow

    if not ON_GPU:
        monkeypatch.setattr(overflow, "SCRATCH_PROGRAMS", 3)
        monkeypatch.setattr(import_module("fastsae_kernels.gpu.decode"), "MAX_ROW_SPLITS", 2)
    with few_programs_here(decode={"BLOCK_E": 4, "BLOCK_D": 16}):
        yield


def reference_residual(problem: problems.Problem, target: Tensor) -> Tensor:
    """`sae_out - target` in the problem's dtype, as fp64."""
    sae_out = problems.run_reference(problem).outputs["sae_out"]
    return (sae_out - target.double()).to(problem.x.dtype).double()


def run_reference(problem: problems.Problem, target: Tensor, row_scale: Tensor) -> problems.Result:
    """The dense reference in the problem's dtype, with the residual in place of the reconstruction."""
    residual = reference_residual(problem, target)
    grad_out = (row_scale.double()[:, None] * residual).to(problem.x.dtype)
    outputs, grads = problems.run_reference(replace(problem, grad_out=grad_out))
    squared_error = residual.square().sum(-1).to(problem.threshold.dtype).double()
    return problems.Result({**outputs, "sae_out": residual, "squared_error": squared_error}, grads)


def operands(problem: problems.Problem) -> tuple[Tensor, Tensor]:
    """A target about as large as the reconstruction, and row scales that give gradients about as large as the problem's."""
    g = torch.Generator().manual_seed(5)
    wide = problem.to(torch.float64)
    sae_out = problems.run_reference(wide).outputs["sae_out"]
    target = (torch.randn(sae_out.shape, generator=g) * sae_out.abs().mean()).to(problem.x.dtype)
    size = wide.grad_out.norm() / reference_residual(wide, target).norm()
    return target, (torch.randn(sae_out.shape[0], generator=g) * size).float()


def assert_matches(
    problem: problems.Problem, capacity: int, target: Tensor | None = None, row_scale: Tensor | None = None
) -> None:
    """Counts exactly, the other outputs and every gradient by name within twice the error of dense eager PyTorch."""
    given = operands(problem)
    target, row_scale = given[0] if target is None else target, given[1] if row_scale is None else row_scale
    truth, eager = (run_reference(p, target, row_scale) for p in (problem.to(torch.float64), problem))
    got = run(problem, capacity, target, row_scale)
    for name in ("l0", "feature_counts"):
        assert torch.equal(got.outputs[name], truth.outputs[name]), f"{name} differs"
    # squares pass the largest number of fp32 long before their roots do
    too_large = eager.outputs["squared_error"].isinf()
    assert torch.equal(got.outputs["squared_error"].isinf(), too_large)
    for result in (got, truth, eager):
        result.outputs["squared_error"].masked_fill_(too_large, 0.0)
    for name in ("sae_out", "squared_error", "penalty"):
        problems.assert_within_budget(name, got.outputs[name], truth.outputs[name], eager.outputs[name])
    assert got.grads.keys() == truth.grads.keys()
    for name, grad in truth.grads.items():
        problems.assert_within_budget(f"grad of {name}", got.grads[name], grad, eager.grads[name])


@pytest.mark.parametrize("capacity", [64, 2], ids=["fits", "overflows"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_matches_reference(spec: AutoencodeSpec, capacity: int) -> None:
    problem = problems.make(9, 20, 43, spec=spec, density=0.2, with_scale=spec.penalty != "l0")
    assert_matches(problem, capacity)


@pytest.mark.parametrize("capacity", [32, 3], ids=["fits", "overflows"])
@pytest.mark.parametrize("problem", problems.HOSTILE.values(), ids=problems.HOSTILE)
def test_on_hostile_inputs(problem: problems.Problem, capacity: int) -> None:
    assert_matches(first(problem, 7), capacity)


def test_one_row_overflows_among_others() -> None:
    problem = problems.make(20, 7, 129, spec=SPECS["tanh, ste to input"], with_scale=True, density=0.03)
    problem = replace(problem, x=problem.x * (1 + 50.0 * (torch.arange(20) == 11))[:, None])
    assert_matches(problem, 24)


def test_more_overflowing_rows_than_splits() -> None:
    """Past as many row blocks as programs no program shares its features, and residuals go straight to the output."""
    assert_matches(problems.make(70, 5, 37, spec=SPECS["ste to input"], density=0.5), 1)


@pytest.mark.parametrize("capacity", [43, 2], ids=["fits", "overflows"])
@pytest.mark.parametrize("d_out", [1, 16, 77])
def test_d_out_other_than_d_in(d_out: int, capacity: int) -> None:
    """A transcoder, its target as narrow as one column, as wide as a tile, and wider than several."""
    assert_matches(transcoder(SPECS["ste to input"], d_out), capacity)


@EVERY_WAY
def test_non_contiguous_and_expanded(n_tokens: int, capacity: int) -> None:
    problem = transcoder(SPECS["tanh"], 33, n_tokens)
    target, row_scale = operands(problem)
    strided = row_scale.repeat_interleave(2)[::2]
    for view in (target.t().contiguous().t(), target.repeat_interleave(2, 1)[:, ::2], target[:1].expand_as(target)):
        assert_matches(problem, capacity, view, strided)
    assert_matches(problem, capacity, target.mean().expand_as(target), row_scale.mean().expand_as(row_scale))


@pytest.mark.parametrize("wide_target", [False, True])
@pytest.mark.parametrize("capacity", [40, 4], ids=["fits", "overflows"])
@pytest.mark.parametrize("name", ["ste to input", "batch top-3"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_16_bits(dtype: torch.dtype, name: str, capacity: int, wide_target: bool) -> None:
    """A target of more digits than the input keeps them: residuals are formed in fp32."""
    problem = first(problems.on_the_edges(SPECS[name]), 9).to(dtype)
    target, row_scale = operands(problem)
    assert_matches(problem, capacity, target.to(torch.float32 if wide_target else dtype) * 1.0001, row_scale)


@pytest.mark.parametrize("capacity", [40, 4], ids=["fits", "overflows"])
def test_squared_error_is_not_of_rounded_values(capacity: int) -> None:
    """The squares of a 16-bit pass are within rounding of fp32, not of fp16."""
    problem = first(problems.on_the_edges(SPECS["no window"]), 9).to(torch.float16)
    problem = replace(problem, b_dec=problem.b_dec + 1000)  # a reconstruction of 1000 is known to within 0.5 in fp16
    target = torch.randn(9, 8, generator=torch.Generator().manual_seed(2))
    truth = reference_residual(problem.to(torch.float64), target)
    got = run(problem, capacity, target, torch.full((9,), 1e-4)).outputs
    torch.testing.assert_close(got["squared_error"], truth.square().sum(-1), rtol=1e-6, atol=0)
    assert torch.equal(got["sae_out"], truth.float().half().double())


@pytest.mark.parametrize("capacity", [43, 2], ids=["fits", "overflows"])
@pytest.mark.parametrize("name", ["tanh, ste to input", "batch top-2, tanh"])
def test_uninitialised_memory_never_shows(name: str, capacity: int, poisoned_memory: None) -> None:
    assert_matches(problems.make(9, 20, 43, spec=SPECS[name], with_scale=True), capacity)


@EVERY_WAY
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value: float, n_tokens: int, capacity: int) -> None:
    problem = problems.make(n_tokens, 20, 43, spec=SPECS["l0"], density=0.3)
    target, row_scale = operands(problem)
    target[3, 2] = value
    outputs = run(problem, capacity, target, row_scale).outputs
    assert torch.equal(outputs["sae_out"].isfinite(), target.isfinite())
    assert torch.equal(outputs["squared_error"].isfinite(), torch.arange(n_tokens) != 3)


@EVERY_WAY
def test_infinite_squares_are_not_nan(n_tokens: int, capacity: int) -> None:
    """An infinite activation times the zeros that fill a tile beyond the last column."""
    problem = problems.make(n_tokens, 20, 43, spec=SPECS["no window"], density=0.3)
    problem = replace(problem, W_enc=problem.W_enc.clone(), W_dec=problem.W_dec.abs())
    problem.W_enc[0, 5] = 10.0
    problem.x[3] = 1e38 * (torch.arange(20) == 0)
    outputs = run(problem, capacity, torch.zeros(n_tokens, 20), torch.ones(n_tokens)).outputs
    assert torch.equal(outputs["squared_error"].isinf(), torch.arange(n_tokens) == 3)


def test_without_a_target_nothing_changes() -> None:
    """The residual of zeros is the reconstruction, and row scales of one change no gradient."""
    problem = problems.make(9, 20, 43, spec=SPECS["l0"], density=0.3)
    plain = run(problem, 12)
    residual = run(replace(problem, grad_out=plain.outputs["sae_out"].float()), 12)
    fused = run(problem, 12, torch.zeros(9, 20), torch.ones(9))
    for name, output in plain.outputs.items():
        assert torch.equal(output, fused.outputs[name]), name
    for name, grad in residual.grads.items():
        torch.testing.assert_close(grad, fused.grads[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("capacity", [12, 2])
def test_two_runs_are_bit_equal(capacity: int) -> None:
    problem = transcoder(SPECS["l0"], 33)
    target, row_scale = operands(problem)
    problems.assert_bit_equal(*(run(problem, capacity, target, row_scale) for _ in range(2)))
