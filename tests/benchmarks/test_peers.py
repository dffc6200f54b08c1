"""The real peers compute what `benchmarks/peers.py` says they compute, so that their times may stand beside ours."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import adapters, peers
from benchmarks.adapters import Adapter
from benchmarks.baselines import Parameters, clear_tokens, relative_errors
from benchmarks.peers import PEERS, Peer
from benchmarks.shapes import DEVICE, Shape

SHAPE = Shape(n_tokens=32, d_in=16, d_sae=64, l0=8)
TOLERANCE = 1e-5  # relative, of an fp32 tensor against fp64
JUMPRELU = [peer for peer in PEERS if peer.architecture == "jumprelu"]


def title(peer: type[Peer]) -> str:
    return f"{peer.architecture}, {peer.name}"


def problem() -> tuple[Tensor, Parameters]:
    """Tokens and weights; biases and thresholds that differ from feature to feature, so that none can be mixed up."""
    g = torch.Generator().manual_seed(0)
    n, d_in, d_sae = SHAPE.n_tokens, SHAPE.d_in, SHAPE.d_sae
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=g), dim=1)
    weights = {
        "W_enc": W_dec.t() + 0.1 * torch.randn(d_in, d_sae, generator=g),
        "b_enc": 0.2 * torch.randn(d_sae, generator=g),
        "threshold": 0.8 + 0.4 * torch.rand(d_sae, generator=g),
        "W_dec": W_dec,
        "b_dec": 0.3 * torch.randn(d_in, generator=g),
    }
    x = 0.5 + torch.randn(n, d_in, generator=g)
    return x.to(DEVICE), {name: tensor.to(DEVICE) for name, tensor in weights.items()}


def in_fp64(x: Tensor, p: Parameters) -> tuple[Tensor, Parameters]:
    return x.double(), {name: tensor.double() for name, tensor in p.items()}


def worst_errors(adapter: Adapter, x: Tensor, p: Parameters) -> dict[str, float]:
    clear = clear_tokens(*in_fp64(x, p), adapter.architecture, adapter.k)
    assert clear.float().mean() > 0.9
    exact = adapters.expected(adapter, *in_fp64(x[clear], p))
    got = adapters.computed(adapter, x[clear], training=False) | adapters.computed(adapter, x[clear], training=True)
    return relative_errors(got, exact)


@pytest.fixture(params=PEERS, ids=title)
def peer(request: pytest.FixtureRequest) -> type[Peer]:
    reason = request.param.why_not()
    if reason is not None:
        pytest.skip(reason)
    return request.param


def skip_without(peer: type[Peer]) -> None:
    reason = peer.why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("side", ["peer", "ours"])
def test_numbers_are_those_of_the_reference(peer: type[Peer], side: str) -> None:
    x, p = problem()
    made = (peer if side == "peer" else peer.ours)(p, SHAPE)
    if side == "peer" and "sparsify" in peer.package and DEVICE == "cuda":
        pytest.skip("eai-sparsify's forward is in bf16 on a GPU")
    errors = worst_errors(made, x, p)
    assert errors.keys() == {"acts", "sae_out", *made.names}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_the_check_lets_it_through(peer: type[Peer], training: bool) -> None:
    error, limit = adapters.check(peer, SHAPE, training=training)
    assert 0 < error <= limit
    assert limit < TOLERANCE or DEVICE == "cuda"


def test_the_check_fails_where_the_numbers_are_wrong(peer: type[Peer]) -> None:
    class Wrong(peer):  # type: ignore[misc,valid-type]
        def loss_scale(self, x: Tensor) -> float:
            return 1.5 * super().loss_scale(x)

    error, limit = adapters.check(Wrong, SHAPE, training=True)
    assert error > limit


@pytest.mark.parametrize("side", ["peer", "ours"])
def test_a_step_changes_all_weights(peer: type[Peer], side: str) -> None:
    x, p = problem()
    made = (peer if side == "peer" else peer.ours)(p, SHAPE)
    for _ in range(3):
        made.train_step(x)
    for name, tensor in made.weights().items():
        assert tensor.isfinite().all(), name
        assert (tensor != p[name]).any(), name


# the peers whose step ours can repeat: one penalty, and Adam
SAME_STEP = [peer for peer in PEERS if peer.name != "eai-sparsify, SignSGD" and peer not in JUMPRELU[1:]]


@pytest.mark.parametrize("peer_class", SAME_STEP, ids=title)
def test_ours_takes_the_same_steps(peer_class: type[Peer]) -> None:
    skip_without(peer_class)
    if "sparsify" in peer_class.package and DEVICE == "cuda":
        pytest.skip("eai-sparsify's forward is in bf16 on a GPU")
    x, p = problem()
    theirs, ours = peer_class(p, SHAPE), peer_class.ours(p, SHAPE)
    for _ in range(5):
        theirs.train_step(x)
        ours.train_step(x)
    expected, got = theirs.weights(), ours.weights()
    if "sparsify" in peer_class.package:  # it normalises before a forward, ours after a step
        expected["W_dec"] = torch.nn.functional.normalize(expected["W_dec"], dim=1)
    for name, tensor in expected.items():
        change = (tensor - p[name]).norm()
        # the first steps of Adam are signs of gradients, however small those are
        assert (got[name] - tensor).norm() < 0.01 * change, name


@pytest.mark.parametrize("peer_class", PEERS, ids=title)
def test_missing_package_is_a_reason(peer_class: type[Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(peers, "version", missing)
    reason = f"{peer_class.package} is not installed (pip install 'fastsae-kernels[bench-peers]')"
    assert peer_class.not_installed() == peer_class.why_not() == reason


def test_broken_package_is_a_reason(peer: type[Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        try:
            raise RuntimeError("operator torchvision::nms does not exist\nmore")
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from error

    monkeypatch.setattr(importlib, "import_module", broken)
    monkeypatch.setattr(peers, "_import_failure", peers._import_failure.__wrapped__)
    cause = "RuntimeError: operator torchvision::nms does not exist; 'pip uninstall torchvision' mends it"
    assert peer.why_not() == f"{peer.package} {peer.version()} cannot be imported ({cause})"
