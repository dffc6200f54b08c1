"""What a command imports for good is not searched for garbage; a process that lives on is left alone."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from fastsae.imports import import_for_good

PROGRAM = """
import gc, sys
from fastsae.imports import import_for_good
import_for_good(model={model})
print(gc.isenabled(), gc.get_freeze_count() > 100_000, *(name in sys.modules for name in ("torch", "transformers")))
"""


@pytest.mark.parametrize("model", [True, False])
def test_a_process_of_its_own_imports_for_good(model: bool) -> None:
    command = [sys.executable, "-c", PROGRAM.format(model=model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "True", str(model)]


def test_a_process_that_has_torch_is_left_alone() -> None:
    import torch  # noqa: F401

    before = gc.get_freeze_count()
    import_for_good(model=True)
    assert (gc.get_freeze_count(), gc.isenabled()) == (before, True)
