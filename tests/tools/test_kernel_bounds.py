"""Bounds on what the hot kernels compile to: a change that costs them instructions or room on a multiprocessor fails here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COMPILE = """
import dataclasses, json, sys
from tools.kernel_report.launches import collect
from tools.kernel_report.compiled import compile_launch
arch, kernel, wanted = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]).items()
found = [
    launch for launch in collect(arch)
    if launch.name == kernel and launch.dtype == "bf16" and wanted <= (dict(launch.constants) | dict(launch.options)).items()
]
print(json.dumps([dataclasses.asdict(compile_launch(launch, arch)) for launch in found]))
"""

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@dataclass(frozen=True)
class Bound:
    """What the specialisations of one kernel for bf16 may take at most, and must leave room for at least."""

    arch: str
    kernel: str  # its name without the underscore
    constants: dict[str, Any]  # compile-time arguments and options that tell its specialisations apart
    epilogue: int  # instructions behind the last matrix instruction; all instructions where there is none
    programs: int  # at once on one multiprocessor


ROW_OF_2304 = {"BLOCK_O1": 2048, "BLOCK_O2": 256, "PENALTY": "l0", "scale_ptr": None}
# they hold for Triton 3.6 to 3.9
BOUNDS = (
    Bound("sm_80", "list_pointers_kernel", {"BLOCK_B": 128, "EVEN_D": True}, epilogue=1150, programs=1),
    Bound("sm_90", "list_descriptors_kernel", {"BLOCK_B": 128, "BLOCK_S": 256}, epilogue=1600, programs=1),
    Bound("sm_90", "list_descriptors_kernel", {"BLOCK_B": 128, "BLOCK_S": 128}, epilogue=1250, programs=2),
    Bound("sm_90", "list_descriptors_kernel", {"BLOCK_B": 64, "num_stages": 3}, epilogue=900, programs=3),
    Bound("sm_100", "list_descriptors_kernel", {"BLOCK_B": 128}, epilogue=1600, programs=1),
    Bound("sm_90", "decode_kernel", {"BLOCK_D": 512}, epilogue=600, programs=9),
    Bound("sm_90", "fused_backward_kernel", {**ROW_OF_2304, "GATED": True, "x": None}, epilogue=550, programs=9),
    Bound("sm_90", "fused_backward_kernel", {**ROW_OF_2304, "BLOCK_I1": 2048}, epilogue=830, programs=4),
    Bound("sm_90", "adam_rows_kernel", {"BLOCK_1": 2048, "BLOCK_2": 256}, epilogue=1500, programs=4),
    Bound("sm_90", "sort_rows_kernel", {"BLOCK_K": 256, "K": 64}, epilogue=4200, programs=16),
)


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: f"{bound.arch}-{bound.kernel}-{bound.epilogue}")
def test_a_hot_kernel_keeps_within_its_bounds(bound: Bound) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, bound.arch, bound.kernel, json.dumps(bound.constants)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert rows, "no launch of the library has these constants"
    for row in rows:
        assert row["problem"] == ""
        assert row["epilogue"] <= bound.epilogue, row
        assert row["programs"] >= bound.programs, row
