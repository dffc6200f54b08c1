"""The tuner with a stopwatch of its own: which candidates it times, what it keeps, and when it must not measure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_helpers import HAS_DESCRIPTORS, needs_kernels

pytestmark = needs_kernels

TILES = {"BLOCK_B": 16, "BLOCK_S": 32, "BLOCK_D": 16, "GROUP_B": 2, "RUN": 2, "LANES": 4}
WIDE = {**TILES, "BLOCK_S": 64}
LONG = {**TILES, "BLOCK_B": 32}
TABLE = {
    "list_pointers": {"16": [TILES, LONG], "16 n<=16": WIDE, "16 n<=32": WIDE, "32": TILES},
    "list_descriptors": {"16": TILES},
    "list_products": {"16": {"CHUNK_MIB": 1, "BLOCK_B": 8, "BLOCK_S": 16, "RUN": 4, "LANES": 4}},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache on disk and in memory, and a table whose candidates are known."""
    from fastsae_kernels.gpu import config, tune

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "_winners", {})
    with config.override(TABLE):
        yield


@pytest.fixture(params=[True, False], ids=["sm_90", "sm_80"])
def has_descriptors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A GPU whose descriptors load tiles, and an older one without."""
    from fastsae_kernels.gpu import list_descriptors

    if request.param and not HAS_DESCRIPTORS:
        pytest.skip("needs sm_90 or later")
    if not request.param:
        monkeypatch.setattr(list_descriptors, "refuses", lambda *operands: "the GPU has no tensor memory accelerator")
    return request.param


def make_call(n_tokens: int = 9, d_in: int = 24, d_sae: int = 43) -> Any:
    from fastsae_kernels.gpu import tune

    return tune.random_call(n_tokens, d_in, d_sae, torch.float16, 4.0)


def stopwatch(fastest: str, seen: list[str] | None = None) -> Callable[[Callable[[], None]], float]:
    """A benchmark that runs each candidate once and likes one kernel best."""

    def bench(run: Callable[[], None]) -> float:
        run()
        (candidate,) = run.__defaults__  # type: ignore[attr-defined]
        if seen is not None:
            seen.append(candidate.kernel)
        return 1.0 if candidate.kernel == fastest else 2.0

    return bench


def forget() -> None:
    """As a new process: nothing in memory."""
    from fastsae_kernels.gpu import tune

    tune._winners.clear()


def files(folder: Path) -> list[Path]:
    return sorted((folder / "fastsae" / "encode").glob("*"))


def test_every_shipped_tile_that_can_serve_is_timed_and_the_fastest_kept(has_descriptors: bool, tmp_path: Path) -> None:
    from fastsae_kernels.gpu import tune

    seen: list[str] = []
    timings = tune.tune(make_call(), stopwatch("list_products", seen))
    others = ["list_descriptors"] * has_descriptors + ["list_pointers"] * 3
    assert sorted(seen) == others + ["list_products"] * 3
    assert [timing.milliseconds for timing in timings] == [1.0] * 3 + [2.0] * len(others)
    seen.clear()
    tune.tune(make_call(d_in=21), stopwatch("list_pointers", seen))
    assert sorted(seen) == ["list_pointers"] * 3 + ["list_products"] * 3  # rows of 42 bytes: no descriptor
    assert len(files(tmp_path)) == 2


def test_measuring_leaves_the_outputs_alone() -> None:
    from fastsae_kernels.gpu import tune

    call = make_call()
    before = [call.cursors.clone(), call.entries.fill_(7).clone()]
    tune.measure(call, stopwatch("list_pointers"))
    assert all(torch.equal(a, b) for a, b in zip(before, (call.cursors, call.entries), strict=True))


def test_hit_after_a_restart_and_miss_for_another_key(has_descriptors: bool) -> None:
    from fastsae_kernels.gpu import tune

    fastest = "list_descriptors" if has_descriptors else "list_pointers"
    call = make_call()
    assert tune.known(call.x, call.W_enc) is None
    tune.tune(call, stopwatch(fastest))
    forget()
    found = tune.known(call.x, call.W_enc)
    assert found is not None
    assert (found.kernel, found.config) in ((fastest, TILES), (fastest, WIDE), (fastest, LONG))
    assert str(found) == f"{fastest}: measured on this machine"
    other = make_call(n_tokens=17)
    assert tune.known(other.x, other.W_enc) is None


def test_key_names_all_that_a_measurement_depends_on() -> None:
    from fastsae_kernels.gpu import tune

    def key(n: int, d_in: int = 24, d_sae: int = 43, dtype: torch.dtype = torch.float16) -> str:
        x = torch.empty(n, d_in, dtype=dtype)
        return tune.key_of(x, torch.empty(d_sae, d_in, dtype=dtype).t())

    assert key(9) == key(16) != key(17)  # tokens to a power of two
    keys = [
        key(9),
        key(9, d_in=25),
        key(9, d_sae=44),
        key(9, dtype=torch.float32),
    ]
    x = torch.empty(9, 24, dtype=torch.float16)
    keys.append(tune.key_of(x, torch.empty(24, 43, dtype=torch.float16)))  # W_enc stored the other way
    torch.use_deterministic_algorithms(True)  # which leaves the library's product out
    try:
        keys.append(key(9))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(set(keys)) == len(keys)
    assert f"triton {tune.triton.__version__}" in keys[0]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"key": "another"}', "\0\0\0", '{"key": 3, "kernel": 1, "config": []}']
)
def test_corrupt_file_is_said_and_rewritten(content: str, tmp_path: Path) -> None:
    from fastsae_kernels.gpu import tune

    call = make_call()
    tune.tune(call, stopwatch("list_products"))
    (path,) = files(tmp_path)
    path.write_text(content)
    forget()
    with pytest.warns(UserWarning, match="not a tuning result"):
        assert tune.known(call.x, call.W_enc) is None
    tune.tune(call, stopwatch("list_pointers"))
    assert json.loads(path.read_text())["kernel"] == "list_pointers"


def test_tile_that_is_no_longer_shipped_is_measured_again(tmp_path: Path) -> None:
    from fastsae_kernels.gpu import tune

    call = make_call()
    tune.tune(call, stopwatch("list_descriptors"))
    (path,) = files(tmp_path)
    stored = json.loads(path.read_text())
    stored["config"]["BLOCK_S"] = 512
    path.write_text(json.dumps(stored))
    forget()
    assert tune.known(call.x, call.W_enc) is None


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    """Many writers of few keys: every file is whole, no key is missing, nothing is left over."""
    from fastsae_kernels.gpu import tune
    from fastsae_kernels.gpu.choice import Choice

    def write(number: int) -> None:
        tune._write(f"key {number % 4}", tune.Timing(Choice("list_pointers", {"BLOCK_B": number}, ""), float(number)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(64)))
    stored = [json.loads(path.read_text()) for path in files(tmp_path)]
    assert sorted(entry["key"] for entry in stored) == [f"key {number}" for number in range(4)]


def test_unwritable_cache_is_said_and_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsae_kernels.gpu import tune

    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    call = make_call()
    with pytest.warns(UserWarning, match="cannot keep the tuning result"):
        tune.tune(call, stopwatch("list_products"))
    found = tune.known(call.x, call.W_enc)
    assert found is not None
    assert found.kernel == "list_products"


def test_candidate_that_fails_is_said_and_left_out() -> None:
    from fastsae_kernels.gpu import tune

    def bench(run: Callable[[], None]) -> float:
        if run.__defaults__[0].kernel != "list_products":  # type: ignore[attr-defined]
            raise RuntimeError("out of resources")
        return 1.0

    with pytest.warns(UserWarning, match="not a candidate on this machine: list_.* out of resources"):
        timings = tune.measure(make_call(), bench)
    assert {timing.choice.kernel for timing in timings} == {"list_products"}

    def broken(run: Callable[[], None]) -> float:
        raise RuntimeError("out of resources")

    with (
        pytest.warns(UserWarning, match="not a candidate"),
        pytest.raises(RuntimeError, match="no kernel that lists entries runs"),
    ):
        tune.measure(make_call(), broken)


def test_nothing_is_measured_while_tracing_or_capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsae_kernels.gpu import tune

    call = make_call()
    monkeypatch.setattr(tune, "tune", lambda call: pytest.fail("measured"))
    capturing, compiling = {"value": False}, {"value": False}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing["value"])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling["value"])
    assert tune.tuned(call.x, call.W_enc, None) is None  # chosen_listing asks without a call: never measures
    for flag in (capturing, compiling):
        flag["value"] = True
        assert tune.tuned(call.x, call.W_enc, call) is None
        flag["value"] = False
    monkeypatch.setattr(tune, "tune", lambda call: [tune.Timing(next(tune.candidates(*call[:2])), 1.0)])
    assert tune.tuned(call.x, call.W_enc, call) is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the command runs where there is a device")
def test_command_without_a_device_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    from fastsae_kernels.gpu import tune

    assert tune.main(["--shape", "8", "16", "32"]) == 1
    assert capsys.readouterr().err == "tune: expected a CUDA device, found none\n"
    with pytest.raises(SystemExit) as ended:
        tune.main(["--shape", "8", "16"])
    assert ended.value.code == 2
