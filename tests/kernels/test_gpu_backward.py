"""The fused backward against the fp64 reference, and against sums over the entries in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import problems
import pytest
import torch
from gpu_helpers import (
    DEVICE,
    FAR_COLUMNS,
    FAR_ROWS,
    FEW_PROGRAMS,
    NARROW,
    launch_table,
    near_and_far,
    needs_kernels,
    on_device,
)
from torch import Tensor

from fastsae_kernels import AutoencodeSpec, SparseActs, reference
from fastsae_kernels.types import OutputGrads, PassInputs

pytestmark = needs_kernels
SPECS = problems.SPECS
FEW_TABLE = launch_table(FEW_PROGRAMS)
CHUNK: int = FEW_PROGRAMS["fused_backward"]["CHUNK"]
# entries of each feature, before chunks are cut: none, one chunk, its edges, several chunks, every token
COUNTS = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 3 * CHUNK - 1, 26, 0, 26)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks so short that small problems have several, and slots enough for them; on a GPU too."""
    from fastsae_kernels.gpu import config, feature_chunks

    monkeypatch.setattr(feature_chunks, "CHUNKS_PER_SLOT", 1)
    with config.override(FEW_TABLE):
        yield


def entries(listed: Tensor, values: Tensor, row_length: int | None = None) -> SparseActs:
    """The entries where `listed` (`[N, S]` bool), packed or in rows of one length."""
    (n_tokens, _), counts = listed.shape, listed.sum(1)
    rows, indices = listed.nonzero(as_tuple=True)
    values = values[listed].float()
    if row_length is None:
        row_offsets = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
        acts = SparseActs(row_offsets, indices.int(), values, tuple(listed.shape))
    else:
        assert n_tokens == 0 or counts.max() <= row_length
        slots = rows * row_length + (listed.cumsum(1) - 1)[listed]
        filled = torch.zeros(n_tokens * row_length).index_put_((slots,), values)
        indices = torch.zeros(n_tokens * row_length, dtype=torch.int32).index_put_((slots,), indices.int())
        row_offsets = torch.arange(n_tokens + 1) * row_length
        acts = SparseActs(row_offsets, indices, filled, tuple(listed.shape), counts)
    moved = {name: t.to(DEVICE) for name, t in vars(acts).items() if isinstance(t, Tensor)}
    return replace(acts, **moved)


def listed_by(problem: problems.Problem, row_length: int | None = None) -> SparseActs:
    """The entries that the problem's spec lists, decided in fp64."""
    wide, spec = problem.to(torch.float64), problem.spec
    pre = reference.hidden_pre(wide.x, wide.W_enc, wide.b_enc)
    active = pre > wide.threshold
    acts = torch.where(active, pre, 0)
    listed = active | reference.in_window(pre, wide.threshold, spec.bandwidth)
    return entries(listed & reference.topk_keep(acts, spec.k, spec.batch_topk), acts, row_length)


def fused(
    problem: problems.Problem,
    acts: SparseActs,
    row_length: int | None = None,
    row_scale: Tensor | None = None,
    with_weights: bool = True,
) -> Any:
    from fastsae_kernels.gpu.feature_sums import feature_order
    from fastsae_kernels.gpu.gradients import feature_gradients

    inputs = PassInputs(*(None if tensor is None else on_device(tensor) for tensor in problem.tensors()))
    grads = OutputGrads(on_device(problem.grad_out), row_scale, on_device(problem.grad_penalty))
    by_feature = feature_order(acts, row_length)
    return feature_gradients(by_feature, acts.values, inputs, problem.spec, grads, with_weights=with_weights)


def by_entries(problem: problems.Problem, acts: SparseActs) -> dict[str, Tensor | None]:
    """The same in fp64 by plain operations over all entries."""
    spec, wide = problem.spec, problem.to(torch.float64)
    valid = acts.valid()
    keep = torch.ones(acts.values.shape, dtype=torch.bool) if valid is None else valid.cpu()
    rows, index, value = (t.cpu()[keep] for t in (acts.row_ids(), acts.indices.long(), acts.values.double()))
    threshold, grad_penalty = problem.threshold.double()[index], problem.grad_penalty.double()[rows]
    scale = 1.0 if problem.feature_scale is None else problem.feature_scale.double()[index]
    grad_acts = (wide.grad_out[rows] * wide.W_dec[index]).sum(1)
    active = value > 0
    step = grad_penalty if spec.penalty == "l0" else torch.zeros_like(value)
    slope = torch.zeros_like(value)
    if spec.penalty == "l1":
        slope = grad_penalty
    elif spec.penalty == "tanh":
        slope = grad_penalty * spec.tanh_scale / torch.cosh(spec.tanh_scale * value * scale) ** 2
    grad_acts = grad_acts + slope * scale
    window = (value == 0) | ((value - threshold).abs() < spec.bandwidth / 2)
    estimate = torch.where(window, (threshold * grad_acts + step) / (spec.bandwidth or torch.inf), 0)
    grads = torch.where(active, grad_acts, 0) + (estimate if spec.ste_to_input else 0)
    per_entry = torch.zeros(acts.values.shape, dtype=torch.float64)
    per_entry[keep] = grads

    def sums(entries: Tensor) -> Tensor:
        return torch.zeros(len(wide.W_dec), *entries.shape[1:], dtype=torch.float64).index_add_(0, index, entries)

    # an entry of weight 0 adds nothing, whatever its token holds
    x = torch.where(grads[:, None] == 0, 0, wide.x[rows])
    return {
        "grad_hidden_pre": per_entry,
        "W_enc": sums(grads[:, None] * x),
        "W_dec": sums(value[:, None] * wide.grad_out[rows]),
        "b_enc": sums(grads),
        "threshold": sums(-estimate),
        "scale": None if problem.feature_scale is None else sums(torch.where(active, slope * value, 0)),
    }


def assert_true(problem: problems.Problem, row_length: int | None = None, row_scale: Tensor | None = None) -> None:
    """Every gradient by name within the error budget of dense eager PyTorch, x's by way of `grad_hidden_pre`."""
    from fastsae_kernels.gpu.decode import decode_into

    acts = listed_by(problem, row_length)
    scale = None if row_scale is None else on_device(row_scale)
    grads = fused(problem, acts, row_length, row_scale=scale)
    got = {"W_enc": grads.W_enc.t(), "b_enc": grads.b_enc, "threshold": grads.threshold, "W_dec": grads.W_dec}
    if problem.feature_scale is not None:
        got["feature_scale"] = grads.scale
    got["x"] = decode_into(acts, grads.grad_hidden_pre, problem.W_enc.t().to(DEVICE), None, problem.x.dtype)
    if row_scale is not None:
        problem = replace(problem, grad_out=problem.grad_out * row_scale[:, None].to(problem.grad_out.dtype))
    truth, eager = problems.run_reference(problem.to(torch.float64)).grads, problems.run_reference(problem).grads
    assert got.keys() == truth.keys() - {"b_dec"}
    for name, grad in got.items():
        like = problem.threshold if name == "b_enc" else getattr(problem, name)  # a sum that is not rounded here
        assert grad.dtype == like.dtype, name
        problems.assert_within_budget(f"grad of {name}", grad.cpu().double(), truth[name], eager[name])


def assert_equals_sums(problem: problems.Problem, acts: SparseActs, row_length: int | None = None) -> None:
    """To the rounding of fp32."""
    grads = fused(problem, acts, row_length)
    for name, expected in by_entries(problem, acts).items():
        got = getattr(grads, name)
        assert (got is None) == (expected is None), name
        if expected is not None:
            assert got.shape == expected.shape, name
            eps = torch.finfo(got.dtype).eps
            largest = expected.nan_to_num().abs().max() if expected.numel() else 0
            torch.testing.assert_close(
                got.cpu().double(), expected, rtol=8 * eps, atol=float(8 * eps * largest), equal_nan=True,
                msg=lambda m, n=name: n + m,
            )  # fmt: skip


def exact_scales(n_tokens: int) -> Tensor:
    """Powers of two, which round nothing, one of them negative and one zero."""
    scales = 2.0 ** (torch.arange(n_tokens) % 5 - 2)
    scales[1], scales[2] = -0.5, 0.0
    return scales


@pytest.mark.parametrize("row_length", [None, 23], ids=["packed", "padded"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_matches_reference(spec: AutoencodeSpec, row_length: int | None) -> None:
    problem = problems.make(13, 20, 23, spec=spec, density=0.2, with_scale=spec.penalty != "l0")
    assert_true(problem, row_length, exact_scales(13))
    assert_equals_sums(problem, listed_by(problem, row_length), row_length)


@pytest.mark.parametrize("problem", problems.HOSTILE.values(), ids=problems.HOSTILE)
def test_on_hostile_inputs(problem: problems.Problem) -> None:
    problem = replace(problem, **{name: getattr(problem, name)[:9] for name in ("x", "grad_out", "grad_penalty")})
    assert_true(problem, problem.W_dec.shape[0])


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("spec", [SPECS["ste to input"], SPECS["top-3"]], ids=["ste to input", "top-3"])
def test_on_threshold_and_window_edges(spec: AutoencodeSpec, dtype: torch.dtype) -> None:
    problem = problems.on_the_edges(spec).to(dtype)
    problem = replace(problem, **{name: getattr(problem, name)[:17] for name in ("x", "grad_out", "grad_penalty")})
    assert_true(problem)
    assert_true(problem, 40, exact_scales(17))


def features_with(counts: tuple[int, ...], n_tokens: int) -> Tensor:
    """`[N, S]` bool: feature j fires on `counts[j]` tokens, drawn at random."""
    g = torch.Generator().manual_seed(2)
    ranks = torch.rand(n_tokens, len(counts), generator=g).argsort(0).argsort(0)
    return ranks < torch.tensor(counts)


@pytest.mark.parametrize("block_e", [1, 4])
@pytest.mark.parametrize(("d_in", "d_out"), [(13, 13), (1, 40), (33, 7)])
@pytest.mark.parametrize("row_length", [None, 60], ids=["packed", "padded"])
def test_features_of_any_length(row_length: int | None, d_in: int, d_out: int, block_e: int) -> None:
    """Chunks exactly full, one entry over, several long features: what one program would sum, several do."""
    from fastsae_kernels.gpu import config
    from fastsae_kernels.gpu.feature_chunks import plan_chunks
    from fastsae_kernels.gpu.feature_sums import feature_order

    listed = features_with(COUNTS, 26)
    problem = problems.make(26, d_in, len(COUNTS), spec=SPECS["tanh, ste to input"], with_scale=True)
    problem = replace(problem, W_dec=torch.randn(len(COUNTS), d_out), grad_out=torch.randn(26, d_out))
    values = torch.rand(listed.shape) * torch.randint(0, 4, listed.shape).sign()  # a quarter is in the window alone
    acts = entries(listed, values, row_length)
    by_feature = feature_order(acts, row_length)
    assert by_feature.offsets.diff().tolist() == list(COUNTS)
    plan = plan_chunks(by_feature.offsets, acts.values.numel(), 26, CHUNK)
    assert (plan.slot_features < len(COUNTS)).any()
    assert row_length is None or plan.length == CHUNK
    tiles = {**FEW_PROGRAMS["fused_backward"], "BLOCK_E": block_e}
    with config.override({**FEW_TABLE, "fused_backward": {"32": tiles}}):
        assert_equals_sums(problem, acts, row_length)


def test_chunks_cover_every_long_feature_and_fit_their_slots() -> None:
    from fastsae_kernels.gpu.feature_chunks import chunk_plan

    g = torch.Generator().manual_seed(0)
    ragged = [(torch.rand(50, generator=g) ** 8 * 400).long() for _ in range(20)]
    for counts in (*ragged, torch.full((90,), 9), torch.full((90,), 8), torch.tensor([10_000]), torch.zeros(3).long()):
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
        for n_slots in (1, 2, 7, 64, 1000):
            _, length, ends, features = chunk_plan(offsets, n_slots, 8)
            chunks = ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
            assert length >= 8
            assert ends[-1] <= n_slots == len(features)
            assert torch.equal(chunks, torch.where(counts > length, -(-counts // length), 0))
            assert torch.equal(features[: ends[-1]], torch.arange(len(counts)).repeat_interleave(chunks))
            assert (features[ends[-1] :] == len(counts)).all()


def test_few_slots_make_longer_chunks() -> None:
    """As many slots as places allow, fewer than chunks of the shortest length would take."""
    from fastsae_kernels.gpu.feature_chunks import chunk_plan
    from fastsae_kernels.gpu.feature_sums import feature_order

    problem = replace(problems.make(37, 7, 5, spec=SPECS["l1"]), b_enc=torch.full((5,), 40.0))
    acts = listed_by(problem)
    order = feature_order(acts)
    assert chunk_plan(order.offsets, acts.values.numel() // CHUNK, CHUNK).length > CHUNK
    assert_true(problem)


def test_rows_of_a_penalty_and_scale_may_be_expanded_and_operands_strided() -> None:
    base = problems.make(13, 24, 23, spec=SPECS["tanh, ste to input"], with_scale=True)
    problem = replace(
        base,
        x=base.x[:1].expand(13, 24),
        W_dec=base.W_dec.t().contiguous().t(),
        grad_out=torch.ones(()).expand(13, 24),
        grad_penalty=torch.ones(()).expand(13),
    )
    assert_true(problem, row_scale=torch.tensor(0.5).expand(13))
    assert_true(replace(problem, grad_penalty=base.grad_penalty.repeat_interleave(3)[::3]), 23)
    assert_true(problem, 23, exact_scales(13).repeat_interleave(2)[::2])


def test_d_out_other_than_d_in() -> None:
    base = problems.make(13, 20, 23, spec=SPECS["ste to input"])
    g = torch.Generator().manual_seed(3)
    problem = replace(
        base,
        W_dec=torch.randn(23, 33, generator=g),
        b_dec=torch.randn(33, generator=g),
        grad_out=torch.randn(13, 33, generator=g),
    )
    assert_true(problem)
    assert_true(problem, 23, exact_scales(13))


@pytest.mark.parametrize("row_length", [None, 23], ids=["packed", "padded"])
def test_without_weights_the_rest_is_the_same(row_length: int | None) -> None:
    problem = problems.make(13, 20, 23, spec=SPECS["tanh, ste to input"], with_scale=True, density=0.3)
    acts = listed_by(problem, row_length)
    with_weights, without = fused(problem, acts, row_length), fused(problem, acts, row_length, with_weights=False)
    assert without.W_enc is None
    assert without.W_dec is None
    for name in ("grad_hidden_pre", "b_enc", "threshold", "scale"):
        assert torch.equal(getattr(with_weights, name), getattr(without, name)), name
    unread = replace(problem, x=torch.full_like(problem.x, torch.nan))
    assert torch.equal(fused(unread, acts, row_length, with_weights=False).b_enc, with_weights.b_enc)


@pytest.mark.parametrize("row_length", [None, 30], ids=["packed", "padded"])
def test_nan_goes_where_plain_sums_take_it(row_length: int | None) -> None:
    problem = problems.make(26, 13, len(COUNTS), spec=SPECS["l0"])
    listed = features_with(COUNTS, 26)
    values = torch.rand(listed.shape)
    values[3] = torch.nan
    acts = entries(listed, values, row_length)
    problem.grad_out[7, 2] = torch.nan
    problem.x[3, 4] = torch.nan
    assert_equals_sums(problem, acts, row_length)
    grads = fused(problem, acts, row_length)
    assert grads.W_dec[listed[3].to(DEVICE)].isnan().all()
    assert grads.W_enc[~listed[7].to(DEVICE)].isfinite().all()


def test_uninitialised_memory_never_shows(poisoned_memory: None) -> None:
    problem = problems.make(26, 20, 23, spec=SPECS["tanh, ste to input"], with_scale=True, density=0.3)
    assert_true(problem)
    assert_true(problem, 23)


def test_padding_has_no_gradient() -> None:
    problem = problems.make(13, 20, 23, spec=SPECS["ste to input"])
    acts = listed_by(problem, 23)
    grads = fused(problem, acts, 23)
    assert (grads.grad_hidden_pre[~acts.valid()] == 0).all()
    assert (grads.grad_hidden_pre != 0).any()


def test_two_runs_are_bit_equal() -> None:
    problem = problems.make(26, 20, 23, spec=SPECS["l0"], density=0.3)
    acts = listed_by(problem, 23)
    for first, second in zip(fused(problem, acts, 23), fused(problem, acts, 23), strict=True):
        assert first is second is None or torch.equal(first, second)


@pytest.mark.skipif(DEVICE == "cuda", reason="reserves host memory; the offsets are the same code on a GPU")
@pytest.mark.parametrize("strides", [FAR_ROWS, FAR_COLUMNS], ids=["rows", "columns"])
def test_offsets_past_two_to_the_31(strides: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsae_kernels.gpu.feature_sums import feature_order, feature_sums

    near, far = near_and_far(monkeypatch, strides)
    acts = listed_by(near)
    for got, expected in zip(fused(far, acts), fused(near, acts), strict=True):
        assert got is expected is None or torch.equal(got, expected)
    expected = torch.zeros(3, 3, dtype=torch.float16)
    feature_sums(feature_order(acts), acts.values, near.x, expected)
    feature_sums(feature_order(acts), acts.values, far.x, far.W_dec)
    assert torch.equal(far.W_dec, expected)


@pytest.mark.parametrize(("d_in", "d_out"), [(13, 20), (20, 7), (40, 33)])
@pytest.mark.parametrize("row_length", [None, 60], ids=["packed", "padded"])
def test_rows_longer_than_a_program_holds(
    row_length: int | None, d_in: int, d_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of x, of W_dec or of both; long features among them."""
    from fastsae_kernels import gpu
    from fastsae_kernels.gpu import fused_backward, gradients

    monkeypatch.setattr(gradients, "MAX_DEPTH", 16)
    monkeypatch.setattr(fused_backward, "MAX_DEPTH", 16)
    monkeypatch.setattr(fused_backward, "LONG_ROW_BLOCK", 16)
    listed = features_with(COUNTS, 26)
    problem = problems.make(26, d_in, len(COUNTS), spec=SPECS["tanh, ste to input"], with_scale=True)
    problem = replace(problem, W_dec=torch.randn(len(COUNTS), d_out), grad_out=torch.randn(26, d_out))
    acts = entries(listed, torch.rand(listed.shape), row_length)
    assert_equals_sums(problem, acts, row_length)
    scaled = replace(problem, grad_out=problem.grad_out * exact_scales(26)[:, None])
    grads = fused(problem, acts, row_length, row_scale=on_device(exact_scales(26)))
    torch.testing.assert_close(grads.W_dec.cpu().double(), by_entries(scaled, acts)["W_dec"], rtol=1e-5, atol=1e-5)
    grad_values, grad_W_dec = gpu.decode_backward(acts, *map(on_device, (problem.W_dec, problem.grad_out)))
    torch.testing.assert_close(grad_W_dec, fused(problem, acts, row_length).W_dec, rtol=1e-5, atol=1e-5)
    products = (problem.grad_out[acts.row_ids().cpu()] * problem.W_dec[acts.indices.cpu().long()]).sum(1)
    valid = acts.valid()
    products = products if valid is None else products * valid.cpu()
    torch.testing.assert_close(grad_values.cpu(), products, rtol=1e-5, atol=1e-5)


def test_slots_take_less_than_2_percent_of_the_dense_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on tensors without data, on which any wait for the device would fail."""
    from triton.runtime.jit import KernelInterface

    from fastsae_kernels.gpu import config, gradients
    from fastsae_kernels.gpu.feature_sums import FeatureOrder

    launched: list[dict[str, Any]] = []
    monkeypatch.undo()  # as many slots as are shipped
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: lambda **given: launched.append(given))
    n_tokens, d_in, d_sae, row_length = 8192, 2304, 65536, 128

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    nnz = n_tokens * row_length
    order = FeatureOrder(meta(d_sae + 1, dtype=torch.int64), meta(nnz, dtype=torch.int64), None, row_length)
    x, W_dec = meta(n_tokens, d_in, dtype=torch.bfloat16), meta(d_sae, d_in, dtype=torch.bfloat16)
    inputs = PassInputs(x, W_dec.t(), W_dec[:, 0], meta(d_sae), W_dec, x[0])
    with config.override("sm_90"):
        grads = OutputGrads(x, None, meta(n_tokens))
        gradients.feature_gradients(order, meta(nnz), inputs, AutoencodeSpec(k=64), grads)
    slots = [tensor for tensor in launched[0]["slots"] if tensor is not None]
    assert len(launched) == 2
    assert 0 < sum(tensor.nbytes for tensor in slots) < 0.02 * n_tokens * d_sae * 2
