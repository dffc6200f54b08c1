"""The fused weight gradient and Adam step against torch.optim.Adam on dense gradients in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from gpu_helpers import DEVICE, NARROW, ON_GPU, launch_table, needs_kernels
from problems import assert_within_budget
from torch import Tensor

from fastsae_kernels import SparseActs

pytestmark = needs_kernels

DEPTH = 13
N_FEATURES = 9
ON_EVERY_TOKEN, NEVER = 2, 5
HYPER: dict[str, Any] = {"lr": 0.03, "beta2": 0.99, "eps": 1e-8}


def loose(operation: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The operation to 2 units in the last place, as GPUs divide and extract roots where they are not told to round."""

    def compute(*operands: np.ndarray) -> np.ndarray:
        exact = operation(*operands)
        if exact.dtype != np.float32:
            return exact
        away = np.where(exact.view(np.int32) & 1, np.inf, -np.inf).astype(np.float32)
        return np.where((exact == 0) | ~np.isfinite(exact), exact, np.nextafter(np.nextafter(exact, away), away))

    return compute


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the interpreter large tiles, and a GPU's divisions; a GPU runs what is shipped."""
    from fastsae_kernels.gpu import config

    if ON_GPU:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    divide, root = loose(np.divide), loose(np.sqrt)
    monkeypatch.setattr(InterpreterBuilder, "create_fdiv", lambda self, a, b: self.binary_op(a, b, divide))
    monkeypatch.setattr(InterpreterBuilder, "create_sqrt", lambda self, a: self.unary_op(a, root))
    tiles = {"BLOCK_E": 2, "D_PER_WARP": 512}
    with config.override(launch_table({"adam_rows": tiles, "feature_sums": tiles})):
        yield


@dataclass
class Batch:
    """Entries of one step: which token fires which feature, with which weight."""

    fires: Tensor  # [B, S] bool
    weights: Tensor  # [nnz], in the order of fires.nonzero()
    vectors: Tensor  # [B, D]
    extra: Tensor | None

    def grads(self, dtype: torch.dtype) -> Tensor:
        """`[S, D]`, dense."""
        tokens, features = self.fires.nonzero(as_tuple=True)
        grads = torch.zeros(self.fires.shape[1], self.vectors.shape[1], dtype=dtype)
        grads.index_add_(0, features, self.weights.to(dtype)[:, None] * self.vectors.to(dtype)[tokens])
        return grads if self.extra is None else grads + self.extra.to(dtype)

    def sums(self) -> Any:
        """What a pass leaves for the optimiser."""
        from fastsae_kernels.gpu.feature_sums import feature_order
        from fastsae_kernels.gpu.weight_gradients import RowSums

        row_offsets = torch.cat((torch.zeros(1, dtype=torch.int64), self.fires.sum(1).cumsum(0)))
        indices = self.fires.nonzero()[:, 1].int()
        acts = SparseActs(*(t.to(DEVICE) for t in (row_offsets, indices, self.weights)), tuple(self.fires.shape))
        extra = None if self.extra is None else self.extra.to(DEVICE)
        return RowSums(feature_order(acts), acts.values, self.vectors.to(DEVICE), None, extra)


def make_batch(
    n_tokens: int = 11, depth: int | None = None, *, extra: bool = False, awake: Tensor | None = None
) -> Batch:
    """Random entries; one feature fires on every token, one never, those outside of `awake` neither."""
    fires = torch.rand(n_tokens, N_FEATURES) < 0.4
    fires[:, ON_EVERY_TOKEN], fires[:, NEVER] = True, False
    depth = depth or DEPTH
    if awake is not None:
        fires &= awake
    return Batch(
        fires,
        torch.randn(int(fires.sum())),
        torch.randn(n_tokens, depth),
        torch.randn(N_FEATURES, depth) if extra else None,
    )


def unit_rows(depth: int | None = None) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(N_FEATURES, depth or DEPTH), dim=1)


class Dense:
    """The same training by torch.optim.Adam, in a dtype."""

    def __init__(self, param: Tensor, dtype: torch.dtype, beta1: float) -> None:
        self.param = param.to(dtype, copy=True).requires_grad_()
        hyper = HYPER | {"betas": (beta1, HYPER["beta2"])}
        self.optimizer = torch.optim.Adam([self.param], **{k: v for k, v in hyper.items() if k != "beta2"})

    @torch.no_grad()
    def gradient(self, batch: Batch, project: bool = False) -> Tensor:
        grads = batch.grads(self.param.dtype)
        return grads - (grads * self.param).sum(1, keepdim=True) * self.param if project else grads

    def step(self, batch: Batch, project: bool = False, unit_norm: bool = False, scale: float = 1.0) -> None:
        self.param.grad = self.gradient(batch, project) * scale
        self.optimizer.step()
        if unit_norm:
            self.param.data /= self.param.data.norm(dim=1, keepdim=True).clamp_min(1e-8)

    def state(self, name: str) -> Tensor:
        return self.optimizer.state[self.param][name]


class Fused:
    """Parameter and state of the kernel."""

    def __init__(self, param: Tensor, beta1: float, lazy: bool = False) -> None:
        self.param, self.beta1, self.t = param.to(DEVICE, copy=True), beta1, 0
        self.exp_avg = torch.zeros_like(self.param) if beta1 else None
        self.exp_avg_sq = torch.zeros_like(self.param)
        self.last_step = torch.zeros(len(param), dtype=torch.int32, device=DEVICE) if lazy else None

    def step(self, batch: Batch, scale: Tensor | float | None = None, sums: Any = None, **options: Any) -> None:
        from fastsae_kernels.gpu.adam import adam_rows

        self.t += 1
        adam_rows(
            batch.sums() if sums is None else sums,
            self.param,
            self.exp_avg,
            self.exp_avg_sq,
            beta1=self.beta1,
            step=self.t,
            scale=None if scale is None else torch.as_tensor(scale, dtype=torch.float32, device=DEVICE),
            last_step=self.last_step,
            **HYPER,
            **options,
        )


def three_ways(param: Tensor, beta1: float, lazy: bool = False) -> tuple[Fused, Dense, Dense]:
    """The same parameter for the kernel, and dense for fp64 and for fp32."""
    return Fused(param, beta1, lazy), Dense(param, torch.float64, beta1), Dense(param, torch.float32, beta1)


def assert_equals_dense(fused: Fused, truth: Dense, eager: Dense) -> None:
    """Parameter and moments, each within twice the error of dense fp32."""
    assert_within_budget("param", fused.param.cpu().double(), truth.param.data, eager.param.data.double())
    for name in ("exp_avg", "exp_avg_sq") if fused.beta1 else ("exp_avg_sq",):
        got = getattr(fused, name).cpu().double()
        assert_within_budget(name, got, truth.state(name), eager.state(name).double())


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({}, False),
        ({}, True),
        ({"scale": 0.3}, False),
        ({"project": True}, False),
        ({"unit_norm": True}, False),
        ({"project": True, "unit_norm": True, "scale": 0.3}, True),
    ],
    ids=["plain", "extra", "scale", "project", "unit norm", "everything"],
)
def test_matches_dense_adam(options: dict[str, Any], extra: bool, beta1: float) -> None:
    param = unit_rows()
    fused, truth, eager = three_ways(param, beta1)
    for n_tokens in (11, 1, 0, 6):
        batch = make_batch(n_tokens, extra=extra)
        for trained in (fused, truth, eager):
            trained.step(batch, **options)
    assert_equals_dense(fused, truth, eager)


@pytest.mark.parametrize("depth", [1, 3, 64, 200])
def test_rows_of_any_length(depth: int) -> None:
    param = torch.randn(N_FEATURES, depth)
    fused, truth, eager = three_ways(param, 0.9)
    for _ in range(2):
        batch = make_batch(5, depth)
        for trained in (fused, truth, eager):
            trained.step(batch, unit_norm=True)
    assert_equals_dense(fused, truth, eager)


def test_norms_of_short_zero_and_broken_rows() -> None:
    """Divided by their norm or 1e-8, as the module does; one NaN makes a row of them."""
    param = unit_rows() * torch.tensor([0, 1e-9, 1e-7, 0.1, 1, 3, 1e3, 1, 1])[:, None]
    param[7, 3] = torch.nan
    fused = Fused(param, 0.9)
    fused.step(make_batch(0), unit_norm=True)
    expected = param / param.norm(dim=1, keepdim=True).clamp_min(1e-8)
    torch.testing.assert_close(fused.param.cpu(), expected, rtol=1e-6, atol=0, equal_nan=True)


def test_any_strides_and_rows_of_one_span() -> None:
    """Column-major tensors, and entries whose token follows from their place, padding among them."""
    from fastsae_kernels.gpu.adam import adam_rows
    from fastsae_kernels.gpu.feature_sums import feature_order
    from fastsae_kernels.gpu.weight_gradients import RowSums

    param, vectors, extra = torch.randn(N_FEATURES, 7), torch.randn(4, 7), torch.randn(N_FEATURES, 7)
    indices, values = torch.tensor([1, 4, 0, 0, 1, 7, 0, 0, 0, 2, 3, 4], dtype=torch.int32), torch.randn(12)
    counts = torch.tensor([2, 3, 0, 3])
    valid = (torch.arange(3) < counts[:, None]).flatten()
    acts = SparseActs(torch.arange(0, 13, 3), indices, values * valid, (4, N_FEATURES), counts)
    truth = Dense(param, torch.float64, 0.9)
    fires = torch.zeros(4, N_FEATURES, dtype=torch.bool)
    fires[torch.arange(4).repeat_interleave(3)[valid], indices[valid].long()] = True
    truth.step(Batch(fires, values[valid], vectors, extra))

    def strided(matrix: Tensor) -> Tensor:
        return matrix.t().contiguous().to(DEVICE).t()

    got, copy = strided(param), strided(torch.zeros(N_FEATURES, 7).half())
    moments = [strided(torch.zeros_like(param)) for _ in range(2)]
    acts = SparseActs(
        acts.row_offsets.to(DEVICE), indices.to(DEVICE), acts.values.to(DEVICE), acts.shape, counts.to(DEVICE)
    )
    sums = RowSums(feature_order(acts, row_length=3), acts.values, strided(vectors), None, strided(extra))
    adam_rows(sums, got, *moments, beta1=0.9, step=1, copy=copy, **HYPER)
    torch.testing.assert_close(got.cpu().double(), truth.param.data, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments[1].cpu().double(), truth.state("exp_avg_sq"), rtol=1e-6, atol=1e-9)
    assert torch.equal(copy, got.half())


def test_rows_that_rest_are_free_and_exact() -> None:
    """With beta1 = 0 untouched rows keep every bit, and all ends as in a dense Adam that updates them."""
    param = unit_rows()
    fused, truth, eager = three_ways(param, 0.0, lazy=True)
    last_touched = torch.zeros(N_FEATURES, dtype=torch.int32)
    for t in range(1, 13):
        awake = torch.rand(N_FEATURES) < (0.3 if t % 4 else 0.0)
        batch = make_batch(6, awake=awake)
        touched = batch.fires.any(0)
        before = fused.param.cpu().clone(), fused.exp_avg_sq.cpu().clone()
        for trained in (fused, truth, eager):
            trained.step(batch, project=True, unit_norm=True)
        after = fused.param.cpu(), fused.exp_avg_sq.cpu()
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[~touched], new[~touched])
            assert not (old == new)[touched].all(1).any()
        last_touched[touched] = t
        assert torch.equal(fused.last_step.cpu(), last_touched)
    assert len(set(last_touched.tolist())) > 3, "rows should have rested for different times"
    fused.exp_avg_sq *= HYPER["beta2"] ** (12 - fused.last_step)[:, None]
    fused.last_step.fill_(12)
    assert_equals_dense(fused, truth, eager)
    batch = make_batch()
    for trained in (fused, truth, eager):
        trained.step(batch)
    assert_equals_dense(fused, truth, eager)


def test_extra_gradient_touches_every_row() -> None:
    param = unit_rows()
    fused, truth, eager = three_ways(param, 0.0, lazy=True)
    for extra in (True, False, True):
        batch = make_batch(4, extra=extra)
        for trained in (fused, truth, eager):
            trained.step(batch)
    assert (fused.last_step == 3).all()
    assert_equals_dense(fused, truth, eager)


@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_flagged_extra_gradient_counts_where_the_flag_is_set(beta1: float) -> None:
    """Elsewhere it is not read, and rows without entries rest."""
    from fastsae_kernels.gpu.adam import grad_norms

    param = unit_rows()
    fused, truth, eager = three_ways(param, beta1, lazy=beta1 == 0)
    stale = torch.full((N_FEATURES, DEPTH), torch.nan, device=DEVICE)
    for flag in (0, 1, 0, 7, 0):
        batch = make_batch(4, extra=flag > 0)
        buffer = stale if batch.extra is None else batch.extra.to(DEVICE)
        sums = batch.sums()._replace(extra=buffer, extra_flag=torch.tensor([flag], dtype=torch.int32, device=DEVICE))
        norms = grad_norms(sums, fused.param)
        torch.testing.assert_close(norms.cpu(), eager.gradient(batch).square().sum(1))
        fused.step(batch, sums=sums)
        for dense in (truth, eager):
            dense.step(batch)
    if fused.last_step is not None:
        assert fused.last_step[NEVER] == 4
        fused.exp_avg_sq[NEVER] *= HYPER["beta2"]
    assert_equals_dense(fused, truth, eager)


def test_state_is_interchangeable_with_torch() -> None:
    """After 20 steps each goes on from the other's state as the other does."""
    param = unit_rows(5)
    fused, torchs = Fused(param, 0.9), Dense(param, torch.float32, 0.9)
    for _ in range(20):
        batch = make_batch(3, 5)
        fused.step(batch)
        torchs.step(batch)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(getattr(fused, name).cpu(), torchs.state(name), rtol=1e-5, atol=1e-7)
    state = deepcopy(torchs.optimizer.state_dict())
    swapped = Fused(torchs.param.data, 0.9)
    swapped.exp_avg, swapped.exp_avg_sq = (torchs.state(n).to(DEVICE, copy=True) for n in ("exp_avg", "exp_avg_sq"))
    swapped.t = int(torchs.state("step"))
    state["state"][0] |= {"exp_avg": fused.exp_avg.cpu().clone(), "exp_avg_sq": fused.exp_avg_sq.cpu().clone()}
    other = Dense(fused.param.cpu(), torch.float32, 0.9)
    other.optimizer.load_state_dict(state)
    for _ in range(3):
        batch = make_batch(3, 5)
        for trained in (fused, torchs, swapped, other):
            trained.step(batch)
    for trained in (torchs, swapped, other):
        torch.testing.assert_close(trained.param.data.cpu(), fused.param.cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_narrow_moments_are_rounded_to_nearest(dtype: torch.dtype) -> None:
    """Only what is stored is narrower: one step from the same state gives the same row, and moments rounded once."""
    wide = Fused(unit_rows(), 0.9)
    wide.step(make_batch())
    narrow = Fused(wide.param, 0.9)
    narrow.t = wide.t
    for name in ("exp_avg", "exp_avg_sq"):
        setattr(narrow, name, getattr(wide, name).to(dtype))
        setattr(wide, name, getattr(narrow, name).float())
    batch = make_batch()
    wide.step(batch)
    narrow.step(batch)
    torch.testing.assert_close(narrow.param, wide.param, rtol=1e-6, atol=1e-6)
    half_a_unit = {"rtol": 1.001 * torch.finfo(dtype).eps / 2, "atol": torch.finfo(dtype).smallest_normal}
    for name in ("exp_avg", "exp_avg_sq"):
        assert getattr(narrow, name).dtype == dtype
        torch.testing.assert_close(getattr(narrow, name).float(), getattr(wide, name), **half_a_unit)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_copy_is_the_row_rounded(dtype: torch.dtype) -> None:
    fused = Fused(unit_rows(), 0.9)
    copy = torch.full((N_FEATURES, DEPTH), torch.nan, dtype=dtype, device=DEVICE)
    fused.step(make_batch(), copy=copy, unit_norm=True)
    assert torch.equal(copy, fused.param.to(dtype))


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("project", [False, True])
def test_clips_by_the_exact_global_norm(project: bool, extra: bool) -> None:
    from fastsae_kernels.gpu.adam import grad_norms

    param, batch = unit_rows(), make_batch(extra=extra)
    fused, truth, eager = three_ways(param, 0.9)
    norms = grad_norms(batch.sums(), fused.param, project=project)
    squares, rounded = (dense.gradient(batch, project).square().sum(1).double() for dense in (truth, eager))
    assert_within_budget("norms", norms.cpu().double(), squares, rounded)
    assert extra or norms[NEVER] == 0
    fused.step(batch, scale=(1.0 / norms.sum().sqrt()).clamp(max=1), project=project)
    for dense in (truth, eager):
        dense.param.grad = dense.gradient(batch, project)
        torch.nn.utils.clip_grad_norm_([dense.param], 1.0)
        dense.optimizer.step()
    assert_equals_dense(fused, truth, eager)


def test_what_cannot_be_is_refused() -> None:
    from fastsae_kernels.gpu.adam import adam_rows, grad_norms

    sums, param = make_batch().sums(), unit_rows().to(DEVICE)
    rest = {"step": 1, **HYPER}
    with pytest.raises(ValueError, match="exp_avg"):
        adam_rows(sums, param, None, param, beta1=0.9, **rest)
    with pytest.raises(ValueError, match="exp_avg"):
        adam_rows(sums, param, param, param, beta1=0.0, **rest)
    with pytest.raises(ValueError, match="last_step"):
        adam_rows(sums, param, param, param, beta1=0.9, last_step=param[:, 0].int(), **rest)
    with pytest.raises(ValueError, match="at most 8192"):
        grad_norms(sums, param.new_zeros(N_FEATURES, 8193))
