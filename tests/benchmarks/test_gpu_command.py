"""The command for a machine with a GPU: what it says where it cannot run, and what is left of a run that goes wrong."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, result, writer
from benchmarks.writer import ROOT, ResultFile, commit_of

BENCHMARKS = """
import os, time
from benchmarks import floor
from benchmarks.harness import Case, Provider, cases_and_providers
from benchmarks.shapes import Shape

floor.COPY_BYTES, floor.PRODUCT = 2**20, (64, 64, 64)

def nothing():
    return lambda: None

def crash():
    os._exit(9)  # as a driver does

def late():
    time.monotonic = lambda: float("inf")  # a day later
    return lambda: None

def no_memory():
    raise RuntimeError("out of resources: shared memory\\nHint: smaller tiles")

GROUPS = {
    "good": {"dense": nothing, "fused": nothing},
    "broken": {"dense": no_memory, "fused": nothing},
    "slow": {"dense": late},
    "crash": {"dense": crash},
    "last": {"dense": nothing},
}
CASES = [
    Case("encode", name, Shape(4, 8, 16, 2), {n: Provider(make) for n, make in makes.items()})
    for name, makes in GROUPS.items()
]

@cases_and_providers(CASES)
def test_tiny(timed, case, provider):
    timed(case, provider)
"""


@pytest.fixture
def tiny(bench_file: Callable[[str], Path]) -> Path:
    return bench_file(BENCHMARKS)


def run(path: Path, chosen: str, *options: str) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit status, what was printed, and the rows of the file."""
    results = path.parents[1] / "results"
    command = [sys.executable, "-m", "pytest", path, "-k", chosen, "--benchmark-quiet", "-rs", "--results", results]
    done = subprocess.run(
        [*command, "--commit", "abc1234", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    files = list(results.glob("*"))
    assert len(files) <= 1, "something beside the result file was left behind"
    rows: list[dict[str, Any]] = json.loads(files[0].read_text())["results"] if files else []
    assert all(file.stem.endswith("_abc1234") for file in files)
    return done.returncode, done.stdout + done.stderr, rows


def test_a_group_that_raises_is_red_and_a_crash_loses_nothing_that_was_measured(tiny: Path) -> None:
    status, _, rows = run(tiny, "good or broken or crash or last", "--minutes", "5")
    assert status == 9
    assert [(row["shape"], row["provider"], row["status"]) for row in rows] == [
        ("good", "dense", "ok"),
        ("good", "fused", "ok"),
        ("broken", "dense", "red"),
        ("broken", "fused", "ok"),
    ]
    assert rows[0]["median_s"] > 0
    assert "out of resources" in rows[2]["reason"]
    assert "\n" not in rows[2]["reason"]
    read = result.read(*(tiny.parents[1] / "results").glob("*.json"))
    assert (read.commit, len(read.rows)) == ("abc1234", 4)


def test_groups_that_no_time_is_left_for_are_skipped_and_named(tiny: Path) -> None:
    status, printed, rows = run(tiny, "slow or good or last", "--minutes", "9")
    assert status == 0
    assert [row["shape"] for row in rows] == ["good", "good", "slow"]
    assert "no time left for 1 groups" in printed
    assert "SKIPPED [1] " in printed


def test_without_a_device_it_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([str(tmp_path / "results")]) == 2
    assert capsys.readouterr().err.startswith("no CUDA device: on a CPU run `pytest benchmarks/")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("file", gpu.TESTS)
def test_every_file_that_it_runs_has_the_tests_that_it_chooses(file: str) -> None:
    names = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.MULTILINE)
    parameters = re.findall(r'"(triton)"', (ROOT / file).read_text())
    assert any(gpu.TESTS[file] in name for name in (*names, *parameters))


def test_no_test_of_the_kernels_is_left_out() -> None:
    """A file that needs the kernels, or a GPU, is run by the command, and under a log of its own."""
    marks = re.compile(r"needs_kernels|torch\.cuda\.is_available\(\), reason=|DEVICE == .cuda.")
    paths = {
        path for folder in ("kernels", "sae", "train", ".") for path in (ROOT / "tests" / folder).glob("test_*.py")
    }
    found = {str(path.relative_to(ROOT)) for path in paths if marks.search(path.read_text())}
    without_a_gpu = {f"tests/kernels/test_{name}.py" for name in ("gpu_memory", "gpu_devices", "race_detector")}
    assert found - set(gpu.TESTS) == without_a_gpu
    assert len({Path(file).stem for file in gpu.TESTS}) == len(gpu.TESTS)


def test_cublas_may_multiply_in_deterministic_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")  # of these tests, so of any other
    assert gpu.environment()["CUBLAS_WORKSPACE_CONFIG"] == os.environ["CUBLAS_WORKSPACE_CONFIG"]
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert gpu.environment()["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "pytest_benchmark" else object())
    assert gpu.missing() == "not installed: pytest-benchmark; run `pip install pytest-benchmark`"
    monkeypatch.setattr(gpu, "find_spec", lambda name: object())
    monkeypatch.setenv("PATH", "")
    assert gpu.missing().startswith("no C compiler")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that there is one."""
    properties = type("Properties", (), {"name": "H0", "major": 9, "minor": 0, "total_memory": 2**37})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(gpu, "LAST_WORDS_S", 2.0)


@pytest.mark.usefixtures("device")
def test_tests_that_fail_or_hang_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing, hanging = tmp_path / "test_failing.py", tmp_path / "test_hanging.py"
    failing.write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2, 'races'\n")
    hanging.write_text("import time\ndef test_good(): pass\ndef test_stuck(): time.sleep(600)\n")
    monkeypatch.setattr(gpu, "TESTS", {str(failing): "", str(hanging): "good or stuck"})
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "pytest", failing], cwd=ROOT, capture_output=True, check=False)
    minutes = (10 + 4 * (time.monotonic() - started)) / 60  # for two such processes, on a machine as busy as this one
    arguments = [str(tmp_path / "results"), f"--minutes={minutes}", "--commit", "abc1234", "--only", "tests"]
    assert gpu.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "compute capability 9.0, 128 GiB" in printed
    assert "commit abc1234" in printed
    assert f"{failing}: 1 failed, 1 passed" in printed
    assert "test_failing.py::test_bad - AssertionError: races" in printed
    assert f"{hanging}: 1 passed" in printed
    assert re.search(r"STOPPED in \S*test_hanging.py::test_stuck", printed)
    assert "0 of 2 parts went well" in printed


@pytest.mark.usefixtures("device")
def test_benchmarks_end_with_a_table_or_say_that_no_time_was_left(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "FOLDER", str(tiny))
    monkeypatch.setattr(gpu, "BENCHMARKS", ("good",))
    arguments = [str(tiny.parents[1] / "results"), "--only", "benchmarks", "--commit", "abc1234"]
    assert gpu.main([*arguments, "--minutes", "3"]) == 0
    printed = capsys.readouterr().out
    assert "benchmarks, good: 2 passed" in printed
    assert "1 of 1 parts went well" in printed
    assert re.search(r"encode, good +fused +\d", printed)
    assert gpu.main([*arguments, "--minutes", "0.05"]) == 1
    assert "benchmarks, good: not begun, no time left" in capsys.readouterr().out


def test_the_commit_is_that_of_the_checkout_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy inside of another repository, a folder that is none, and a machine without git."""
    assert commit_of(tmp_path) == "unknown"
    (tmp_path / ".git").mkdir()
    assert commit_of(tmp_path) == "unknown"
    monkeypatch.setenv("PATH", "")
    assert commit_of(tmp_path) == "unknown"


def test_a_broken_file_of_an_earlier_run_does_no_harm(
    tmp_path: Path, make_row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "machine", lambda: {"gpu": "H0"})
    first = ResultFile(tmp_path, "one")
    first.write([make_row("encode", "fused", 1.0)])
    assert first.path is not None
    first.path.with_name(first.path.name.replace("_one", "_two")).write_text('{"finished": "2')
    second = ResultFile(tmp_path, "three")
    with pytest.warns(UserWarning, match="not a result file"):
        second.write([make_row("decode", "fused", 1.0)])
    assert second.path is not None
    rows = json.loads(second.path.read_text())["results"]
    assert [(row["operation"], row["commit"]) for row in rows] == [("decode", "three"), ("encode", "one")]


def test_processors_of_one_name_are_told_apart() -> None:
    cpuinfo = "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping\t: 1\n"
    assert writer.processor(cpuinfo * 2) == "AMD EPYC family 25 model 17"
    assert writer.processor("model name\t: Neoverse-V2\n") == "Neoverse-V2"
    assert writer.processor("") == (platform.processor() or platform.machine())
