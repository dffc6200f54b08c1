"""What the peers do by default, and ours beside them: a TopK SAE's training step, and a loaded JumpReLU SAE at inference."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.baselines import SPEC
from benchmarks.floor import encode_work, step_work
from benchmarks.harness import Call, Case, Provider, cases_and_providers
from benchmarks.peers import PEER_SHAPES, Action, our_provider, peer_providers
from benchmarks.shapes import DEVICE, SHAPES, Shape, parameters, tokens
from fastsae_kernels import reference

NAMES = ("demo", "pythia-70m") if DEVICE == "cpu" else PEER_SHAPES


def topk_case(operation: str, action: Action, shape_name: str) -> Case:
    shape = SHAPES[shape_name]
    providers = peer_providers(shape, "topk", action) | {"fused fp32": our_provider(shape, "topk", action)}
    return Case(operation, shape_name, shape, providers, work=partial(step_work, shape, adam="step" in action))


TOPK_CASES = [topk_case("whole step, TopK", "train_step", name) for name in NAMES]
TOPK_CASES.append(topk_case("forward+backward, TopK", "loss_and_backward", NAMES[0]))


@cases_and_providers(TOPK_CASES)
def test_topk_step(timed, case: Case, provider: str) -> None:  # type: ignore[no-untyped-def]
    timed(case, provider)


def dense(shape: Shape) -> Call:
    return partial(torch.no_grad()(reference.autoencode), tokens(shape), *parameters(shape).values(), None, SPEC)


def inference_case(shape_name: str) -> Case:
    shape = SHAPES[shape_name]
    providers = {
        "dense eager fp32": Provider(partial(dense, shape), dtype="fp32"),
        **peer_providers(shape, "jumprelu", "reconstruct"),
        "fused fp32": our_provider(shape, "jumprelu", "reconstruct"),
    }
    return Case("inference", shape_name, shape, providers, work=partial(encode_work, shape))


@cases_and_providers([inference_case(name) for name in NAMES])
def test_inference(timed, case: Case, provider: str) -> None:  # type: ignore[no-untyped-def]
    timed(case, provider)
