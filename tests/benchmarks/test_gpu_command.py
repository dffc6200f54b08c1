"""The command for a machine with a GPU: what it says where it cannot run, and what is left of a run that goes wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.result import ROOT


@pytest.mark.parametrize(
    ("has_gpu", "absent", "message"),
    [
        (False, "", "no CUDA device: on a CPU run `pytest benchmarks/"),
        (True, "pytest_benchmark", "not installed: pytest-benchmark; run `pip install pytest-benchmark`\n"),
        (True, "", "no C compiler"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, has_gpu: bool, absent: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == absent else object())
    monkeypatch.setenv("PATH", "")
    assert gpu.main([str(tmp_path / "results")]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("file", gpu.TESTS)
def test_every_file_that_it_runs_has_the_tests_that_it_chooses(file: str) -> None:
    names = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.MULTILINE)
    parameters = re.findall(r'"(triton|batch)"', (ROOT / file).read_text())
    for chosen in gpu.TESTS[file]:
        assert any(chosen.removeprefix("not ") in name for name in (*names, *parameters))
    *halves, other = gpu.TESTS[file]
    assert not halves or [other] == [f"not {half}" for half in halves]


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
    monkeypatch.setattr(gpu, "TESTS", {str(failing): ("",), str(hanging): ("good or stuck",)})
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "pytest", failing], cwd=ROOT, capture_output=True, check=False)
    minutes = (5 + 3 * (time.monotonic() - started)) / 60  # for two such processes, on a machine as busy as this one
    arguments = [str(tmp_path / "results"), f"--minutes={minutes}", "--commit", "abc1234", "--only", "tests"]
    assert gpu.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "compute capability 9.0, 128 GiB" in printed
    assert "commit abc1234" in printed
    assert f"{failing}: 1 failed, 1 passed" in printed
    assert "test_failing.py::test_bad - AssertionError: races" in printed
    assert f"{hanging} good or stuck: 1 passed" in printed
    assert re.search(r"STOPPED in \S*test_hanging.py::test_stuck", printed)
    assert "0 of 2 parts went well" in printed


@pytest.mark.usefixtures("device")
def test_benchmarks_end_with_a_table_or_say_that_no_time_was_left(
    bench_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "FOLDER", str(bench_file))
    monkeypatch.setattr(gpu, "BENCHMARKS", ("demo",))
    arguments = [str(bench_file.parents[1] / "results"), "--only", "benchmarks", "--commit", "abc1234"]
    assert gpu.main([*arguments, "--minutes", "3"]) == 0
    printed = capsys.readouterr().out
    assert "benchmarks, demo: 2 passed" in printed
    assert "1 of 1 parts went well" in printed
    assert re.search(r"encode, demo +fused +\d", printed)
    assert gpu.main([*arguments, "--minutes", "0.05"]) == 1
    assert "benchmarks, demo: not begun, no time left" in capsys.readouterr().out
