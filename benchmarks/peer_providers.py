"""The real peers as providers of a group, skipped with a reason where they are not installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from benchmarks.contestants import Contestant, check
from benchmarks.harness import Call, Provider
from benchmarks.peers import PEERS, Peer
from benchmarks.shapes import DEVICE, HEADLINE, Shape, parameters, tokens

# peers take as long as dense PyTorch, and their check with fp64 longer
PEER_SHAPES = {"cpu": (HEADLINE, "demo"), "cuda": ("gpt2-small x32", "gemma-2-2b 16k")}[DEVICE]
Action = Literal["loss_and_backward", "train_step", "reconstruct"]


def make(peer: Callable[..., Contestant], shape: Shape, action: Action) -> Call:
    return partial(getattr(peer(parameters(shape), shape), action), tokens(shape))


def provider(peer: type[Peer], shape: Shape, action: Action) -> Provider:
    gate = partial(check, peer, shape, training=action != "reconstruct")
    return Provider(partial(make, peer, shape, action), gate, "fp32", peer.why_not)


def label(peer: type[Peer]) -> str:
    """The name, and the version where there is one."""
    if peer.not_installed():
        return peer.name
    package, comma, option = peer.name.partition(", ")
    return f"{package} {peer.version()}{comma}{option}"


def peer_providers(shape: Shape, architecture: str, action: Action) -> dict[str, Provider]:
    """Every peer that has the architecture."""
    return {label(peer): provider(peer, shape, action) for peer in PEERS if peer.architecture == architecture}


def counterpart(shape: Shape, architecture: str, action: Action) -> Provider:
    """Ours, with the options of the first such peer."""
    ours = next(peer for peer in PEERS if peer.architecture == architecture).counterpart
    gate = partial(check, ours, shape, training=action != "reconstruct")
    return Provider(partial(make, ours, shape, action), gate, "fp32")
