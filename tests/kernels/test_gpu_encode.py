"""The three kernels that list entries against the fp64 reference and against each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import problems
import pytest
import torch
from gpu_helpers import DEVICE, HAS_DESCRIPTORS, NARROW, ON_GPU, needs_kernels, on_device, reserved
from torch import Tensor

from fastsae_kernels import AutoencodeSpec, reference

KERNELS = (
    "list_pointers",
    pytest.param("list_descriptors", marks=pytest.mark.skipif(not HAS_DESCRIPTORS, reason="needs sm_90 or later")),
    "list_products",
)
TILES = {"BLOCK_B": 16, "BLOCK_S": 64, "BLOCK_D": 16, "GROUP_B": 2, "RUN": 2, "LANES": 4}
CHUNKS = {
    "CHUNK_MIB": 2**-9,
    "BLOCK_B": 16,
    "BLOCK_S": 32,
    "RUN": 4,
    "LANES": 2,
}  # 16 tokens x 32 features of fp32: several chunks both ways
TABLE = {
    "list_pointers": {"16": TILES, "32": TILES},
    "list_descriptors": {"16": TILES},
    "list_products": {"16": CHUNKS, "32": CHUNKS},
}
pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tiles and chunks on small problems; a GPU runs the shipped ones."""
    from fastsae_kernels.gpu import config, list_products

    if ON_GPU:
        yield
        return
    monkeypatch.setattr(list_products, "MIN_WIDTH", 32)
    monkeypatch.setattr(list_products, "WIDTH_STEP", 32)
    with config.override(TABLE):
        yield


class Listed(NamedTuple):
    """What one listing found."""

    values: Tensor  # [N, d_sae], 0 where nothing is listed
    listed: Tensor  # [N, d_sae] bool: stored in the row's slots
    counts: Tensor  # [N] how far the cursors moved


def run(kernel: str, p: problems.Problem, *, capacity: int | None = None, first: int = 0, **options: Any) -> Listed:
    """List the entries of a problem through one kernel, into rows of `capacity` slots."""
    from fastsae_kernels.gpu.choice import use_listing
    from fastsae_kernels.gpu.encode import list_entries

    n_tokens, d_sae = p.x.shape[0], p.W_enc.shape[1]
    capacity = d_sae if capacity is None else capacity
    offsets = torch.arange(n_tokens + 1, dtype=torch.int32, device=DEVICE) * capacity
    cursors = offsets[:-1].clone()
    entries = torch.full((n_tokens * capacity,), -1, device=DEVICE)
    operands = [on_device(tensor) for tensor in (p.x, p.W_enc, p.b_enc, p.threshold)]
    with use_listing(kernel):
        list_entries(
            *operands, cursors, offsets[1:], entries, bandwidth=p.spec.bandwidth, first_feature=first, **options
        )  # fmt: skip
    counts = (cursors - offsets[:-1]).cpu()
    values, listed = torch.zeros(n_tokens, d_sae), torch.zeros(n_tokens, d_sae, dtype=torch.bool)
    for row, slots in enumerate(entries.cpu().view(n_tokens, capacity)):
        stored = slots[: int(counts[row])]
        assert (slots[len(stored) :] == -1).all(), "an entry in a slot that no cursor passed"
        index = (stored >> 32) - first
        assert len(set(index.tolist())) == len(index), "an entry twice"
        values[row, index] = stored.int().view(torch.float32)
        listed[row, index] = True
    return Listed(values, listed, counts.long())


def expected(p: problems.Problem, bounds: Tensor | None = None) -> Listed:
    """The same by the dense fp64 reference, with slots enough."""
    pre = reference.hidden_pre(p.x.double(), p.W_enc.double(), p.b_enc.double())
    active = pre > p.threshold.double()
    window = (pre - p.threshold.double()).abs() < p.spec.bandwidth / 2
    values = torch.where(active | pre.isnan(), pre, 0.0)
    listed = active | window | pre.isnan()
    if bounds is not None:
        listed &= ~(values < bounds[:, None])
    return Listed(torch.where(listed, values, 0.0), listed, listed.sum(1))


def assert_matches(got: Listed, p: problems.Problem, bounds: Tensor | None = None) -> None:
    truth = expected(p, bounds)
    for name in ("listed", "counts"):
        assert torch.equal(getattr(got, name), getattr(truth, name)), f"{name} differs"
    nan = truth.values.isnan()
    assert torch.equal(got.values.isnan(), nan)
    eager = reference.hidden_pre(p.x.float(), p.W_enc.float(), p.b_enc.float()).double()
    problems.assert_within_budget(
        "values",
        got.values.double().masked_fill(nan, 0.0),
        truth.values.masked_fill(nan, 0.0),
        torch.where(truth.values != 0, eager, 0.0).masked_fill(nan, 0.0),
    )


def storable(p: problems.Problem, kernel: str) -> problems.Problem:
    """A problem as a kernel takes it: descriptors want 16 bits and aligned rows, the others take fp32."""
    if kernel != "list_descriptors":
        return p

    def padded(matrix: Tensor) -> Tensor:
        width = -(-matrix.shape[1] // 8) * 8
        # what lies between the rows must not matter
        return torch.nn.functional.pad(matrix, (0, width - matrix.shape[1]), value=float("nan"))[:, : matrix.shape[1]]

    p = p.to(torch.float16)
    return replace(p, x=padded(p.x), W_enc=padded(p.W_enc.t()).t())


OUT_OF_FP16 = ("tiny", "subnormal", "squares", "vanish", "huge", "large", "one large row", "all dead")
HOSTILE = {
    name: p for name, p in problems.HOSTILE.items() if not ON_GPU or not any(word in name for word in OUT_OF_FP16)
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", HOSTILE)
def test_on_hostile_inputs(name: str, kernel: str) -> None:
    if kernel == "list_descriptors" and any(word in name for word in OUT_OF_FP16):
        pytest.skip("fp16 cannot hold these numbers, and descriptors take no fp32")
    problem = storable(HOSTILE[name], kernel)
    assert_matches(run(kernel, problem), problem)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
def test_ways_agree_on_exact_numbers(dtype: torch.dtype) -> None:
    """Small integers: sums are exact in any order, and many sit on thresholds and window edges."""
    problem = problems.on_the_edges(problems.SPECS["l0"]).to(dtype)
    bounds = torch.arange(64).remainder(5).float() - 1.0
    ways = ["list_pointers", "list_products"]
    if HAS_DESCRIPTORS and dtype != torch.float32:
        ways.append("list_descriptors")
    for options in ({}, {"bounds": bounds.to(DEVICE)}):
        for way in ways:
            got = run(way, problem, **options)
            truth = expected(problem, bounds if options else None)
            for name in Listed._fields:
                assert torch.equal(getattr(got, name), getattr(truth, name).to(getattr(got, name).dtype)), (way, name)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n_tokens", [1, 16, 17, 33, 64, 65])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_16_bits_with_few_tokens(dtype: torch.dtype, n_tokens: int, kernel: str) -> None:
    problem = problems.make(n_tokens, 24, 83, density=0.2).to(dtype)
    assert_matches(run(kernel, problem), problem)


@pytest.mark.parametrize("kernel", KERNELS)
def test_overflow_counts_on_and_fills_the_span(kernel: str) -> None:
    problem = problems.make(20, 24, 83, density=0.3).to(torch.float16)
    got, truth = run(kernel, problem, capacity=5), expected(problem)
    assert (truth.counts > 5).any()
    assert torch.equal(got.counts, truth.counts)
    assert torch.equal(got.listed.sum(1), truth.counts.clamp(max=5))
    assert (truth.listed | ~got.listed).all()
    torch.testing.assert_close(got.values, torch.where(got.listed, truth.values, 0.0).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_range_of_features_continues_the_rows(kernel: str) -> None:
    """Two ranges into the same rows list what one call over all features does."""
    from fastsae_kernels.gpu.choice import use_listing
    from fastsae_kernels.gpu.encode import list_entries

    p = problems.make(9, 24, 80, density=0.2).to(torch.float16)
    x, W_enc, b_enc, threshold = (tensor.to(DEVICE) for tensor in (p.x, p.W_enc, p.b_enc, p.threshold))
    offsets = torch.arange(10, dtype=torch.int32, device=DEVICE) * 80
    cursors, entries = offsets[:-1].clone(), torch.zeros(9 * 80, dtype=torch.int64, device=DEVICE)
    with use_listing(kernel):
        for part in (slice(0, 48), slice(48, 80)):
            list_entries(
                x, W_enc[:, part], b_enc[part], threshold[part], cursors, offsets[1:], entries,
                bandwidth=p.spec.bandwidth, first_feature=part.start,
            )  # fmt: skip
    truth = expected(p).listed
    for row in range(9):
        stored = entries.view(9, 80)[row, : int(cursors[row] - offsets[row])]
        assert sorted((stored >> 32).tolist()) == truth[row].nonzero().flatten().tolist()
    assert_matches(run(kernel, p, first=1000), p)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_is_listed(kernel: str) -> None:
    problem = storable(problems.make(5, 24, 43), kernel)
    problem.x[3, 2] = float("nan")
    got = run(kernel, problem, bounds=torch.full((5,), 0.5, device=DEVICE))
    assert_matches(got, problem, torch.full((5,), 0.5))
    assert got.values[3].isnan().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_threshold_lists_nothing(kernel: str) -> None:
    problem = storable(problems.make(5, 24, 43, density=0.5), kernel)
    problem.threshold[[0, 7, 42]] = float("nan")
    assert_matches(run(kernel, problem), problem)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs the shipped tiles")
@pytest.mark.parametrize(("run_length", "lanes"), [(64, 1), (2, 1), (32, 2), (1, 2), (2, 16), (4, 16), (1, 64)])
def test_strips_of_any_shape_list_the_same(run_length: int, lanes: int) -> None:
    """From one strip of four masks in a row to one for each feature; every feature of the first row is active."""
    from fastsae_kernels.gpu import config

    problem = problems.make(9, 24, 150, density=0.5)
    problem.x[0], problem.threshold[:] = 0.0, 0.25
    problem.b_enc[:] = problem.b_enc.abs() + 0.5
    tiles = {"BLOCK_B": 16, "BLOCK_S": 64, "BLOCK_D": 16, "GROUP_B": 2, "RUN": run_length, "LANES": lanes}
    with config.override({"list_pointers": {"32": tiles}}):
        assert_matches(run("list_pointers", problem), problem)


def test_strides_are_free() -> None:
    """Non-contiguous, expanded, and W_enc stored either way."""
    p = problems.make(9, 21, 43, density=0.2)
    wide = torch.randn(9, 42)
    wide[:, ::2] = p.x
    for kernel in ("list_pointers", "list_products"):
        assert_matches(run(kernel, replace(p, x=wide[:, ::2])), replace(p, x=wide[:, ::2]))
        expanded = replace(p, x=p.x[:1].expand(9, 21), W_enc=p.W_enc.contiguous())
        assert_matches(run(kernel, expanded), expanded)


@pytest.mark.skipif(DEVICE == "cuda", reason="reserves host memory; the offsets are the same code on a GPU")
@pytest.mark.parametrize("kernel", KERNELS)
def test_offsets_past_two_to_the_31(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of x and of W_enc 2^30 elements apart: an int32 row * stride would wrap and read elsewhere."""
    memory = reserved(2**32 + 64, monkeypatch)
    near = problems.make(3, 8, 5, spec=AutoencodeSpec(bandwidth=0.5), density=0.5).to(torch.float16)
    x = memory.as_strided((3, 8), (2**30, 1)).copy_(near.x)
    W_enc = memory[16:].as_strided((5, 8), (2**30, 1)).copy_(near.W_enc.t()).t()
    for got, want in zip(run(kernel, replace(near, x=x, W_enc=W_enc)), run(kernel, near), strict=True):
        assert torch.equal(got, want)


def test_a_way_that_cannot_serve_is_one_clear_error() -> None:
    p, wide = problems.make(9, 20, 43), problems.make(9, 24, 43).to(torch.float16)
    half = p.to(torch.float16)
    cases = (
        (p, "fp32 operands have no matrix instruction"),
        (half, "rows of x are 20 elements apart"),
        (replace(half, x=half.x.t().contiguous().t()), "x is not stored with d_in innermost"),
        (replace(half, x=half.x[:1].expand(9, 20)), "0 elements apart"),
        (replace(wide, W_enc=torch.zeros(24, 43).half()), "W_enc"),
        (replace(wide, x=torch.zeros(9 * 24 + 1).half()[1:].view(9, 24)), "start at a multiple of 16"),
    )
    for problem, message in cases:
        reason = message if HAS_DESCRIPTORS else "tensor memory accelerator"
        with pytest.raises(ValueError, match=f"list_descriptors cannot serve this call: .*{reason}"):
            run("list_descriptors", problem)


def test_wrong_arguments() -> None:
    from fastsae_kernels.gpu.choice import use_listing

    p = problems.make(3, 4, 5)
    with pytest.raises(TypeError, match="float64"):
        run("list_pointers", p.to(torch.float64))
    with (
        pytest.raises(
            ValueError, match="kernel: expected one of list_pointers, list_descriptors, list_products, got 'cublas'"
        ),
        use_listing("cublas"),
    ):
        pass
