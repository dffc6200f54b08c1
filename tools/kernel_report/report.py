"""Compile every Triton kernel for GPUs that this machine does not have, and report what each one takes.

    python -m tools.kernel_report --arch 80 90 100 gfx942 [--kernel encode] [--json PATH]

What is compiled is what the library would launch (`launches`), in every shipped configuration. Registers and stack come
from `cuobjdump`, matrix instructions from `nvdisasm`, both part of the Triton wheel; for AMD all of it from the assembly.

Exit status: 0 clean; 1 where a kernel does not compile, spills, exceeds the shared memory of its architecture or multiplies
16-bit operands without a matrix instruction, or where the report cannot run; 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.kernel_report.launches import Launch, ReportError, collect
from tools.kernel_report.workers import in_processes

# shared memory that one program may take, bytes
MAX_SHARED = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}


@dataclass(frozen=True)
class Row:
    """What one compiled kernel takes."""

    arch: str
    kernel: str
    dtype: str
    variant: str
    num_warps: int
    num_stages: int
    registers: int  # per thread; on AMD vector registers
    stack_bytes: int  # spilled registers and local arrays, per thread
    shared_bytes: int
    matrix: int  # matrix instructions: HGMMA (Hopper), UTC*MMA (Blackwell), HMMA (Ampere, and small tiles), MFMA (AMD)
    problem: str


def _tool(name: str) -> str:
    """Path of a CUDA binary tool: Triton's own copy, else the one on PATH."""
    from shutil import which

    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    path = str(bundled) if bundled.is_file() else which(name)
    if path is None:
        raise ReportError(f"{name}: expected in Triton's wheel ({bundled}) or on PATH, found in neither")
    return path


def _call(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read_cubin(cubin: bytes) -> tuple[int, int, int]:
    """`(registers, stack bytes, matrix instructions)`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _call(_tool("cuobjdump"), "--dump-resource-usage", str(path))
        assembly = _call(_tool("nvdisasm"), "-c", str(path))
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    matrix = len(re.findall(r"\b(?:[HQI]G?MMA|UTC\w*MMA)\b", assembly))
    return resources["REG"], resources["STACK"] + resources["LOCAL"], matrix


def _read_amdgcn(assembly: str) -> tuple[int, int, int]:
    """The same of AMD's assembly: vector registers, scratch bytes, MFMA."""
    numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", assembly)}
    scratch = max(numbers["private_segment_fixed_size"], 4 * numbers["vgpr_spill_count"])
    return numbers["vgpr_count"], scratch, len(re.findall(r"\bv_mfma_", assembly))


def _compile(launch: Launch, arch: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        launch.kernel,
        signature=dict(launch.signature),
        constexprs={launch.path(name): value for name, value in launch.constants},
        attrs={launch.path(name): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    is_amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if is_amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=dict(launch.options))


def _row(launch: Launch, arch: str, *, found: tuple[int, int, int, int] = (0, 0, 0, 0), problem: str) -> Row:
    """The row of a launch, with `(registers, stack bytes, shared bytes, matrix instructions)` where it was compiled."""
    options = dict(launch.options)
    warps, stages = options.get("num_warps", 4), options.get("num_stages", 3)
    return Row(arch, launch.name, launch.dtype, launch.variant, warps, stages, *found, problem)


def compile_launch(launch: Launch, arch: str) -> Row:
    """Compile one specialisation for `arch` and read what came out."""
    try:
        compiled = _compile(launch, arch)
        amd = compiled.asm.get("amdgcn")
        registers, stack, matrix = _read_cubin(compiled.asm["cubin"]) if amd is None else _read_amdgcn(amd)
    except ReportError:
        raise
    except Exception as error:  # an error of Triton's passes or of a tool is a finding, not the end of the report
        reason = (str(error).strip().splitlines() or [""])[0]
        return _row(launch, arch, problem=f"does not compile: {type(error).__name__}: {reason}"[:120])
    shared = compiled.metadata.shared
    problems = []
    if stack > 0:
        problems.append("spills")
    if shared > MAX_SHARED[arch]:
        problems.append("too much shared memory")
    if launch.wants_matrix_instructions and matrix == 0:
        problems.append("no matrix instruction")
    return _row(launch, arch, found=(registers, stack, shared, matrix), problem=", ".join(problems))


def compile_all(work: list[tuple[Launch, str]]) -> Iterator[Row]:
    """Rows of all launches, in their order; where the compiler takes its process down, the row says so."""

    def died(number: int, how: str) -> Row:
        return _row(*work[number], problem=f"does not compile: the compiler died ({how})")

    return in_processes(lambda number: compile_launch(*work[number]), len(work), died)


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    head = ("arch", "kernel", "dtype", "warps", "stages", "regs", "stack B", "smem KiB", "matrix", "problem", "variant")
    body = [
        (row.arch, row.kernel, row.dtype, row.num_warps, row.num_stages, row.registers, row.stack_bytes,
         f"{row.shared_bytes / 1024:.1f}", row.matrix, row.problem or "-", row.variant)
        for row in rows
    ]  # fmt: skip
    lines = [tuple(map(str, line)) for line in (head, *body)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    return "\n".join(
        "  ".join((*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[-1])) for line in lines
    )


def _arch(text: str) -> str:
    name = f"sm_{text}" if text.isdigit() else text
    if name not in MAX_SHARED:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(MAX_SHARED)}, got {text!r}")
    return name


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_report", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=_arch, nargs="+", default=["sm_80", "sm_90"], metavar="N",
                        help="architectures, such as 80 (A100), 90 (H100, H200), 100 (B200) or gfx942 (MI300)")  # fmt: skip
    parser.add_argument("--kernel", default="", metavar="TEXT", help="only kernels whose name contains this")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there too")
    arguments = parser.parse_args(argv)
    rows: list[Row] = []
    try:
        work = [
            (launch, arch) for arch in arguments.arch for launch in collect(arch) if arguments.kernel in launch.name
        ]
        for row in compile_all(work):
            rows.append(row)
            if sys.stderr.isatty():
                sys.stderr.write(f"\rcompiled {len(rows)} of {len(work)} ")
    except ReportError as error:
        sys.stderr.write(f"report: {error}\n")
        return 1
    sys.stdout.write(table(rows) + "\n")
    bad = [row for row in rows if row.problem]
    sys.stdout.write(f"{len(rows)} kernels compiled, {len(bad)} with a problem\n")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if bad else 0
