"""Drop-in proof against the real SAELens: it loads our files, we load its, and one training step is the same step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsae import FusedJumpReLUSAE, FusedReLUSAE, FusedTopKSAE, SparseAutoencoder, TrainOutput

sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed (pip install sae-lens)")


def fill(sae: Any) -> None:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            values = torch.randn(tensor.shape, generator=g) / max([1, *tensor.shape[:1]]) ** 0.5
            tensor.copy_(values.abs() + 0.05 if "threshold" in name else values)


@pytest.mark.parametrize("cls", [FusedJumpReLUSAE, FusedReLUSAE])
@pytest.mark.parametrize("subtract", [False, True])
def test_saelens_loads_our_folder(cls: type[SparseAutoencoder], subtract: bool, tmp_path: Path) -> None:
    ours = cls(24, 80, apply_b_dec_to_input=subtract)
    fill(ours)
    ours.save(tmp_path, model_name="m", hook_name="blocks.3.hook_resid_post")
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    x = torch.randn(200, 24)
    difference = (theirs(x) - ours(x)).abs().max().item()
    print(f"max difference of the reconstruction, {ours.architecture}: {difference:.3g}")  # noqa: T201
    assert difference < 2e-6
    torch.testing.assert_close(theirs.encode(x), ours.encode(x))
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"


def test_we_load_a_folder_of_saelens(tmp_path: Path) -> None:
    config = sae_lens.JumpReLUSAEConfig(d_in=24, d_sae=80, apply_b_dec_to_input=True)
    theirs = sae_lens.JumpReLUSAE(config)
    fill(theirs)
    theirs.save_model(str(tmp_path))
    ours = FusedJumpReLUSAE.load(tmp_path)
    x = torch.randn(200, 24)
    assert (theirs(x) - ours(x)).abs().max() < 2e-6


@pytest.mark.parametrize("kind", ["save_model", "save_inference_model"])
def test_training_goes_on_with_the_settings_of_saelens(kind: str, tmp_path: Path) -> None:
    config = sae_lens.JumpReLUTrainingSAEConfig(
        **WIDTHS, jumprelu_bandwidth=0.5, jumprelu_init_threshold=0.25, jumprelu_ste_to_input=True
    )
    getattr(sae_lens.JumpReLUTrainingSAE(config), kind)(str(tmp_path))
    ours = FusedJumpReLUSAE.load(tmp_path)
    assert (ours.bandwidth, ours.init_threshold, ours.ste_to_input) == (0.5, 0.25, True)


WIDTHS = {"d_in": 24, "d_sae": 80}
INFERENCE = {
    "standard": FusedReLUSAE,
    "jumprelu": FusedJumpReLUSAE,
    "topk": FusedTopKSAE,
    "gated": None,
    "abstopk": None,
    "matching_pursuit": None,
}


@pytest.mark.parametrize("subtract", [False, True], ids=["", "subtracts b_dec"])
@pytest.mark.parametrize("architecture", INFERENCE)
def test_every_inference_folder_of_saelens_is_read_or_refused(
    architecture: str, subtract: bool, tmp_path: Path
) -> None:
    from sae_lens.registry import get_sae_class

    cls, config_cls = get_sae_class(architecture)
    options = {"k": 8} if architecture.endswith("topk") else {}
    theirs = cls(config_cls(**WIDTHS, apply_b_dec_to_input=subtract, **options))
    fill(theirs)
    theirs.save_model(str(tmp_path))
    expected = INFERENCE[architecture]
    if expected is None:
        with pytest.raises(ValueError, match=f"batchtopk or jumprelu or standard or topk, got '{architecture}'"):
            SparseAutoencoder.load(tmp_path)
        return
    ours, x = SparseAutoencoder.load(tmp_path), torch.randn(200, 24)
    assert type(ours) is expected
    assert (theirs(x) - ours(x)).abs().max() < 2e-6
    torch.testing.assert_close(ours.encode(x), theirs.encode(x))


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "matryoshka_batchtopk"])
@pytest.mark.parametrize("kind", ["checkpoint", "inference"])
def test_what_saelens_saves_of_a_training_is_read_or_refused(architecture: str, kind: str, tmp_path: Path) -> None:
    from sae_lens.registry import get_sae_training_class

    cls, config_cls = get_sae_training_class(architecture)
    options = {"k": 8, "matryoshka_widths": [20, 80]} if "topk" in architecture else {}
    theirs = cls(config_cls(**WIDTHS, **options))
    fill(theirs)
    (theirs.save_model if kind == "checkpoint" else theirs.save_inference_model)(str(tmp_path))
    if architecture == "gated" or (architecture.startswith("matryoshka") and kind == "checkpoint"):
        with pytest.raises(ValueError, match=f"batchtopk or jumprelu or standard or topk, got '{architecture}'"):
            SparseAutoencoder.load(tmp_path)
        return
    plain = sae_lens.SAE.load_from_disk(str(tmp_path)) if kind == "inference" else theirs
    x = torch.randn(200, 24)
    assert (plain(x) - SparseAutoencoder.load(tmp_path)(x)).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("normalize", "advice"),
    [
        ("expected_average_only_in", "fold it"),
        ("covariance_whitening", "fold it"),
        ("layer_norm", "this library does not compute it"),
    ],
)
def test_normalised_activations_of_saelens_are_refused(normalize: Any, advice: str, tmp_path: Path) -> None:
    theirs = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**WIDTHS, normalize_activations=normalize))
    theirs.save_model(str(tmp_path))
    with pytest.raises(ValueError, match=f"normalize_activations: expected 'none', got '{normalize}'; {advice}"):
        SparseAutoencoder.load(tmp_path)
    content = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**content, "architecture": "gated"}))
    with pytest.raises(ValueError, match="got 'gated'"):  # first, because nothing can be folded to change that
        SparseAutoencoder.load(tmp_path)


def assert_same_step(ours: SparseAutoencoder, theirs: Any, got: TrainOutput, expected: Any) -> None:
    """Losses by name, and every gradient after both went back."""
    expected.loss.backward()
    got.loss.backward()
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.sae_out, expected.sae_out)
    assert got.losses.keys() == expected.losses.keys()
    for name, loss in expected.losses.items():
        torch.testing.assert_close(got.losses[name], loss, msg=name)
    for name, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max()
        error = (ours.get_parameter(name).grad - parameter.grad).abs().max()
        assert error <= 2e-6 * scale, f"{name}: {error / scale:.3g} relative"


def step_input(coefficients: dict[str, float]) -> Any:
    from sae_lens.saes.sae import TrainStepInput

    x, dead = torch.randn(300, 24, generator=torch.Generator().manual_seed(2)), torch.arange(80) % 7 == 0
    return TrainStepInput(
        sae_in=x, coefficients=coefficients, dead_neuron_mask=dead, n_training_steps=1, is_logging_step=False
    )


@pytest.mark.parametrize("subtract", [False, True], ids=["", "subtracts b_dec"])
@pytest.mark.parametrize("mode", ["step", "tanh", "quadratic"])
@pytest.mark.parametrize("ste_to_input", [False, True], ids=["", "ste to input"])
def test_one_training_step_is_the_same_step(mode: Any, ste_to_input: bool, subtract: bool) -> None:
    config = sae_lens.JumpReLUTrainingSAEConfig(
        d_in=24,
        d_sae=80,
        apply_b_dec_to_input=subtract,
        jumprelu_bandwidth=0.3,
        jumprelu_sparsity_loss_mode=mode,
        jumprelu_ste_to_input=ste_to_input,
        pre_act_loss_coefficient=0.01,
        l0_coefficient=0.5,
        target_l0=9.0,
    )
    theirs = sae_lens.JumpReLUTrainingSAE(config)
    ours = FusedJumpReLUSAE(24, 80, bandwidth=0.3, ste_to_input=ste_to_input, apply_b_dec_to_input=subtract)
    fill(theirs)
    ours.load_state_dict(theirs.state_dict())
    batch = step_input({"l0": 0.5})
    got = ours.training_forward(
        batch.sae_in, 0.5, mode, target_l0=9.0, dead_mask=batch.dead_neuron_mask, pre_act_loss_coefficient=0.01
    )
    assert_same_step(ours, theirs, got, theirs.training_forward_pass(batch))


@pytest.mark.parametrize("subtract", [False, True], ids=["", "subtracts b_dec"])
def test_one_training_step_of_a_relu_sae_is_the_same_step(subtract: bool) -> None:
    theirs = sae_lens.StandardTrainingSAE(
        sae_lens.StandardTrainingSAEConfig(d_in=24, d_sae=80, apply_b_dec_to_input=subtract)
    )
    ours = FusedReLUSAE(24, 80, apply_b_dec_to_input=subtract)
    fill(theirs)
    ours.load_state_dict(theirs.state_dict())
    batch = step_input({"l1": 0.3})
    got = ours.training_forward(batch.sae_in, 0.3)
    assert_same_step(ours, theirs, got, theirs.training_forward_pass(batch))
