"""The detector finds planted races in the interpreter's own order of programs, and leaves alone what does not race."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import race_detector
import torch
from gpu_helpers import DEVICE, needs_kernels

pytestmark = [needs_kernels, pytest.mark.skipif(DEVICE == "cuda", reason="watches Triton's interpreter")]
if DEVICE == "cpu" and not needs_kernels.args[0]:
    import planted_races as planted

N = 8


def ints(n: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(n, dtype=dtype)


PLANTED = {
    "counter_without_atomic": {"count_ptr": ["stores", "stores, loads"]},
    "neighbours_output": {"x_ptr": ["stores, loads"]},
    "stale_slot": {"cursor_ptr": ["updates by an atomic, loads"]},
    "store_beside_atomic": {"count_ptr": ["stores, updates by an atomic"]},
}


@pytest.mark.parametrize(("kernel", "races"), PLANTED.items(), ids=PLANTED)
def test_planted_race_is_found_in_sequential_order(kernel: str, races: dict[str, list[str]]) -> None:
    function = getattr(planted, kernel)
    with pytest.raises(race_detector.RaceError) as raised:
        function[(N,)](**{name: ints(N) for name in function.arg_names})
    found: dict[str, list[str]] = {}
    for line in str(raised.value).splitlines():
        name, argument, who = line.split(": ")
        assert name == kernel
        kinds = re.findall(r"program [\d, .]+([a-z ]+) \(planted_races.py:[\d, a-z_.:]+\)", who)
        found.setdefault(argument.removesuffix("[0]"), []).append(", ".join(kinds))
    assert found == races


def test_programs_and_lines_are_named() -> None:
    source = Path(planted.__file__).read_text().splitlines()
    store, load = (1 + next(i for i, line in enumerate(source) if mark in line) for mark in ("# its own", "# another"))
    with pytest.raises(race_detector.RaceError) as raised:
        planted.neighbours_output[(3,)](x_ptr=ints(3), y_ptr=ints(3))
    where = f"program 0 stores (planted_races.py:{store}); program 1 loads (planted_races.py:{load})"
    assert str(raised.value) == f"neighbours_output: x_ptr[0]: {where}"


def test_halves_of_an_element_count() -> None:
    wide = ints(N, torch.int64)
    with pytest.raises(race_detector.RaceError, match=r"halves: narrow_ptr\[0\]: program 0 stores .*; program 1 loads"):
        planted.halves[(2,)](wide_ptr=wide, narrow_ptr=wide.view(torch.int32)[1:2], out_ptr=ints(1))


def test_slots_of_an_atomic_do_not_race() -> None:
    out = ints(N)
    planted.own_slot[(N,)](cursor_ptr=ints(1), out_ptr=out)
    assert out.sort().values.tolist() == list(range(N))


def test_what_the_list_names_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(race_detector.BENIGN, ("neighbours_output", "x_ptr", "stores", "loads"), "a test")
    planted.neighbours_output[(N,)](x_ptr=ints(N), y_ptr=ints(N))


def test_list_names_kernels_and_arguments_that_there_are() -> None:
    import importlib
    import pkgutil

    from fastsae_kernels import gpu

    modules = [
        importlib.import_module(f"{gpu.__name__}.{module.name}") for module in pkgutil.iter_modules(gpu.__path__)
    ]
    kernels = {name: value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}
    tuples = [value for module in modules for value in vars(module).values() if hasattr(value, "_fields")]
    for kernel, argument, *_ in race_detector.BENIGN:
        name, _, field = argument.partition(".")  # of a pointer, or of a tuple of pointers and a field of it
        assert name in kernels[kernel].arg_names, kernel
        assert not field or any(field in getattr(value, "_fields", ()) for value in tuples), argument


def test_detector_is_on(request: pytest.FixtureRequest) -> None:
    watch = request.config.stash[race_detector.WATCH]
    before = watch.launches
    planted.own_slot[(N,)](cursor_ptr=ints(1), out_ptr=ints(N))
    assert watch.launches == before + 1


def test_other_internals_of_triton_are_one_clear_line() -> None:
    other = types.SimpleNamespace(
        __file__="/a/b/c.py", interpreter_builder=None, _interpreter=types.ModuleType("memory")
    )
    with pytest.raises(pytest.UsageError, match=r"does not fit this version of Triton: .*'load'"):
        race_detector.Watch(other, None)  # type: ignore[arg-type]


@pytest.fixture
def shuffled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> race_detector.Watch:
    """The detector, told to shuffle."""
    watch = request.config.stash[race_detector.WATCH]
    monkeypatch.setattr(watch, "seed", "5")
    return watch


def order() -> list[int]:
    """The order in which the programs of a launch run."""
    out = ints(12)
    planted.own_slot[(2, 3, 2)](cursor_ptr=ints(1), out_ptr=out)
    return out.tolist()


def test_shuffled_order_runs_every_program_once(shuffled: race_detector.Watch) -> None:
    assert order() != list(range(12))
    assert sorted(order()) == list(range(12))


def test_shuffled_order_follows_from_the_seed_and_the_test(shuffled: race_detector.Watch) -> None:
    runs = []
    for name in ("one", "one", "two"):
        shuffled.begin_test(name)
        runs.append([order(), order()])
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_sequential_order_is_the_interpreters(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request.config.stash[race_detector.WATCH], "seed", None)
    assert order() == list(range(12))


def test_seed_of_a_shuffle_is_printed(tmp_path: Path) -> None:
    """By a pytest of its own, that of the test's process has its options already."""
    (tmp_path / "test_nothing.py").write_text("def test_nothing(): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "race_detector", "-p", "no:cacheprovider", "--rootdir", "."]
    done = subprocess.run(
        [*command, "--program-order", "shuffle", "test_nothing.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"programs ran in a random order: --program-order \d+\n", done.stdout)


def test_order_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    config = types.SimpleNamespace(option=types.SimpleNamespace(program_order="shuffle"))
    with pytest.raises(pytest.UsageError, match="--program-order: expected Triton's interpreter"):
        race_detector.pytest_configure(config)  # type: ignore[arg-type]
