"""No terminal, pipe or missing stream ends a command: each is a process of its own here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
PRINT = (
    "from fastsae.terminal import tolerant_output\nwith tolerant_output():\n    print('run\\xe9 \\udcff', flush=True)"
)
FLOOD = (
    "import sys\nfrom fastsae.terminal import tolerant_output\nwith tolerant_output():\n"
    "    for i in range(10_000): print('a line that nobody reads', i)\n    print('done', file=sys.stderr)"
)


def start(command: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, **ASCII}
    return subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, check=False, **options
    )


def test_letters_that_an_ascii_terminal_lacks_are_escaped() -> None:
    done = start(f'"$PYTHON" -c "{PRINT}"')
    assert (done.returncode, done.stdout, done.stderr) == (0, "run\\xe9 \\udcff\n", "")


def test_a_reader_that_leaves_ends_nothing() -> None:
    done = start(f'"$PYTHON" -c "{FLOOD}" | head -n 1; echo "${{PIPESTATUS[0]}}"')
    assert done.stdout.splitlines()[1:] == ["0"]
    assert done.stderr == "done\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_closed_streams_end_nothing(closed: str) -> None:
    done = start(f'"$PYTHON" -c "{PRINT}" {closed}')
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", ["--help", "train --help", "--version"])
def test_help_does_not_import_torch_and_survives_head(arguments: str) -> None:
    program = f"import sys, fastsae.cli\ntry: fastsae.cli.main('{arguments}'.split())\nfinally: assert 'torch' not in sys.modules"
    done = start(f'"$PYTHON" -c "{program}" | head -n 1; echo "${{PIPESTATUS[0]}}"')
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""
