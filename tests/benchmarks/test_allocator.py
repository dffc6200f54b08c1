"""Each provider is timed under the allocator's setting that suits it best, and only where the settings can differ under both."""

from __future__ import annotations

import pytest
import torch

from benchmarks import allocator, harness
from benchmarks.allocator import DEFAULT, TUNED
from benchmarks.harness import Case, Group, Provider
from benchmarks.outcome import Outcome
from benchmarks.shapes import Shape
from benchmarks.writer import line

SHAPE = Shape(n_tokens=4, d_in=4, d_sae=8, l0=2)
needs_glibc = pytest.mark.skipif(
    TUNED not in allocator.settings(), reason="glibc's allocator on a CPU has both settings"
)


@pytest.fixture
def in_use(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The setting in use, of an allocator that is made up, as are the seconds of calls: a call returns them."""
    now = [DEFAULT]

    class Use:
        def __init__(self, setting: str) -> None:
            self.setting = setting

        def __enter__(self) -> None:
            now[0] = self.setting

        def __exit__(self, *error: object) -> None:
            now[0] = DEFAULT

    monkeypatch.setattr(allocator, "settings", lambda: (DEFAULT, TUNED))
    monkeypatch.setattr(allocator, "use", Use)
    monkeypatch.setattr(harness, "_seconds", lambda call, count: [call()] * count)
    return now


def timed(
    monkeypatch: pytest.MonkeyPatch, in_use: list[str], seconds: dict[str, dict[str, float]], rounds: int, faults: int
) -> tuple[dict[str, Outcome], list[str]]:
    """The outcome of each provider, whose calls take so long under each setting, and a log of all calls."""
    log: list[str] = []
    monkeypatch.setattr(allocator, "page_faults", lambda: faults * sum(call.endswith(DEFAULT) for call in log))

    def provider(name: str) -> Provider:
        def call() -> float:
            log.append(f"{name}, {in_use[0]}")
            return seconds[name].get(in_use[0], 0.0)

        return Provider(lambda: call)

    group = Group(Case("encode", "tiny", SHAPE, {name: provider(name) for name in seconds}))
    for _ in range(rounds):
        group.measure()
    return group.outcomes, log


def test_the_better_setting_of_each_provider_counts(monkeypatch: pytest.MonkeyPatch, in_use: list[str]) -> None:
    seconds = {
        "dense": {DEFAULT: 0.20, TUNED: 0.12},
        "fused": {DEFAULT: 0.03, TUNED: 0.04},
        "even": {DEFAULT: 0.06, TUNED: 0.06},
    }
    found, _ = timed(monkeypatch, in_use, seconds, rounds=2, faults=10**6)
    rows = {name: outcome.row for name, outcome in found.items()}
    told = {name: (row["median_s"], row["allocator"], row["other_median_s"]) for name, row in rows.items()}
    assert told["dense"] == (0.12, TUNED, 0.20)
    assert told["fused"] == (0.03, DEFAULT, 0.04)
    assert rows["fused"]["speedup"] == pytest.approx(4.0), "0.12 / 0.03: not against dense under the default allocator"
    assert rows["even"]["speedup"] == pytest.approx(2.0)
    assert rows["dense"]["speedup"] == 1.0
    assert rows["dense"]["rounds"] == 2


def test_without_page_faults_there_is_one_setting(monkeypatch: pytest.MonkeyPatch, in_use: list[str]) -> None:
    found, log = timed(monkeypatch, in_use, {"fused": {DEFAULT: 0.03}}, rounds=2, faults=allocator.FEWEST_FAULTS - 1)
    assert (found["fused"].row["allocator"], found["fused"].row["other_median_s"]) == (None, None)
    assert set(log) == {"fused, default", "fused, exact"}  # the one that tells the peak


def test_a_slow_provider_is_not_measured_again_where_it_is_clearly_slower(
    monkeypatch: pytest.MonkeyPatch, in_use: list[str]
) -> None:
    seconds = {"dense": {DEFAULT: 4.0, TUNED: 2.5}, "close": {DEFAULT: 4.0, TUNED: 3.9}}
    found, log = timed(monkeypatch, in_use, seconds, rounds=5, faults=10**7)
    # slow providers take part in three of five rounds; in the first, two calls come before the one that counts
    assert (log.count("dense, default"), log.count("dense, tuned")) == (2, 3)
    assert (log.count("close, default"), log.count("close, tuned")) == (4, 3)
    assert found["dense"].calls == [2.5] * 3
    assert found["dense"].row["other_median_s"] == 4.0


def test_calls_count_under_the_tuned_setting_once_their_memory_is_there(
    monkeypatch: pytest.MonkeyPatch, in_use: list[str]
) -> None:
    """The first ones find it, however long they take."""
    monkeypatch.setattr(harness, "_seconds", lambda call, count: [call() for _ in range(count)])
    left = iter([9.0, 8.0, 7.0, 6.0, 5.0, 4.0])
    pages = iter([0, 10**7, 10**7, 2 * 10**7, 2 * 10**7, 2 * 10**7])
    monkeypatch.setattr(allocator, "page_faults", lambda: next(pages))
    found = Outcome({}, {DEFAULT: {}, TUNED: {}})
    harness._time_calls(lambda: next(left), found, 0, TUNED)
    assert found.by_setting == {DEFAULT: {}, TUNED: {0: [7.0]}}


def test_what_is_wrong_has_no_setting(monkeypatch: pytest.MonkeyPatch, in_use: list[str]) -> None:
    def fails() -> float:
        if in_use[0] == TUNED:
            raise ValueError("no more")
        return 0.1

    monkeypatch.setattr(allocator, "page_faults", lambda: 10**9)
    monkeypatch.setattr(allocator, "matters", lambda faults, seconds: True)
    group = Group(Case("encode", "tiny", SHAPE, {"it": Provider(lambda: fails)}))
    group.measure()
    row = group.outcomes["it"].row
    assert (row["status"], row["median_s"], row["allocator"], row["other_median_s"]) == ("red", None, None, None)
    assert in_use == [DEFAULT]
    assert "red: ValueError: no more" in line(row)


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
    assert allocator.settings() == (DEFAULT,)
    assert allocator.page_faults() == 0
    with allocator.use(TUNED):
        pass


@pytest.mark.parametrize(
    ("faults", "seconds", "answer"), [(31, 1e-6, False), (32, 1e-3, True), (1000, 1.0, False), (10**6, 5.0, True)]
)
def test_page_faults_matter_where_their_share_can_be_seen(faults: int, seconds: float, answer: bool) -> None:
    assert allocator.matters(faults, seconds) is answer
