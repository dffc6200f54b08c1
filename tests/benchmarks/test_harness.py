"""What computes wrong numbers gets no time, what cannot run says why, and what is timed is what counts."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastsae_kernels as kernels
from benchmarks import allocator, floor, harness, steps, test_encode, test_steps
from benchmarks.allocator import DEFAULT, TUNED
from benchmarks.floor import Work, step_work
from benchmarks.harness import Case, Group, Outcome, Provider
from benchmarks.peak import process_peak_mib
from benchmarks.result import ROOT
from benchmarks.shapes import DEVICE, Shape

SHAPE = Shape(n_tokens=48, d_in=16, d_sae=96, l0=8)
FLOOR_S = Work.floor_s
needs_glibc = pytest.mark.skipif(
    allocator.setting_of(1) != TUNED, reason="glibc's allocator on a CPU has both settings"
)


@pytest.fixture(autouse=True)
def soon_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "CALLS_S", 0.0)
    monkeypatch.setattr(Work, "floor_s", lambda self, with_gathers=False: 1e-6)
    for cached in (steps.truth, steps.errors_of):
        cached.cache_clear()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A call returns the seconds that it takes; the setting of an allocator that is made up, as a list of one."""
    now = [DEFAULT]

    @contextmanager
    def use(setting: str) -> Iterator[None]:
        now[0] = setting
        yield
        now[0] = DEFAULT

    monkeypatch.setattr(allocator, "setting_of", lambda number: TUNED if number % 2 else DEFAULT)
    monkeypatch.setattr(allocator, "use", use)
    monkeypatch.setattr(allocator, "page_faults", lambda: 0)
    monkeypatch.setattr(harness, "_seconds", lambda call, count: [call() for _ in range(count)])
    return now


def tiny(providers: dict[str, Provider]) -> Case:
    return Case("encode", "tiny", SHAPE, providers)


def calling(call: Any) -> Case:
    return tiny({"it": Provider(lambda: call)})


def step_case(*names: str) -> Case:
    return test_steps.case("forward+backward", "tiny", SHAPE, tuple(set(test_steps.LOSSES) - set(names)))


def measured(case: Case, rounds: int = 4) -> dict[str, Outcome]:
    group = Group(case)
    for _ in range(rounds):
        group.measure()
    return group.outcomes


def break_the_op(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """A gradient of W_dec that is off by a factor, and nothing else."""
    works = kernels.autoencode

    def broken(x: Any, W_enc: Any, b_enc: Any, threshold: Any, W_dec: Any, b_dec: Any, **options: Any) -> Any:
        W_dec = W_dec * factor + W_dec.detach() * (1 - factor)
        return works(x, W_enc, b_enc, threshold, W_dec, b_dec, **options)

    monkeypatch.setattr(kernels, "autoencode", broken)


# ---- right numbers come first


def test_a_working_op_is_timed() -> None:
    row = measured(step_case("dense eager fp32", "fused fp32"))["fused fp32"].row
    assert row.status == "ok"
    assert row.error <= row.error_limit < 2e-3
    assert row.median_s > 0
    assert row.speedup > 0


def test_a_broken_op_turns_its_rows_red(monkeypatch: pytest.MonkeyPatch) -> None:
    break_the_op(monkeypatch, 1.001)
    found = measured(step_case("dense eager fp32", "fused fp32", "fused bf16"), 1)
    row = found["fused fp32"].row
    assert (row.status, row.median_s) == ("red", None)
    assert row.error == pytest.approx(1e-3, rel=0.1)
    assert "over the limit" in row.reason
    assert found["dense eager fp32"].row.status == "ok"


def test_a_missing_entry_turns_encode_red(monkeypatch: pytest.MonkeyPatch) -> None:
    works = kernels.encode
    monkeypatch.setattr(kernels, "encode", lambda x, W, b, threshold, **o: works(x, W, b, threshold + 0.05, **o))
    error, limit = test_encode.check(test_encode.fused, SHAPE, torch.float32, top_k=False)
    assert error == float("inf") > limit


def test_a_red_row_fails_its_benchmark_and_a_skipped_one_says_why() -> None:
    providers = {
        "wrong": Provider(lambda: print, check=lambda: (0.5, 0.1)),
        "absent": Provider(lambda: print, skip=lambda: "it is not installed"),
        "nan": Provider(lambda: print, check=lambda: (float("nan"), 0.1)),
    }
    group, benchmark = Group(tiny(providers)), SimpleNamespace()
    group.measure()
    for provider in ("wrong", "nan"):
        with pytest.raises(pytest.fail.Exception, match=r"over the limit of 0\.1"):
            harness.report(benchmark, group, provider)
    with pytest.raises(pytest.skip.Exception, match="absent: it is not installed"):
        harness.report(benchmark, group, "absent")
    assert [outcome.row.status for outcome in group.outcomes.values()] == ["red", "skipped", "red"]


def test_what_raises_is_red_or_out_of_memory_and_the_others_have_their_times(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where it has had its times before: a red row has no time."""

    def raising(error: Exception, after: int = 0) -> Provider:
        calls: list[int] = []

        def call() -> None:
            calls.append(0)
            if len(calls) > after:
                raise error

        return Provider(lambda: call)

    wrong, large = ValueError("no such thing\nat all"), torch.OutOfMemoryError("tried to allocate 64 GiB")
    providers = {"late": raising(wrong, after=4), "large": raising(large), "fused": Provider(lambda: lambda: None)}
    found = measured(tiny(providers), 2)
    assert [(outcome.row.status, outcome.row.reason, outcome.row.median_s is None) for outcome in found.values()] == [
        ("red", "ValueError: no such thing", True),
        ("skipped", "out of memory: tried to allocate 64 GiB", True),
        ("ok", None, False),
    ]
    assert found["fused"].row.speedup is None
    assert capsys.readouterr().err.count("at all") == 1


def test_the_floor_of_a_row_is_that_of_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200, where bf16 products are fifteen times as fast as those of fp32."""
    rates = {"fp32": 52.0, "tf32": 400.0, "bf16": 780.0}
    monkeypatch.setattr(Work, "floor_s", FLOOR_S)
    monkeypatch.setattr(floor, "DEVICE", "cuda")
    monkeypatch.setattr(floor, "product_tflop_per_s", rates.__getitem__)
    monkeypatch.setattr(floor, "copy_gb_per_s", lambda: 4300.0)
    gemma = Shape(8192, 2304, 65536, 64)
    providers = {f"fused {dtype}": Provider(lambda: lambda: None, dtype=dtype) for dtype in rates}
    case = Case("whole step", "gemma", gemma, providers, work=partial(step_work, gemma, adam=True))
    rows = {dtype: case.row(f"fused {dtype}") for dtype in rates}
    floors = {dtype: 1e3 * row.floor_s for dtype, row in rows.items()}
    assert floors == pytest.approx({"fp32": 49.6, "tf32": 8.2, "bf16": 5.0}, rel=0.02)
    gathers = {dtype: 1e3 * row.gather_floor_s - floors[dtype] for dtype, row in rows.items()}
    gib = 4 * 8192 * 64 * 2304 * 4 / 1e9  # each entry reads four rows
    assert gathers == pytest.approx({"fp32": gib / 4.3, "tf32": gib / 4.3, "bf16": gib / 8.6})


# ---- rounds, calls, settings


@pytest.mark.parametrize(("long_s", "counted", "made"), [(float("inf"), 3, 2 + 3 * 2), (0.0, 3, 2 + 3)])
def test_the_first_call_of_a_round_counts_where_calls_are_long(
    monkeypatch: pytest.MonkeyPatch, long_s: float, counted: int, made: int
) -> None:
    """Before all of them one call warms up, and one tells the peak."""
    calls: list[int] = []
    monkeypatch.setattr(harness, "LONG_S", long_s)
    monkeypatch.setattr(allocator, "setting_of", lambda number: DEFAULT)
    row = measured(calling(lambda: calls.append(0)), 3)["it"].row
    assert (row.rounds, row.calls, len(calls)) == (3, counted, made if DEVICE == "cpu" else len(calls))


def test_the_spread_is_that_of_all_rounds_and_a_ratio_that_of_one(told: list[str]) -> None:
    """On a machine that was slow and has become fast."""
    now, times = {"slowness": 3.0}, {"dense": 0.08, "fused": 0.02}
    group = Group(tiny({name: Provider(lambda name=name: lambda: times[name] * now["slowness"]) for name in times}))
    for now["slowness"] in (3.0, 1.0, 2.0):
        group.measure()
    row = group.outcomes["fused"].row
    assert (row.median_s, row.iqr_s, row.speedup) == pytest.approx((0.04, 0.02, 4.0))
    group.outcomes["fused"].rounds[3] = [0.4]
    group.outcomes["fused"].fill_in(group.outcomes["dense"])
    assert group.unsteady() == ["dense", "fused"]
    assert " (unsteady)   4.00x" in row.line()


def test_the_better_setting_of_each_provider_counts(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {
        "dense": {DEFAULT: 0.20, TUNED: 0.12},
        "fused": {DEFAULT: 0.03, TUNED: 0.04},
        "faultless": {DEFAULT: 0.06, TUNED: 0.06},
    }
    called: list[str] = []

    def provider(name: str) -> Provider:
        return Provider(lambda: lambda: called.append(name) or seconds[name].get(told[0], 0.0))

    monkeypatch.setattr(allocator, "page_faults", lambda: 10**6 * sum(name != "faultless" for name in called))
    found = {name: outcome.row for name, outcome in measured(tiny({name: provider(name) for name in seconds})).items()}
    assert [(row.median_s, row.allocator, row.other_median_s, row.rounds) for row in found.values()] == [
        (0.12, TUNED, 0.20, 2),
        (0.03, DEFAULT, 0.04, 2),
        (0.06, None, None, 4),
    ]
    assert found["dense"].speedup == 1.0
    assert found["fused"].speedup == pytest.approx(4.0), "0.12 / 0.03: not against dense under the default allocator"
    assert found["faultless"].speedup == pytest.approx(2.0)


def test_calls_count_under_the_tuned_setting_once_their_memory_is_there(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones find it, however long they take."""
    left, pages = iter([9.0, 8.0, 7.0, 6.0, 5.0]), iter([0, 10**7, 10**7, 10**7])
    monkeypatch.setattr(allocator, "page_faults", lambda: next(pages))
    found = Outcome(calling(print).row("it"))
    harness._time(lambda: next(left), found, 1)
    assert found.rounds == {1: [7.0]}


def test_a_test_reports_the_calls_of_its_group(benchmark: Any) -> None:
    harness.replay(benchmark, [0.25, 0.5, 1.0])
    if not benchmark.disabled:
        assert benchmark.stats.stats.data == [0.25, 0.5, 1.0]


def test_seconds_on_a_gpu_are_between_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call has its own two events, and finds caches that were emptied before the first of them."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(log)
            log.append("event")

        def elapsed_time(self, end: Event) -> float:
            assert log[-1] == "synchronize"
            return 1000.0 * (end.at - self.at)  # milliseconds

    monkeypatch.setattr(harness, "DEVICE", "cuda")
    monkeypatch.setattr(harness, "_flushed", lambda: SimpleNamespace(zero_=lambda: log.append("flush")))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    assert harness._seconds(lambda: log.append("call"), 2) == [2.0, 2.0]
    assert log == ["flush", "event", "call", "event"] * 2 + ["synchronize"]


def test_a_shape_that_was_compiled_is_not_compiled_again() -> None:
    """Though each round makes its providers anew, and other shapes came between."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    # monkeypatch would delete the option when it undoes this, for it is no attribute of the module's own
    with torch._dynamo.config.patch(recompile_limit=1):  # each compilation takes seconds
        shapes = [Shape(n_tokens=8 + n, d_in=4, d_sae=16, l0=4) for n in range(2)]  # more than PyTorch allows by itself
        others = tuple(set(test_steps.LOSSES) - {"dense compiled fp32"})
        groups = [Group(test_steps.case("forward+backward", "tiny", shape, others)) for shape in shapes]
        for group in groups:
            group.measure()
        compiled = counters["stats"]["unique_graphs"]
        assert compiled >= len(groups)
        for group in groups:
            group.measure()
        assert counters["stats"]["unique_graphs"] == compiled
        assert torch._dynamo.config.recompile_limit < harness.MOST_GRAPHS  # other code has its own


# ---- memory


def test_what_does_not_fit_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is gone, with all that it keeps, before the next is made."""
    monkeypatch.setattr(harness, "memory_bytes", lambda: 1000)
    made: list[weakref.ref[Any]] = []

    def make() -> Any:
        assert all(earlier() is None for earlier in made)
        weights = torch.zeros(1)
        made.append(weakref.ref(weights))
        return lambda: weights + 1

    found = measured(tiny({name: Provider(make) for name in "ab"}), 2)
    assert [outcome.row.rounds for outcome in found.values()] == [2, 2]


def peak_of(call: Any) -> float:
    peak = measured(calling(call), 1)["it"].row.peak_mib
    if peak is None:
        pytest.skip("this system does not tell the peak of a process")
    return peak


@pytest.mark.parametrize("is_fragmented", [False, True])
def test_peak_is_that_of_the_calls(is_fragmented: bool) -> None:
    """The difference of two calls, since the allocator and the system add the same to both; holes of the heap do not count."""
    held = [torch.ones(2**21) for _ in range(12)]  # 8 MiB, which glibc takes from its heap or maps, as it has learnt to
    del held[:: 2 if is_fragmented else 1]
    small, large = (peak_of(lambda n=n: torch.ones(n * 2**18).sum().item()) for n in (16, 144))
    assert large - small == pytest.approx(144 - 16, abs=16)


def test_peak_is_without_what_the_first_call_keeps() -> None:
    """As against a call that keeps nothing: an allocator may hold more than it was asked for."""
    kept: list[torch.Tensor] = []

    def call() -> None:
        torch.ones(2**22).sum().item()

    def keeping_call() -> None:
        if not kept:
            kept.append(torch.ones(2**25))
        call()

    kept_mib = 2**25 * 4 / 2**20
    assert peak_of(keeping_call) - peak_of(call) == pytest.approx(0, abs=kept_mib / 2)


def test_the_peak_of_a_process_is_its_own() -> None:
    """That of a child begins anew, whatever its parent has."""
    parent = process_peak_mib()
    if parent is None:
        pytest.skip("this system does not tell the peak of a process")
    held = torch.ones(2**27)
    assert process_peak_mib() >= max(parent, held.nbytes / 2**20)
    program = "import torch\nfrom benchmarks.peak import process_peak_mib\nprint(process_peak_mib())"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 10 < float(found.stdout) < process_peak_mib() - 128


@needs_glibc
def test_freed_memory_is_kept_under_the_tuned_setting_and_given_back_after_it() -> None:
    """Counted in page faults, which do not hang on what else the machine does."""

    def faults() -> int:
        before = allocator.page_faults()
        for _ in range(4):
            torch.ones(2**24)  # 64 MiB, which is 16,384 pages
        return allocator.page_faults() - before

    by_default = faults()
    with allocator.use(TUNED):
        # glibc may need a few calls until no small piece keeps a large one from being filled again
        settles = any(faults() < 1000 for _ in range(20))
    assert settles, "their pages were found, and stay"
    if by_default < 4 * 16384:  # 2 MB pages
        pytest.skip("this system gives larger pages")
    assert faults() >= 0.2 * by_default, "and are given back at its end"


def test_another_system_has_the_default_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_libc", lambda: None)
    assert {allocator.setting_of(number) for number in range(4)} == {DEFAULT}
    assert allocator.page_faults() == 0
    with allocator.use(TUNED):
        pass


def test_page_faults_matter_where_their_share_can_be_seen() -> None:
    few, enough, small_share, large_share = (31, 1e-6), (32, 1e-3), (1000, 1.0), (10**6, 5.0)
    answers = [allocator.matters(*call) for call in (few, enough, small_share, large_share)]
    assert answers == [False, True, False, True]
