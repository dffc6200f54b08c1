"""Forward and backward of a JumpReLU training step, and the backward alone: fused ops against dense PyTorch, eager, compiled.

A provider is timed once every gradient's error against fp64 is at most twice that of the dense eager step in the same
dtype (in norm, over the tokens none of whose gates hangs on rounding).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

import fastsae_kernels as kernels
from benchmarks.baselines import (
    L0_COEFFICIENT,
    SPEC,
    Loss,
    Parameters,
    checked,
    clear_tokens,
    compiled,
    dense_loss,
    gradients,
    in_bf16,
    in_fp64,
    in_tf32,
    relative_errors,
    worst,
)
from benchmarks.floor import step_work
from benchmarks.harness import Call, Case, Prepared, Provider, cases_and_providers
from benchmarks.shapes import DEVICE, EARLY_SHAPES, SHAPES, Shape, parameters, tokens, too_large

BACKWARD_AT = ("gemma-2-2b 65k",) if DEVICE == "cuda" else ("demo",)
ALL_AT = ("gemma-2-2b 65k", "llama-3.1-8b x32") if DEVICE == "cuda" else ("demo",)
FLOOR = 2e-6  # of a relative error: sums over 4,096 tokens in another order


def fused_loss(x: Tensor, p: Parameters, hint: kernels.ActivityHint | None = None) -> Tensor:
    output = kernels.autoencode(x, *p.values(), spec=SPEC, target=x, hint=hint)
    assert output.squared_error is not None
    return output.squared_error.mean() + L0_COEFFICIENT * output.penalty.mean()


def hinted_loss() -> Loss:
    """As a module has it, which knows from its earlier passes how many features are active."""
    return partial(fused_loss, hint=kernels.ActivityHint())


def tiled_loss(x: Tensor, p: Parameters) -> Tensor:
    with kernels.use_backend("dense"):
        return fused_loss(x, p)


Losses = dict[str, Callable[[], Loss]]
DENSE: Losses = {
    "dense eager fp32": lambda: dense_loss,
    "dense compiled fp32": lambda: compiled(dense_loss),
    "dense eager bf16": lambda: in_bf16(dense_loss),
    "dense compiled bf16": lambda: compiled(in_bf16(dense_loss)),
}
if DEVICE == "cuda":
    DENSE["dense eager tf32"] = lambda: in_tf32(dense_loss)
    DENSE["dense compiled tf32"] = lambda: in_tf32(compiled(dense_loss))
FUSED: Losses = {"fused fp32": hinted_loss, "fused bf16": lambda: in_bf16(hinted_loss())}
TILES: Losses = {"dense in tiles fp32": lambda: tiled_loss}
LOSSES = DENSE | FUSED | TILES
COSTLY = ("dense eager bf16", *TILES)


@lru_cache(1)  # the next shape's would not fit beside it
def exact_gradients(shape: Shape) -> tuple[dict[str, Tensor], Tensor]:
    """In fp64, over the tokens that count, and which these are."""
    x, p = in_fp64(shape)
    clear = clear_tokens(x, p, "jumprelu", 0)
    return gradients(dense_loss, x[clear], p), clear


@lru_cache(2)
def eager_errors(shape: Shape, dtype: str) -> dict[str, float]:
    return errors_of({"fp32": dense_loss, "tf32": in_tf32(dense_loss), "bf16": in_bf16(dense_loss)}[dtype], shape)


def errors_of(loss: Loss, shape: Shape) -> dict[str, float]:
    exact, clear = exact_gradients(shape)
    return relative_errors(gradients(loss, tokens(shape)[clear], parameters(shape)), exact)


def check(name: str, shape: Shape, dtype: str) -> tuple[float, float]:
    """The worst gradient's error, and twice that of the dense eager step in the same dtype."""
    part, loss = checked(shape), LOSSES[name]()
    if DEVICE == "cuda":  # or its first pass would be dense, which is not what is timed
        loss(tokens(part), parameters(part))
        torch.cuda.synchronize()
    limits = {name: 2 * error + FLOOR for name, error in eager_errors(part, dtype).items()}
    return worst(errors_of(loss, part), limits)


@lru_cache(1)
def operands(shape: Shape) -> tuple[Tensor, Parameters]:
    return tokens(shape), parameters(shape)


def make(name: str, shape: Shape) -> Call:
    return partial(gradients, LOSSES[name](), *operands(shape))


def make_backward(name: str, shape: Shape) -> Call:
    loss, (x, p) = LOSSES[name](), operands(shape)
    return Prepared(lambda: loss(x, p), lambda of_step: torch.autograd.grad(of_step, list(p.values())))


def provider(name: str, shape: Shape, make: Callable[[str, Shape], Call] = make) -> Provider:
    dtype = name.rsplit(" ", 1)[1]
    gate, too_large_here = partial(check, name, shape, dtype), partial(too_large, name, shape)
    return Provider(partial(make, name, shape), gate, dtype, too_large_here)


def case(shape_name: str, shape: Shape, names: Losses) -> Case:
    providers = {name: provider(name, shape) for name in names}
    return Case("forward+backward", shape_name, shape, providers, work=partial(step_work, shape))


def backward_case(shape_name: str) -> Case:
    """Without the forward; no floor: what is dense in a step is done there."""
    shape, names = SHAPES[shape_name], [name for name in LOSSES if name not in COSTLY]
    return Case("backward", shape_name, shape, {name: provider(name, shape, make_backward) for name in names})


def chosen(shape_name: str, shape: Shape) -> Losses:
    """All providers at some shapes; at a CPU's cuts the baseline, the fastest rival, which is compiled bf16, and ours."""
    left_out = () if shape_name in ALL_AT else COSTLY
    left_out += ("dense compiled fp32",) if shape.is_cut and shape_name not in EARLY_SHAPES else ()
    return {name: loss for name, loss in LOSSES.items() if name not in left_out}


def cases() -> list[Case]:
    """A shape's backward comes beside its whole pass, whose truth in fp64 it shares."""
    found = []
    shapes = SHAPES if DEVICE == "cuda" else {**SHAPES, **EARLY_SHAPES}
    for name, shape in shapes.items():
        if name == "pythia-70m" and DEVICE == "cpu":  # whose TopK step is timed, with the peers
            continue
        found.append(case(name, shape, chosen(name, shape)))
        found += [backward_case(name)] if name in BACKWARD_AT else []
    return found


@cases_and_providers(cases())
def test_forward_backward(timed, case: Case, provider: str) -> None:  # type: ignore[no-untyped-def]
    timed(case, provider)
