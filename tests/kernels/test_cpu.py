"""The CPU backend and the chunked dense path against the fp64 reference: outputs, counts and every gradient by name."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import problems
import pytest
import torch
from meter import Meter
from small_products import force_product

import fastsae_kernels as kernels
from fastsae_kernels import AutoencodeSpec, dense, gates
from fastsae_kernels.activity import sampled_share
from fastsae_kernels.backend import BackendName as Backend
from fastsae_kernels.cpu.product import has_fast_bf16

matmul = importlib.import_module("fastsae_kernels.matmul")
cpu_product = importlib.import_module("fastsae_kernels.cpu.product")
cpu_entries = importlib.import_module("fastsae_kernels.cpu.entries")
cpu_topk = importlib.import_module("fastsae_kernels.cpu.topk")
cpu_encode = importlib.import_module("fastsae_kernels.cpu.encode")  # the package's `encode` is the function


def run(problem: problems.Problem, backend: Backend | None = None) -> problems.Result:
    inputs = problems.leaves(problem)
    *tensors, scale = inputs
    options: dict[str, Any] = {"spec": problem.spec, "feature_scale": scale, "rank_scale": problem.rank_scale}
    with kernels.use_backend(backend):
        output = kernels.autoencode(*tensors, **options)  # type: ignore[arg-type]
        named = {name: getattr(output, name) for name in ("sae_out", "penalty", "l0", "feature_counts")}
        return problems.collect(inputs, named, problem)


@pytest.fixture(params=["rescored", "plain", "small", "small, few", "small, rough"])
def scoring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways to find candidates.

    They are bf16 with the margin and a second score, the plain product, and one product in all, by oneDNN with a margin or
    plain.
    """
    if "small" in request.param:
        force_product(monkeypatch, rough="rough" in request.param, few="few" in request.param)
    else:
        rescored = request.param == "rescored"
        monkeypatch.setattr(cpu_encode, "MAX_ELEMENTS", 0)
        monkeypatch.setattr(cpu_product, "has_fast_bf16", lambda: rescored)
        monkeypatch.setattr(cpu_product, "MIN_ROUNDED_TOKENS", 0)
        monkeypatch.setattr(cpu_product, "SCRATCH_ELEMENTS", 1)  # several chunks even on small problems
        monkeypatch.setattr(matmul, "MIN_BLOCK", 1)  # and blocks of tokens
        monkeypatch.setattr(cpu_entries, "PRUNE_SLACK", -(2**20))  # and the top k taken between them
        monkeypatch.setattr(cpu_topk, "DENSE_ELEMENTS", 0)
        monkeypatch.setattr(cpu_topk, "MIN_TOKENS", 8)
        monkeypatch.setattr(cpu_topk, "BLOCK_ELEMENTS", 1)
    return str(request.param)


@pytest.mark.parametrize("spec", problems.SPECS.values(), ids=problems.SPECS)
def test_sparse_matches_reference(spec: AutoencodeSpec, scoring: str) -> None:
    problem = problems.make(d_sae=300, spec=spec, with_scale=spec.penalty != "l0")
    problems.assert_matches(run(problem, "cpu"), problem)


@pytest.mark.parametrize("spec", problems.SPECS.values(), ids=problems.SPECS)
def test_sparse_on_threshold_and_window_edges(spec: AutoencodeSpec, scoring: str) -> None:
    problem = problems.on_the_edges(replace(spec, k=spec.k and min(spec.k, 39)))
    problems.assert_matches(run(problem, "cpu"), problem)


@pytest.mark.parametrize("problem", problems.HOSTILE.values(), ids=problems.HOSTILE)
def test_sparse_on_hostile_inputs(problem: problems.Problem, scoring: str) -> None:
    problems.assert_matches(run(problem, "cpu"), problem)


DENSE_SPECS = {name: spec for name, spec in problems.SPECS.items() if spec.k is None}


@pytest.fixture(params=["one tile", "tiles", "tiles, oneDNN"])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One tile or several both ways on small problems, and the library that multiplies them."""
    by_onednn = "oneDNN" in request.param
    if by_onednn and not matmul.has_onednn():
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(matmul, "has_half_speed_mkl", lambda: by_onednn)
    monkeypatch.setattr(matmul, "MIN_ROWS", 1)
    monkeypatch.setattr(matmul, "LONGEST_SUM", 5)
    monkeypatch.setattr(matmul, "MIN_BLOCK", 1)  # blocks of columns, too
    if "tiles" in request.param:
        for name, value in {"TILE": 256, "KEPT_TILE": 256, "FEATURES": 16, "MIN_CHUNK": 16, "MAX_CHUNK": 32}.items():
            monkeypatch.setattr(dense, name, value)
    return str(request.param)


@pytest.mark.parametrize("spec", DENSE_SPECS.values(), ids=DENSE_SPECS)
def test_chunked_dense_matches_reference(spec: AutoencodeSpec, tiling: str) -> None:
    problem = problems.make(d_sae=300, spec=spec, with_scale=spec.penalty != "l0")
    problems.assert_matches(run(problem, "dense"), problem)
    edges = problems.on_the_edges(spec)
    problems.assert_matches(run(edges, "dense"), edges)


@pytest.mark.parametrize("few_columns", [0, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_dense_with_weights_stored_by_input(
    dtype: torch.dtype, few_columns: int, tiling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their gradients have that layout, or autograd would copy them."""
    monkeypatch.setattr(matmul, "FEW_COLUMNS", few_columns)
    problem = problems.on_the_edges(problems.SPECS["ste to input"]).to(dtype)
    other = replace(problem, W_enc=problem.W_enc.contiguous(), W_dec=problem.W_dec.t().contiguous().t())
    problems.assert_matches(run(other, "dense"), other)
    for p in (problem, other):
        *tensors, _ = problems.leaves(p)
        with kernels.use_backend("dense"):
            output = kernels.autoencode(*tensors, spec=p.spec)  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(output.sae_out, tensors[1:2], p.grad_out)  # type: ignore[arg-type]
        assert grad.stride() == p.W_enc.stride()


@pytest.mark.parametrize("problem", problems.HOSTILE.values(), ids=problems.HOSTILE)
def test_chunked_dense_on_hostile_inputs(problem: problems.Problem, tiling: str) -> None:
    problems.assert_matches(run(problem, "dense"), problem)


@pytest.mark.parametrize(
    "values",
    [
        {"x": float("nan")},
        {"x": float("inf")},
        {"b_enc": float("-inf")},
        {"W_dec": float("inf")},
        {"grad_out": float("nan")},
    ],
    ids=str,
)
def test_chunked_dense_keeps_what_is_not_finite(values: dict[str, float], tiling: str) -> None:
    """Whatever is NaN or Inf in dense PyTorch, outputs and gradients, is not finite here."""
    problem = problems.make(d_sae=100)
    for name, value in values.items():
        getattr(problem, name).view(-1)[-3] = value
    got, dense = run(problem, "dense"), problems.run_reference(problem)
    for name in ("sae_out", "penalty"):
        assert not got.outputs[name][~dense.outputs[name].isfinite()].isfinite().any(), name
    for name, grad in dense.grads.items():
        assert not got.grads[name][~grad.isfinite()].isfinite().any(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_other_dtypes(dtype: torch.dtype, backend: Backend) -> None:
    """Integer-valued problems are exact in every dtype up to the gates, so counts must agree and errors stay in budget."""
    problem = problems.on_the_edges(problems.SPECS["l0"]).to(dtype)
    problem = replace(problem, x=problem.x / 4, threshold=problem.threshold / 4, b_enc=problem.b_enc / 4)
    problems.assert_matches(run(problem, backend), problem)


@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_non_contiguous_and_expanded_inputs(backend: Backend) -> None:
    base = problems.make(40, 24, 300)
    problem = replace(
        base,
        x=base.x[:1].expand(40, 24),
        W_enc=base.W_enc.contiguous(),  # [d_in, d_sae] row-major: the other storage
        W_dec=base.W_dec.t().contiguous().t(),
        grad_out=base.grad_out.t().contiguous().t(),
    )
    problems.assert_matches(run(problem, backend), problem)


@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_uninitialised_memory_never_shows(backend: Backend, poisoned_memory: None) -> None:
    problem = problems.make(d_sae=300)
    problems.assert_matches(run(problem, backend), problem)


def test_path_follows_activity_and_the_numbers_do_not_change() -> None:
    sparse = problems.make(200, 16, 2048, density=0.004, spec=AutoencodeSpec(bandwidth=0.01))
    dense = replace(sparse, threshold=torch.zeros(2048), b_enc=torch.zeros(2048))
    for problem, expects_sparse in ((sparse, True), (dense, False), (sparse, True)):
        *tensors, scale = problem.tensors()
        output = kernels.autoencode(*tensors, spec=problem.spec, feature_scale=scale)  # type: ignore[arg-type]
        assert (output.acts is not None) == expects_sparse
        problems.assert_matches(run(problem), problem)


def test_dense_activity_is_known_from_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = problems.make(200, 16, 2048, density=0.004)
    arguments, limit = (sparse.x, sparse.W_enc, sparse.b_enc), 200 * 2048 // 8
    acts = cpu_encode.encode(*arguments, sparse.threshold, AutoencodeSpec(), limit)
    assert acts is not None
    assert acts.values.numel() < limit
    for name in ("encode_small", "_encode_threshold"):
        monkeypatch.delattr(cpu_encode, name)  # nothing is listed in vain
    assert cpu_encode.encode(*arguments, torch.zeros(2048), AutoencodeSpec(), limit) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_is_reported_not_lost(bad: float) -> None:
    problem = problems.make()
    problem.x[3, 2] = bad
    result = run(problem)
    assert not result.outputs["sae_out"][3].isfinite().any()
    assert result.outputs["sae_out"][:3].isfinite().all()
    with pytest.raises(ValueError, match="expected finite values"):
        kernels.encode(problem.x, problem.W_enc, problem.b_enc, problem.threshold)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_bias_is_reported_not_lost(bad: float, scoring: str) -> None:
    problem = problems.make()
    problem.b_enc[5] = bad
    assert not run(problem).outputs["sae_out"].isfinite().any()
    with pytest.raises(ValueError, match="expected finite values"):
        kernels.encode(problem.x, problem.W_enc, problem.b_enc, problem.threshold)
    with pytest.raises(ValueError, match="W_enc, b_enc: expected finite values where k is given"):
        run(replace(problem, spec=AutoencodeSpec(k=3)))


@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_two_runs_are_bit_equal(backend: Backend) -> None:
    problem = problems.make(300, 32, 512)
    problems.assert_bit_equal(run(problem, backend), run(problem, backend))


@pytest.mark.skipif(not has_fast_bf16(), reason="this CPU has no bf16 units, so the product would be emulated")
def test_margin_never_misses_where_bf16_is_coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """x and W are rounded down by the largest step everywhere, which pushes the bf16 product as far off as it goes."""
    monkeypatch.setattr(cpu_encode, "MAX_ELEMENTS", 0)
    d_in, d_sae = 512, 4096
    g = torch.Generator().manual_seed(0)
    worst = 1 + 2.0**-8 - 2.0**-12  # just below the middle of two bf16 numbers: rounds down by the largest step
    x = torch.full((64, d_in), worst)
    W_enc = torch.full((d_sae, d_in), worst) * (1 + torch.rand(d_sae, 1, generator=g) * 1e-3)
    threshold = (x[:1] @ W_enc.t()).squeeze(0).double().float() * (1 - 2e-6)
    acts = kernels.encode(x, W_enc.t(), torch.zeros(d_sae), threshold)
    exact = (x.double() @ W_enc.t().double()) > threshold.double()
    assert exact.all()
    assert torch.equal(acts.l0(), exact.sum(1))


@pytest.mark.skipif(not has_fast_bf16(), reason="this CPU has no bf16 units, so the product would be emulated")
def test_margin_covers_the_rounding_of_a_large_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window's lower edge, 999.99998, is no fp32 number: products of either sign land on 1000 and lie inside."""
    monkeypatch.setattr(cpu_encode, "MAX_ELEMENTS", 0)
    g = torch.Generator().manual_seed(0)
    x, W_enc = torch.randn(256, 64, generator=g) * 1e-5, torch.randn(2048, 64, generator=g)
    b_enc, threshold, bandwidth = torch.full((2048,), 1000.0), torch.full((2048,), 1000.5), 1.00004
    listed = kernels.encode(x, W_enc.t(), b_enc, threshold, bandwidth=bandwidth).row_offsets.diff()
    hidden_pre = (x.double() @ W_enc.t().double()).float() + b_enc
    inside = (hidden_pre - threshold).abs() < bandwidth / 2
    assert inside.float().mean() > 0.5
    assert (listed - inside.sum(1)).abs().max() <= 2  # a product halfway between two fp32 sums may round either way


def test_memory_of_a_step_stays_far_below_one_dense_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts every tensor that an op allocates; the largest must be far smaller than `[N, d_sae]`."""
    from torch.utils._python_dispatch import TorchDispatchMode

    n_tokens, d_in, d_sae = 512, 4, 8192
    monkeypatch.setattr(cpu_product, "SCRATCH_ELEMENTS", 2**16)
    monkeypatch.setattr(dense, "KEPT_ELEMENTS", n_tokens * d_sae - 1)

    class Largest(TorchDispatchMode):
        size, op = 0, ""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                    size = tensor.numel() * tensor.element_size()
                    self.size, self.op = max((self.size, self.op), (size, str(func)))
            return out

    for density in (0.002, 0.5):
        problem = problems.make(n_tokens, d_in, d_sae, density=density, spec=AutoencodeSpec(bandwidth=0.01))
        with Largest() as largest:
            run(problem)
        assert largest.size < 0.05 * n_tokens * d_sae * 4, f"{largest.op} made {largest.size} bytes"


def test_memory_of_the_dense_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tiles of 16,384 features and many threads, less than 5 % of such a dense tensor beyond outputs and gradients."""
    n_tokens, d_in, d_sae, smaller = 4096, 768, 1024, 16
    monkeypatch.setattr(dense, "MIN_TILES", dense.MIN_TILES // smaller)
    monkeypatch.setattr(dense, "KEPT_ELEMENTS", dense.KEPT_ELEMENTS // smaller)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    problem = problems.make(n_tokens, d_in, d_sae, density=0.5)
    *tensors, _ = problems.leaves(problem)

    def call() -> list[torch.Tensor]:
        with kernels.use_backend("dense"):
            output = kernels.autoencode(*tensors, spec=problem.spec)  # type: ignore[arg-type]
        grads = torch.autograd.grad([output.sae_out, output.penalty], tensors, [problem.grad_out, problem.grad_penalty])
        return [*output[:4], *grads]

    with Meter() as meter:
        returned = call()
    beyond = meter.peak - sum(tensor.nbytes for tensor in returned)
    whole = n_tokens * d_sae * smaller * 4
    assert 0.005 * whole < beyond < 0.05 * whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_dense_pass_multiplies_no_tile_again(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.make(64, 24, 1000, density=0.5, spec=problems.SPECS["tanh, ste to input"]).to(dtype)
    products, multiply = [0], dense.multiply

    def counted(*operands: Any, **options: Any) -> None:
        products[0] += 1
        multiply(*operands, **options)

    for module in (dense, gates):
        monkeypatch.setattr(module, "multiply", counted)
    for name in ("TILE", "KEPT_TILE"):
        monkeypatch.setattr(dense, name, 2**14)
    counts, results = [], []
    for kept in (dense.KEPT_ELEMENTS, 0):
        monkeypatch.setattr(dense, "KEPT_ELEMENTS", kept)
        products[0] = 0
        results.append(run(problem, "dense"))
        counts.append(products[0])
    assert counts[0] / 6 == counts[1] / 7  # x is asked for its gradient, too
    if dtype == torch.float32:  # where no number lies so close to its threshold that 16 bits move it across
        problems.assert_matches(results[0], problem)
    for kept_grads, again in zip(results[0].grads.values(), results[1].grads.values(), strict=True):
        assert torch.equal(kept_grads, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_and_unsorted_rows_have_their_own_gradients(dtype: torch.dtype) -> None:
    """Entries need not come from `encode`: rows made by hand have padding, and features in any order."""
    indices = torch.tensor([7, 3, 0, 0, 1, 0, 0, 0, 4, 0, 2, 8], dtype=torch.int32)
    counts = torch.tensor([2, 1, 4])
    values = torch.tensor([1.0, 2, 0, 0, 3, 0, 0, 0, 4, 5, 6, 7], requires_grad=True)
    W_dec, grad_out = torch.randn(9, 5).to(dtype).requires_grad_(), torch.randn(3, 5).to(dtype)
    acts = kernels.SparseActs(torch.tensor([0, 4, 8, 12]), indices, values, (3, 9), counts)
    grads = torch.autograd.grad(kernels.decode(acts, W_dec), (values, W_dec), grad_out)
    truth = torch.autograd.grad(acts.to_dense() @ W_dec.float(), (values, W_dec), grad_out.float())
    valid = acts.valid()
    assert valid is not None
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(grads[0][valid], truth[0][valid], **tolerance)
    torch.testing.assert_close(grads[1], truth[1], **tolerance)


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
@pytest.mark.parametrize(
    ("limit", "expected"),
    [("AVX2", False), ("avx512_core", False), ("AVX512_CORE_BF16", True), ("AVX512_CORE_AMX", True), ("ALL", True)],
)
def test_a_limit_of_onednn_to_older_instructions_is_heeded(
    name: str, limit: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN emulates bf16 then, at a three-hundredth of the speed."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setenv(name, limit)
    assert has_fast_bf16.__wrapped__() is expected


@pytest.mark.parametrize(("d_sae", "every"), [(1, 1), (5, 5), (127, 1), (1000, 4), (16384, 2)])
def test_a_sample_has_the_share_of_active_features(d_sae: int, every: int) -> None:
    b_enc = (torch.arange(d_sae) % every == 0).float()
    share = sampled_share(torch.randn(70, 3), torch.zeros(3, d_sae), b_enc, torch.full((d_sae,), 0.5))
    assert share == pytest.approx(1 / every)
