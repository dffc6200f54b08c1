"""Everything that only a GPU can tell, in ten minutes: `python -m benchmarks.gpu RESULTS`.

Runs the GPU tests, then the headline benchmarks (encode, a step's passes, the whole step, at 65,536 to 1,048,576 features),
prints their table and leaves a result file in the folder RESULTS. Needs torch with CUDA, Triton, NumPy, safetensors, pytest and
pytest-benchmark; no network. Peers that are not installed are skipped with a reason.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

TESTS = ["tests/kernels", "-q", "-p", "no:cacheprovider"]
HEADLINES = ["benchmarks/test_whole_step.py", "benchmarks/test_train_step.py", "benchmarks/test_encode.py"]
SHAPES = "65k or x32 or 1M"
MINUTES = 10.0
TESTS_SHARE = 0.4  # of the time, at most


def run(arguments: list[str], seconds: float) -> bool:
    """Whether pytest ended well, and in time."""
    try:
        return (
            subprocess.run([sys.executable, "-m", "pytest", *arguments], timeout=seconds, check=False).returncode == 0
        )
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s: pytest {' '.join(arguments)}", file=sys.stderr)
        return False


def main() -> int:
    """Exit status: 0 all went well, 1 something failed, 2 there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder for the result file")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all of it (default: %(default)g)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: on a CPU run `pytest benchmarks/ --results FOLDER`", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    started = time.monotonic()
    tested = run(TESTS, 60 * arguments.minutes * TESTS_SHARE)
    left = 60 * arguments.minutes - (time.monotonic() - started)
    timed = run([*HEADLINES, "-q", "-k", SHAPES, "--results", str(arguments.results)], left)
    print(
        f"tests {'passed' if tested else 'FAILED'}, benchmarks {'passed' if timed else 'FAILED'}: {arguments.results}"
    )
    return 0 if tested and timed else 1


if __name__ == "__main__":
    sys.exit(main())
