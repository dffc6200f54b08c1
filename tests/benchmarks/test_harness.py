"""What computes wrong numbers gets no time, what cannot run says why, and what is timed is what counts."""

from __future__ import annotations

import subprocess
import sys
import time
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastsae_kernels as kernels
from benchmarks import floor, harness, outcome, test_encode, test_steps
from benchmarks.floor import Work, step_work
from benchmarks.harness import Case, Group, Provider
from benchmarks.outcome import Outcome
from benchmarks.peak import process_peak_mib
from benchmarks.shapes import DEVICE, Shape
from benchmarks.writer import ROOT, line

SHAPE = Shape(n_tokens=48, d_in=16, d_sae=96, l0=8)
FLOOR_S = Work.floor_s


@pytest.fixture(autouse=True)
def soon_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "CALLS_S", 0.0)
    monkeypatch.setattr(Work, "floor_s", lambda self, with_gathers=False: 1e-6)
    for cached in (test_steps.exact_gradients, test_steps.operands, test_steps.eager_pass_errors):
        cached.cache_clear()


def measured(case: Case, rounds: int = 3) -> dict[str, Outcome]:
    group = Group(case)
    for _ in range(rounds):
        group.measure()
    return group.outcomes


def tiny(providers: dict[str, Provider]) -> Case:
    return Case("encode", "tiny", SHAPE, providers)


def step_case(*names: str) -> Case:
    return Case("forward+backward", "tiny", SHAPE, {name: test_steps.pass_provider(name, SHAPE) for name in names})


def break_the_op(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """A gradient of W_dec that is off by a factor, and nothing else."""
    works = kernels.autoencode

    def broken(x: Any, W_enc: Any, b_enc: Any, threshold: Any, W_dec: Any, b_dec: Any, **options: Any) -> Any:
        W_dec = W_dec * factor + W_dec.detach() * (1 - factor)
        return works(x, W_enc, b_enc, threshold, W_dec, b_dec, **options)

    monkeypatch.setattr(kernels, "autoencode", broken)


def test_a_working_op_is_timed() -> None:
    row = measured(step_case("dense eager fp32", "fused fp32"))["fused fp32"].row
    assert row["status"] == "ok"
    assert row["error"] <= row["error_limit"] < 1e-4
    assert row["rounds"] == row["calls"] == 3
    assert row["median_s"] > 0
    assert row["speedup"] > 0


def test_a_broken_op_turns_its_rows_red(monkeypatch: pytest.MonkeyPatch) -> None:
    break_the_op(monkeypatch, 1.001)
    found = measured(step_case("dense eager fp32", "fused fp32", "fused bf16"))
    row = found["fused fp32"].row
    assert row["status"] == "red"
    assert row["median_s"] is None
    assert row["error"] == pytest.approx(1e-3, rel=0.1)
    assert "over the limit" in row["reason"]
    assert found["dense eager fp32"].row["status"] == "ok"


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
    assert [outcome.row["status"] for outcome in group.outcomes.values()] == ["red", "skipped", "red"]


def test_the_floor_of_a_row_is_that_of_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200, where bf16 products are fifteen times as fast as those of fp32."""
    rates = {"fp32": 52.0, "tf32": 400.0, "bf16": 780.0}
    monkeypatch.setattr(Work, "floor_s", FLOOR_S)
    monkeypatch.setattr(floor, "DEVICE", "cuda")
    monkeypatch.setattr(floor, "product_tflop_per_s", rates.__getitem__)
    monkeypatch.setattr(floor, "copy_gb_per_s", lambda: 4300.0)
    gemma = Shape(8192, 2304, 65536, 64)
    providers = {f"fused {dtype}": Provider(lambda: lambda: None, dtype=dtype) for dtype in rates}
    found = measured(Case("whole step", "gemma", gemma, providers, work=partial(step_work, gemma, adam=True)), 1)
    rows = {dtype: found[f"fused {dtype}"].row for dtype in rates}
    floors = {dtype: 1e3 * row["floor_s"] for dtype, row in rows.items()}
    assert floors == pytest.approx({"fp32": 49.6, "tf32": 8.2, "bf16": 5.0}, rel=0.02)
    gathers = {dtype: 1e3 * row["gather_floor_s"] - floors[dtype] for dtype, row in rows.items()}
    gib = 4 * 8192 * 64 * 2304 * 4 / 1e9  # each entry reads four rows
    assert gathers == pytest.approx({"fp32": gib / 4.3, "tf32": gib / 4.3, "bf16": gib / 8.6})


def test_a_test_reports_the_calls_of_its_group(benchmark: Any) -> None:
    harness.replay(benchmark, [0.25, 0.5, 1.0])
    if not benchmark.disabled:
        assert benchmark.stats.stats.data == [0.25, 0.5, 1.0]


def test_what_does_not_fit_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is gone, with all that it keeps, before the next is made."""
    monkeypatch.setattr(harness, "memory_bytes", lambda: 1000)
    made: list[weakref.ref[Any]] = []

    def make() -> Any:
        assert all(earlier() is None for earlier in made)
        weights = torch.zeros(1)
        made.append(weakref.ref(weights))
        return lambda: weights + 1

    found = measured(tiny({name: Provider(make) for name in "abc"}))
    assert [outcome.row["rounds"] for outcome in found.values()] == [3, 3, 3]


def test_what_raises_is_red_or_out_of_memory_and_the_others_have_their_times(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def raising(error: Exception) -> Provider:
        def call() -> None:
            raise error

        return Provider(lambda: call)

    wrong, large = ValueError("no such thing\nat all"), torch.OutOfMemoryError("tried to allocate 64 GiB")
    found = measured(tiny({"wrong": raising(wrong), "large": raising(large), "fused": Provider(lambda: lambda: None)}))
    assert [(outcome.row["status"], outcome.row["reason"]) for outcome in found.values()] == [
        ("red", "ValueError: no such thing"),
        ("skipped", "out of memory: tried to allocate 64 GiB"),
        ("ok", None),
    ]
    assert "at all" in capsys.readouterr().err


def counted_calls(call: Any) -> list[float]:
    found = measured(tiny({"it": Provider(lambda: call)}))["it"]
    assert (found.row["rounds"], found.row["calls"]) == (3, len(found.calls))
    return found.calls


def test_the_first_calls_in_a_round_count_where_they_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(outcome, "LONG_S", float("inf"))  # however busy the machine is
    assert len(counted_calls(lambda: calls.append(0))) == 3
    assert len(calls) == 1 + 3 * 3  # one tells the peak
    calls.clear()
    monkeypatch.setattr(outcome, "LONG_S", 0.0)
    monkeypatch.setattr(outcome, "STALL_S", 0.0)
    assert len(counted_calls(lambda: calls.append(0))) == len(calls) - 1 == 3 * 2


def test_a_first_call_that_stalls_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the first of all nor a later one, which would look long by itself; a call that always is counts."""
    stalls, long = [2.5, 0.2, 0.2, 1.4, 0.2, 0.24, 0.2], [4.4, 3.2, 1.3, 1.5]
    for seconds, rounds in ((stalls, {0: [0.2], 1: [0.2], 2: [0.2]}), (long, {0: [4.4, 3.2], 1: [1.3], 2: [1.5]})):
        left = iter(seconds)
        monkeypatch.setattr(harness, "_seconds", lambda call, count, left=left: [next(left) for _ in range(count)])
        found = Outcome({})
        harness._make_first_call(lambda: None, found, 0)
        for number in range(3):
            harness._time_calls(lambda: None, found, number)
        assert found.rounds == rounds
        assert next(left, None) is None


def test_what_comes_before_a_call_is_not_timed() -> None:
    prepared = harness.Prepared(lambda: time.sleep(0.05) or 7, lambda seven: seven + 1)
    assert prepared() == 8
    assert min(counted_calls(prepared)) < 0.05  # of the fastest: another process may take the core from any one of them


def peak_of(call: Any) -> float:
    peak = measured(tiny({"it": Provider(lambda: call, lambda: (0.0, 1.0))}), 1)["it"].row["peak_mib"]
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


def test_all_rounds_are_one_outcome() -> None:
    """A later one does not compare again, and leaves alone what was red."""
    log: list[str] = []
    providers = {
        "it": Provider(lambda: lambda: log.append("call"), lambda: log.append("check") or (0.0, 1.0)),
        "wrong": Provider(lambda: lambda: log.append("wrong call"), lambda: log.append("wrong") or (2.0, 1.0)),
    }
    group = Group(tiny(providers))
    group.measure()
    in_a_round = ["call"] * 3  # the first, one that finds cold caches, and one that counts
    assert log == ["check", "call", "wrong", *in_a_round]  # one of them tells the peak
    group.measure()
    assert log[6:] == in_a_round
    rows = [outcome.row for outcome in group.outcomes.values()]
    assert (rows[0]["rounds"], rows[0]["calls"]) == (2, 2)
    assert [row["status"] for row in rows] == ["ok", "red"]


def test_the_spread_is_that_of_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a ratio is that of one round, on a machine that was slow and has become fast."""
    now = {"slowness": 3.0}
    times = {"dense": 0.08, "fused": 0.02}
    monkeypatch.setattr(harness, "_seconds", lambda call, count: [call() * now["slowness"]] * count)
    group = Group(tiny({name: Provider(lambda name=name: lambda: times[name]) for name in times}))
    for now["slowness"] in (3.0, 1.0, 2.0):
        group.measure()
    row = group.outcomes["fused"].row
    assert (row["median_s"], row["iqr_s"]) == pytest.approx((0.04, 0.04))
    assert (row["speedup"], row["speedup_iqr"]) == pytest.approx((4.0, 0.0))
    assert group.unsteady() == ["dense", "fused"]
    assert " (unsteady)   4.00x" in line(row)


def test_slow_calls_have_every_second_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first there is one more, which tells the peak; where calls are long, each other counts.

    A ratio is that of the rounds that both have.
    """
    monkeypatch.setattr(harness, "_seconds", lambda call, count: [call()] * count)
    log: list[str] = []
    seconds = {"dense": 4.0, "slow": 0.5, "fused": 0.2}
    providers = {name: Provider(lambda name=name: lambda: log.append(name) or seconds[name]) for name in seconds}
    group, counts = Group(tiny(providers)), []
    for _ in range(4):
        group.measure()
        counts.append(tuple(map(log.count, group.outcomes)))
    assert counts == [(3, 4, 4), (3, 4, 7), (4, 6, 10), (4, 6, 13)]
    dense, slow, fused = group.outcomes.values()
    assert dense.rounds == {0: [4.0, 4.0], 2: [4.0]}
    assert slow.rounds == {0: [0.5], 2: [0.5]}
    assert fused.rounds == {0: [0.2], 1: [0.2], 2: [0.2], 3: [0.2]}
    assert (fused.row["speedup"], fused.row["speedup_iqr"]) == pytest.approx((20.0, 0.0))


def test_what_raises_while_it_is_timed_leaves_its_group_red(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it has had its times before: a red row has no time."""
    fails: list[bool] = []

    def call() -> None:
        if fails:
            raise ValueError("no more")

    group = Group(tiny({"dense": Provider(lambda: call)}))
    group.measure()
    row = group.outcomes["dense"].row
    assert row["status"] == "ok"
    fails.append(True)
    group.measure()
    group.measure()
    assert capsys.readouterr().err.count("ValueError: no more") == 1
    assert (row["status"], row["reason"], row["median_s"]) == ("red", "ValueError: no more", None)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is warmed in every round")
@pytest.mark.parametrize(("name", "warm_calls"), [("dense", 0), ("dense compiled", 1)])
def test_what_is_compiled_is_compiled_once_and_not_timed(name: str, warm_calls: int) -> None:
    log: list[str] = []
    group = Group(tiny({name: Provider(lambda: lambda: log.append("call"))}))
    group.measure()
    assert len(log) == warm_calls + 1 + 3  # one tells the peak
    group.measure()
    assert len(log) == warm_calls + 1 + 2 * 3


def test_a_shape_that_was_compiled_is_not_compiled_again() -> None:
    """Though each round makes its providers anew, and other shapes came between."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    # monkeypatch would delete the option when it undoes this, for it is no attribute of the module's own
    with torch._dynamo.config.patch(recompile_limit=2):  # each compilation takes seconds
        shapes = [Shape(n_tokens=8 + n, d_in=4, d_sae=16, l0=4) for n in range(4)]  # more than PyTorch allows by itself
        name = "dense compiled fp32"
        groups = [Group(tiny({name: test_steps.pass_provider(name, shape)})) for shape in shapes]
        for group in groups:
            group.measure()
        compiled = counters["stats"]["unique_graphs"]
        assert compiled >= len(groups)
        for group in groups:
            group.measure()
        assert counters["stats"]["unique_graphs"] == compiled
        assert torch._dynamo.config.recompile_limit < harness.MOST_GRAPHS  # other code has its own
