"""fp8 candidates and their exact values, against `list_entries`, PyTorch's own float8 and a dense simulation.

Triton's interpreter runs the fp8 product in full precision; what tensor cores lose is in `fp8_simulation.py --accumulate`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace

import fp8_simulation
import numpy as np
import problems
import pytest
import torch
from gpu_helpers import DEVICE, FEW_PROGRAMS, needs_kernels, run
from torch import Tensor

import fastsae_kernels as kernels
from fastsae_kernels import AutoencodeSpec

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(
        DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9),
        reason="the GPU has no fp8 matrix instructions",
    ),
]
TILES = FEW_PROGRAMS | {
    "fp8_quantise": {"BLOCK_R": 16, "BLOCK_D": 64},
    "fp8_list": {"BLOCK_B": 16, "BLOCK_S": 32, "BLOCK_D": 128, "GROUP_B": 2},
    "fp8_rescore": {"BLOCK_E": 64, "BLOCK_D": 32},
}
BOTH = pytest.mark.parametrize("sigmas", [6.0, None], ids=["six sigmas", "bound"])
Row = dict[int, float]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tiles, and PyTorch's rounding to fp8 in Triton's interpreter, whose own loses the carry (7.9 becomes 4)."""
    from fastsae_kernels.gpu import config

    if DEVICE == "cuda":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_as_pytorch(values: np.ndarray, source: object, target: object, rounding: object) -> np.ndarray:
        if (source, target) != (tl.float32, tl.float8e4nv):
            return convert(values, source, target, rounding)
        numbers = torch.from_numpy(values.view(np.float32).copy())
        return numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert_as_pytorch)
    with config.override({name: {"16": tiles, "32": tiles} for name, tiles in TILES.items()}):
        yield


class Lists:
    """Spans of `capacity` slots per row, and what was appended to them."""

    def __init__(self, problem: problems.Problem, capacity: int) -> None:
        self.problem, self.capacity = problem, capacity
        n = len(problem.x)
        # one slot before and behind each span, which nobody may touch
        self.starts = torch.arange(n, dtype=torch.int32, device=DEVICE) * (capacity + 2) + 1
        self.cursors = self.starts.clone()
        self.entries = torch.full((n * (capacity + 2),), -1, dtype=torch.int64, device=DEVICE)

    def append(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        fp8: bool,
        sigmas: float | None = 6.0,
        bounds: Tensor | None = None,
    ) -> Lists:
        from fastsae_kernels.gpu import fp8 as fp8_module
        from fastsae_kernels.gpu.encode import list_entries

        p = self.problem
        stop = p.W_enc.shape[1] if stop is None else stop
        x, W_enc = p.x.to(DEVICE), p.W_enc.to(DEVICE)
        vectors = [vector[start:stop].to(DEVICE) for vector in (p.b_enc, p.threshold)]
        tensors = (x, W_enc[:, start:stop], *vectors, self.cursors, self.starts + self.capacity, self.entries)
        options = {"bandwidth": p.spec.bandwidth, "bounds": bounds, "first_feature": start}
        if fp8:
            weights = fp8_module.fp8_weights(W_enc, x, sigmas)
            fp8_module.list_entries_fp8(*tensors, **options, weights=weights.features(start, stop))
        else:
            list_entries(*tensors, **options)
        return self

    @property
    def counts(self) -> list[int]:
        return (self.cursors - self.starts).tolist()

    def rows(self) -> list[Row | None]:
        """Feature -> value of every row; None where it overflowed."""
        rows: list[Row | None] = []
        guards = self.entries.view(-1, self.capacity + 2)[:, [0, -1]]
        assert (guards == -1).all(), "wrote outside a span"
        spans = self.entries.view(-1, self.capacity + 2)[:, 1:-1].cpu()
        for count, span in zip(self.counts, spans, strict=True):
            if count > self.capacity:
                rows.append(None)
                continue
            values = span[:count].int().view(torch.float32).tolist()
            row = dict(zip((span[:count] >> 32).tolist(), values, strict=True))
            assert len(row) == count, "a feature stands twice in a row"
            rows.append(row)
        return rows


def assert_same(got: list[Row | None], expected: list[Row | None], problem: problems.Problem) -> None:
    """The same features in every row, values equal but for the order of fp32 sums."""
    size = problem.x.float().abs() @ problem.W_enc.float().abs() + problem.b_enc.float().abs()
    for n, (row, truth) in enumerate(zip(got, expected, strict=True)):
        assert row is not None
        assert truth is not None
        assert row.keys() == truth.keys(), f"row {n}"
        for feature, value in row.items():
            slack = 1e-6 * float(size[n, feature])
            assert value == pytest.approx(truth[feature], rel=0, abs=slack, nan_ok=True), f"row {n}, feature {feature}"


def assert_lists_the_same(problem: problems.Problem, sigmas: float | None = 6.0) -> None:
    capacity = problem.W_enc.shape[1]
    got, expected = (Lists(problem, capacity).append(fp8=fp8, sigmas=sigmas) for fp8 in (True, False))
    assert_same(got.rows(), expected.rows(), problem)


def candidates(problem: problems.Problem, sigmas: float | None) -> list[int]:
    """How many candidates each row has: without any slot, cursors count them and nothing is evaluated."""
    return Lists(problem, 0).append(fp8=True, sigmas=sigmas).counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_quantised_as_pytorch_does(dtype: torch.dtype) -> None:
    from fastsae_kernels.gpu import fp8_quantise

    g = torch.Generator().manual_seed(0)
    matrix = (torch.randn(37, 150, generator=g) * torch.logspace(-3, 2, 150)).to(dtype)
    spread = torch.rand(150, generator=g) + 0.1
    one = torch.ones(150)
    truth = fp8_simulation.rounded(matrix)
    by_rows = matrix.to(DEVICE)
    for name, view in (("rows", by_rows), ("columns", by_rows.t().contiguous().t())):
        plain = fp8_quantise.quantise(view, None, tokens=False)
        got = plain.values.float().cpu() * plain.scales.cpu()[:, None]
        assert torch.equal(got[:, :150], truth.values), name
        assert not got[:, 150:].any()
        assert plain.values.shape[1] % fp8_quantise.PARTIAL == 0
        assert torch.equal(plain.scales.cpu(), truth.scale[:, 0])
        features = fp8_quantise.quantise(view, spread.to(DEVICE), tokens=False)
        for quantised, weights in ((plain, one), (features, spread)):
            torch.testing.assert_close(quantised.norms.cpu(), truth.norms(weights), rtol=1e-5, atol=0)
            torch.testing.assert_close(quantised.errors.cpu(), truth.errors(weights), rtol=1e-5, atol=0)
        tokens = fp8_quantise.quantise(view, spread.to(DEVICE) / spread.sum(), tokens=True)
        shares = matrix.double().square() / matrix.double().square().sum(1, keepdim=True)
        wide = (shares.square() / (spread / spread.sum())).sum(1).div(3).clamp_min(1).sqrt().float()
        assert wide.max() > 1.2
        torch.testing.assert_close(tokens.norms.cpu(), truth.norms(one) * wide, rtol=1e-5, atol=0)
        torch.testing.assert_close(tokens.errors.cpu(), truth.errors(one) * wide, rtol=1e-5, atol=0)


def test_quantised_extremes() -> None:
    """Zeros, the smallest and the largest numbers, infinities, NaN; no rows."""
    from fastsae_kernels.gpu import fp8_quantise

    rows = torch.ones(7, 5) * torch.tensor([0.0, 1e-45, 1e-38, 1e-19, 3e38, float("inf"), float("nan")])[:, None]
    rows[5:, 1:] = 0
    q = fp8_quantise.quantise(rows.to(DEVICE), None, tokens=True)
    values = (q.values.float() * q.scales[:, None]).cpu()[:, :5]
    assert not values[0].any()
    assert q.norms[0] == q.errors[0] == 0
    torch.testing.assert_close(values[2:5], rows[2:5], rtol=2**-4, atol=0)
    assert (values[1] <= rows[1]).all()
    assert q.errors.cpu()[1] >= (rows[1] - values[1]).abs().max()
    assert q.scales[5:].isnan().all()
    assert q.scales[:5].isfinite().all()
    assert fp8_quantise.quantise(rows[:0].to(DEVICE), None, tokens=True).values.shape == (0, fp8_quantise.PARTIAL)


def test_spread_adds_up_and_survives_bad_rows() -> None:
    from fastsae_kernels.gpu.fp8_quantise import dimension_spread

    x = torch.zeros(4, 3)
    assert torch.allclose(dimension_spread(x), torch.full((3,), 1 / 3))
    assert torch.allclose(dimension_spread(x[:0]), torch.full((3,), 1 / 3))
    x[0, 0], x[1, 1], x[2, 2] = float("nan"), float("inf"), 1e30
    spread = dimension_spread(x)
    assert spread.sum() == pytest.approx(1)
    assert spread[2] > spread[1] == spread[0] > 0.16


@BOTH
@pytest.mark.parametrize("problem", problems.HOSTILE.values(), ids=problems.HOSTILE)
def test_hostile_inputs(problem: problems.Problem, sigmas: float | None) -> None:
    assert_lists_the_same(replace(problem, x=problem.x[:7]), sigmas)


@BOTH
def test_half_precision(sigmas: float | None) -> None:
    assert_lists_the_same(problems.make(20, 33, 70).to(torch.float16), sigmas)


@BOTH
def test_on_threshold_and_window_edges(sigmas: float | None) -> None:
    """Integers: no rounding anywhere, so bits are equal; their fp8 residuals are 0, so the margin is next to nothing."""
    problem = problems.on_the_edges(problems.AutoencodeSpec())
    got, expected = (Lists(problem, 40).append(fp8=fp8, sigmas=sigmas).rows() for fp8 in (True, False))
    assert got == expected
    assert any(0.0 in row.values() for row in got if row)


def test_ranges_and_bounds() -> None:
    """Two ranges appended one after the other, with a bound on some rows: window entries go, NaN stays."""
    problem = problems.make(21, 30, 90, density=0.3)
    problem.x[7] = float("nan")
    bounds = torch.where(torch.arange(21) % 3 == 0, 0.0, 1.0).to(DEVICE)
    both = []
    for fp8 in (True, False):
        lists = Lists(problem, 90)
        both.append(lists.append(0, 37, fp8=fp8, bounds=bounds).append(37, 90, fp8=fp8, bounds=bounds).rows())
    assert_same(*both, problem)
    values = {n: sorted(row.values()) for n, row in enumerate(both[0]) if row and n != 7}
    assert values[0][0] == 0.0
    assert min(value[0] for n, value in values.items() if n % 3) >= 1.0
    assert len(both[0][7] or ()) == 90


def test_a_bound_that_a_value_meets_keeps_it() -> None:
    problem = replace(
        problems.make(4, 8, 33), x=torch.zeros(4, 8), b_enc=torch.full((33,), 3.1), threshold=torch.ones(33)
    )
    for bound, kept in ((3.1, 33), (3.2, 0)):
        bounds = torch.full((4,), bound, device=DEVICE)
        assert Lists(problem, 33).append(fp8=True, bounds=bounds).counts == [kept] * 4


@pytest.mark.parametrize("capacity", [0, 1, 9, 14])
def test_overflow_is_never_silent(capacity: int) -> None:
    """A row has either all its entries or a cursor behind its span; ranges that follow do not hide it."""
    problem = problems.make(20, 24, 83, density=0.1)
    expected = Lists(problem, 83).append(fp8=False)
    lists = Lists(problem, capacity).append(0, 50, fp8=True).append(50, 83, fp8=True)
    rows = lists.rows()
    flagged = [row is None for row in rows]
    assert any(flagged)
    assert capacity < 9 or not all(flagged)
    for row, count, truth, true_count in zip(rows, lists.counts, expected.rows(), expected.counts, strict=True):
        if row is None:
            assert count >= min(true_count, capacity + 1)
        else:
            assert truth is not None
            assert row.keys() == truth.keys()


@BOTH
def test_infinities_and_nan_are_listed(sigmas: float | None) -> None:
    problem = problems.make(9, 20, 43)
    problem.x[2, 3], problem.x[4, 5], problem.x[6, 7] = float("nan"), float("inf"), float("-inf")
    W_enc = problem.W_enc.clone()
    W_enc[1, 11], W_enc[2, 12] = float("nan"), float("inf")
    b_enc = problem.b_enc.clone()
    b_enc[20:22] = torch.tensor([float("inf"), float("-inf")])
    problem = replace(problem, W_enc=W_enc, b_enc=b_enc)
    rows = Lists(problem, 43).append(fp8=True, sigmas=sigmas).rows()
    expected = Lists(problem, 43).append(fp8=False).rows()
    for row, truth in zip(rows, expected, strict=True):
        assert row is not None
        assert truth is not None
        assert row.keys() == truth.keys()
        assert {f for f in row if row[f] != row[f]} == {f for f in truth if truth[f] != truth[f]}
    assert len(rows[2] or ()) == 43
    assert {11, 20} <= set(rows[0] or ())


def test_an_infinite_threshold_makes_no_candidates() -> None:
    problem = replace(problems.make(5, 20, 43), threshold=torch.full((43,), float("inf")))
    assert candidates(problem, None) == [0] * 5


@pytest.mark.parametrize("make", [fp8_simulation.gaussian, fp8_simulation.outliers, fp8_simulation.aligned])
def test_candidates_are_those_of_the_formula(make: fp8_simulation.Maker) -> None:
    from fastsae_kernels.gpu.fp8_quantise import dimension_spread

    data = make(32, 96, 256)
    problem = with_features(data)
    approximate = fp8_simulation.rounded(data.x).values @ fp8_simulation.rounded(data.W).values.T
    for sigmas in (2.0, None):
        spread = None if sigmas is None else dimension_spread(data.x)
        margin = fp8_simulation.unit_margin(fp8_simulation.rounded(data.x), fp8_simulation.rounded(data.W), spread)
        n = (approximate + (sigmas or 1.0) * margin > problem.threshold).sum(1)
        got = torch.tensor(candidates(problem, sigmas))
        assert n.sum() > 150
        assert (got - n).abs().sum() <= 2, sigmas  # pairs whose gap is within rounding of 0


def with_features(data: fp8_simulation.Problem, density: float = 0.05) -> problems.Problem:
    """As a problem of the kernels, thresholds at a quantile of each feature's values."""
    n_tokens, d_in = data.x.shape
    base = problems.make(n_tokens, d_in, len(data.W), spec=problems.AutoencodeSpec())
    threshold = (data.x @ data.W.T).quantile(1 - density, dim=0)
    return replace(base, x=data.x, W_enc=data.W.t(), b_enc=torch.zeros(len(data.W)), threshold=threshold.clamp_min(0))


def test_the_bound_never_misses_where_a_small_margin_does() -> None:
    problem = with_features(fp8_simulation.aligned(24, 96, 256))
    expected = Lists(problem, 96).append(fp8=False).rows()
    narrow = Lists(problem, 96).append(fp8=True, sigmas=0.05).rows()
    assert sum(len(row or ()) for row in narrow) < sum(len(row or ()) for row in expected)
    assert_same(Lists(problem, 96).append(fp8=True, sigmas=None).rows(), expected, problem)
    for row, truth in zip(narrow, expected, strict=True):  # what is listed is exact all the same
        assert row is not None
        assert truth is not None
        assert row == pytest.approx({feature: truth[feature] for feature in row}, abs=1e-3)


@pytest.mark.parametrize(
    "make", [fp8_simulation.gaussian, fp8_simulation.outliers, fp8_simulation.aligned, fp8_simulation.sinks]
)
def test_simulated_misses_are_as_rare_as_the_model_says(make: fp8_simulation.Maker) -> None:
    active, needed, error, worst = make(1000, 400, 512).outcome()
    assert active.sum() > 1000
    assert 0.4 < error.std() < 1.1
    assert needed[active].max() < 5
    assert float((active & (needed >= 3)).sum()) <= 2e-3 * float(active.sum())
    assert not (active & ~worst).any()


def test_cut_sums_stay_within_the_margin() -> None:
    """What sums of 13 bits lose, against the shares of the margin that are set apart for it."""
    from fastsae_kernels.gpu import fp8

    data = fp8_simulation.gaussian(60, 40, 1024)
    x, W = fp8_simulation.rounded(data.x), fp8_simulation.rounded(data.W)
    loss = (fp8_simulation.truncated_product(x.values, W.values) - x.values.double() @ W.values.double().T).abs()
    size = x.values.norm(dim=1)[:, None] * W.values.norm(dim=1)
    assert (loss < fp8.TYPICAL_ACCUMULATION * 6 / 1024**0.5 * size).all()
    ones = torch.ones(2, 1024)
    product = fp8_simulation.truncated_product(ones * 1.125, ones * 0.9375)
    assert ((product - 1024 * 1.125 * 0.9375).abs() < fp8.WORST_ACCUMULATION * 1024 * 1.125 * 0.9375).all()


def test_wrong_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsae_kernels.gpu import fp8, fp8_quantise

    problem = problems.make(3, 200, 9)
    for sigmas in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="sigmas: expected a positive number or None"):
            fp8.fp8_weights(problem.W_enc.to(DEVICE), problem.x.to(DEVICE), sigmas)
    other = fp8.fp8_weights(problem.W_enc[:, :5].to(DEVICE), problem.x.to(DEVICE))
    lists = Lists(problem, 9)
    tensors = [t.to(DEVICE) for t in (problem.x, problem.W_enc, problem.b_enc, problem.threshold)]
    spans = (lists.cursors, lists.starts + 9, lists.entries)
    with pytest.raises(ValueError, match="weights: expected those of W_enc"):
        fp8.list_entries_fp8(*tensors, *spans, weights=other)
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31"):
        fp8.list_entries_fp8(*tensors, *spans, first_feature=2**31 - 1, weights=other)
    with pytest.raises(TypeError, match="float64"):
        fp8.list_entries_fp8(tensors[0].double(), *tensors[1:], *spans, weights=other)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    for capability, works in (
        ((0, 0), False),
        ((8, 0), False),
        ((8, 6), False),
        ((8, 9), True),
        ((9, 0), True),
        ((12, 0), True),
    ):
        monkeypatch.setattr(fp8_quantise, "capability", lambda index, found=capability: found)
        if works:
            fp8_quantise.check_device(torch.device("cuda"))
        else:
            with pytest.raises(RuntimeError, match=r"compute capability 8\.9 or newer .*got A100"):
                fp8_quantise.check_device(torch.device("cuda"))


@pytest.mark.parametrize("capacity", [64, 2], ids=["fits", "overflows"])
def test_whole_pass_in_fp8_matches_reference(capacity: int) -> None:
    problem = problems.make(9, 20, 43, spec=AutoencodeSpec(bandwidth=0.3, fp8=True), density=0.2)
    problems.assert_matches(run(problem, capacity), problem)


@pytest.mark.parametrize("capacity", [256, 2], ids=["fits", "is repeated"])
def test_public_encode_in_fp8(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("fastsae_kernels.gpu.encode"), "DEFAULT_CAPACITY", capacity)
    p = problems.make(9, 20, 43, density=0.2)
    arguments = [tensor.to(DEVICE) for tensor in (p.x, p.W_enc, p.b_enc, p.threshold)]
    with kernels.use_backend("triton"):
        acts, expected = kernels.encode(*arguments, fp8=True), kernels.encode(*arguments)
    torch.testing.assert_close(acts.to_dense(), expected.to_dense())


def test_fp8_is_refused_without_a_gpu_and_with_k() -> None:
    p = problems.make(9, 20, 43)
    with pytest.raises(ValueError, match="fp8: expected a CUDA tensor"):
        kernels.encode(p.x, p.W_enc, p.b_enc, p.threshold, fp8=True)
    with pytest.raises(ValueError, match="fp8: expected False with k"):
        AutoencodeSpec(k=3, fp8=True)
