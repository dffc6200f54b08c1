"""The compile-only report: what it compiles, what it says, how it ends. Compiling needs a process without the interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastsae_kernels import report

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

CLEAN = report.Row("sm_90", "encode_kernel", "bf16", "-", 8, 4, 255, 0, 131072, 4, 0, "")
SPILLING = report.Row("sm_90", "encode_kernel", "bf16", "-", 8, 4, 255, 1104, 131072, 4, 0, "spills")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process whose kernels are compiled, not interpreted."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **environment}, capture_output=True, text=True, check=False
    )


@needs_triton
def test_every_kernel_is_collected_without_a_device() -> None:
    """The pass runs on tensors without data, so it cannot have waited for one: no host synchronisation."""
    done = python(
        "import pkgutil, importlib, fastsae_kernels.gpu as gpu\n"
        "from fastsae_kernels import report\n"
        "modules = [importlib.import_module(f'{gpu.__name__}.{m.name}') for m in pkgutil.iter_modules(gpu.__path__)]\n"
        "defined = {name for m in modules for name in vars(m) if name.endswith('_kernel')}\n"
        "launched = {(launch.kernel.__name__, launch.dtype) for launch in report.collect(90)}\n"
        "assert {name for name, _ in launched} == defined, (launched, defined)\n"
        "assert {('_encode_kernel', 'bf16'), ('_encode_kernel', 'fp32')} <= launched\n"
    )
    assert done.returncode == 0, done.stderr


@needs_triton
@pytest.mark.parametrize(("arch", "instruction"), [(80, "hmma"), (90, "hgmma")])
def test_bf16_encode_is_clean(arch: int, instruction: str) -> None:
    done = python(
        "import json, dataclasses\n"
        "from fastsae_kernels import report\n"
        f"launches = [l for l in report.collect({arch}) if l.kernel.__name__ == '_encode_kernel' and l.dtype == 'bf16']\n"
        f"print(json.dumps([dataclasses.asdict(report.compile_launch(l, {arch})) for l in launches]))\n"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 2  # d_in a multiple of the tile, and not
    for row in rows:
        assert row["problem"] == ""
        assert row["stack_bytes"] == 0
        assert row[instruction] > 0
        assert 0 < row["registers"] <= 255


def test_exit_status_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rows, status in (([CLEAN], 0), ([CLEAN, SPILLING], 1)):
        monkeypatch.setattr(report, "collect", lambda arch, rows=rows: rows)
        monkeypatch.setattr(report, "compile_launch", lambda row, arch: row)
        path = tmp_path / "report.json"
        assert report.main(["--arch", "90", "--json", str(path)]) == status
        printed = capsys.readouterr().out
        assert printed.count("encode_kernel") == len(rows)
        assert ("spills" in printed) == bool(status)
        assert [row["stack_bytes"] for row in json.loads(path.read_text())] == [row.stack_bytes for row in rows]


@pytest.mark.parametrize("arguments", [["--arch", "12"], ["--arch", "ninety"], ["--colour"]])
def test_wrong_arguments_end_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        report.main(arguments)
    assert ended.value.code == 2


def test_interpreter_and_missing_triton_are_one_clear_line() -> None:
    main = "import sys\nfrom fastsae_kernels import report\nsys.exit(report.main([]))\n"
    interpreted = python(main, TRITON_INTERPRET="1")
    assert interpreted.returncode == 1
    assert interpreted.stderr.strip().endswith("unset it")
    missing = python("import sys\nsys.modules['triton'] = None\n" + main)
    assert missing.returncode == 1
    assert "Triton is not installed" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_package_imports_without_triton() -> None:
    done = python("import sys\nsys.modules['triton'] = None\nimport fastsae_kernels, fastsae_kernels.report\n")
    assert done.returncode == 0, done.stderr
