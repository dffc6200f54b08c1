"""Top-k and BatchTopK on the GPU path: exact among ties, over many ranges of features, and where rows or buffers overflow.

Problems of small integers make every pre-activation exact, so that results must equal the fp64 reference, with ties at
nearly every cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import problems
import pytest
import torch
from gpu_helpers import DEVICE, NARROW, few_programs_here, first, needs_kernels, run
from torch import Tensor

from fastsae_kernels import AutoencodeSpec, reference

pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rows that hold few entries, hence many ranges of features on small problems."""
    from fastsae_kernels.gpu import batch_topk, radix, row_topk

    monkeypatch.setattr(row_topk, "MIN_CAPACITY", 16)
    monkeypatch.setattr(row_topk, "SMALL_BATCH", 0)
    monkeypatch.setattr(batch_topk, "MIN_RANGE", 4)
    monkeypatch.setattr(batch_topk, "AGAIN_PROGRAMS", 2)
    monkeypatch.setattr(radix, "BLOCK", 64)
    monkeypatch.setattr(radix, "PROGRAMS", 3)
    with few_programs_here():
        yield


def integers(n_tokens: int, d_in: int, d_sae: int, spec: AutoencodeSpec, seed: int = 0) -> problems.Problem:
    """Exact pre-activations, most of them tied with others; half of all features active."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=g).float()

    base = problems.make(n_tokens, d_in, d_sae, spec=spec, with_scale=spec.penalty != "l0")
    return replace(
        base,
        x=draw(n_tokens, d_in),
        W_enc=draw(d_sae, d_in).t(),
        b_enc=draw(d_sae),
        threshold=torch.zeros(d_sae),
        W_dec=draw(d_sae, d_in),
        grad_out=draw(n_tokens, d_in),
    )


@pytest.mark.parametrize("batch_topk", [False, True], ids=["rows", "batch"])
@pytest.mark.parametrize("k", [1, 3, 16, 70, 150])
def test_exact_among_ties(k: int, batch_topk: bool) -> None:
    spec = AutoencodeSpec(k=k, batch_topk=batch_topk, penalty="l1")
    problem = integers(11, 6, 150, spec, seed=k)
    problems.assert_matches(run(problem, 32), problem)


@pytest.fixture
def overflows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows (or buffers) overflowed, one number per forward pass that could."""
    from fastsae_kernels.gpu import batch_topk, row_topk

    seen: list[int] = []
    resolve, cut = row_topk.resolve_overflow_topk, batch_topk.cut_activations

    def resolve_and_count(x, W_enc, b_enc, threshold, counts, entries, capacity, *rest):  # type: ignore[no-untyped-def]
        seen.append(int((counts > capacity).sum()))
        resolve(x, W_enc, b_enc, threshold, counts, entries, capacity, *rest)

    def cut_and_count(problem, buffer, places):  # type: ignore[no-untyped-def]
        seen.append(int((buffer.cursor > buffer.entries.numel()).sum()))
        return cut(problem, buffer, places)

    monkeypatch.setattr(row_topk, "resolve_overflow_topk", resolve_and_count)
    monkeypatch.setattr(batch_topk, "cut_activations", cut_and_count)
    return seen


ROWS, BATCH = AutoencodeSpec(k=4), AutoencodeSpec(k=4, batch_topk=True)
BOTH = pytest.mark.parametrize("spec", [ROWS, BATCH], ids=["rows", "batch"])
SPECS = {
    "rows, l0": AutoencodeSpec(k=4),
    "rows, window": AutoencodeSpec(k=4, bandwidth=0.3, ste_to_input=True),
    "rows, tanh, window": AutoencodeSpec(k=4, bandwidth=0.3, penalty="tanh"),
    "batch, l0": AutoencodeSpec(k=4, batch_topk=True),
    "batch, l1": AutoencodeSpec(k=4, batch_topk=True, penalty="l1"),
    "batch, tanh": AutoencodeSpec(k=4, batch_topk=True, penalty="tanh"),
}


def half_active(spec: AutoencodeSpec, n_tokens: int = 9, d_sae: int = 150) -> problems.Problem:
    """A random problem with thresholds of 0, as a TopK SAE has."""
    problem = problems.make(n_tokens, 20, d_sae, spec=spec, with_scale=spec.penalty != "l0")
    return replace(problem, threshold=torch.zeros(d_sae))


def rising(problem: problems.Problem) -> problems.Problem:
    """Later features are the larger ones: the bound from the first ones admits everything."""
    d_sae = problem.b_enc.numel()
    return replace(problem, b_enc=torch.arange(d_sae).float())


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_many_ranges_without_an_overflow(
    spec: AutoencodeSpec, monkeypatch: pytest.MonkeyPatch, overflows: list[int]
) -> None:
    from fastsae_kernels.gpu import row_topk

    monkeypatch.setattr(row_topk, "MIN_CAPACITY", 32)
    problem = half_active(spec)
    problems.assert_matches(run(problem, 32), problem)
    assert overflows == [0]


@pytest.mark.parametrize(("k", "small_batch"), [(1, 0), (64, 0), (100, 0), (64, 64)])
def test_shipped_capacities_do_not_overflow(
    k: int, small_batch: int, monkeypatch: pytest.MonkeyPatch, overflows: list[int]
) -> None:
    """Half of all features active, in no particular order: the overflow path has nothing to do."""
    from fastsae_kernels.gpu import row_topk

    monkeypatch.setattr(row_topk, "MIN_CAPACITY", 256)
    monkeypatch.setattr(row_topk, "SMALL_BATCH", small_batch)
    problem = half_active(AutoencodeSpec(k=k), n_tokens=16, d_sae=5000)
    acts = row_topk.list_topk(
        *(tensor.to(DEVICE) for tensor in (problem.x, problem.W_enc, problem.b_enc, problem.threshold)), k, 0.0
    ).acts
    assert overflows == [0]
    dense = reference.encode(problem.x, problem.W_enc, problem.b_enc, problem.threshold, k=k)
    torch.testing.assert_close(acts.to_dense().cpu(), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_few_active(spec: AutoencodeSpec) -> None:
    """Rows, and the batch, with less than they could keep: everything stays, window entries too."""
    problem = problems.make(9, 20, 150, spec=spec, density=0.015, with_scale=spec.penalty != "l0")
    problems.assert_matches(run(problem, 32), problem)


@BOTH
def test_rising_activity_overflows_and_stays_exact(spec: AutoencodeSpec, overflows: list[int]) -> None:
    problem = rising(half_active(spec))
    problems.assert_matches(run(problem, 32), problem)
    assert overflows == [9 if spec is ROWS else 1]


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "counted"])
@pytest.mark.parametrize(("k", "bandwidth"), [(1, 2.0), (5, 0.0), (21, 2.0)])
def test_overflowing_rows_among_ties(
    k: int, bandwidth: float, merge: bool, monkeypatch: pytest.MonkeyPatch, overflows: list[int]
) -> None:
    """No room to spare: nearly every row overflows; both ways to resolve it."""
    from fastsae_kernels.gpu import overflow_topk, row_topk

    monkeypatch.setattr(row_topk, "MIN_CAPACITY", 1)
    monkeypatch.setattr(row_topk, "HEADROOM", 1)
    monkeypatch.setattr(overflow_topk, "MAX_MERGE", 512 if merge else 0)
    problem = integers(9, 6, 70, AutoencodeSpec(k=k, bandwidth=bandwidth, penalty="l1"), seed=k)
    problem = replace(problem, x=problem.x * (torch.arange(9) % 7 != 3)[:, None])  # and rows with few active
    problems.assert_matches(run(problem, 1), problem)
    assert overflows[0] > 0


@pytest.mark.parametrize("k", [1, 5, 30])
def test_overflowing_batch_among_ties(k: int, overflows: list[int]) -> None:
    problem = integers(18, 6, 70, AutoencodeSpec(k=k, batch_topk=True, penalty="l1"), seed=k)
    problem = replace(problem, b_enc=(torch.arange(70) // 4 * 4).float())
    problems.assert_matches(run(problem, 32), problem)
    assert overflows == [1] or k == 30


@BOTH
@pytest.mark.parametrize("n_tokens", [1, 18])
def test_all_values_equal(spec: AutoencodeSpec, n_tokens: int, overflows: list[int]) -> None:
    """The lowest features win; in a batch, those of the lowest tokens. Rows need no more room for it."""
    problem = problems.make(n_tokens, 4, 70, spec=spec)
    problem = replace(problem, W_enc=torch.zeros(4, 70), b_enc=torch.full((70,), 2.0), threshold=torch.zeros(70))
    result = run(problem, 8)
    problems.assert_matches(result, problem)
    assert spec is BATCH or overflows == [0]
    full = 4 * n_tokens // 70
    expected = (
        [4.0] * n_tokens if spec is ROWS else ([70.0] * full + [4.0 * n_tokens % 70] + [0.0] * n_tokens)[:n_tokens]
    )
    assert result.outputs["l0"].tolist() == expected


@BOTH
def test_equal_tokens(spec: AutoencodeSpec) -> None:
    problem = half_active(spec, n_tokens=24)
    problem = replace(problem, x=problem.x[torch.arange(24) % 3])
    problems.assert_matches(run(problem, 32), problem)


@BOTH
@pytest.mark.parametrize("name", problems.HOSTILE)
def test_on_hostile_inputs(name: str, spec: AutoencodeSpec) -> None:
    problem = first(problems.HOSTILE[name], 7)
    problem = replace(problem, spec=replace(spec, k=min(4, problem.W_dec.shape[0])))
    problems.assert_matches(run(problem, 32), problem)


@pytest.mark.parametrize("spec", [replace(ROWS, k=150), replace(BATCH, k=150), replace(BATCH, k=75)])
def test_k_of_all_features(spec: AutoencodeSpec) -> None:
    problem = half_active(spec)
    problems.assert_matches(run(problem, 32), problem)


@BOTH
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_16_bits(spec: AutoencodeSpec, dtype: torch.dtype) -> None:
    problem = integers(9, 6, 70, spec).to(dtype)
    problems.assert_matches(run(problem, 32), problem)


@pytest.mark.parametrize("k", [3, 8])
@pytest.mark.parametrize("bandwidth", [0.0, 2.0])
def test_rows_too_long_for_one_program(k: int, bandwidth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsae_kernels.gpu import topk

    monkeypatch.setattr(topk, "MAX_SORT", 8)
    problem = integers(9, 6, 300, AutoencodeSpec(k=k, bandwidth=bandwidth))
    problems.assert_matches(run(problem, 32), problem)


@BOTH
@pytest.mark.parametrize("overflowing", [False, True])
def test_nan_reaches_the_output_of_its_row_alone(spec: AutoencodeSpec, overflowing: bool) -> None:
    """NaN is the largest value of all: in a batch it takes the places of the others, and is not lost."""
    problem = half_active(spec, n_tokens=5)
    problem = rising(problem) if overflowing else problem
    problem.x[3, 2] = float("nan")
    sae_out = run(problem, 32).outputs["sae_out"]
    assert sae_out[3].isnan().all()
    others = [0, 1, 2, 4]
    truth = problems.run_reference(problem.to(torch.float64)).outputs["sae_out"]
    torch.testing.assert_close(sae_out[others], truth[others], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [ROWS, BATCH, replace(ROWS, bandwidth=0.3)], ids=["rows", "batch", "rows, window"])
@pytest.mark.parametrize("overflowing", [False, True])
def test_two_runs_are_bit_equal(spec: AutoencodeSpec, overflowing: bool) -> None:
    problem = rising(half_active(spec)) if overflowing else half_active(spec)
    problems.assert_bit_equal(run(problem, 32), run(problem, 32))


@BOTH
@pytest.mark.parametrize("overflowing", [False, True])
def test_uninitialised_memory_never_shows(spec: AutoencodeSpec, overflowing: bool, poisoned_memory: None) -> None:
    problem = rising(half_active(spec)) if overflowing else half_active(spec)
    problems.assert_matches(run(problem, 32), problem)


def test_as_many_features_as_a_row_can_hold_need_one_range(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsae_kernels.gpu import row_topk

    def never(*args: object) -> None:
        raise AssertionError("nothing to prune, nothing to resolve")

    monkeypatch.setattr(row_topk, "MIN_CAPACITY", 256)
    monkeypatch.setattr(row_topk.topk, "prune_rows", never)
    monkeypatch.setattr(row_topk, "resolve_overflow_topk", never)
    problem = half_active(ROWS)
    problems.assert_matches(run(problem, 32), problem)


@pytest.mark.parametrize("n_tokens", [0, 1, 13])
@pytest.mark.parametrize("kind", ["random", "integers", "rising", "few active"])
def test_batch_topk_lists_what_the_reference_keeps(kind: str, n_tokens: int) -> None:
    from fastsae_kernels.gpu.batch_topk import encode_batch_topk

    p = integers(n_tokens, 20, 150, BATCH) if kind == "integers" else half_active(BATCH, n_tokens)
    p = rising(p) if kind == "rising" else p
    p = replace(p, threshold=torch.full((150,), 1.9)) if kind == "few active" else p
    acts, min_active = encode_batch_topk(*(tensor.to(DEVICE) for tensor in (p.x, p.W_enc, p.b_enc, p.threshold)), 4)
    wide = (tensor.double() for tensor in (p.x, p.W_enc, p.b_enc, p.threshold))
    dense = reference.encode(*wide, k=4, batch_topk=True) if n_tokens > 0 else torch.zeros(0, 150)
    torch.testing.assert_close(acts.to_dense().cpu().double(), dense.double(), rtol=1e-5, atol=1e-5)
    smallest = dense[dense > 0].min().item() if (dense > 0).any() else float("inf")
    assert min_active.item() == pytest.approx(smallest, rel=1e-5)
    # its size does not depend on the data; rows are sorted, and nothing is listed twice
    assert acts.indices.numel() == acts.values.numel() == 4 * n_tokens
    packed = acts.packed()
    assert packed.indices.cpu().tolist() == dense.nonzero()[:, 1].tolist()
    assert packed.row_ids().cpu().tolist() == dense.nonzero()[:, 0].tolist()


def test_backward_of_a_batch_counts_no_unused_place() -> None:
    """Places behind the last row's end belong to no feature and no token, whatever memory held."""
    from fastsae_kernels import gpu
    from fastsae_kernels.gpu.batch_topk import encode_batch_topk

    p = replace(problems.make(5, 20, 150), threshold=torch.full((150,), 1.9))
    x, W_enc, b_enc, threshold, W_dec, grad_out = (
        tensor.to(DEVICE) for tensor in (p.x, p.W_enc, p.b_enc, p.threshold, p.W_dec, p.grad_out)
    )
    acts, _ = encode_batch_topk(x, W_enc, b_enc, threshold, 10)
    assert acts.row_counts is not None
    assert 0 < acts.row_counts.sum() < acts.indices.numel()
    dense = acts.to_dense().cpu().double()
    grad_values, grad_W_dec = gpu.decode_backward(acts, W_dec, grad_out)
    torch.testing.assert_close(grad_W_dec.cpu().double(), dense.T @ p.grad_out.double(), rtol=1e-5, atol=1e-5)
    assert not grad_values[int(acts.row_counts.sum()) :].any()
    ones = torch.ones_like(acts.values)
    grad_x, grad_W_enc, grad_b_enc = gpu.encode_backward(acts, x, W_enc, ones, needs_x=True)
    active = (dense > 0).double()
    torch.testing.assert_close(grad_b_enc.cpu().double(), active.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_W_enc.cpu().double(), p.x.double().T @ active, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_x.cpu().double(), active @ p.W_enc.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["random", "integers", "rising"])
@pytest.mark.parametrize("bandwidth", [0.0, 0.4, 8.0])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_encode_lists_what_the_reference_has(k: int, bandwidth: float, kind: str) -> None:
    """Window entries only in rows with at most k active; among them rows whose window outgrows every capacity."""
    from fastsae_kernels import gpu

    spec = AutoencodeSpec()
    p = integers(9, 20, 150, spec) if kind == "integers" else half_active(spec)
    p = replace(rising(p) if kind == "rising" else p, threshold=torch.full((150,), 1.5))
    p.x[3] = 0
    p.x[5] = -p.x[5].abs()
    operands = [tensor.to(DEVICE) for tensor in (p.x, p.W_enc, p.b_enc, p.threshold)]
    acts = gpu.encode(*operands, AutoencodeSpec(bandwidth, k)).packed()
    wide = [tensor.double() for tensor in (p.x, p.W_enc, p.b_enc, p.threshold)]
    pre, dense = reference.hidden_pre(*wide[:3]), reference.encode(*wide, k=k)
    torch.testing.assert_close(acts.to_dense().cpu().double(), dense, rtol=1e-5, atol=1e-5)
    whole = (pre > p.threshold).sum(1, keepdim=True) <= k
    listed = (dense > 0) | ((pre - p.threshold).abs() < bandwidth / 2) & whole
    assert acts.row_ids().cpu().tolist() == listed.nonzero()[:, 0].tolist()
    assert acts.indices.cpu().tolist() == listed.nonzero()[:, 1].tolist()


@BOTH
def test_fp64_is_refused(spec: AutoencodeSpec) -> None:
    with pytest.raises(TypeError, match="float64"):
        run(half_active(spec).to(torch.float64), 32)


@pytest.mark.parametrize("k", [3, 150], ids=["merge", "select"])
def test_a_row_that_only_seemed_to_overflow_is_listed_whole(k: int) -> None:
    """The listing sums in another order, so the recount may find its entries inactive; such a row must not end up empty."""
    from fastsae_kernels.gpu import overflow_topk

    p = problems.make(4, 20, 300, density=0.01)
    arguments = [tensor.to(DEVICE) for tensor in (p.x, p.W_enc, p.b_enc, p.threshold)]
    active = reference.hidden_pre(p.x.double(), p.W_enc.double(), p.b_enc.double()) > p.threshold
    capacity = 200
    k = max(k, int(active.sum(1).max()))
    assert active.any()
    counts = torch.full((4,), capacity + 1, dtype=torch.int32, device=DEVICE)
    entries = torch.full((4 * capacity,), -1, dtype=torch.int64, device=DEVICE)
    overflow_topk.resolve_overflow_topk(*arguments, counts, entries, capacity, k, only_active=True)
    assert counts.tolist() == active.sum(1).tolist()
    listed = [sorted((row[:n] >> 32).tolist()) for row, n in zip(entries.view(4, -1), counts, strict=True)]
    assert listed == [row.nonzero().flatten().tolist() for row in active]
