"""Every kernel launch that the library makes, recorded without a device; what `report` compiles.

The public functions of `fastsae_kernels.gpu` run on meta tensors (shapes without data) while a recorder stands in for the
launch. So what is recorded is exactly what would be launched: same specialisation, same shipped configuration. It also
shows that no pass waits for the device, for a meta tensor has no value to wait for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsae_kernels.types import AutoencodeNeeds, AutoencodeSpec, Capacity, OutputGrads, PassInputs

# the size of a typical SAE; it matters through its divisibility alone
N_TOKENS, D_IN, D_SAE = 4096, 2304, 65536
UNEVEN_D_IN = 1000  # no tile divides it
LONGEST_ROW = 8192  # a whole row in one program's registers
# d_in, capacity, options: every compile-time branch of the training kernels is taken by one of these
CASES = (
    (D_IN, 128, AutoencodeSpec(bandwidth=0.05)),
    (D_IN, 128, AutoencodeSpec(bandwidth=0.05, k=64, penalty="tanh", ste_to_input=True)),
    (D_IN, 128, AutoencodeSpec(penalty="l1")),
    (D_IN, 128, AutoencodeSpec(k=300)),
    (D_IN, 128, AutoencodeSpec(k=64, batch_topk=True)),
    (UNEVEN_D_IN, 128, AutoencodeSpec(k=64, batch_topk=True)),
    (UNEVEN_D_IN, 256, AutoencodeSpec(bandwidth=0.05, k=128)),
    (D_IN, 2048, AutoencodeSpec(penalty="l1", k=1024)),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}


class ReportError(Exception):
    """The report cannot run here; the message says what to do."""


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel."""

    kernel: Any
    dtype: str
    signature: tuple[tuple[str, Any], ...]  # type of each argument, of a named tuple a named tuple of types
    constants: tuple[tuple[str, Any], ...]  # "argument" or "argument.field"
    aligned: tuple[str, ...]  # arguments and fields divisible by 16
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """The kernel's name without the underscore."""
        return self.kernel.__name__.strip("_")

    @property
    def variant(self) -> str:
        """The compile-time flags that tell specialisations of a kernel apart."""
        flags = [f"{key}={value}" for key, value in self.constants if key.isupper()]
        missing = [key.removesuffix("_ptr").split(".")[-1] for key, value in self.constants if value is None]
        return " ".join(flags) + (f" without {','.join(missing)}" if missing else "")

    def path(self, name: str) -> tuple[int, ...]:
        """Where an argument, or the field of one, stands among the arguments."""
        argument, _, field = name.partition(".")
        number = [known for known, _ in self.signature].index(argument)
        return (number, self.signature[number][1]._fields.index(field)) if field else (number,)

    @property
    def wants_matrix_instructions(self) -> bool:
        """Whether it multiplies tiles of operands that a matrix unit takes, which have 16 bits."""
        return self.dtype != "fp32" and {"BLOCK_S", "BLOCK_D"} <= dict(self.constants).keys()


def _specialise(name: str, value: Any) -> tuple[str, Any, bool]:
    """`(type, constant or None, divisible by 16)` of a launch argument, as Triton's launcher would decide."""
    if isinstance(value, Tensor):
        return "*" + NAMES[value.dtype], None, True
    if type(value).__name__ == "TensorDescriptor":
        return f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>", None, False
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
        signature, constants, aligned = [], [], []

        def kind_of(name: str, value: Any, is_constexpr: bool, specialise: bool) -> str:
            kind, constant, divisible = ("constexpr", value, False) if is_constexpr else _specialise(name, value)
            if not specialise:
                kind, divisible = "i32" if constant == 1 else kind, False
            if kind == "constexpr":
                constants.append((name, constant))
            elif divisible:
                aligned.append(name)
            return kind

        for parameter in self.params:
            name, value = parameter.name, kwargs.pop(parameter.name, parameter.default)
            if isinstance(value, tuple):
                fields = value._asdict().items()  # type: ignore[attr-defined]
                kinds: Any = type(value)(*(kind_of(f"{name}.{field}", item, False, True) for field, item in fields))
            else:
                kinds = kind_of(name, value, parameter.is_constexpr, not parameter.do_not_specialize)
            signature.append((name, kinds))
        options = sorted(kwargs.items())
        launch = Launch(self, dtype, tuple(signature), tuple(constants), tuple(aligned), tuple(options))
        launches.setdefault((self.__name__, launch.signature, launch.constants, launch.aligned, launch.options), launch)

    original = JITFunction.run
    JITFunction.run = record
    try:
        yield
    finally:
        JITFunction.run = original


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _operands(n_tokens: int, d_in: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(x, W_enc, b_enc, threshold)`."""
    W_enc = _empty(D_SAE, d_in, dtype=dtype).t()
    return _empty(n_tokens, d_in, dtype=dtype), W_enc, _empty(D_SAE, dtype=dtype), _empty(D_SAE)


def _train(dtype: torch.dtype) -> None:
    """Launch what a training pass and the sparse ops do, in each of their variants."""
    from fastsae_kernels import gpu

    for d_in, capacity, spec in CASES:
        x, W_enc, b_enc, threshold = _operands(N_TOKENS, d_in, dtype)
        W_dec, b_dec = _empty(D_SAE, d_in, dtype=dtype), _empty(d_in, dtype=dtype)
        scale = None if spec.penalty == "l0" else _empty(D_SAE)
        for target, row_scale in ((None, None), (x, _empty(N_TOKENS))):
            inputs = PassInputs(x, W_enc, b_enc, threshold, W_dec, b_dec, scale, target)
            output, kept = gpu.forward(inputs, spec, Capacity(capacity, capacity))
            grads = OutputGrads(output.sae_out, row_scale, _empty(N_TOKENS))
            gpu.backward(inputs, kept, spec, grads, AutoencodeNeeds())
    assert kept.acts is not None
    gpu.decode(kept.acts, W_dec)
    gpu.decode_backward(kept.acts, W_dec, output.sae_out)


def _gate_tiles(dtype: torch.dtype) -> None:
    """Launch what gates a tile of the dense backend, for each penalty."""
    from fastsae_kernels.gates import Features
    from fastsae_kernels.gpu import gates

    tile, features, tokens = _empty(2048, N_TOKENS, dtype=dtype), _empty(2048), _empty(N_TOKENS)
    W_dec, grad_out = _empty(2048, D_IN, dtype=dtype), _empty(N_TOKENS, D_IN, dtype=dtype)
    for scale, spec in (
        (None, AutoencodeSpec(bandwidth=0.05)),
        (None, AutoencodeSpec()),
        (features, AutoencodeSpec(penalty="l1")),
        (features, AutoencodeSpec(bandwidth=0.05, penalty="tanh", ste_to_input=True)),
    ):
        for b_enc in (features, features.to(dtype)):  # under autocast biases stay in fp32
            of_tile = Features(b_enc, features, scale)
            gates.gate_tile(tile, of_tile, spec, dtype, False)
            gates.gate_tile_backward(tile, W_dec, grad_out, tokens, of_tile, spec, False)


def _backward(dtype: torch.dtype) -> None:
    """Launch the fused backward, with and without long ones and all that is optional."""
    from fastsae_kernels.gpu.feature_sums import FeatureOrder
    from fastsae_kernels.gpu.gradients import feature_gradients

    nnz = N_TOKENS * 128
    offsets, entries = _empty(D_SAE + 1, dtype=torch.int64), _empty(nnz, dtype=torch.int64)
    for d_in, d_out, n_tokens, tokens in (
        (D_IN, D_IN, N_TOKENS, None),
        (UNEVEN_D_IN, D_IN, N_TOKENS, entries),
        (UNEVEN_D_IN, UNEVEN_D_IN, 128, None),
        (LONGEST_ROW - 1, LONGEST_ROW - 1, N_TOKENS, None),
        (LONGEST_ROW, LONGEST_ROW, N_TOKENS, entries),
        (2 * LONGEST_ROW, 2 * LONGEST_ROW, N_TOKENS, None),
    ):
        operands, grad_out = _operands(n_tokens, d_in, dtype), _empty(n_tokens, d_out, dtype=dtype)
        W_dec, b_dec = _empty(D_SAE, d_out, dtype=dtype), _empty(d_out, dtype=dtype)
        rows, features = _empty(n_tokens), _empty(D_SAE)
        by_feature = FeatureOrder(offsets, entries, tokens, 128)
        for scale, row_scale, spec, with_weights in (
            (None, rows, AutoencodeSpec(bandwidth=0.05), True),
            (features, None, AutoencodeSpec(penalty="l1"), True),
            (features, rows, AutoencodeSpec(bandwidth=0.05, penalty="tanh", ste_to_input=True), True),
            (None, rows, AutoencodeSpec(k=64), False),
            (None, rows, AutoencodeSpec(bandwidth=0.05), False),
        ):
            inputs, grads = PassInputs(*operands, W_dec, b_dec, scale), OutputGrads(grad_out, row_scale, rows)
            feature_gradients(by_feature, _empty(nnz), inputs, spec, grads, with_weights=with_weights)


def _update(dtype: torch.dtype) -> None:
    """Launch the update of encoder and decoder rows with and without all that is optional."""
    from fastsae_kernels.gpu.adam import adam_rows, grad_norms
    from fastsae_kernels.gpu.feature_sums import FeatureOrder
    from fastsae_kernels.gpu.weight_gradients import RowSums, clear_where

    flag = _empty(1, dtype=torch.int32)
    clear_where(flag, _empty(D_SAE * 2 * D_IN, dtype=dtype))
    entries, weights = _empty(N_TOKENS * 128, dtype=torch.int64), _empty(N_TOKENS * 128)
    offsets, last_step = _empty(D_SAE + 1, dtype=torch.int64), _empty(D_SAE, dtype=torch.int32)
    hyper: dict[str, Any] = {"lr": 1e-3, "beta2": 0.999, "eps": 1e-8, "step": 2}
    decoder = {"project": True, "unit_norm": True}
    for d_in, tokens in ((UNEVEN_D_IN, entries), (D_IN, None), (LONGEST_ROW - 1, None), (LONGEST_ROW, entries)):
        vectors, rows = _empty(N_TOKENS, d_in, dtype=dtype), _empty(D_SAE, d_in)
        narrow = _empty(D_SAE, d_in, dtype=torch.bfloat16)
        by_feature = FeatureOrder(offsets, entries, tokens, 128)
        everything: dict[str, Any] = {"scale": weights[0], "copy": narrow, **decoder}
        plain = RowSums(by_feature, weights, vectors, None)
        summed = plain._replace(extra=rows)
        flagged = plain._replace(extra=_empty(D_SAE, d_in, dtype=dtype), extra_flag=flag)
        for sums, m, v, options in (
            (plain, rows, rows, hyper),
            (summed, rows, rows, hyper | everything),
            (flagged, rows, rows, hyper | everything),
            (flagged, narrow, narrow, hyper | everything),
            (plain, None, rows, hyper | decoder | {"last_step": last_step}),
            (summed, None, rows, hyper | everything | {"last_step": last_step}),
            (flagged, None, rows, hyper | everything | {"last_step": last_step}),
        ):
            adam_rows(sums, rows, m, v, beta1=0.0 if m is None else 0.9, **options)
        grad_norms(plain, rows)
        grad_norms(summed, rows, project=True)
        grad_norms(flagged, rows, project=True)


def _list(dtype: torch.dtype, d_in: int, with_bounds: bool) -> None:
    """Launch every kernel that can list entries with each of its tiles."""
    from fastsae_kernels.gpu.choice import KERNELS
    from fastsae_kernels.gpu.listing import Listing
    from fastsae_kernels.gpu.tune import candidates

    operands = _operands(N_TOKENS, d_in, dtype)
    integers, entries = _empty(N_TOKENS, dtype=torch.int32), _empty(N_TOKENS * 128, dtype=torch.int64)
    bounds = _empty(N_TOKENS) if with_bounds else None
    for choice in candidates(*operands[:2]):
        KERNELS[choice.kernel].launch(
            Listing(*operands, integers, integers, entries, 0.0, bounds, 0), choice.config
        )  # fmt: skip


def _list_everything(dtype: torch.dtype) -> None:
    """Launch every tile of the launch table that lists entries. fp16 compiles as bf16 does: one shape shows it."""
    if dtype == torch.float16:
        _list(dtype, D_IN, True)
        return
    for d_in in (D_IN, UNEVEN_D_IN):
        for with_bounds in (False, True):
            _list(dtype, d_in, with_bounds)


def _forget_line_numbers() -> None:
    """Let a kernel that has only moved in its file come out of Triton's cache, whose keys count the line it begins at."""
    from triton.runtime.jit import JITFunction

    for name, module in sys.modules.items():
        if name.startswith("fastsae_kernels.gpu."):
            for function in vars(module).values():
                if isinstance(function, JITFunction):
                    function.starting_line_number = 1


def collect(arch: str) -> list[Launch]:
    """Every specialisation that the library launches on `arch` ("sm_90", "gfx942"), once each.

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
    with config.override(arch):
        for name, dtype in DTYPES.items():
            with _recorded(name, launches):
                _list_everything(dtype)
                if name != "fp16":
                    _train(dtype)
                    _gate_tiles(dtype)
                    _backward(dtype)
                    _update(dtype)
    _forget_line_numbers()
    return sorted(launches.values(), key=lambda launch: (launch.name, launch.dtype, launch.variant))
