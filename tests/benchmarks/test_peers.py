"""The peers' own steps as the benchmarks make them: what is compared before they are timed, and why one cannot run."""

from __future__ import annotations

import importlib
import importlib.metadata
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.peers import PEERS, Peer
from benchmarks.shapes import Shape, parameters, tokens
from benchmarks.steps import Make, Training, check, results

SHAPE = Shape(n_tokens=64, d_in=16, d_sae=128, l0=8)


@pytest.fixture(params=PEERS, ids=lambda peer: f"{peer.package} {peer.what}")
def peer(request: pytest.FixtureRequest) -> Peer:
    if (reason := peers.why_not(request.param.package)) is not None:
        pytest.skip(reason)
    return request.param


def checked(peer: Peer, make: Make) -> tuple[float, float]:
    return check(make, SHAPE, peer.own, peer.own, peer.architecture)


def test_the_check_lets_a_peer_and_its_accelerated_self_through(peer: Peer) -> None:
    for make in [peer.own, peer.accelerated] + [partial(peer.accelerated, optimizer=True)] * peer.has_optimizer:
        error, limit = checked(peer, make)
        assert 0 < error <= limit < 5e-3


def test_the_check_fails_where_the_numbers_are_wrong(peer: Peer) -> None:
    """Of a gradient that is off by a factor, which Adam's step would hide, and of a reconstruction."""

    def wrong(shape: Shape, dtype: torch.dtype) -> Training:
        found = peer.accelerated(shape, dtype)
        if found.loss is None:
            return found._replace(step=lambda x: 1.01 * found.step(x))
        return found._replace(loss=lambda x: 1.01 * found.loss(x))

    error, limit = checked(peer, wrong)
    assert error > limit


def test_a_step_takes_the_weights_that_it_is_given(peer: Peer) -> None:
    found, p = peer.own(SHAPE, torch.float32), parameters(SHAPE)
    weights = dict(found.module.named_parameters())
    encoder = weights["W_enc"] if "W_enc" in weights else weights["encoder.weight"].t()
    assert torch.equal(encoder, p["W_enc"])
    if found.loss is not None:
        changes = {name: change for name, change in results(found, tokens(SHAPE)).items() if name.startswith("change")}
        assert len(changes) == len(weights)
        assert all(0 < change.abs().max() < 0.01 for change in changes.values())


def test_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(peers, "version", missing)
    monkeypatch.setattr(peers, "why_not", peers.why_not.__wrapped__)
    reason = "sae-lens is not installed (pip install 'fastsae-kernels[bench-peers]')"
    assert (peers.why_not("sae-lens"), PEERS[0].title) == (reason, "sae-lens")


def test_broken_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        try:
            raise RuntimeError("operator torchvision::nms does not exist\nmore")
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from error

    monkeypatch.setattr(importlib, "import_module", broken)
    monkeypatch.setattr(peers, "version", lambda package: "6.54.12")
    cause = "RuntimeError: operator torchvision::nms does not exist; 'pip uninstall torchvision' mends it"
    expected = f"sae-lens 6.54.12 cannot be imported ({cause})"
    assert peers.why_not.__wrapped__("sae-lens") == expected
