"""A loaded SAE at inference, activations in and reconstruction out: ours, the dense formula, and the peers."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.baselines import SPEC
from benchmarks.floor import encode_work
from benchmarks.harness import Call, Case, Provider, cases_and_providers
from benchmarks.peers import our_provider, peer_providers
from benchmarks.shapes import DEVICE, SHAPES, Shape, parameters, tokens
from fastsae_kernels import reference

INFERENCE_SHAPES = {"cpu": ("demo", "pythia-70m"), "cuda": ("gpt2-small x32", "gemma-2-2b 16k")}[DEVICE]


def dense(shape: Shape) -> Call:
    return partial(torch.no_grad()(reference.autoencode), tokens(shape), *parameters(shape).values(), None, SPEC)


def case(shape_name: str) -> Case:
    shape = SHAPES[shape_name]
    providers = {
        "dense eager fp32": Provider(partial(dense, shape), dtype="fp32"),
        **peer_providers(shape, "jumprelu", "reconstruct"),
        "fused fp32": our_provider(shape, "jumprelu", "reconstruct"),
    }
    return Case("inference", shape_name, shape, providers, work=partial(encode_work, shape))


@cases_and_providers([case(shape_name) for shape_name in INFERENCE_SHAPES])
def test_inference(timed, case: Case, provider: str) -> None:  # type: ignore[no-untyped-def]
    timed(case, provider)
