"""The imports of a command, which stay as long as it runs."""

from __future__ import annotations

import atexit
import gc
import sys
from contextlib import suppress
from importlib import import_module

_OF_A_MODEL = ("transformers.modeling_utils", "transformers.models.auto.modeling_auto", "transformers.models.auto")


def import_for_good(*, model: bool) -> None:
    """Imports torch, and transformers where a model is needed, undisturbed by searches for garbage, now and later.

    Nothing of it ever is garbage, yet Python would look at its many objects again and again. In a process that has torch already
    nothing is done: it may live for more than one command.
    """
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        import_module("torch")
        with suppress(ImportError):  # whoever needs it says so
            for name in _OF_A_MODEL if model else ():
                import_module(name)
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # libraries that count their objects at the end would call these leaks
        gc.enable()
