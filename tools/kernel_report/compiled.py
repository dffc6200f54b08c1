"""Compile every Triton kernel for GPUs that this machine does not have, and report what each one takes.

    python -m tools.kernel_report --arch 80 90 100 gfx942 [--kernel adam decode] [--json PATH]

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
from typing import Any, NamedTuple

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
# what one multiprocessor has for all its programs: registers, warps, bytes of shared memory, of which each program takes
# 1 KiB more than it asks for
REGISTERS, RESERVED_SHARED = 65536, 1024
WARPS = {"sm_86": 48, "sm_89": 48, "sm_120": 48}
MOST_WARPS, MOST_PROGRAMS = 64, 32


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
    instructions: int  # all of them, without padding; 0 on AMD
    epilogue: int  # those that stand behind the last matrix instruction; all of them where there is none
    programs: int  # that one multiprocessor runs at once; 0 on AMD
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


class Found(NamedTuple):
    """What the compiled code of one kernel says."""

    registers: int = 0
    stack_bytes: int = 0
    matrix: int = 0
    instructions: int = 0
    epilogue: int = 0


def _read_cubin(cubin: bytes) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _call(_tool("cuobjdump"), "--dump-resource-usage", str(path))
        assembly = _call(_tool("nvdisasm"), "-c", str(path))
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = [line for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", assembly) if "NOP" not in line]
    matrix = [n for n, line in enumerate(instructions, 1) if re.search(r"\b(?:[HQI]G?MMA|UTC\w*MMA)\b", line)]
    return Found(
        registers=resources["REG"],
        stack_bytes=resources["STACK"] + resources["LOCAL"],
        matrix=len(matrix),
        instructions=len(instructions),
        epilogue=len(instructions) - max(matrix, default=0),
    )


def _read_amdgcn(assembly: str) -> Found:
    """The same of AMD's assembly: vector registers, scratch bytes, MFMA."""
    numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", assembly)}
    scratch = max(numbers["private_segment_fixed_size"], 4 * numbers["vgpr_spill_count"])
    return Found(numbers["vgpr_count"], scratch, len(re.findall(r"\bv_mfma_", assembly)))


def programs_per_multiprocessor(arch: str, registers: int, num_warps: int, shared_bytes: int) -> int:
    """How many programs of that size one multiprocessor runs at once; 0 on AMD, where it is not known."""
    if not arch.startswith("sm_"):
        return 0
    registers = -(-max(registers, 1) // 8) * 8  # a warp gets them in units of 8 a thread
    shared = MAX_SHARED[arch] + RESERVED_SHARED
    by_warps = WARPS.get(arch, MOST_WARPS) // num_warps
    return min(
        MOST_PROGRAMS, by_warps, REGISTERS // (registers * 32 * num_warps), shared // (shared_bytes + RESERVED_SHARED)
    )


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


def _row(launch: Launch, arch: str, *, found: Found | None = None, shared: int = 0, problem: str) -> Row:
    """The row of a launch, with what was found where it was compiled."""
    options = dict(launch.options)
    warps, stages = options.get("num_warps", 4), options.get("num_stages", 3)
    programs = 0 if found is None else programs_per_multiprocessor(arch, found.registers, warps, shared)
    return Row(
        arch, launch.name, launch.dtype, launch.variant, warps, stages,
        shared_bytes=shared, programs=programs, problem=problem, **(found or Found())._asdict(),
    )  # fmt: skip


def compile_launch(launch: Launch, arch: str) -> Row:
    """Compile one specialisation for `arch` and read what came out."""
    try:
        compiled = _compile(launch, arch)
        amd = compiled.asm.get("amdgcn")
        found = _read_cubin(compiled.asm["cubin"]) if amd is None else _read_amdgcn(amd)
    except ReportError:
        raise
    except Exception as error:  # an error of Triton's passes or of a tool is a finding, not the end of the report
        reason = (str(error).strip().splitlines() or [""])[0]
        return _row(launch, arch, problem=f"does not compile: {type(error).__name__}: {reason}"[:120])
    shared = compiled.metadata.shared
    problems = []
    if found.stack_bytes > 0:
        problems.append("spills")
    if shared > MAX_SHARED[arch]:
        problems.append("too much shared memory")
    if launch.wants_matrix_instructions and found.matrix == 0:
        problems.append("no matrix instruction")
    return _row(launch, arch, found=found, shared=shared, problem=", ".join(problems))


def compile_all(work: list[tuple[Launch, str]]) -> Iterator[Row]:
    """Rows of all launches, in their order; where the compiler takes its process down, the row says so."""

    def died(number: int, how: str) -> Row:
        return _row(*work[number], problem=f"does not compile: the compiler died ({how})")

    return in_processes(lambda number: compile_launch(*work[number]), len(work), died)


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    head = ("arch", "kernel", "dtype", "warps", "stages", "regs", "stack B", "smem KiB", "matrix", "instr", "epilogue",
            "programs", "problem", "variant")  # fmt: skip
    body = [
        (row.arch, row.kernel, row.dtype, row.num_warps, row.num_stages, row.registers, row.stack_bytes,
         f"{row.shared_bytes / 1024:.1f}", row.matrix, row.instructions, row.epilogue, row.programs, row.problem or "-",
         row.variant)
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
    parser.add_argument("--kernel", nargs="+", default=[""], metavar="TEXT",
                        help="only kernels whose name contains one of these")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there too")
    arguments = parser.parse_args(argv)
    rows: list[Row] = []
    try:
        work = [
            (launch, arch)
            for arch in arguments.arch
            for launch in collect(arch)
            if any(text in launch.name for text in arguments.kernel)
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
