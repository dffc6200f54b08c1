"""A JumpReLU training step, ours against dense PyTorch: forward and backward, the whole step, the optimiser, scaling.

A provider is timed once the error of every gradient, and of what a step adds to every parameter, is at most twice that of the
dense eager step in the same dtype (against fp64, in norm, over the tokens none of whose features is active or not by rounding).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastsae_kernels as kernels
from benchmarks.floor import step_work, tf32_products
from benchmarks.harness import Call, Case, Provider, benchmark_of
from benchmarks.shapes import BANDWIDTH, DEVICE, EARLY_SHAPES, HEADLINE, SHAPES, Shape, tokens, too_large
from benchmarks.steps import MAX_GRAD_NORM, Forward, Make, Step, Training, check, fused_step, make_sae, plain_step
from fastsae import FusedJumpReLUSAE, FusedSAEAdam
from fastsae_kernels import AutoencodeSpec, reference

LR, L0_COEFFICIENT = 1e-4, 0.01
SPEC = AutoencodeSpec(bandwidth=BANDWIDTH)
SAE = FusedJumpReLUSAE
Loss = Callable[..., Tensor]


def dense_loss(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """The loss as one writes it in PyTorch."""
    sae_out, penalty, _ = reference.autoencode(x, *p.values(), None, SPEC)
    return (sae_out - x).square().sum(-1).mean() + L0_COEFFICIENT * penalty.mean()


def in_bf16(loss: Loss) -> Loss:
    return torch.autocast(DEVICE, torch.bfloat16)(loss)


def in_tf32(loss: Loss) -> Loss:
    return tf32_products()(loss)


def compiled(loss: Loss) -> Loss:
    """Compiled for the shapes it meets, as for a training run."""
    return torch.compile(loss, dynamic=False)


def dense(sae: SAE, loss: Loss = dense_loss) -> Forward:
    p = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")}
    return lambda x: loss(x, p)


def fused(sae: SAE) -> Forward:
    return lambda x: sae.training_forward(x, L0_COEFFICIENT).loss


LOSSES: dict[str, Callable[[SAE], Forward]] = {
    "dense eager fp32": dense,
    "dense compiled fp32": lambda sae: dense(sae, compiled(dense_loss)),
    "dense eager bf16": lambda sae: dense(sae, in_bf16(dense_loss)),
    "dense compiled bf16": lambda sae: dense(sae, compiled(in_bf16(dense_loss))),
    **({
        "dense eager tf32": lambda sae: dense(sae, in_tf32(dense_loss)),
        "dense compiled tf32": lambda sae: dense(sae, in_tf32(compiled(dense_loss))),
    } if DEVICE == "cuda" else {}),
    "fused fp32": fused,
    "fused bf16": lambda sae: in_bf16(fused(sae)),
    "dense in tiles fp32": lambda sae: kernels.use_backend("dense")(fused(sae)),
}  # fmt: skip
COSTLY = ("dense eager bf16", "dense in tiles fp32")


def torch_adam(sae: SAE, forward: Forward, clipped: bool = False) -> Step:
    return plain_step(sae, forward, torch.optim.Adam(sae.parameters(), lr=LR, fused=True), clipped)


def our_adam(sae: SAE, forward: Forward, clipped: bool = False, plain: bool = False, **options: torch.dtype) -> Step:
    """Returns a step with `FusedSAEAdam`, which finds gradients in `.grad` where it is `plain`."""
    clips = {"max_grad_norm": MAX_GRAD_NORM, "normalize_decoder": True} if clipped else {}
    optimizer = FusedSAEAdam(sae, lr=LR, **clips, **options)
    return plain_step(sae, forward, optimizer) if plain else fused_step(forward, optimizer)


# what a provider's name says after its loss: with its optimiser
Optimiser = Callable[[SAE, Forward], Step]
OPTIMISERS: dict[str, Optimiser] = {
    "torch.optim.Adam": torch_adam,
    "FusedSAEAdam, loss.backward()": partial(our_adam, plain=True),
    "FusedSAEAdam, optimizer.backward(loss)": our_adam,
}
OPERATIONS: dict[str, dict[str, tuple[str, Optimiser]]] = {
    "forward+backward": {name: (name, torch_adam) for name in LOSSES},
    "whole step": {
        **{name: (name, torch_adam) for name in LOSSES if name not in ("dense eager tf32", "dense in tiles fp32")},
        "fused, torch.optim.Adam fp32": ("fused fp32", torch_adam),
        "fused fp32": ("fused fp32", our_adam),
        "fused bf16": ("fused bf16", partial(our_adam, compute_dtype=torch.bfloat16)),
    },
    "optimiser": {name: ("fused fp32", optimiser) for name, optimiser in OPTIMISERS.items()},
    "optimiser, clipped and unit norm": {
        name: ("fused fp32", partial(optimiser, clipped=True)) for name, optimiser in OPTIMISERS.items()
    },
}


def training(loss: str, optimiser: Optimiser, shape: Shape, dtype: torch.dtype = torch.float32) -> Training:
    sae = make_sae(shape, dtype)
    forward = LOSSES[loss](sae)
    return Training(sae, optimiser(sae, forward), forward)


# one object for each, so that what they give is computed once
BASELINES: dict[tuple[str, bool], Make] = {
    (dtype, clipped): partial(training, f"dense eager {dtype}", partial(torch_adam, clipped=clipped))
    for dtype in ("fp32", "bf16", *(("tf32",) if DEVICE == "cuda" else ()))
    for clipped in (False, True)
}


def make_call(make: Make, shape: Shape, is_pass: bool) -> Call:
    made, x = make(shape, torch.float32), tokens(shape)

    def forward_and_backward() -> None:
        assert made.loss is not None
        made.module.zero_grad()
        made.loss(x).backward()

    return forward_and_backward if is_pass else partial(made.step, x)


def case(operation: str, shape_name: str, shape: Shape, left_out: tuple[str, ...] = (), x: float | None = None) -> Case:
    """All providers of an operation at a shape, but for those that are left out."""
    providers, clipped = {}, "clipped" in operation
    is_pass = operation not in OPERATIONS or operation == "forward+backward"
    for name, (loss, optimiser) in OPERATIONS["forward+backward" if is_pass else operation].items():
        if name not in left_out:
            dtype, make = loss.rsplit(" ", 1)[1], partial(training, loss, optimiser)
            gate = partial(check, make, shape, BASELINES[dtype, clipped], BASELINES["fp32", clipped])
            skip = partial(too_large, name, shape)
            providers[name] = Provider(partial(make_call, make, shape, is_pass), gate, dtype, skip)
    return Case(operation, shape_name, shape, providers, work=partial(step_work, shape, adam=not is_pass), x=x)


def pass_case(shape_name: str, shape: Shape) -> Case:
    """All providers at some shapes; at a CPU's cuts the baseline, the fastest dense one, which is compiled bf16, and ours."""
    all_at = ("gemma-2-2b 65k", "llama-3.1-8b x32") if DEVICE == "cuda" else ("demo",)
    left_out = () if shape_name in all_at else COSTLY
    left_out += ("dense compiled fp32",) if shape.is_cut and shape_name not in EARLY_SHAPES else ()
    return case("forward+backward", shape_name, shape, left_out)


PASSES = [pass_case(name, shape) for name, shape in (SHAPES | (EARLY_SHAPES if DEVICE == "cpu" else {})).items()]
N_SCALED = {"cpu": 256, "cuda": 8192}[DEVICE]
SERIES = {
    "d_sae": {n: Shape(N_SCALED, 768, n, 64) for n in (4096, 8192, 16384, 32768, 65536)},
    # from 2,048 of the 16,384 features on, an eighth, the fused ops take the dense path
    "L0": {n: Shape(N_SCALED, 768, 16384, n) for n in (8, 32, 128, 512, 1024, 1536, 3072)},
}
BUT_TWO = tuple(name for name in LOSSES if name not in ("dense eager fp32", "fused fp32"))
SCALING = [
    case(f"scaling with {axis}", f"{n:,}", shape, BUT_TWO, n)
    for axis, found in SERIES.items()
    for n, shape in found.items()
]
STEP_NAMES = tuple(SHAPES) if DEVICE == "cuda" else (HEADLINE, "demo")
# eager bf16 is slower than compiled bf16 and takes long where the shape is large
STEPS = [
    case("whole step", name, SHAPES[name], COSTLY if DEVICE == "cpu" and name == HEADLINE else ())
    for name in STEP_NAMES
]
OPTIMISER_NAMES = tuple(SHAPES) if DEVICE == "cuda" else (*STEP_NAMES, "gemma-2-2b 65k")
OPTIMISER_CASES = [case(name, shape, SHAPES[shape]) for name in list(OPERATIONS)[2:] for shape in OPTIMISER_NAMES]


test_whole_step = benchmark_of(STEPS)
test_forward_backward = benchmark_of(PASSES)
test_scaling = benchmark_of(SCALING)
test_optimiser = benchmark_of(OPTIMISER_CASES)
