"""Makes two slow spots of Triton's interpreter fast; tests/conftest.py turns it on."""

from __future__ import annotations

import os


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
