"""Top-k on a CPU: of each token and of the batch, in every way that it is found, on inputs that break guesses and ties."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small_products import force_product
from torch import Tensor

import fastsae_kernels as kernels
from fastsae_kernels import AutoencodeSpec, SparseActs, cpu, reference

cpu_topk = importlib.import_module("fastsae_kernels.cpu.topk")
cpu_encode = importlib.import_module("fastsae_kernels.cpu.encode")
cpu_product = importlib.import_module("fastsae_kernels.cpu.product")
cpu_small = importlib.import_module("fastsae_kernels.cpu.small")


@dataclass(frozen=True)
class Case:
    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor


def case(n_tokens: int = 40, d_in: int = 16, d_sae: int = 700, *, seed: int = 0) -> Case:
    g = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(d_sae, d_in, generator=g).t()
    x = torch.randn(n_tokens, d_in, generator=g)
    return Case(x, W_enc, 0.1 * torch.randn(d_sae, generator=g), torch.zeros(d_sae))


def integers(case: Case) -> Case:
    """Small integers: products are exact in every dtype, and many are equal."""
    return Case((case.x * 2).round(), (case.W_enc * 1.5).round(), (case.b_enc * 10).round(), case.threshold)


def with_bias(case: Case, b_enc: Tensor) -> Case:
    return Case(case.x, case.W_enc, b_enc, case.threshold)


BASE = case()
CASES = {
    "random": BASE,
    "many ties": integers(BASE),
    "one token": case(1),
    "no tokens": case(0),
    "one feature": case(9, 16, 1),
    "few features": case(9, 16, 7),
    "all equal": Case(torch.zeros(30, 16), BASE.W_enc, torch.full((700,), 2.0), BASE.threshold),
    "nothing active": with_bias(BASE, torch.full((700,), -1e3)),
    "activity rises with the index": with_bias(BASE, torch.linspace(-30, 30, 700)),
    "activity falls with the index": with_bias(BASE, torch.linspace(30, -30, 700)),
    "copies of one token": integers(Case(BASE.x[:1].expand(40, 16), BASE.W_enc, BASE.b_enc, BASE.threshold)),
    "copies of one feature": integers(Case(BASE.x, BASE.W_enc[:, :1].expand(16, 700), BASE.b_enc * 0, BASE.threshold)),
    "thresholds": Case(BASE.x, BASE.W_enc, BASE.b_enc, torch.linspace(0, 8, 700)),
    "threshold ties": integers(Case(BASE.x, BASE.W_enc, BASE.b_enc, torch.arange(700) % 5.0)),
    "one loud token": Case(
        BASE.x * (1 + 1e4 * (torch.arange(40) == 3))[:, None], BASE.W_enc, BASE.b_enc, BASE.threshold
    ),
    "huge": Case(BASE.x * 1e19, BASE.W_enc * 1e18, BASE.b_enc, BASE.threshold),
    "tiny": Case(BASE.x * 1e-20, BASE.W_enc * 1e-10, BASE.b_enc * 0, BASE.threshold),
}


@pytest.fixture(params=["searched, rounded", "searched", "dense blocks", "small", "small, few", "small, rough"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if "small" in request.param:
        force_product(monkeypatch, rough="rough" in request.param, few="few" in request.param)
    if "small" not in request.param:
        monkeypatch.setattr(cpu_encode, "MAX_ELEMENTS", 0)
        monkeypatch.setattr(cpu_encode, "SAMPLE", (8, 64))
        monkeypatch.setattr(cpu_product, "has_fast_bf16", lambda: "rounded" in request.param)
        monkeypatch.setattr(cpu_product, "MIN_ROUNDED_TOKENS", 0)
        monkeypatch.setattr(cpu_product, "SCRATCH_ELEMENTS", 2**12)
        monkeypatch.setattr(cpu_topk, "MIN_TOKENS", 16)
        monkeypatch.setattr(cpu_topk, "BLOCK_ELEMENTS", 1)
        monkeypatch.setattr(cpu_topk, "MIN_DENSE_TOKENS", 1)
        monkeypatch.setattr(cpu_topk, "DENSE_ELEMENTS", 2**13 if request.param == "dense blocks" else 0)
    return str(request.param)


def assert_exact(acts: SparseActs | None, case: Case, k: int, batch_topk: bool, dtype: torch.dtype) -> None:
    """The entries are the reference's in fp64, but for swaps between values that agree to the dtype's precision."""
    assert acts is not None
    wide = [tensor.double() for tensor in (case.x, case.W_enc, case.b_enc, case.threshold)]
    expected = reference.encode(*wide, k=k, batch_topk=batch_topk)
    dense = acts.to_dense().double()
    assert (acts.values > 0).all()
    if case.x.shape[0] == 0:
        assert acts.shape == tuple(expected.shape)
        assert acts.values.numel() == 0
        return
    ends = acts.row_offsets
    for n in range(len(ends) - 1):
        row = acts.indices[ends[n] : ends[n + 1]]
        assert (row.diff() > 0).all()
    assert (dense > 0).sum() == (expected > 0).sum()
    if not batch_topk:
        assert torch.equal((dense > 0).sum(1), (expected > 0).sum(1))
    tolerance = 64 * torch.finfo(dtype).eps * expected.abs().amax().clamp_min(1e-300)
    different = (dense > 0) != (expected > 0)
    if torch.equal(wide[0], wide[0].round()):
        assert not different.any()
    pre = reference.hidden_pre(*wide[:3])
    kth = torch.where(expected > 0, expected, torch.inf).amin(None if batch_topk else 1, keepdim=not batch_topk)
    assert ((pre - kth).abs() <= tolerance)[different].all()
    torch.testing.assert_close(
        dense * ~different, expected * ~different, rtol=64 * torch.finfo(dtype).eps, atol=tolerance
    )


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("batch_topk", [False, True], ids=["token", "batch"])
@pytest.mark.parametrize("name", CASES)
def test_exact(name: str, batch_topk: bool, k: int, way: str) -> None:
    problem = CASES[name]
    k = min(k, problem.threshold.numel())
    arguments = (problem.x, problem.W_enc, problem.b_enc, problem.threshold)
    assert_exact(
        cpu.encode(*arguments, AutoencodeSpec(k=k, batch_topk=batch_topk)), problem, k, batch_topk, torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("batch_topk", [False, True], ids=["token", "batch"])
def test_other_dtypes(dtype: torch.dtype, batch_topk: bool, way: str) -> None:
    problem = CASES["many ties"]
    narrow = [tensor.to(dtype) for tensor in (problem.x, problem.W_enc, problem.b_enc)]
    assert_exact(
        cpu.encode(*narrow, problem.threshold, AutoencodeSpec(k=7, batch_topk=batch_topk)),
        problem,
        7,
        batch_topk,
        dtype,
    )


@pytest.mark.parametrize(("k", "batch_topk"), [(None, False), (5, False), (5, True)], ids=["all", "token", "batch"])
def test_bf16_on_and_beside_thresholds(k: int | None, batch_topk: bool, way: str) -> None:
    """Each product is its feature's bf16, exactly: all there are, against thresholds that equal one or lie between two."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).flip(0).to(torch.int16).view(torch.bfloat16)
    values = values[values.isfinite() & (values.abs() > 2.0**-100)].view(1, -1)  # oneDNN flushes what is subnormal
    at = values[0].float().abs()
    below, above = (at.nextafter(torch.tensor(limit)) for limit in (0.0, torch.inf))
    mixed = torch.where(torch.arange(len(at)) % 2 == 0, below, -torch.nan)
    thresholds = [at, below, above, -0.0 * at, mixed]
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    for threshold in thresholds:
        acts = cpu.encode(
            one, values, torch.zeros_like(values[0]), threshold, AutoencodeSpec(k=k, batch_topk=batch_topk)
        )
        expected = values * (values > threshold)
        if k is not None:
            expected = expected * reference.topk_keep(expected.float(), k)
        assert torch.equal(acts.to_dense(), expected.float())


def test_k_of_all_features_keeps_what_is_positive(way: str) -> None:
    for batch_topk in (False, True):
        acts = cpu.encode(BASE.x, BASE.W_enc, BASE.b_enc, BASE.threshold, AutoencodeSpec(k=700, batch_topk=batch_topk))
        assert_exact(acts, BASE, 700, batch_topk, torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_reported(bad: float, way: str) -> None:
    for name in ("x", "W_enc", "b_enc"):
        arguments = {"x": BASE.x.clone(), "W_enc": BASE.W_enc.clone(), "b_enc": BASE.b_enc.clone()}
        arguments[name][(3, 2)[: arguments[name].dim()]] = bad
        for threshold in (BASE.threshold, BASE.threshold + 1):
            for k, batch_topk in ((None, False), (3, False), (3, True)):
                assert (
                    cpu.encode(**arguments, threshold=threshold, spec=AutoencodeSpec(k=k, batch_topk=batch_topk))
                    is None
                )


def test_fp16_products_beyond_its_range_are_reported(way: str) -> None:
    x, W_enc, b_enc = (BASE.x * 300).half(), (BASE.W_enc * 300).half(), BASE.b_enc.half()
    for k, batch_topk in ((None, False), (3, False), (3, True)):
        assert cpu.encode(x, W_enc, b_enc, BASE.threshold, AutoencodeSpec(k=k, batch_topk=batch_topk)) is None


def test_subnormal_activations_are_kept(way: str) -> None:
    problem = Case(BASE.x[:, :1] * 1e-20, BASE.W_enc[:1] * 1e-20, BASE.b_enc * 0, BASE.threshold)
    acts = cpu.encode(problem.x, problem.W_enc, problem.b_enc, problem.threshold, AutoencodeSpec(k=700))
    assert torch.equal(acts.to_dense() > 0, problem.x @ problem.W_enc > 0)
    assert 0 < acts.values.max() < torch.finfo(torch.float32).tiny


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each search began with guesses; in small blocks, so that there are several."""
    for name, value in {"MIN_TOKENS": 16, "BLOCK_ELEMENTS": 1, "DENSE_ELEMENTS": 0}.items():
        monkeypatch.setattr(cpu_topk, name, value)
    monkeypatch.setattr(cpu_product, "SCRATCH_ELEMENTS", 2**11)
    seen: list[bool] = []
    run = cpu_topk._Block.run
    monkeypatch.setattr(cpu_topk._Block, "run", lambda self: seen.append(self.guesses) or run(self))
    return seen


def test_guess_is_proved_or_searched_again(searches: list[bool]) -> None:
    """Early features fire most: guesses from them are far too high, and every token must be found out and redone."""
    problem = CASES["activity falls with the index"]
    arguments = (problem.x, problem.W_enc, problem.b_enc, problem.threshold)
    assert_exact(cpu_topk.encode_topk(*arguments, 200), problem, 200, False, torch.float32)
    assert False in searches
    searches.clear()
    assert_exact(
        cpu_topk.encode_topk(BASE.x, BASE.W_enc, BASE.b_enc, BASE.threshold, 20), BASE, 20, False, torch.float32
    )
    assert False not in searches  # the usual case needs one search


def test_margins_that_grow_late_disprove_no_bound(searches: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last features are long and never active: all lower ends sink below bounds that were reached before."""
    monkeypatch.setattr(cpu_product, "has_fast_bf16", lambda: True)
    late = torch.arange(700) >= 640
    problem = Case(BASE.x, BASE.W_enc * (1 + 9 * late), BASE.b_enc - 1e3 * late, BASE.threshold)
    arguments = (problem.x, problem.W_enc, problem.b_enc, problem.threshold)
    assert_exact(cpu_topk.encode_topk(*arguments, 20), problem, 20, False, torch.float32)
    assert False not in searches


def test_rows_without_room_are_encoded_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = CASES["all equal"]
    monkeypatch.setattr(cpu_topk, "DENSE_ELEMENTS", 0)
    monkeypatch.setattr(cpu_topk, "listed_width", lambda d_sae, k: 5)
    monkeypatch.setattr(cpu_product, "SCRATCH_ELEMENTS", 2**11)
    arguments = (problem.x, problem.W_enc, problem.b_enc, problem.threshold)
    acts = cpu_topk.encode_topk(*arguments, 4)
    assert_exact(acts, problem, 4, False, torch.float32)
    assert acts.indices.view(30, 4).tolist() == [[0, 1, 2, 3]] * 30


@pytest.mark.parametrize("k", [None, 5], ids=["all", "token"])
def test_rough_product_never_misses_what_a_careful_sum_finds(monkeypatch: pytest.MonkeyPatch, k: int | None) -> None:
    """Sums of 4,096 numbers that cancel: the rough ones are off by several times the distance to the threshold."""
    force_product(monkeypatch, rough=True)
    g = torch.Generator().manual_seed(0)
    half = 100 * torch.randn(12, 2048, generator=g)
    x = torch.cat([half, -half + 1e-3 * torch.randn(12, 2048, generator=g)], 1)
    W_enc = torch.randn(300, 2048, generator=g).repeat(1, 2).t()
    threshold = torch.zeros(300) if k else torch.full((300,), 0.01)
    acts = cpu.encode(x, W_enc, torch.zeros(300), threshold, AutoencodeSpec(k=k))
    assert acts is not None
    rough = cpu_small.by_onednn(x, W_enc.t(), torch.zeros(300))
    hidden_pre = (x[:, None] * W_enc.t()).sum(2)  # by pairs, so with a far smaller error
    assert ((rough > threshold) != (hidden_pre > threshold)).any()
    scored = cpu.product.sampled_dot(torch.arange(13) * 300, torch.arange(300).repeat(12).int(), x, W_enc.t()).view(
        12, 300
    )
    kept = reference.topk_keep(scored * (scored > threshold), k) if k else torch.ones_like(scored, dtype=torch.bool)
    assert torch.equal(acts.to_dense(), torch.where(kept & (scored > threshold), scored, 0))


def test_public_encode_takes_k_of_the_batch() -> None:
    acts = kernels.encode(BASE.x, BASE.W_enc, BASE.b_enc, BASE.threshold, k=4, batch_topk=True)
    assert acts.values.numel() == 4 * 40


@pytest.mark.parametrize("is_typical", [True, False], ids=["proved", "dropped"])
def test_a_guess_of_the_batchs_bound_is_proved_or_dropped(monkeypatch: pytest.MonkeyPatch, is_typical: bool) -> None:
    """Where the sampled features fire more than all others the guess is too high, and entries below it would be lost."""
    monkeypatch.setattr(cpu_encode, "MAX_ELEMENTS", 0)
    monkeypatch.setattr(cpu_encode, "SAMPLE", (8, 50))
    passes = []
    listing = cpu_encode._list_above_bound

    def watched(*arguments: Any) -> bool:
        passes.append(arguments[-1].bound)
        return bool(listing(*arguments))

    monkeypatch.setattr(cpu_encode, "_list_above_bound", watched)
    b_enc = BASE.b_enc if is_typical else torch.where(torch.arange(700) % 14 == 0, 20.0, -1.0)
    acts = cpu.encode(BASE.x, BASE.W_enc, b_enc, BASE.threshold, AutoencodeSpec(k=60, batch_topk=True))
    assert_exact(acts, with_bias(BASE, b_enc), 60, True, torch.float32)
    assert passes[0] > 0
    assert passes[1:] == ([] if is_typical else [0.0])
