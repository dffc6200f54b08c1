"""The three ways of listing entries against the fp64 reference and against each other, and the choice between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import problems
import pytest
import torch
from gpu_helpers import DEVICE, HAS_DESCRIPTORS, NARROW, ON_GPU, needs_kernels, on_device
from torch import Tensor

from fastsae_kernels import AutoencodeSpec, reference

RIVALS = (
    "pointer",
    pytest.param("persistent", marks=pytest.mark.skipif(not HAS_DESCRIPTORS, reason="needs sm_90 or later")),
    "chunks",
)
TILES = {"BLOCK_B": 16, "BLOCK_S": 64, "BLOCK_D": 16, "GROUP_B": 2}
CHUNKS = {"CHUNK_MIB": 2**-9, "BLOCK_B": 16, "BLOCK_S": 32}  # 16 tokens x 32 features of fp32: several chunks both ways
TABLE = {
    "encode": {"16": TILES, "32": TILES},
    "encode_persistent": {"16": TILES},
    "encode_chunks": {"16": CHUNKS, "32": CHUNKS},
}
pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tiles and chunks on small problems; a GPU runs the shipped ones."""
    from fastsae_kernels.gpu import compact, config

    if ON_GPU:
        yield
        return
    monkeypatch.setattr(compact, "MIN_WIDTH", 32)
    monkeypatch.setattr(compact, "WIDTH_STEP", 32)
    with config.override(TABLE):
        yield


class Listed(NamedTuple):
    """What one listing found."""

    values: Tensor  # [N, d_sae], 0 where nothing is listed
    listed: Tensor  # [N, d_sae] bool: stored in the row's span
    counts: Tensor  # [N] how far the cursors moved
    l0: Tensor
    feature_counts: Tensor


def run(rival: str, p: problems.Problem, *, capacity: int | None = None, first: int = 0, **options: Any) -> Listed:
    """List the entries of a problem through one rival, into spans of `capacity`."""
    from fastsae_kernels.gpu.encode import list_entries
    from fastsae_kernels.gpu.rivals import use_rival

    n_tokens, d_sae = p.x.shape[0], p.W_enc.shape[1]
    capacity = d_sae if capacity is None else capacity
    offsets = torch.arange(n_tokens + 1, dtype=torch.int32, device=DEVICE) * capacity
    cursors = offsets[:-1].clone()
    entries = torch.full((n_tokens * capacity,), -1, device=DEVICE)
    l0 = torch.zeros(n_tokens, dtype=torch.int32, device=DEVICE)
    feature_counts = torch.zeros(d_sae, dtype=torch.int64, device=DEVICE)
    operands = [on_device(tensor) for tensor in (p.x, p.W_enc, p.b_enc, p.threshold)]
    with use_rival(rival):
        list_entries(
            *operands, cursors, offsets[1:], entries, bandwidth=p.spec.bandwidth, first_feature=first,
            l0=l0, feature_counts=feature_counts, **options,
        )  # fmt: skip
    counts = (cursors - offsets[:-1]).cpu()
    values, listed = torch.zeros(n_tokens, d_sae), torch.zeros(n_tokens, d_sae, dtype=torch.bool)
    for row, span in enumerate(entries.cpu().view(n_tokens, capacity)):
        stored = span[: int(counts[row])]
        assert (span[len(stored) :] == -1).all(), "an entry in a place that no cursor passed"
        index = (stored >> 32) - first
        assert len(set(index.tolist())) == len(index), "an entry twice"
        values[row, index] = stored.int().view(torch.float32)
        listed[row, index] = True
    return Listed(values, listed, counts.long(), l0.cpu().long(), feature_counts.cpu())


def expected(p: problems.Problem, bounds: Tensor | None = None) -> Listed:
    """The same by the dense fp64 reference, spans long enough."""
    pre = reference.hidden_pre(p.x.double(), p.W_enc.double(), p.b_enc.double())
    active = pre > p.threshold.double()
    window = (pre - p.threshold.double()).abs() < p.spec.bandwidth / 2
    values = torch.where(active | pre.isnan(), pre, 0.0)
    listed = active | window | pre.isnan()
    if bounds is not None:
        listed &= ~(values < bounds[:, None])
    active &= listed
    return Listed(torch.where(listed, values, 0.0), listed, listed.sum(1), active.sum(1), active.sum(0))


def assert_matches(got: Listed, p: problems.Problem, bounds: Tensor | None = None) -> None:
    truth = expected(p, bounds)
    for name in ("listed", "counts", "l0", "feature_counts"):
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


def storable(p: problems.Problem, rival: str) -> problems.Problem:
    """A problem as a rival takes it: the persistent kernel wants 16 bits and aligned rows, the others take fp32."""
    if rival != "persistent":
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


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("name", HOSTILE)
def test_on_hostile_inputs(name: str, rival: str) -> None:
    if rival == "persistent" and any(word in name for word in OUT_OF_FP16):
        pytest.skip("fp16 cannot hold these numbers, and the persistent kernel takes no fp32")
    problem = storable(HOSTILE[name], rival)
    assert_matches(run(rival, problem), problem)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
def test_ways_agree_on_exact_numbers(dtype: torch.dtype) -> None:
    """Small integers: sums are exact in any order, and many sit on thresholds and window edges."""
    problem = problems.on_the_edges(problems.SPECS["l0"]).to(dtype)
    bounds = torch.arange(64).remainder(5).float() - 1.0
    ways = ["pointer", "chunks", *(["persistent"] if HAS_DESCRIPTORS and dtype != torch.float32 else [])]
    for options in ({}, {"bounds": bounds.to(DEVICE)}):
        for way in ways:
            got = run(way, problem, **options)
            truth = expected(problem, bounds if options else None)
            for name in Listed._fields:
                assert torch.equal(getattr(got, name), getattr(truth, name).to(getattr(got, name).dtype)), (way, name)


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("n_tokens", [1, 16, 17, 33, 64, 65])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_16_bits_with_few_tokens(dtype: torch.dtype, n_tokens: int, rival: str) -> None:
    problem = problems.make(n_tokens, 24, 83, density=0.2).to(dtype)
    assert_matches(run(rival, problem), problem)


@pytest.mark.parametrize("rival", RIVALS)
def test_overflow_counts_on_and_fills_the_span(rival: str) -> None:
    problem = problems.make(20, 24, 83, density=0.3).to(torch.float16)
    got, truth = run(rival, problem, capacity=5), expected(problem)
    assert (truth.counts > 5).any()
    for name in ("counts", "l0", "feature_counts"):
        assert torch.equal(getattr(got, name), getattr(truth, name)), name
    assert torch.equal(got.listed.sum(1), truth.counts.clamp(max=5))
    assert (truth.listed | ~got.listed).all()
    torch.testing.assert_close(got.values, torch.where(got.listed, truth.values, 0.0).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rival", RIVALS)
def test_range_of_features_continues_the_rows(rival: str) -> None:
    """Two ranges into the same spans list what one call over all features does."""
    from fastsae_kernels.gpu.encode import list_entries
    from fastsae_kernels.gpu.rivals import use_rival

    p = problems.make(9, 24, 80, density=0.2).to(torch.float16)
    x, W_enc, b_enc, threshold = (tensor.to(DEVICE) for tensor in (p.x, p.W_enc, p.b_enc, p.threshold))
    offsets = torch.arange(10, dtype=torch.int32, device=DEVICE) * 80
    cursors, entries = offsets[:-1].clone(), torch.zeros(9 * 80, dtype=torch.int64, device=DEVICE)
    with use_rival(rival):
        for part in (slice(0, 48), slice(48, 80)):
            list_entries(
                x, W_enc[:, part], b_enc[part], threshold[part], cursors, offsets[1:], entries,
                bandwidth=p.spec.bandwidth, first_feature=part.start,
            )  # fmt: skip
    truth = expected(p).listed
    for row in range(9):
        stored = entries.view(9, 80)[row, : int(cursors[row] - offsets[row])]
        assert sorted((stored >> 32).tolist()) == truth[row].nonzero().flatten().tolist()
    assert_matches(run(rival, p, first=1000), p)


@pytest.mark.parametrize("rival", RIVALS)
def test_nan_is_listed_but_not_counted(rival: str) -> None:
    problem = storable(problems.make(5, 24, 43), rival)
    problem.x[3, 2] = float("nan")
    got = run(rival, problem, bounds=torch.full((5,), 0.5, device=DEVICE))
    assert_matches(got, problem, torch.full((5,), 0.5))
    assert got.values[3].isnan().all()
    assert got.l0[3] == 0


def test_strides_are_free() -> None:
    """Non-contiguous, expanded, and W_enc stored either way."""
    p = problems.make(9, 21, 43, density=0.2)
    wide = torch.randn(9, 42)
    wide[:, ::2] = p.x
    for rival in ("pointer", "chunks"):
        assert_matches(run(rival, replace(p, x=wide[:, ::2])), replace(p, x=wide[:, ::2]))
        expanded = replace(p, x=p.x[:1].expand(9, 21), W_enc=p.W_enc.contiguous())
        assert_matches(run(rival, expanded), expanded)


@pytest.mark.skipif(DEVICE == "cuda", reason="reserves host memory; the offsets are the same code on a GPU")
@pytest.mark.parametrize("rival", RIVALS)
def test_offsets_past_two_to_the_31(rival: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of x and of W_enc 2^30 elements apart: an int32 row * stride would wrap and read elsewhere."""
    try:
        memory = torch.empty(2**32 + 64, dtype=torch.float16)  # reserved, never touched but for a few rows
    except RuntimeError:
        pytest.skip("cannot reserve 8 GiB of address space")
    copy = torch.UntypedStorage.copy_
    # the interpreter copies each argument back onto itself, which would touch every page
    monkeypatch.setattr(
        torch.UntypedStorage, "copy_", lambda a, b, *args: a if a.data_ptr() == b.data_ptr() else copy(a, b, *args)
    )
    near = problems.make(3, 8, 5, spec=AutoencodeSpec(bandwidth=0.5), density=0.5).to(torch.float16)
    x = memory.as_strided((3, 8), (2**30, 1)).copy_(near.x)
    W_enc = memory[16:].as_strided((5, 8), (2**30, 1)).copy_(near.W_enc.t()).t()
    for got, want in zip(run(rival, replace(near, x=x, W_enc=W_enc)), run(rival, near), strict=True):
        assert torch.equal(got, want)


def test_a_way_that_cannot_serve_is_one_clear_error() -> None:
    p = problems.make(9, 20, 43)
    half = p.to(torch.float16)
    cases: list[tuple[str, problems.Problem, dict[str, Any], str]] = [
        ("persistent", p, {}, "fp32 operands have no matrix instruction"),
        ("persistent", half, {}, "rows of x are 20 elements apart"),
        ("persistent", replace(half, x=half.x.t().contiguous().t()), {}, "x is not stored with d_in innermost"),
        ("persistent", replace(half, x=half.x[:1].expand(9, 20)), {}, "0 elements apart"),
        (
            "persistent",
            replace(problems.make(9, 24, 43).to(torch.float16), W_enc=torch.zeros(24, 43).half()),
            {},
            "W_enc",
        ),
        ("persistent", problems.make(9, 24, 43).to(torch.float16), {"misaligned": True}, "start at a multiple of 16"),
    ]
    for rival, problem, options, message in cases:
        if options.pop("misaligned", False):
            problem = replace(problem, x=torch.zeros(9 * 24 + 1).half()[1:].view(9, 24))
        if DEVICE == "cuda" and rival == "persistent" and not HAS_DESCRIPTORS:
            message = "tensor memory accelerator"
        with pytest.raises(ValueError, match=f"rival '{rival}' cannot serve this call: .*{message}"):
            run(rival, problem, **options)


def test_wrong_arguments() -> None:
    from fastsae_kernels.gpu.rivals import use_rival

    p = problems.make(3, 4, 5)
    with pytest.raises(TypeError, match="float64"):
        run("pointer", p.to(torch.float64))
    with (
        pytest.raises(ValueError, match="rival: expected one of pointer, persistent, chunks, got 'cublas'"),
        use_rival("cublas"),
    ):
        pass


def path_of(x: Tensor, W_enc: Tensor) -> str:
    from fastsae_kernels.gpu.encode import chosen_path

    return chosen_path(x, W_enc)


def test_chosen_path_says_what_serves_and_why() -> None:
    from fastsae_kernels.gpu import config
    from fastsae_kernels.gpu.rivals import use_rival

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, W_enc = meta(4096, 2304), meta(65536, 2304).t()
    with config.override("sm_90"):
        assert path_of(x, W_enc).startswith("persistent: the table of sm_90")
        assert path_of(x[:8], W_enc).startswith("pointer: the table of sm_90")
        odd = path_of(meta(4096, 2305), meta(65536, 2305).t())
        assert odd.startswith("pointer: the table of sm_90")
        assert "says persistent, but the rows of x are 2305 elements apart" in odd
        assert path_of(x.float(), W_enc.float()).startswith("chunks: the table of sm_90 for torch.float32")
        with use_rival("chunks"):
            assert path_of(x, W_enc) == "chunks: use_rival asks for it"
    with config.override("sm_80"):
        assert path_of(x, W_enc).startswith("pointer: the table of sm_80")


def test_no_library_product_in_deterministic_mode() -> None:
    from fastsae_kernels.gpu import config
    from fastsae_kernels.gpu.rivals import use_rival

    x, W_enc = torch.empty(256, 64, device="meta"), torch.empty(2048, 64, device="meta").t()
    torch.use_deterministic_algorithms(True)
    try:
        for arch in ("sm_80", "sm_90", "sm_100", "default"):
            with config.override(arch):
                found = path_of(x, W_enc)
                assert found.startswith("pointer: ")
                assert "says chunks, but deterministic algorithms are asked for" in found
        with config.override("sm_90"), use_rival("chunks"), pytest.raises(ValueError, match="deterministic"):
            path_of(x, W_enc)
    finally:
        torch.use_deterministic_algorithms(False)
    with config.override("sm_90"):
        assert path_of(x, W_enc).startswith("chunks: ")


def test_fp32_products_follow_pytorchs_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library serves fp32 only where no flag allows TF32 there; flags are left alone."""
    from fastsae_kernels.gpu.compact import refuses

    x, W_enc = torch.zeros(4, 8), torch.zeros(8, 16)
    before = torch.get_float32_matmul_precision()
    assert refuses(x, W_enc) == ""
    try:
        torch.set_float32_matmul_precision("high")
        assert "flags ask for TF32" in refuses(x, W_enc)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "shape", [(8192, 65536, 2), (8192, 131072, 2), (64, 65536, 2), (1, 131072, 4), (500_000, 65536, 2)]
)
def test_chunks_stay_small(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsae_kernels.gpu import compact

    monkeypatch.undo()  # the shipped widths
    n_tokens, d_sae, element_size = shape
    rows, width = compact.chunk_shape(n_tokens, d_sae, element_size, 24 * 2**20)
    assert rows * width * 4 <= 24 * 2**20
    assert rows * width * 4 < 0.03 * n_tokens * d_sae * element_size
    assert rows == min(rows, n_tokens)
    assert width % 128 == 0


def test_statistics_are_added_to_what_is_there() -> None:
    """A staged listing adds up range by range; None leaves a count out."""
    from fastsae_kernels.gpu.encode import list_entries

    p = problems.make(9, 24, 43, density=0.3)
    truth = expected(p)
    operands = [tensor.to(DEVICE) for tensor in (p.x, p.W_enc, p.b_enc, p.threshold)]
    offsets = torch.arange(10, dtype=torch.int32, device=DEVICE) * 43
    entries = torch.zeros(9 * 43, dtype=torch.int64, device=DEVICE)
    l0 = torch.full((9,), 7, dtype=torch.int64, device=DEVICE)
    list_entries(*operands, offsets[:-1].clone(), offsets[1:], entries, bandwidth=p.spec.bandwidth, l0=l0)
    assert torch.equal(l0.cpu(), truth.l0 + 7)


def test_narrowest_key_of_the_table_serves() -> None:
    from fastsae_kernels.gpu.config import find_config, launch_config, override

    def tile(number: int) -> dict[str, int]:
        return {"BLOCK_B": number}

    keys = ("16", "16 odd", "16 n<=32", "16 n<=32 odd", "32", "32 n<=16")
    half, full = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    with override({"encode": {key: tile(number) for number, key in enumerate(keys)}}):
        for like, options, expected_key in (
            (half, {}, "16"),
            (half, {"odd": True}, "16 odd"),
            (half, {"n_tokens": 33}, "16"),
            (half, {"n_tokens": 7}, "16 n<=32"),
            (half, {"n_tokens": 32, "odd": True}, "16 n<=32 odd"),
            (half, {"n_tokens": 64, "odd": True}, "16 odd"),
            (full, {"n_tokens": 7}, "32 n<=16"),
            (full, {"n_tokens": 17, "odd": True}, "32"),
        ):
            assert find_config("encode", like, **options) == tile(keys.index(expected_key)), (options, expected_key)
        assert find_config("nothing", half) is None
        assert launch_config("encode", half, odd=True) == tile(1)
        with pytest.raises(KeyError, match="nothing: expected in the launch table"):
            launch_config("nothing", half)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_103", "gfx942", "sm_86"])
def test_every_table_serves_every_batch(arch: str) -> None:
    """Each dtype, number of tokens and depth finds tiles, and no row of the table names a rival without them."""
    from fastsae_kernels.gpu import config
    from fastsae_kernels.gpu.rivals import config_of, table_path

    with config.override(arch):
        for dtype in (torch.bfloat16, torch.float32):
            for n_tokens in (1, 16, 17, 33, 65, 4096):
                for d_in in (2304, 1000, 7):
                    x = torch.empty(n_tokens, d_in, dtype=dtype, device="meta")
                    W_enc = torch.empty(4096, d_in, dtype=dtype, device="meta").t()
                    assert config_of("pointer", x) is not None
                    assert "has no tiles" not in table_path(x, W_enc).why


def test_too_old_a_gpu_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsae_kernels.gpu import config

    monkeypatch.setattr(config, "capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0 or newer, Tesla T4 has 7\.5"):
        config._arch_of.__wrapped__(0)


def test_too_old_a_triton_is_one_clear_error() -> None:
    from fastsae_kernels.gpu.config import check_triton

    for version in ("3.2.0", "3.4.0+git1a2b"):
        with pytest.raises(RuntimeError, match=r"need triton 3\.5 or newer .* got 3\.[24]"):
            check_triton(version)
    for version in ("3.5.0", "3.10.1", "4.0.0rc1"):
        check_triton(version)
