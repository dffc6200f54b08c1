"""The running threshold of a BatchTopK SAE: how it moves, and what it does at inference."""

from __future__ import annotations

import copy

import pytest
import torch
from topk_problem import CLASSES, D_IN, D_SAE, dense_pass, randomised

from fastsae import FusedBatchTopKSAE


def test_threshold_follows_the_smallest_surviving_activation() -> None:
    sae = randomised(FusedBatchTopKSAE)
    expected = 0.4
    for _ in range(5):
        x = torch.randn(32, D_IN)
        acts = dense_pass(sae, x)["acts"]
        expected = 0.99 * expected + 0.01 * acts[acts > 0].min().item()
        sae.training_forward(x)
        assert sae.topk_threshold.item() == pytest.approx(expected, rel=1e-6)
    assert sae.topk_threshold.dtype == torch.float64
    assert sae.topk_threshold.shape == ()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_activations_of_a_batch_can_be_encoded_again(ties: bool, dtype: torch.dtype) -> None:
    sae, x = randomised(FusedBatchTopKSAE, 2).to(dtype), torch.randn(16, D_IN)
    if ties:  # every value twenty-fold, so that the cut goes through a group of equals
        with torch.no_grad():
            for parameter in (sae.W_enc, sae.b_enc[None], sae.W_dec.t()):
                parameter.copy_(parameter[:, :2].repeat(1, 20))
    for tokens in (x, torch.zeros(0, D_IN)):
        output = sae.training_forward(tokens)
        again = output.encode_again()
        assert again.values.numel() == output.feature_counts.sum() == 2 * tokens.shape[0]
        torch.testing.assert_close(again.to_dense(), output.acts.to_dense(), rtol=0, atol=0)


def test_threshold_moves_in_a_whole_graph() -> None:
    sae, x = randomised(FusedBatchTopKSAE), torch.randn(32, D_IN)
    eager = copy.deepcopy(sae)
    compiled = torch.compile(sae.training_forward, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(x).loss, eager.training_forward(x).loss)
        assert sae.topk_threshold == eager.topk_threshold != 0.4


def test_threshold_stays_where_nothing_is_active() -> None:
    sae = randomised(FusedBatchTopKSAE)
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    output = sae.training_forward(torch.randn(8, D_IN))
    assert output.l0 == 0
    assert sae.topk_threshold == 0.4


def test_inference_is_the_jumprelu_of_the_threshold_in_either_mode() -> None:
    sae, x = randomised(FusedBatchTopKSAE), torch.randn(30, D_IN)
    for module in (sae.train(), sae.eval()):
        acts = module.encode(x)
        assert ((acts > 0.4) | (acts == 0)).all()
        torch.testing.assert_close(module.encode(x[:1]), acts[:1])  # a token's activations are its own
        torch.testing.assert_close(module(x)[:1], module(x[:1]))
    fresh = FusedBatchTopKSAE(D_IN, D_SAE, 4)
    assert torch.equal(fresh.encode(x) > 0, (x @ fresh.W_enc) > 0)  # before the first step: a ReLU
    assert fresh.encode_sparse(x).l0().float().mean() > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_training_pass_between_forward_and_backward_does_no_harm(dtype: torch.dtype) -> None:
    sae = randomised(FusedBatchTopKSAE).to(dtype)
    x = torch.randn(30, D_IN, dtype=dtype)
    (expected,) = torch.autograd.grad(sae(x).square().sum(), sae.W_enc)
    waiting = sae(x).square().sum()
    sae.training_forward(x)
    torch.testing.assert_close(torch.autograd.grad(waiting, sae.W_enc)[0], expected)


def test_fold_activation_scale_is_exact() -> None:
    for cls in CLASSES:
        for rescale in (False, True):
            sae = randomised(cls, rescale_acts_by_decoder_norm=rescale)
            x = torch.randn(50, D_IN)
            expected, trained = sae(x * 0.25) / 0.25, copy.deepcopy(sae).training_forward(x * 0.25).sae_out / 0.25
            sae.fold_activation_scale_(0.25)
            assert torch.equal(sae(x), expected)  # a power of two rounds nothing
            assert torch.equal(sae.training_forward(x).sae_out, trained)
