"""The peers' own training steps, and the pair that their inference calls, before and after `fastsae.accelerate`."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.floor import encode_work, step_work
from benchmarks.harness import Call, Case, Provider, benchmark_of
from benchmarks.peers import PEERS, Peer, why_not
from benchmarks.result import PEERS as OPERATION
from benchmarks.shapes import CPU_SHAPES, DEVICE, GPU_SHAPES, HEADLINE, Shape, tokens
from benchmarks.steps import Make, check

PEER_SHAPES = {
    "cpu": {HEADLINE: CPU_SHAPES[HEADLINE], "512 tokens": Shape(512, 256, 2048, 78)},
    "cuda": {name: GPU_SHAPES[name] for name in ("gpt2-small x32", "gemma-2-2b 16k")},
}[DEVICE]
SMALL_GOAL = 2.0  # how many times as fast as the peer at a small shape


def call(make: Make, shape: Shape) -> Call:
    return partial(make(shape, torch.float32).step, tokens(shape))


def case(peer: Peer, shape_name: str) -> Case:
    shape, makes = PEER_SHAPES[shape_name], {peer.title: peer.own, "accelerated": peer.accelerated}
    if peer.has_optimizer:
        makes["accelerated, FusedSAEAdam"] = partial(peer.accelerated, optimizer=True)
    providers = {}
    for name, make in makes.items():
        # the peer in fp64 is what is right, so that it has nothing to be compared with; on a GPU eai-sparsify is always in bf16
        has_none = name == peer.title or (peer.package == "eai-sparsify" and DEVICE == "cuda")
        gate = None if has_none else partial(check, make, shape, peer.own, peer.own, peer.architecture)
        providers[name] = Provider(partial(call, make, shape), gate, "fp32", partial(why_not, peer.package))
    work = partial(encode_work, shape) if peer.is_inference else partial(step_work, shape, adam=True)
    goal = peer.goal if shape_name != "512 tokens" else SMALL_GOAL
    return Case(OPERATION, shape_name, shape, providers, work=work, subject=f"{peer.package} {peer.what}", goal=goal)


test_peer = benchmark_of([case(peer, shape_name) for shape_name in PEER_SHAPES for peer in PEERS])
