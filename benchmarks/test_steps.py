"""A JumpReLU training step, ours against dense PyTorch: forward and backward, the whole step, the optimiser, scaling.

A pass is timed once the error of every gradient against fp64 is at most twice that of the dense eager pass in the same dtype (in
norm, over the tokens none of whose features is active or not by rounding); a step once the same holds for what it adds to the
parameters. (A second step would meet features that are active by rounding; tests compare 200 steps.)
"""

from __future__ import annotations

import copy
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
)  # fmt: skip
from benchmarks.floor import step_work
from benchmarks.harness import Call, Case, Provider, cases_and_providers
from benchmarks.shapes import DEVICE, EARLY_SHAPES, HEADLINE, SHAPES, Shape, parameters, tokens, too_large
from benchmarks.steps import MAX_GRAD_NORM, Step, fused_step, make_sae, plain_step
from fastsae import FusedJumpReLUSAE, FusedSAEAdam

LR = 1e-4
SUM_ROUNDING = 2e-6  # a relative error this large comes from adding 4,096 tokens in another order
# the changes of the parameters may differ by this share: Adam's first step is the gradient's sign, however small that is
SIGN_ROUNDING = 1e-3


def fused_loss(x: Tensor, p: Parameters, hint: kernels.ActivityHint | None = None) -> Tensor:
    output = kernels.autoencode(x, *p.values(), spec=SPEC, target=x, hint=hint)
    assert output.squared_error is not None
    return output.squared_error.mean() + L0_COEFFICIENT * output.penalty.mean()


def hinted_loss() -> Loss:
    """Returns the loss as a module has it, which knows from its earlier passes how many features are active."""
    return partial(fused_loss, hint=kernels.ActivityHint())


def tiled_loss(x: Tensor, p: Parameters) -> Tensor:
    with kernels.use_backend("dense"):
        return fused_loss(x, p)


DENSE: dict[str, Callable[[], Loss]] = {
    "dense eager fp32": lambda: dense_loss,
    "dense compiled fp32": lambda: compiled(dense_loss),
    "dense eager bf16": lambda: in_bf16(dense_loss),
    "dense compiled bf16": lambda: compiled(in_bf16(dense_loss)),
}
if DEVICE == "cuda":
    DENSE["dense eager tf32"] = lambda: in_tf32(dense_loss)
    DENSE["dense compiled tf32"] = lambda: in_tf32(compiled(dense_loss))
LOSSES = DENSE | {
    "fused fp32": hinted_loss,
    "fused bf16": lambda: in_bf16(hinted_loss()),
    "dense in tiles fp32": lambda: tiled_loss,
}
COSTLY = ("dense eager bf16", "dense in tiles fp32")


def provider(name: str, shape: Shape, make: Callable[[], Call], check: Callable, *arguments: object) -> Provider:
    dtype = name.rsplit(" ", 1)[1] if name.endswith(("fp32", "tf32", "bf16")) else "fp32"
    return Provider(
        make, partial(check, name, checked(shape), dtype, *arguments), dtype, partial(too_large, name, shape)
    )


# ---- forward and backward


@lru_cache(1)  # the next shape's would not fit beside it
def exact_gradients(shape: Shape) -> tuple[dict[str, Tensor], Tensor]:
    """Returns them in fp64, over the tokens that count, and which these are."""
    x, p = in_fp64(shape)
    clear = clear_tokens(x, p, "jumprelu", 0)
    return gradients(dense_loss, x[clear], p), clear


def pass_errors(loss: Loss, shape: Shape) -> dict[str, float]:
    exact, clear = exact_gradients(shape)
    return relative_errors(gradients(loss, tokens(shape)[clear], parameters(shape)), exact)


@lru_cache(2)
def eager_pass_errors(shape: Shape, dtype: str) -> dict[str, float]:
    return pass_errors({"fp32": dense_loss, "tf32": in_tf32(dense_loss), "bf16": in_bf16(dense_loss)}[dtype], shape)


def check_pass(name: str, shape: Shape, dtype: str) -> tuple[float, float]:
    loss = LOSSES[name]()
    if DEVICE == "cuda":  # or its first pass would be dense, which is not what is timed
        loss(tokens(shape), parameters(shape))
        torch.cuda.synchronize()
    errors, eager = pass_errors(loss, shape), eager_pass_errors(shape, dtype)
    return worst(errors, {key: 2 * error + SUM_ROUNDING for key, error in eager.items()})


@lru_cache(1)
def operands(shape: Shape) -> tuple[Tensor, Parameters]:
    return tokens(shape), parameters(shape)


def make_pass(name: str, shape: Shape) -> Call:
    return partial(gradients, LOSSES[name](), *operands(shape))


def pass_provider(name: str, shape: Shape) -> Provider:
    return provider(name, shape, partial(make_pass, name, shape), check_pass)


def pass_case(shape_name: str, shape: Shape) -> Case:
    """All providers at some shapes; at a CPU's cuts the baseline, the fastest dense one, which is compiled bf16, and ours."""
    all_at = ("gemma-2-2b 65k", "llama-3.1-8b x32") if DEVICE == "cuda" else ("demo",)
    left_out = () if shape_name in all_at else COSTLY
    left_out += ("dense compiled fp32",) if shape.is_cut and shape_name not in EARLY_SHAPES else ()
    providers = {name: pass_provider(name, shape) for name in LOSSES if name not in left_out}
    return Case("forward+backward", shape_name, shape, providers, work=partial(step_work, shape))


# at pythia-70m on a CPU, scaling tells the story
PASS_SHAPES = SHAPES if DEVICE == "cuda" else {**SHAPES, **EARLY_SHAPES}
PASS_CASES = [pass_case(name, shape) for name, shape in PASS_SHAPES.items() if DEVICE == "cuda" or name != "pythia-70m"]


@cases_and_providers(PASS_CASES)
def test_forward_backward(timed, case: Case, provider: str) -> None:  # type: ignore[no-untyped-def]
    timed(case, provider)


def scaling_case(axis: str, value: int, shape: Shape) -> Case:
    providers = {name: pass_provider(name, shape) for name in ("dense eager fp32", "fused fp32")}
    return Case(f"scaling with {axis}", f"{value:,}", shape, providers, work=partial(step_work, shape), x=value)


N_SCALED = {"cpu": 256, "cuda": 8192}[DEVICE]
SCALING = [
    *(scaling_case("d_sae", n, Shape(N_SCALED, 768, n, 64)) for n in (4096, 8192, 16384, 32768, 65536)),
    # from 2,048 of the 16,384 features on, an eighth, the fused ops take the dense path
    *(scaling_case("L0", n, Shape(N_SCALED, 768, 16384, n)) for n in (8, 32, 128, 512, 1024, 1536, 3072)),
]


@cases_and_providers(SCALING)
def test_scaling(timed, case: Case, provider: str) -> None:  # type: ignore[no-untyped-def]
    timed(case, provider)


# ---- whole steps

MakeStep = Callable[[FusedJumpReLUSAE], Step]


def dense_step(loss: Loss, clipped: bool, sae: FusedJumpReLUSAE) -> Step:
    p = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")}
    return plain_step(sae, lambda x: loss(x, p), torch_adam(sae), clipped)


def our_loss(sae: FusedJumpReLUSAE) -> Callable[[Tensor], Tensor]:
    return lambda x: sae.training_forward(x, L0_COEFFICIENT).loss


def torch_adam(sae: FusedJumpReLUSAE) -> torch.optim.Adam:
    return torch.optim.Adam(sae.parameters(), lr=LR, fused=True)


def adam_of(sae: FusedJumpReLUSAE, clipped: bool = False) -> FusedSAEAdam:
    options = {"max_grad_norm": MAX_GRAD_NORM, "normalize_decoder": True} if clipped else {}
    return FusedSAEAdam(sae, lr=LR, **options)


def optimiser_steps(clipped: bool) -> dict[str, MakeStep]:
    """Returns steps with our passes that differ in the optimiser alone: Adam by itself, or as `fastsae train` wants it."""
    return {
        "torch.optim.Adam": lambda sae: plain_step(sae, our_loss(sae), torch_adam(sae), clipped),
        "FusedSAEAdam, loss.backward()": lambda sae: plain_step(sae, our_loss(sae), adam_of(sae, clipped)),
        "FusedSAEAdam, optimizer.backward(loss)": lambda sae: fused_step(our_loss(sae), adam_of(sae, clipped)),
    }


CLIPPED = "optimiser, clipped and unit norm"
STEPS: dict[str, dict[str, MakeStep]] = {
    "whole step": {
        **{
            name: lambda sae, loss=loss: dense_step(loss(), False, sae)
            for name, loss in DENSE.items()
            if name != "dense eager tf32"
        },
        "fused, torch.optim.Adam fp32": lambda sae: plain_step(sae, our_loss(sae), torch_adam(sae)),
        "fused fp32": lambda sae: fused_step(our_loss(sae), adam_of(sae)),
        "fused bf16": lambda sae: fused_step(
            in_bf16(our_loss(sae)), FusedSAEAdam(sae, lr=LR, compute_dtype=torch.bfloat16)
        ),
    },
    "optimiser": optimiser_steps(clipped=False),
    CLIPPED: optimiser_steps(clipped=True),
}


@lru_cache(1)
def clear_rows(shape: Shape) -> Tensor:
    return tokens(shape)[clear_tokens(*in_fp64(shape), "jumprelu", 0)]


def changes(make: MakeStep, shape: Shape, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Returns what a step adds to each parameter."""
    sae = make_sae(shape).to(dtype)
    before = copy.deepcopy(sae.state_dict())
    step, x = make(sae), clear_rows(shape).to(dtype)
    if DEVICE == "cuda":  # or its first step would be dense, which is not what is timed
        sae.training_forward(x, L0_COEFFICIENT)
        torch.cuda.synchronize()
    step(x)
    return {name: tensor.double() - before[name].double() for name, tensor in sae.state_dict().items()}


@lru_cache(1)
def exact_changes(shape: Shape, clipped: bool) -> dict[str, Tensor]:
    return changes(partial(dense_step, dense_loss, clipped), shape, torch.float64)


@lru_cache(2)
def eager_step_errors(shape: Shape, dtype: str, clipped: bool) -> dict[str, float]:
    loss = in_bf16(dense_loss) if dtype == "bf16" else dense_loss
    return relative_errors(changes(partial(dense_step, loss, clipped), shape), exact_changes(shape, clipped))


def check_step(name: str, shape: Shape, dtype: str, operation: str) -> tuple[float, float]:
    clipped = operation == CLIPPED
    errors = relative_errors(changes(STEPS[operation][name], shape), exact_changes(shape, clipped))
    eager = eager_step_errors(shape, dtype, clipped)
    return worst(errors, {key: 2 * error + SIGN_ROUNDING for key, error in eager.items()})


def make_step(operation: str, name: str, shape: Shape) -> Call:
    return partial(STEPS[operation][name](make_sae(shape)), tokens(shape))


def step_case(operation: str, shape_name: str) -> Case:
    shape = SHAPES[shape_name]
    # eager bf16 is slower than compiled bf16 and takes long where the shape is large
    names = [
        name for name in STEPS[operation] if name != "dense eager bf16" or DEVICE == "cuda" or shape_name != HEADLINE
    ]
    make = partial(partial, make_step, operation)
    providers = {name: provider(name, shape, make(name, shape), check_step, operation) for name in names}
    return Case(operation, shape_name, shape, providers, work=partial(step_work, shape, adam=True))


STEP_NAMES = tuple(SHAPES) if DEVICE == "cuda" else (HEADLINE, "demo")
OPTIMISER_NAMES = tuple(SHAPES) if DEVICE == "cuda" else (*STEP_NAMES, "pythia-70m", "gemma-2-2b 16k", "gemma-2-2b 65k")


@cases_and_providers([step_case("whole step", name) for name in STEP_NAMES])
def test_whole_step(timed, case: Case, provider: str) -> None:  # type: ignore[no-untyped-def]
    timed(case, provider)


@cases_and_providers([step_case(operation, name) for operation in list(STEPS)[1:] for name in OPTIMISER_NAMES])
def test_optimiser(timed, case: Case, provider: str) -> None:  # type: ignore[no-untyped-def]
    timed(case, provider)
