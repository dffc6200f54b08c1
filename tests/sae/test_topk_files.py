"""Copies, dtypes and files of the TopK family."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from topk_problem import CLASSES, D_IN, D_SAE, randomised

from fastsae import FusedBatchTopKSAE, FusedJumpReLUSAE, FusedTopKSAE, SparseAutoencoder


@pytest.mark.parametrize("cls", CLASSES)
def test_copies_and_dtypes(cls: Any) -> None:
    sae, x = randomised(cls), torch.randn(500, D_IN)
    sae.training_forward(x, dead_mask=torch.arange(D_SAE) < 5)
    for copied in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert torch.equal(copied(x), sae(x))
        copied.training_forward(x, dead_mask=torch.arange(D_SAE) < 5).loss.backward()
    if cls is FusedBatchTopKSAE:
        sae.topk_threshold.fill_(0.1 + 2**-40)
    narrow = copy.deepcopy(sae).to(torch.bfloat16)
    if cls is FusedBatchTopKSAE:
        assert narrow.topk_threshold.dtype == torch.float64
        assert narrow.topk_threshold == 0.1 + 2**-40
    assert narrow.dtype == torch.bfloat16
    output = narrow.training_forward(x, dead_mask=torch.arange(D_SAE) < 5)
    output.loss.backward()
    assert output.sae_out.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in narrow.parameters())
    torch.testing.assert_close(
        output.loss, sae.training_forward(x, dead_mask=torch.arange(D_SAE) < 5).loss, rtol=0.01, atol=0
    )
    assert narrow(x).dtype == narrow.encode(x).dtype == torch.bfloat16


@pytest.mark.parametrize("cls", CLASSES)
def test_autocast_keeps_wide_gradients(cls: Any) -> None:
    sae, x = randomised(cls), torch.randn(500, D_IN)
    exact = copy.deepcopy(sae).training_forward(x).loss
    with torch.autocast("cpu", torch.bfloat16):
        output = sae.training_forward(x, dead_mask=torch.arange(D_SAE) < 5)
    output.loss.backward()
    assert output.sae_out.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 for parameter in sae.parameters())
    torch.testing.assert_close(output.losses["mse_loss"], exact, rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_round_trip_on_disk(cls: Any, rescale: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    sae = randomised(cls, rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=False).to(dtype)
    if cls is FusedBatchTopKSAE:
        sae.topk_threshold.fill_(1 / 3)
    x, dead = torch.randn(50, D_IN), torch.arange(D_SAE) < 9
    sae.save(tmp_path, model_name="m")
    tolerance = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}[dtype]
    for loaded in (SparseAutoencoder.load(tmp_path), cls.load(tmp_path)):
        assert type(loaded) is cls
        assert loaded.config() == sae.config()
        assert loaded.apply_b_dec_to_input is False
        assert loaded.metadata["model_name"] == "m"
        torch.testing.assert_close(loaded(x), sae(x), **tolerance)
        torch.testing.assert_close(loaded.encode(x), sae.encode(x), **tolerance)
        got, expected = (copy.deepcopy(s).training_forward(x, dead_mask=dead) for s in (loaded, sae))
        torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=0)
        if not rescale or cls is FusedTopKSAE:
            assert torch.equal(loaded(x), sae(x))
        loaded.save(tmp_path / "again")
        assert torch.equal(SparseAutoencoder.load(tmp_path / "again")(x), loaded(x)) or rescale


def test_a_batchtopk_folder_is_a_jumprelu_too(tmp_path: Path) -> None:
    sae, x = randomised(FusedBatchTopKSAE), torch.randn(50, D_IN)
    sae.save(tmp_path)
    plain = FusedJumpReLUSAE.load(tmp_path)
    assert plain.k is None
    assert (plain.threshold == 0.4).all()
    torch.testing.assert_close(plain(x), sae(x))
    plain.save(tmp_path / "plain")
    assert type(SparseAutoencoder.load(tmp_path / "plain")) is FusedJumpReLUSAE
    with pytest.raises(ValueError, match="FusedTopKSAE"):
        FusedTopKSAE.load(tmp_path)
    with pytest.raises(ValueError, match="FusedBatchTopKSAE"):
        FusedBatchTopKSAE.load(save_topk(tmp_path / "topk"))


def save_topk(path: Path) -> Path:
    randomised(FusedTopKSAE).save(path)
    return path


def test_a_threshold_edited_in_the_file_is_obeyed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    randomised(FusedBatchTopKSAE).save(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    config = json.loads((tmp_path / "cfg.json").read_text())
    del config["metadata"]["weights_sha256"]  # as the message about another file says
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    tensors = load_file(weights)
    save_file({**tensors, "threshold": torch.full((D_SAE,), 0.75)}, weights)
    assert SparseAutoencoder.load(tmp_path).topk_threshold == 0.75
    tensors["threshold"][3] = 0.5
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="load it as FusedJumpReLUSAE"):
        SparseAutoencoder.load(tmp_path)
    assert FusedJumpReLUSAE.load(tmp_path).threshold[3] == 0.5


def test_bad_files(tmp_path: Path) -> None:
    save_topk(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["k"] == 4
    for change, word in (({"k": None}, "k: expected an integer"), ({"k": 41}, "k: expected an integer")):
        (tmp_path / "cfg.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=word):
            SparseAutoencoder.load(tmp_path)
    del config["k"]
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="k: expected a value, but the key is missing"):
        SparseAutoencoder.load(tmp_path)
    FusedJumpReLUSAE(D_IN, D_SAE).save(tmp_path / "jumprelu")
    with pytest.raises(ValueError, match="batchtopk"):
        FusedBatchTopKSAE.load(tmp_path / "jumprelu")
