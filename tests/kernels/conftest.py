"""Makes two slow spots of Triton's interpreter fast, where tests/conftest.py turned it on; memory that shows when it is read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


def _speed_up_interpreter() -> None:
    """Same results in a fifth of the time; does nothing where Triton's internals look different."""
    try:
        import numpy as np
        import triton.language as tl
        from triton.runtime.interpreter import InterpretedFunction, ReduceOps

        xor_combine, generic_reduce = tl.standard._xor_combine, ReduceOps.apply_impl
    except (ImportError, AttributeError):
        return

    def apply_impl(self, input):
        # tl.sort reduces by xor, which the interpreter does element by element in Python: seconds for one row
        if self.combine_fn is not xor_combine or self.axis is None:
            return generic_reduce(self, input)
        reduced = np.bitwise_xor.reduce(input[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(reduced, input[0].dtype)

    ReduceOps.apply_impl = apply_impl

    call = InterpretedFunction.__call__
    patched_modules: set[int] = set()

    def call_device_function(self, *args, **kwargs):
        # every call of a device function (tl.sum among them) patches all of triton.language again, 2 ms each
        module = id(self.fn.__globals__)
        if module not in patched_modules:
            patched_modules.add(module)
            return call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call_device_function


if os.environ.get("TRITON_INTERPRET") == "1":
    _speed_up_interpreter()
if "ttsem" in sys.modules:
    # it says that there is a GPU; PyTorch's builds for CPUs cannot answer this. While a graph is captured nothing waits for
    # the device, which is what a CPU can do here
    torch.cuda.is_current_stream_capturing = lambda: True


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote holds NaN, or an integer that is no index."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            if made.is_floating_point():
                return made.fill_(float("nan"))
            return made.fill_(-(2**30) if made.element_size() >= 4 else 1)

        return filled

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
