"""Everything that only a GPU can tell, in ten minutes: `python -m benchmarks.gpu RESULTS`.

Runs the GPU tests, then the headline benchmarks, the most telling first: the whole step, encode and a step's passes at
65,536, 131,072 and 1,048,576 features. Prints a table of both at the end and leaves in the folder RESULTS

    <gpu>_<date>_<commit>.json    what was measured, for `python -m benchmarks.report`; written anew after each benchmark
    logs/                         all that pytest said, a file for each process

Tests run in several processes, for most of their time goes into compiling kernels, which a process does one by one. Each part
has a process of its own, so that a kernel that hangs or breaks the CUDA context costs that part alone. What did not fit into
the time, and where it was stopped, is said at the end.

Needs torch with CUDA, Triton and the C compiler that it calls, NumPy, safetensors, pytest and pytest-benchmark; no network,
no installation, no git. Peers that are not installed are skipped with a reason.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.result import ROOT, all_in, commit_of

MINUTES = 10.0
TESTS_SHARE = 0.4  # of the time, at most
HANG_S = 60.0  # what a part may take beside half of the time that is left
GROUP_S = 45.0  # about as long as a group of benchmarks takes: none begins later before the end
LAST_WORDS_S = 10.0  # for what failed so far, when a process is stopped
NEEDED = {"triton": "triton", "numpy": "numpy", "safetensors": "safetensors", "pytest": "pytest",
          "pytest_benchmark": "pytest-benchmark"}  # fmt: skip
# what compiles most comes first, or at the end all others would wait for it, and in halves; of some files, the few tests that
# use the GPU
KERNEL_TESTS = (
    "gpu_residual gpu_autoencode gpu_graphs gpu_backward gpu_gates gpu_adam gpu_encode gpu_overflow gpu_ops "
    "gpu_weight_gradients gpu_choice gpu_ranges rank_scale tune"
)
TESTS = {
    "tests/kernels/test_gpu_topk.py": ("batch", "not batch"),
    **{f"tests/kernels/test_{name}.py": ("",) for name in KERNEL_TESTS.split()},
    "tests/optim/test_fused_adam.py": ("triton",),
    "tests/optim/test_pending_gradients.py": ("kernels",),
    "tests/kernels/test_residual.py": ("triton",),
    "tests/kernels/test_graph.py": ("triton",),
    "tests/kernels/test_autocast.py": ("triton",),
    "tests/sae/test_topk.py": ("triton",),
    "tests/sae/test_token_gradients.py": ("kernels",),
    "tests/train/test_deterministic.py": ("triton",),
    "tests/train/test_host_reads.py": ("gpu",),
}
FOLDER = "benchmarks"
GEMMA, LLAMA, MILLION = "gemma-2-2b and 65k", "llama and x32", "1M"
BENCHMARKS = (  # which are chosen, the most telling first
    f"whole_step and {GEMMA}",
    f"(encode or forward_backward) and {GEMMA}",
    f"whole_step and {LLAMA}",
    f"whole_step and {MILLION}",
    f"(encode or forward_backward) and {LLAMA}",
    f"forward_backward and {MILLION}",
)
OUTCOME = re.compile(r"^(\S+\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
BEGUN = re.compile(r"^(\S+\.py::.+?)(?: PASSED\b| FAILED\b| ERROR\b| SKIPPED\b|$)", re.MULTILINE)
REASON = re.compile(r"^(?:FAILED|ERROR) .+", re.MULTILINE)


def environment() -> dict[str, str]:
    """The variables under which a part runs."""
    return {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it cuBLAS refuses to multiply in deterministic mode
        **os.environ,
        "PYTHONUNBUFFERED": "1",  # reasons at once,
        "COLUMNS": "250",  # and in full
        "PYTEST_XDIST_AUTO_NUM_WORKERS": "0",  # a part is one of several processes
    }


@dataclass
class Part:
    """One pytest process, and what became of it."""

    name: str
    arguments: tuple[str, ...]
    log: Path
    status: int | None = None  # of pytest; None where it did not begin
    seconds: float = 0.0
    is_stopped: bool = False

    def run(self, seconds: float) -> None:
        """Runs it; after so many seconds asks it to end, then kills it."""
        if seconds < 1:
            return
        started = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *self.arguments]
        with self.log.open("w") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT)
            for wait, stop in ((seconds, partial(process.send_signal, signal.SIGINT)), (LAST_WORDS_S, process.kill)):
                try:
                    process.wait(wait)
                except subprocess.TimeoutExpired:  # at last, it hangs in a kernel
                    self.is_stopped = True
                    stop()
            self.status = process.wait()
        self.seconds = time.monotonic() - started

    @property
    def is_good(self) -> bool:
        """Whether all ran and passed."""
        return self.status == 0 and not self.is_stopped

    def described(self) -> list[str]:
        """Returns one line, and one for each failure."""
        if self.status is None:
            return [f"{self.name}: not begun, no time left"]
        text = self.log.read_text(errors="replace")
        outcomes = dict(OUTCOME.findall(text))
        counts = sorted(Counter(outcomes.values()).items())
        counted = ", ".join(f"{n} {outcome.lower()}" for outcome, n in counts) or "nothing ran"
        ended = "" if self.status in (0, 1) else f", exit status {self.status}: see {self.log}"
        if self.is_stopped:
            unfinished = [name.strip() for name in BEGUN.findall(text) if name.strip() not in outcomes]
            ended = f", STOPPED in {unfinished[-1]}" if unfinished else ", STOPPED"
        failed = [f"{outcome} {test}" for test, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
        lines = [f"{self.name}: {counted}, {self.seconds:.0f} s{ended}"]
        return lines + [f"    {reason}" for reason in REASON.findall(text) or failed]


def missing() -> str:
    """What has to be put right before anything can run; empty where nothing has."""
    if not torch.cuda.is_available():
        return "no CUDA device: on a CPU run `pytest benchmarks/ --results FOLDER`"
    packages = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if packages:
        return f"not installed: {', '.join(packages)}; run `pip install {' '.join(packages)}`"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return "no C compiler, which Triton calls: install gcc, or name one in the environment variable CC"
    return ""


def describe_machine(commit: str) -> None:
    """Says what runs here, and what may be in the way."""
    gpu = torch.cuda.get_device_properties(0)
    memory = f"compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    print(f"{gpu.name}, {memory}; torch {torch.__version__}, CUDA {torch.version.cuda}, commit {commit}", flush=True)
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        print("Python.h is missing: Triton may fail to build its launcher (Debian: python3-dev)", flush=True)


def run_tests(logs: Path, deadline: float) -> list[Part]:
    """A process for each choice, as many at a time as there are cores: on one, 780 variants of kernels take ten minutes."""
    options = ("-o", "faulthandler_timeout=60", "--durations=10", "--tb=short")  # a test that hangs says where
    parts = [
        Part(f"{file} {chosen}".strip(), (file, *options, "-k", chosen), logs / f"{Path(file).stem}_{number}.log")
        for file, choices in TESTS.items()
        for number, chosen in enumerate(choices)
    ]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as pool:
        list(pool.map(lambda part: part.run(deadline - time.monotonic()), parts))
    return parts


def run_benchmarks(logs: Path, results: Path, commit: str, deadline: float) -> list[Part]:
    """One process after the other."""
    parts = []
    for number, chosen in enumerate(BENCHMARKS):
        left = deadline - time.monotonic()
        seconds = min(left, HANG_S + left / 2)
        options = ("--benchmark-quiet", "--results", str(results), "--commit", commit)
        limit = ("--minutes", f"{max(seconds - GROUP_S, GROUP_S / 2) / 60:.2f}")
        part = Part(
            f"benchmarks, {chosen}", (FOLDER, "-k", chosen, *options, *limit), logs / f"benchmarks_{number}.log"
        )
        part.run(seconds if left > GROUP_S / 2 else 0)
        parts.append(part)
        print("\n".join(part.described()), flush=True)
    return parts


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 all went well, 1 something failed or was stopped, 2 it cannot run here."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="folder for the result file and the logs")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all of it (default: %(default)g)")
    parser.add_argument("--commit", help="what is measured, where the copy has no .git (default: of the git checkout)")
    parser.add_argument("--only", choices=["tests", "benchmarks"], help="spend the time on one of the two")
    arguments = parser.parse_args(argv)
    reason = missing()
    if reason:
        print(reason, file=sys.stderr)
        return 2
    started, results = time.monotonic(), arguments.results.resolve()
    deadline, commit = started + 60 * arguments.minutes - LAST_WORDS_S, arguments.commit or commit_of()
    logs = results / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / ".gitignore").write_text("*\n")
    describe_machine(commit)
    parts: list[Part] = []
    if arguments.only != "benchmarks":
        share = 1.0 if arguments.only == "tests" else TESTS_SHARE
        parts += run_tests(logs, started + (deadline - started) * share)
        print("\n".join(text for part in parts for text in part.described()), flush=True)
    if arguments.only != "tests":
        parts += run_benchmarks(logs, results, commit, deadline)
        measured = max(all_in(results), key=lambda result: result.finished, default=None)
        print("\n".join(row.line() for row in measured.rows) if measured else "nothing was measured")
    failed = [part for part in parts if not part.is_good]
    for part in failed:
        print(part.described()[0])
    print(f"{len(parts) - len(failed)} of {len(parts)} parts went well, {time.monotonic() - started:.0f} s: {results}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
