"""The Triton training pass against the fp64 reference: outputs, counts and every gradient by name.

Without a GPU the kernels run in Triton's interpreter, which runs programs one by one: it finds wrong formulas, masks and
offsets, not races.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import problems
import pytest
import torch
from gpu_helpers import DEVICE, NARROW, ON_GPU, few_programs_here, first, near_and_far, needs_kernels, run, transcoder

from fastsae_kernels import AutoencodeSpec

pytestmark = needs_kernels
SPECS = problems.SPECS


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles that suit the interpreter, several of them even on small problems; a GPU runs what is shipped."""
    from fastsae_kernels.gpu import overflow

    if not ON_GPU:
        monkeypatch.setattr(overflow, "SCRATCH_PROGRAMS", 3)
    with few_programs_here():
        yield


@pytest.mark.parametrize("capacity", [64, 2], ids=["fits", "overflows"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_matches_reference(spec: AutoencodeSpec, capacity: int) -> None:
    problem = problems.make(9, 20, 43, spec=spec, density=0.2, with_scale=spec.penalty != "l0")
    problems.assert_matches(run(problem, capacity), problem)


@pytest.mark.parametrize("capacity", [40, 8], ids=["fits", "overflows"])
@pytest.mark.parametrize("spec", [SPECS["ste to input"], SPECS["top-3"]], ids=["ste to input", "top-3"])
def test_on_threshold_and_window_edges(spec: AutoencodeSpec, capacity: int) -> None:
    """Pre-activations on the threshold and on both window edges, equal ones at the cut of the top-k."""
    problem = first(problems.on_the_edges(spec), 17)
    problems.assert_matches(run(problem, capacity), problem)


@pytest.mark.parametrize("problem", problems.HOSTILE.values(), ids=problems.HOSTILE)
def test_on_hostile_inputs(problem: problems.Problem) -> None:
    problem = first(problem, 7)
    problems.assert_matches(run(problem, 32), problem)


@pytest.mark.parametrize("mean_capacity", [1, 8], ids=["none fits", "some fit"])
@pytest.mark.parametrize("spec", [SPECS["l0"], SPECS["tanh, ste to input"]], ids=["l0", "tanh, ste to input"])
def test_rows_that_find_no_room_are_exact(spec: AutoencodeSpec, mean_capacity: int) -> None:
    """Rows lie one behind the other; those behind the end of the memory, and the one across it, overflow."""
    problem = problems.make(9, 20, 43, spec=spec, density=0.3, with_scale=spec.penalty != "l0")
    problems.assert_matches(run(problem, 43, mean_capacity=mean_capacity), problem)


def test_one_row_with_many_entries_takes_no_room_of_others() -> None:
    from fastsae_kernels.gpu.topk import packed_offsets, sort_rows

    counts = torch.tensor([2, 9, 0, 4, 3, 1], dtype=torch.int32, device=DEVICE)
    entries = torch.arange(24, device=DEVICE).view(6, 4) % 4 + 1 << 32  # feature and value bits
    for size, kept in ((6, [2, 0, 0, 4, 0, 0]), (9, [2, 0, 0, 4, 3, 0]), (24, [2, 0, 0, 4, 3, 1]), (1, [0] * 6)):
        offsets = packed_offsets(counts, 4, size)
        acts = sort_rows(counts, entries.flatten() + 1, offsets, (6, 5), None, size)
        assert acts.row_counts is not None
        assert acts.row_counts.tolist() == kept
        assert (offsets[0].item(), offsets[-1].item(), acts.indices.numel()) == (0, size, size)
        packed = acts.packed()
        assert packed.indices.tolist() == [j + 1 for n in kept for j in range(n)]
        assert (packed.values > 0).all()
        assert acts.values.count_nonzero() == sum(kept)


def test_one_row_overflows_among_others() -> None:
    problem = problems.make(20, 7, 129, spec=SPECS["tanh, ste to input"], with_scale=True, density=0.03)
    problem = replace(problem, x=problem.x * (1 + 50.0 * (torch.arange(20) == 11))[:, None])
    problems.assert_matches(run(problem, 24), problem)


def test_more_overflowing_rows_than_splits() -> None:
    """Past as many row blocks as programs no program shares its features, and sums go straight to the output."""
    problem = problems.make(70, 5, 37, spec=SPECS["ste to input"], density=0.5)
    problems.assert_matches(run(problem, 1), problem)


def test_d_out_other_than_d_in() -> None:
    """A transcoder: the target's width is not the input's."""
    problem = transcoder(SPECS["ste to input"], 33)
    for capacity in (43, 2):
        problems.assert_matches(run(problem, capacity), problem)


def test_non_contiguous_and_expanded_inputs() -> None:
    base = problems.make(9, 24, 43, spec=SPECS["tanh, ste to input"], with_scale=True)
    vectors = {name: getattr(base, name) for name in ("b_enc", "threshold", "b_dec", "feature_scale")}
    problem = replace(
        base,
        **{name: vector.repeat_interleave(2)[::2] for name, vector in vectors.items()},
        x=base.x[:1].expand(9, 24),
        W_enc=base.W_enc.contiguous(),  # [d_in, d_sae] row-major: the other storage
        W_dec=base.W_dec.t().contiguous().t(),
        grad_out=torch.ones(()).expand(9, 24),
        grad_penalty=torch.ones(()).expand(9),
    )
    for capacity in (43, 2):
        problems.assert_matches(run(problem, capacity), problem)


@pytest.mark.parametrize("capacity", [43, 2], ids=["fits", "overflows"])
def test_a_penalty_of_tanh_may_weigh_features_by_negative_numbers(capacity: int) -> None:
    """The exponential of twice a product below -44 is more than fp32 holds."""
    problem = problems.make(9, 24, 43, spec=SPECS["tanh"], with_scale=True)
    assert problem.feature_scale is not None
    problem.feature_scale.mul_(-50)
    problems.assert_matches(run(problem, capacity), problem)


@pytest.mark.parametrize("capacity", [64, 2], ids=["fits", "overflows"])
@pytest.mark.parametrize("spec", [SPECS["tanh, ste to input"], SPECS["batch top-3"]], ids=["tanh", "batch top-3"])
def test_rows_longer_than_a_program_holds(spec: AutoencodeSpec, capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsae_kernels.gpu import fused_backward, gradients

    monkeypatch.setattr(gradients, "MAX_DEPTH", 8)
    monkeypatch.setattr(fused_backward, "MAX_DEPTH", 8)
    monkeypatch.setattr(fused_backward, "LONG_ROW_BLOCK", 8)
    problem = problems.make(9, 20, 43, spec=spec, density=0.2, with_scale=spec.penalty != "l0")
    problems.assert_matches(run(problem, capacity), problem)


@pytest.mark.parametrize("capacity", [40, 4], ids=["fits", "overflows"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_16_bits(dtype: torch.dtype, capacity: int) -> None:
    problem = first(problems.on_the_edges(SPECS["ste to input"]), 9).to(dtype)
    problems.assert_matches(run(problem, capacity), problem)


@pytest.mark.parametrize("capacity", [43, 2], ids=["fits", "overflows"])
def test_uninitialised_memory_never_shows(capacity: int, poisoned_memory: None) -> None:
    problem = problems.make(9, 20, 43, spec=SPECS["tanh, ste to input"], with_scale=True)
    problems.assert_matches(run(problem, capacity), problem)


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("capacity", [43, 4], ids=["fits", "overflows"])
def test_nan_reaches_the_output_of_its_row_alone(capacity: int, k: int | None) -> None:
    problem = problems.make(5, 20, 43, spec=AutoencodeSpec(bandwidth=0.3, k=k))
    problem.x[3, 2] = float("nan")
    sae_out = run(problem, capacity).outputs["sae_out"]
    assert sae_out[3].isnan().all()
    assert sae_out[[0, 1, 2, 4]].isfinite().all()


def test_two_runs_are_bit_equal() -> None:
    problem = problems.make(9, 20, 43, spec=SPECS["l0"], density=0.3)
    problems.assert_bit_equal(run(problem, 12), run(problem, 12))


@pytest.mark.skipif(DEVICE == "cuda", reason="reserves host memory; the offsets are the same code on a GPU")
@pytest.mark.parametrize("capacity", [3, 1], ids=["fits", "overflows"])
def test_offsets_past_two_to_the_31(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = near_and_far(monkeypatch)
    problems.assert_bit_equal(run(near, capacity), run(far, capacity))


def test_fp64_is_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        run(problems.make(3, 4, 20).to(torch.float64), 8)
