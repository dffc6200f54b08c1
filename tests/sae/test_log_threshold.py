"""The option to train the logarithm of the threshold: the same function, another parameter."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from fastsae import FusedJumpReLUSAE, FusedSAEAdam


def pair() -> tuple[FusedJumpReLUSAE, FusedJumpReLUSAE]:
    """The same SAE with either parameter."""
    torch.manual_seed(0)
    raw, log = (FusedJumpReLUSAE(12, 40, 0.3, 0.2, log_threshold=log) for log in (False, True))
    with torch.no_grad():
        raw.threshold.uniform_(0.05, 0.6)
        raw.b_enc.normal_(std=0.1)
    state = raw.state_dict()
    state["log_threshold"] = state.pop("threshold").log()
    log.load_state_dict(state)
    return raw, log


@pytest.mark.parametrize("sparsity", ["step", "quadratic", "tanh"])
def test_same_function_and_the_chain_rule(sparsity: str) -> None:
    raw, log = pair()
    x = torch.randn(50, 12)
    for sae in (raw, log):
        sae.training_forward(x, 0.5, sparsity, target_l0=4.0).loss.backward()  # type: ignore[arg-type]
    assert [name for name, _ in log.named_parameters()] == ["W_enc", "b_enc", "W_dec", "b_dec", "log_threshold"]
    torch.testing.assert_close(log(x), raw(x))
    assert raw.threshold.grad is not None
    torch.testing.assert_close(log.log_threshold.grad, raw.threshold.detach() * raw.threshold.grad)
    torch.testing.assert_close(log.W_enc.grad, raw.W_enc.grad)


def test_saved_as_a_threshold_and_trained_on_as_a_logarithm(tmp_path: Path) -> None:
    raw, log = pair()
    log.save(tmp_path)
    x = torch.randn(20, 12)
    loaded = FusedJumpReLUSAE.load(tmp_path)
    assert isinstance(loaded.log_threshold, torch.nn.Parameter)
    torch.testing.assert_close(loaded(x), raw(x))
    SAE = pytest.importorskip("sae_lens").SAE
    torch.testing.assert_close(SAE.load_from_disk(str(tmp_path))(x), raw(x))


def test_copies_dtypes_and_scale() -> None:
    raw, log = pair()
    narrow = copy.deepcopy(log).to(torch.bfloat16)
    assert narrow.W_enc.dtype == torch.bfloat16
    assert narrow.log_threshold.dtype == narrow.threshold.dtype == torch.float32
    for sae in (raw, log):
        sae.fold_activation_scale_(4.0)
    torch.testing.assert_close(log.threshold, raw.threshold)
    with pytest.raises(AttributeError, match="no attribute 'thresold'"):
        _ = log.thresold


def test_trains() -> None:
    _, log = pair()
    before = log.threshold.detach().clone()
    optimizer = FusedSAEAdam(log, lr=1e-2)
    log.training_forward(torch.randn(200, 12), 1.0).loss.backward()
    optimizer.step()
    assert (log.threshold > 0).all()
    assert not torch.equal(log.threshold, before)


def test_a_threshold_of_zero_has_no_logarithm() -> None:
    with pytest.raises(ValueError, match="init_threshold"):
        FusedJumpReLUSAE(4, 8, init_threshold=0.0, log_threshold=True)
