"""Compile every Triton kernel for GPUs that this machine does not have, and report what each one takes.

    python -m fastsae_kernels.report --arch 80 90 [--json PATH]

The public functions of `fastsae_kernels.gpu` run on meta tensors (shapes without data) while a recorder stands in for the
launch. So what is compiled is exactly what would be launched: same specialisation, same shipped configuration. It also
shows that the training pass never waits for the device, for a meta tensor has no value to wait for. Registers and stack
come from `cuobjdump`, matrix instructions from `nvdisasm`, both part of the Triton wheel.

Exit status: 0 clean; 1 where a kernel spills, exceeds the shared memory of its architecture or where the bf16 encode has
no matrix instruction, or where the report cannot run; 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastsae_kernels.spec import AutoencodeSpec

# shared memory that one program may take, bytes
MAX_SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# the size of a typical SAE; it matters through its divisibility alone
N_TOKENS, D_SAE = 4096, 65536
# d_in, capacity, options: every compile-time branch of the kernels is taken by one of these
CASES = (
    (2304, 128, AutoencodeSpec(bandwidth=0.05)),
    (2304, 128, AutoencodeSpec(bandwidth=0.05, k=64, penalty="tanh", ste_to_input=True)),
    (2304, 128, AutoencodeSpec(penalty="l1")),
    (1000, 256, AutoencodeSpec(bandwidth=0.05, k=128)),
)


class ReportError(Exception):
    """The report cannot run here; the message says what to do."""


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel."""

    kernel: Any
    dtype: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # arguments divisible by 16
    options: tuple[tuple[str, int], ...]

    @property
    def variant(self) -> str:
        """The compile-time flags that tell specialisations of a kernel apart."""
        hidden = {"PRECISION", "MAX_SPLITS"}
        flags = [f"{key}={value}" for key, value in self.constants if key.isupper() and key not in hidden]
        given = [key.removesuffix("_ptr") for key, value in self.constants if value is None]
        return " ".join(flags) + (f" without {','.join(given)}" if given else "")


@dataclass(frozen=True)
class Row:
    """What one compiled kernel takes."""

    arch: str
    kernel: str
    dtype: str
    variant: str
    num_warps: int
    num_stages: int
    registers: int
    stack_bytes: int  # spilled registers and local arrays, per thread
    shared_bytes: int
    hgmma: int  # matrix instructions of Hopper (HGMMA) and Blackwell (UTC*MMA)
    hmma: int  # Ampere's
    problem: str


def _specialise(name: str, value: Any) -> tuple[str, Any, bool]:
    """`(type, constant or None, divisible by 16)` of a launch argument, as Triton's launcher would decide."""
    names = {
        torch.float32: "fp32",
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.int32: "i32",
        torch.int64: "i64",
    }
    if isinstance(value, torch.Tensor):
        return "*" + names[value.dtype], None, True
    if isinstance(value, bool) or value is None:
        return "constexpr", value, False
    if isinstance(value, int):
        if value == 1:
            return "constexpr", 1, False
        return "i32" if value < 2**31 else "i64", None, value % 16 == 0
    if isinstance(value, float):
        return "fp32", None, False
    raise TypeError(f"{name}: expected a tensor or a number, got {type(value).__name__}")


@contextmanager
def _recorded(dtype: str, launches: dict[tuple, Launch]) -> Iterator[None]:
    """Inside, a launch of any Triton kernel adds its specialisation to `launches` and does nothing else."""
    from triton.runtime.jit import JITFunction

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        signature, constants, aligned, options = [], [], [], []
        for parameter in self.params:
            value = kwargs.pop(parameter.name)
            if parameter.is_constexpr:
                kind, constant, divisible = "constexpr", value, False
            else:
                kind, constant, divisible = _specialise(parameter.name, value)
                if parameter.do_not_specialize:
                    divisible = False
            signature.append((parameter.name, kind))
            if kind == "constexpr":
                constants.append((parameter.name, constant))
            elif divisible:
                aligned.append(parameter.num)
        options = sorted(kwargs.items())
        launch = Launch(self, dtype, tuple(signature), tuple(constants), tuple(aligned), tuple(options))
        launches.setdefault((self.__name__, launch.signature, launch.constants, launch.aligned, launch.options), launch)

    original = JITFunction.run
    JITFunction.run = record
    try:
        yield
    finally:
        JITFunction.run = original


def _run_everything(dtype: torch.dtype) -> None:
    """Launch each kernel in each of its variants, on shapes without data."""
    from fastsae_kernels import gpu

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    threshold, scale = empty(D_SAE, kind=torch.float32), empty(D_SAE, kind=torch.float32)
    grad_penalty = empty(N_TOKENS, kind=torch.float32)
    for d_in, capacity, spec in CASES:
        x, W_enc, W_dec = empty(N_TOKENS, d_in), empty(D_SAE, d_in).t(), empty(D_SAE, d_in)
        output, saved = gpu.autoencode_forward(
            x, W_enc, empty(D_SAE), threshold, W_dec, empty(d_in), None if spec.penalty == "l0" else scale, spec, capacity
        )  # fmt: skip
        gpu.autoencode_backward(saved, output.sae_out, grad_penalty, needs_x=True)
    gpu.decode(saved.acts, W_dec)
    gpu.decode_backward(saved.acts, W_dec, output.sae_out)


def collect(arch: int) -> list[Launch]:
    """Every specialisation that the training pass launches on `arch`, bf16 and fp32, once each.

    Raises:
        ReportError: Triton is missing, or runs as an interpreter in this process.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ReportError("TRITON_INTERPRET=1 is set: kernels are interpreted and cannot be compiled; unset it")
    try:
        import triton  # noqa: F401
    except ImportError:
        raise ReportError("Triton is not installed, so there are no kernels to compile: pip install triton") from None
    from fastsae_kernels.gpu import config

    launches: dict[tuple, Launch] = {}
    with config.override(f"sm_{arch}"):
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            with _recorded(name, launches):
                _run_everything(dtype)
    return sorted(launches.values(), key=lambda launch: (launch.kernel.__name__, launch.dtype, launch.variant))


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


def compile_launch(launch: Launch, arch: int) -> Row:
    """Compile one specialisation for `arch` and read its cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(number,): [["tt.divisibility", 16]] for number in launch.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _call(_tool("cuobjdump"), "--dump-resource-usage", str(cubin))
        assembly = _call(_tool("nvdisasm"), "-c", str(cubin))
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    stack = resources["STACK"] + resources["LOCAL"]
    shared, name = compiled.metadata.shared, launch.kernel.__name__.strip("_")
    hgmma, hmma = len(re.findall(r"\b(?:HGMMA|UTC\w*MMA)\b", assembly)), len(re.findall(r"\bHMMA\b", assembly))
    problems = []
    if stack > 0:
        problems.append("spills")
    if shared > MAX_SHARED.get(arch, MAX_SHARED[90]):
        problems.append("too much shared memory")
    if name == "encode_kernel" and launch.dtype == "bf16" and hgmma + hmma == 0:
        problems.append("no matrix instruction")
    return Row(
        arch=f"sm_{arch}",
        kernel=name,
        dtype=launch.dtype,
        variant=launch.variant,
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        registers=resources["REG"],
        stack_bytes=stack,
        shared_bytes=shared,
        hgmma=hgmma,
        hmma=hmma,
        problem=", ".join(problems),
    )


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    head = ("arch", "kernel", "dtype", "warps", "regs", "stack B", "smem KiB", "HGMMA", "HMMA", "problem", "variant")
    body = [
        (row.arch, row.kernel, row.dtype, row.num_warps, row.registers, row.stack_bytes, f"{row.shared_bytes / 1024:.1f}",
         row.hgmma, row.hmma, row.problem or "-", row.variant)
        for row in rows
    ]  # fmt: skip
    lines = [tuple(map(str, line)) for line in (head, *body)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    return "\n".join(
        "  ".join((*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[-1])) for line in lines
    )


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastsae_kernels.report", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=sorted(MAX_SHARED), metavar="N",
                        help="compute capabilities, such as 80 (A100) or 90 (H100, H200)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there too")
    arguments = parser.parse_args(argv)
    try:
        launches = [(launch, arch) for arch in arguments.arch for launch in collect(arch)]
        rows: list[Row] = []
        for launch, arch in launches:
            if sys.stderr.isatty():
                sys.stderr.write(f"\rcompiling {len(rows) + 1} of {len(launches)} ")
            rows.append(compile_launch(launch, arch))
    except ReportError as error:
        sys.stderr.write(f"report: {error}\n")
        return 1
    sys.stdout.write(table(rows) + "\n")
    bad = [row for row in rows if row.problem]
    sys.stdout.write(f"{len(rows)} kernels compiled, {len(bad)} with a problem\n")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
