"""The compile-only report: what it compiles, what it says, how it ends. Compiling needs a process without the interpreter."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.kernel_report import compiled, launches

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
CLEAN = compiled.Row("sm_90", "encode_kernel", "bf16", "-", 8, 4, 255, 0, 131072, 4, 900, 400, 1, "")
SPILLING = compiled.Row("sm_90", "encode_kernel", "bf16", "-", 8, 4, 255, 1104, 131072, 4, 900, 400, 1, "spills")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process whose kernels are compiled, not interpreted."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_triton
def test_every_kernel_is_collected_without_a_device() -> None:
    """The passes run on tensors without data, so they cannot have waited for one: no host synchronisation."""
    done = python(
        "import pkgutil, importlib, fastsae_kernels.gpu as gpu\n"
        "from tools.kernel_report.launches import collect\n"
        "modules = [importlib.import_module(f'{gpu.__name__}.{m.name}') for m in pkgutil.iter_modules(gpu.__path__)]\n"
        "defined = {name for m in modules for name in vars(m) if name.endswith('_kernel')}\n"
        "launched = {(launch.kernel.__name__, launch.dtype) for launch in collect('sm_90')}\n"
        "assert {name for name, _ in launched} == defined, {name for name, _ in launched} ^ defined\n"
        "ways = ('_list_pointers_kernel', '_list_descriptors_kernel', '_list_products_kernel')\n"
        "wanted = {(way, dtype) for way in ways for dtype in ('bf16', 'fp16', 'fp32')}\n"
        "assert wanted - launched == {('_list_descriptors_kernel', 'fp32')}\n"  # it has no fp32 product
    )
    assert done.returncode == 0, done.stderr


@needs_triton
def test_the_update_of_a_row_takes_no_slow_path_and_fits_four_times() -> None:
    """A correctly rounded division or root calls a function for numbers such as 0; registers allow four programs."""
    done = python(
        "from tools.kernel_report.launches import collect\n"
        "from tools.kernel_report.compiled import _compile, _read_cubin\n"
        "rows = [r for r in collect('sm_90') if r.name == 'adam_rows_kernel' and r.dtype == 'bf16']\n"
        "everything = [r for r in rows if dict(r.constants)['BLOCK_1'] == 2048 and dict(r.options)['num_warps'] == 4][-1]\n"
        "compiled = _compile(everything, 'sm_90')\n"
        "found = _read_cubin(compiled.asm['cubin'])\n"
        "ptx = compiled.asm['ptx']\n"
        "programs = 65536 // (-(-found.registers // 8) * 8 * 32 * 4)\n"
        "print(ptx.count('div.rn'), ptx.count('sqrt.rn'), found.stack_bytes, programs)\n"
    )
    assert done.returncode == 0, done.stderr
    divisions, roots, stack, programs = map(int, done.stdout.split())
    assert (divisions, roots, stack) == (0, 1, 0)  # the root is that of a row's norm
    assert programs >= 4


@needs_triton
def test_no_step_of_the_optimiser_compiles_again() -> None:
    """Step, learning rate and bias corrections are arguments of one specialisation."""
    done = python(
        "import torch\n"
        "from tools.kernel_report import launches\n"
        "from fastsae_kernels.gpu.adam import adam_rows\n"
        "from fastsae_kernels.gpu.feature_sums import FeatureOrder\n"
        "from fastsae_kernels.gpu.config import override\n"
        "from fastsae_kernels.gpu.weight_gradients import RowSums\n"
        "def meta(*shape, dtype=torch.float32): return torch.empty(*shape, dtype=dtype, device='meta')\n"
        "order = FeatureOrder(meta(9, dtype=torch.int64), meta(50, dtype=torch.int64), None, 5)\n"
        "rows, last_step, found = meta(8, 24), meta(8, dtype=torch.int32), {}\n"
        "with override('sm_90'), launches._recorded('fp32', found):\n"
        "    for step in (1, 2, 16, 1000):\n"
        "        options = dict(lr=1 / step, beta1=0.0, beta2=0.999, eps=1e-8, step=step, last_step=last_step)\n"
        "        adam_rows(RowSums(order, meta(50), meta(10, 24), None), rows, None, rows, **options)\n"
        "assert len(found) == 1, found\n"
    )
    assert done.returncode == 0, done.stderr


@needs_triton
def test_every_shipped_tile_that_lists_entries_is_compiled() -> None:
    """Each tile of the table, odd ones and small batches too, shows up in a recorded launch."""
    done = python(
        "from tools.kernel_report.launches import collect\n"
        "from fastsae_kernels.gpu.config import load_table\n"
        "for arch in ('sm_80', 'sm_90', 'sm_100', 'gfx942'):\n"
        "    launches = collect(arch)\n"
        "    for table in ('list_pointers', 'list_descriptors'):\n"
        "        for key, tiles in load_table(arch).get(table, {}).items():\n"
        "            for tile in tiles if isinstance(tiles, list) else [tiles]:\n"
        "                wanted = {(k, v) for k, v in tile.items() if k.isupper() and k != 'PROGRAMS'}\n"
        "                options = {(k, v) for k, v in tile.items() if not k.isupper()}\n"
        "                dtype = 'fp32' if key.startswith('32') else 'bf16'\n"
        "                found = [l for l in launches if l.dtype == dtype and wanted <= set(l.constants)]\n"
        "                assert any(options <= set(l.options) for l in found), (arch, table, key)\n"
    )
    assert done.returncode == 0, done.stderr


@needs_triton
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_large_tiles_that_list_entries_are_clean(arch: str) -> None:
    """With bounds, which take the most registers; the report compiles the others."""
    done = python(
        "import json, dataclasses\n"
        "from tools.kernel_report import compiled\n"
        "names = ('list_pointers_kernel', 'list_descriptors_kernel')\n"
        f"launches = [l for l in compiled.collect('{arch}') if l.name in names and l.dtype == 'bf16'\n"
        "             and 'BLOCK_B=128' in l.variant and 'EVEN_D=False' not in l.variant and 'without' not in l.variant]\n"
        f"print(json.dumps([dataclasses.asdict(compiled.compile_launch(l, '{arch}')) for l in launches]))\n"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["kernel"] for row in rows} == {
        "list_pointers_kernel",
        *(["list_descriptors_kernel"] if arch == "sm_90" else []),
    }
    for row in rows:
        assert row["problem"] == ""
        assert row["stack_bytes"] == 0
        assert row["matrix"] > 0
        assert 0 < row["registers"] <= (512 if arch == "gfx942" else 255)


@needs_triton
def test_a_kernel_that_has_only_moved_is_not_compiled_again() -> None:
    """Its key in Triton's cache is the same wherever in its file it begins."""
    found = []
    for lines in (0, 1234):
        done = python(
            "from fastsae_kernels.gpu import feature_sums, tiles\n"
            "from tools.kernel_report.launches import collect\n"
            "for function in (feature_sums._feature_sums_kernel, tiles.read_row):\n"
            f"    function.starting_line_number += {lines}\n"
            "collect('sm_90')\n"
            "print(feature_sums._feature_sums_kernel.cache_key)\n"
        )
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    assert found[0] == found[1]


@needs_triton
def test_what_does_not_compile_is_a_finding() -> None:
    done = python(
        "from dataclasses import replace\n"
        "from tools.kernel_report import compiled\n"
        "launch = next(l for l in compiled.collect('sm_90') if l.name == 'row_stats_kernel')\n"
        "row = compiled.compile_launch(replace(launch, constants=()), 'sm_90')\n"
        "assert row.problem.startswith('does not compile: '), row\n"
    )
    assert done.returncode == 0, done.stderr


def fake_launch(name: str) -> launches.Launch:
    """A launch that only its name tells apart."""
    kernel = SimpleNamespace(__name__=f"_{name}_kernel")
    return launches.Launch(kernel, "bf16", (), (), (), ())


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_a_compiler_that_crashes_is_a_red_line_that_names_the_kernel(
    cores: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Compiling takes the process down on two kernels, with an exit status and with a signal; the report goes on."""

    def compile_launch(launch: launches.Launch, arch: str) -> compiled.Row:
        if launch.name == "leaving_kernel":
            os._exit(3)
        if launch.name == "crashing_kernel":
            os.kill(os.getpid(), signal.SIGKILL)
        return compiled.Row(arch, launch.name, launch.dtype, "-", 4, 3, 40, 0, 1024, 1, 90, 40, 12, "")

    names = ["first", "leaving", "second", "crashing", "third", "last"]
    monkeypatch.setattr(compiled, "collect", lambda arch: [fake_launch(name) for name in names])
    monkeypatch.setattr(compiled, "compile_launch", compile_launch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    assert compiled.main(["--arch", "90"]) == 1
    *lines, summary = capfd.readouterr().out.splitlines()[1:]
    assert summary == "6 kernels compiled, 2 with a problem"
    assert [line.split()[1] for line in lines] == [f"{name}_kernel" for name in names]
    assert "does not compile: the compiler died (exit status 3)" in lines[1]
    assert "does not compile: the compiler died (SIGKILL)" in lines[3]
    assert sum("does not compile" in line for line in lines) == 2
    assert not multiprocessing.active_children()


def test_kernels_are_chosen_by_parts_of_their_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        compiled, "collect", lambda arch: [fake_launch(name) for name in ("decode", "adam_rows", "sort")]
    )
    chosen: list[str] = []
    monkeypatch.setattr(
        compiled, "compile_all", lambda work: iter(chosen.extend(launch.name for launch, _ in work) or ())
    )
    assert compiled.main(["--arch", "90", "--kernel", "adam", "sort"]) == 0
    assert chosen == ["adam_rows_kernel", "sort_kernel"]


def test_what_a_worker_raises_ends_the_report_with_its_message(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def compile_launch(launch: launches.Launch, arch: str) -> compiled.Row:
        raise launches.ReportError("cuobjdump: expected on PATH, found nowhere")

    monkeypatch.setattr(compiled, "collect", lambda arch: [fake_launch(str(i)) for i in range(5)])
    monkeypatch.setattr(compiled, "compile_launch", compile_launch)
    assert compiled.main(["--arch", "90"]) == 1
    assert capfd.readouterr().err == "report: cuobjdump: expected on PATH, found nowhere\n"
    assert not multiprocessing.active_children()


def test_exit_status_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rows, status in (([CLEAN], 0), ([CLEAN, SPILLING], 1)):
        monkeypatch.setattr(compiled, "collect", lambda arch: [])
        monkeypatch.setattr(compiled, "compile_all", lambda work, rows=rows: iter(rows))
        path = tmp_path / "report.json"
        assert compiled.main(["--arch", "90", "--json", str(path)]) == status
        printed = capsys.readouterr().out
        assert printed.count("encode_kernel") == len(rows)
        assert ("spills" in printed) == bool(status)
        assert [row["stack_bytes"] for row in json.loads(path.read_text())] == [row.stack_bytes for row in rows]


@pytest.mark.parametrize("arguments", [["--arch", "12"], ["--arch", "ninety"], ["--arch", "gfx1"], ["--colour"]])
def test_wrong_arguments_end_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compiled.main(arguments)
    assert ended.value.code == 2


def test_interpreter_and_missing_triton_are_one_clear_line() -> None:
    main = "import sys\nfrom tools.kernel_report import compiled\nsys.exit(compiled.main([]))\n"
    interpreted = python(main, TRITON_INTERPRET="1")
    assert interpreted.returncode == 1
    assert interpreted.stderr.strip().endswith("unset it")
    missing = python("import sys\nsys.modules['triton'] = None\n" + main)
    assert missing.returncode == 1
    assert "Triton is not installed" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_package_and_report_import_without_triton() -> None:
    done = python("import sys\nsys.modules['triton'] = None\nimport fastsae_kernels, tools.kernel_report.compiled\n")
    assert done.returncode == 0, done.stderr
