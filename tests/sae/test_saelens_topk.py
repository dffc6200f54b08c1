"""Drop-in proof of the TopK family against the real SAELens: same step with every gradient, same files both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsae import FusedBatchTopKSAE, FusedJumpReLUSAE, FusedTopKSAE, SparseAutoencoder

sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed (pip install sae-lens)")
D_IN, D_SAE, K = 24, 80, 5


def fill(sae: Any, bias: float = 0.3) -> None:
    """Weights with uneven decoder norms; a large bias keeps every pre-activation positive."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            values = torch.randn(sae.get_parameter(name).shape, generator=g)
            sae.get_parameter(name).copy_(0.3 * values + (bias if name == "b_enc" else 0.0))
        sae.W_dec.mul_(torch.rand(D_SAE, 1, generator=g) + 0.2)


def pair(architecture: str, *, rescale: bool, subtract: bool, bias: float = 0.3, **options: Any) -> tuple[Any, Any]:
    """Their training SAE and ours, with equal weights."""
    config_class, their_class, our_class = {
        "topk": (sae_lens.TopKTrainingSAEConfig, sae_lens.TopKTrainingSAE, FusedTopKSAE),
        "batchtopk": (sae_lens.BatchTopKTrainingSAEConfig, sae_lens.BatchTopKTrainingSAE, FusedBatchTopKSAE),
    }[architecture]
    config = config_class(
        d_in=D_IN,
        d_sae=D_SAE,
        k=K,
        apply_b_dec_to_input=subtract,
        rescale_acts_by_decoder_norm=rescale,
        **options,
    )
    theirs = their_class(config)
    fill(theirs, bias)
    ours = our_class(D_IN, D_SAE, K, apply_b_dec_to_input=subtract, rescale_acts_by_decoder_norm=rescale)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def their_step(sae: Any, x: torch.Tensor, dead: torch.Tensor | None) -> Any:
    from sae_lens.saes.sae import TrainStepInput

    return sae.training_forward_pass(
        TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=1, is_logging_step=False)
    )


def dead_features(n_dead: int) -> torch.Tensor:
    mask = torch.zeros(D_SAE, dtype=torch.bool)
    mask[torch.randperm(D_SAE, generator=torch.Generator().manual_seed(1))[:n_dead]] = True
    return mask


# d_in // 2 = 12 dead features fill the auxiliary top-k; below, the loss is scaled down
@pytest.mark.parametrize("n_dead", [None, 0, 5, 12, 40], ids=lambda n: f"dead={n}")
@pytest.mark.parametrize("subtract", [False, True], ids=["plain", "subtract"])
@pytest.mark.parametrize("rescale", [False, True], ids=["raw", "rescale"])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_one_training_step_is_the_same_step(
    architecture: str, rescale: bool, subtract: bool, n_dead: int | None
) -> None:
    # every pre-activation is positive, so that both libraries mean the same auxiliary activations
    bias = 12.0 if n_dead else 0.3
    theirs, ours = pair(architecture, rescale=rescale, subtract=subtract, bias=bias, aux_loss_coefficient=0.7)
    x = torch.randn(300, D_IN, generator=torch.Generator().manual_seed(2))
    dead = None if n_dead is None else dead_features(n_dead)
    expected = their_step(theirs, x, dead)
    if n_dead:
        assert (expected.hidden_pre[:, dead] > 0).all()
    expected.loss.backward()
    got = ours.training_forward(x, dead_mask=dead, aux_loss_coefficient=0.7)
    got.loss.backward()
    torch.testing.assert_close(got.sae_out, expected.sae_out)
    torch.testing.assert_close(got.loss, expected.loss)
    for name in expected.losses:
        if name in got.losses or n_dead is not None:
            torch.testing.assert_close(got.losses[name], expected.losses[name], msg=name)
    assert got.feature_counts.tolist() == (expected.feature_acts > 0).sum(0).tolist()
    for name, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max()
        error = (ours.get_parameter(name).grad - parameter.grad).abs().max()
        assert error <= 4e-6 * scale, f"{name}: {error / scale:.3g} relative"
    if n_dead:
        assert ours.W_enc.grad[:, dead].abs().sum() > 0
    if architecture == "batchtopk":
        torch.testing.assert_close(ours.topk_threshold, theirs.topk_threshold, rtol=1e-6, atol=0)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_run_of_steps_stays_together(architecture: str) -> None:
    theirs, ours = pair(architecture, rescale=True, subtract=True)
    optimizers = [torch.optim.SGD(sae.parameters(), lr=0.01) for sae in (theirs, ours)]
    data = torch.randn(30, 128, D_IN, generator=torch.Generator().manual_seed(3))
    for x in data:
        losses = [their_step(theirs, x, None).loss, ours.training_forward(x).loss]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(ours.W_enc, theirs.W_enc, rtol=1e-3, atol=1e-4)
    if architecture == "batchtopk":
        assert ours.topk_threshold > 0
        torch.testing.assert_close(ours.topk_threshold, theirs.topk_threshold, rtol=1e-4, atol=0)


def test_negative_dead_features_stay_out_of_the_auxiliary_reconstruction() -> None:
    """The documented difference: SAELens fills the auxiliary top-k up with negative pre-activations."""
    theirs, ours = pair("topk", rescale=True, subtract=True, bias=-0.5)
    x, dead = torch.randn(100, D_IN, generator=torch.Generator().manual_seed(4)), dead_features(20)
    step = their_step(theirs, x, dead)
    norms = theirs.W_dec.norm(dim=-1)
    residual = (x - step.sae_out).detach()

    def loss_of(acts: torch.Tensor) -> torch.Tensor:
        return ((acts / norms) @ theirs.W_dec - residual).square().sum(-1).mean()

    largest = torch.where(dead, step.hidden_pre, -torch.inf).topk(12)
    assert (largest.values < 0).any()
    filled = torch.zeros_like(step.hidden_pre).scatter(-1, largest.indices, largest.values)
    torch.testing.assert_close(step.losses["auxiliary_reconstruction_loss"], loss_of(filled))
    got = ours.training_forward(x, dead_mask=dead).losses["auxiliary_reconstruction_loss"]
    torch.testing.assert_close(got, loss_of(filled.relu()))
    assert not torch.isclose(loss_of(filled), loss_of(filled.relu()), rtol=1e-2)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("cls", [FusedTopKSAE, FusedBatchTopKSAE])
def test_saelens_loads_our_folder(cls: Any, rescale: bool, tmp_path: Path) -> None:
    ours = cls(D_IN, D_SAE, K, rescale_acts_by_decoder_norm=rescale)
    fill(ours)
    if cls is FusedBatchTopKSAE:
        ours.topk_threshold.fill_(0.61)
    ours.save(tmp_path, hook_name="blocks.3.hook_resid_post")
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    assert theirs.cfg.architecture() == {FusedTopKSAE: "topk", FusedBatchTopKSAE: "jumprelu"}[cls]
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    x = torch.randn(200, D_IN)
    assert (theirs(x) - ours(x)).abs().max() < 5e-6
    torch.testing.assert_close(theirs.encode(x), ours.encode(x))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("kind", ["checkpoint", "inference"])
def test_we_load_a_topk_folder_of_saelens(rescale: bool, kind: str, tmp_path: Path) -> None:
    theirs, _ = pair("topk", rescale=rescale, subtract=True)
    (theirs.save_model if kind == "checkpoint" else theirs.save_inference_model)(str(tmp_path))
    ours = SparseAutoencoder.load(tmp_path)
    assert isinstance(ours, FusedTopKSAE)
    assert (ours.k, ours.rescale_acts_by_decoder_norm) == (K, rescale)
    x = torch.randn(200, D_IN)
    assert (theirs(x) - ours(x)).abs().max() < 5e-6
    plain = sae_lens.SAE.load_from_disk(str(tmp_path)) if kind == "inference" else theirs
    torch.testing.assert_close(ours.encode(x), plain.encode(x))


@pytest.mark.parametrize("rescale", [False, True])
def test_we_load_batchtopk_folders_of_saelens(rescale: bool, tmp_path: Path) -> None:
    theirs, _ = pair("batchtopk", rescale=rescale, subtract=True)
    theirs.topk_threshold.fill_(0.4321)
    theirs.save_model(str(tmp_path / "checkpoint"))
    theirs.save_inference_model(str(tmp_path / "inference"))
    inference = sae_lens.SAE.load_from_disk(str(tmp_path / "inference"))
    x = torch.randn(200, D_IN)
    for folder in ("checkpoint", "inference"):
        ours = FusedBatchTopKSAE.load(tmp_path / folder)
        assert (ours.k, ours.rescale_acts_by_decoder_norm) == (K, rescale)
        assert ours.topk_threshold.item() == pytest.approx(0.4321, rel=1e-7)
        torch.testing.assert_close(ours.encode(x), inference.encode(x))
        torch.testing.assert_close(ours(x), inference(x))
        expected, got = their_step(copy.deepcopy(theirs), x, None), ours.training_forward(x)
        torch.testing.assert_close(got.loss, expected.loss)
    assert FusedBatchTopKSAE.load(tmp_path / "checkpoint").topk_threshold == theirs.topk_threshold
    assert type(SparseAutoencoder.load(tmp_path / "inference")) is FusedJumpReLUSAE  # what the file says it is


def test_fractional_k_of_saelens_is_refused(tmp_path: Path) -> None:
    theirs, _ = pair("batchtopk", rescale=True, subtract=True)
    theirs.cfg.k = 2.5
    theirs.save_model(str(tmp_path))
    assert json.loads((tmp_path / "cfg.json").read_text())["k"] == 2.5
    with pytest.raises(ValueError, match=r"k: expected an integer .*, got 2\.5"):
        SparseAutoencoder.load(tmp_path)
