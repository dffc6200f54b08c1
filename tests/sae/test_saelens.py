"""Drop-in proof against the real SAELens: it loads our files, we load its, and one training step is the same step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastsae import FusedJumpReLUSAE, FusedReLUSAE, SparseAutoencoder

sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed (pip install sae-lens)")


def fill(sae: Any) -> None:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            values = torch.randn(tensor.shape, generator=g) / tensor.shape[0] ** 0.5
            tensor.copy_(values.abs() + 0.05 if name == "threshold" else values)


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


@pytest.mark.parametrize("mode", ["step", "tanh"])
@pytest.mark.parametrize("ste_to_input", [False, True])
def test_one_training_step_is_the_same_step(mode: str, ste_to_input: bool) -> None:
    from sae_lens.saes.sae import TrainStepInput

    config = sae_lens.JumpReLUTrainingSAEConfig(
        d_in=24,
        d_sae=80,
        apply_b_dec_to_input=False,
        jumprelu_bandwidth=0.3,
        jumprelu_sparsity_loss_mode=mode,
        jumprelu_ste_to_input=ste_to_input,
        pre_act_loss_coefficient=0.01,
        l0_coefficient=0.5,
    )
    theirs = sae_lens.JumpReLUTrainingSAE(config)
    ours = FusedJumpReLUSAE(24, 80, bandwidth=0.3, ste_to_input=ste_to_input)
    fill(theirs)
    ours.load_state_dict(theirs.state_dict())
    x, dead = torch.randn(300, 24), torch.arange(80) % 7 == 0
    step_input = TrainStepInput(
        sae_in=x, coefficients={"l0": 0.5}, dead_neuron_mask=dead, n_training_steps=1, is_logging_step=False
    )
    expected = theirs.training_forward_pass(step_input)
    expected.loss.backward()
    got = ours.training_forward(x, 0.5, mode, dead_mask=dead, pre_act_loss_coefficient=0.01)  # type: ignore[arg-type]
    got.loss.backward()
    torch.testing.assert_close(got.loss, expected.loss)
    for name in ("mse_loss", "l0_loss", "pre_act_loss"):
        torch.testing.assert_close(got.losses[name], expected.losses[name], msg=name)
    for name, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max()
        error = (ours.get_parameter(name).grad - parameter.grad).abs().max()
        assert error <= 2e-6 * scale, f"{name}: {error / scale:.3g} relative"
