"""SAEs on the hub, tried against a stand-in for it on this machine."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
import torch

from fastsae import FastsaeError, FusedJumpReLUSAE, FusedTopKSAE, SparseAutoencoder
from fastsae.sae import hub as sae_hub

constants: Any = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
hf_api: Any = pytest.importorskip("huggingface_hub.hf_api")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    """A stand-in, which this process's huggingface_hub takes for the hub, with an empty cache and somebody logged in."""
    with hub_server.running() as (served, address):
        before = constants.ENDPOINT
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] in ("huggingface_hub", "sae_lens"):
                for attribute, value in list(vars(module).items()):
                    if isinstance(value, str) and attribute.isupper() and value.startswith(before):
                        monkeypatch.setattr(module, attribute, address + value.removeprefix(before))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hf_api.api, "endpoint", address)
        monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
        monkeypatch.chdir(tmp_path)
        yield served


def filled(make: Any = lambda: FusedJumpReLUSAE(8, 32)) -> Any:
    torch.manual_seed(0)
    sae = make()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.rand_like(parameter))
    sae.metadata |= {"model_name": "owner/a-model", "hook_name": "model.layers.3", "l0": 31.754321}
    return sae


@pytest.mark.parametrize("subfolder", [None, "layer-3", "layers/3"])
@pytest.mark.parametrize("make", [lambda: FusedJumpReLUSAE(8, 32), lambda: FusedTopKSAE(8, 32, k=4)])
def test_what_was_pushed_is_loaded_again(hub: hub_server.Hub, make: Any, subfolder: str | None) -> None:
    sae = filled(make)
    address = sae.push_to_hub("me/my-saes", subfolder)
    assert address.endswith(f"/me/my-saes/commit/{hub.sha('me/my-saes')}")
    place = "" if subfolder is None else f"{subfolder}/"
    assert hub.files("me/my-saes").keys() == {"README.md", f"{place}cfg.json", f"{place}sae_weights.safetensors"}
    assert len(hub.commits["me/my-saes"]) == 2  # one commit for all, after the empty one
    loaded = SparseAutoencoder.load("me/my-saes", subfolder=subfolder)
    assert type(loaded) is type(sae)
    torch.testing.assert_close(loaded.state_dict(), sae.state_dict(), rtol=0, atol=0)
    assert loaded.metadata["hook_name"] == "model.layers.3"


def test_saelens_loads_what_was_pushed(hub: hub_server.Hub, request: pytest.FixtureRequest) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    sae = filled()
    log_sparsity = torch.rand(32).log10()
    sae.push_to_hub("me/my-saes", "layer-3", log_sparsity=log_sparsity)
    theirs, _, sparsity = sae_lens.SAE.from_pretrained_with_cfg_and_sparsity("me/my-saes", "layer-3")
    assert torch.equal(sparsity, log_sparsity)
    x = torch.randn(20, 8)
    torch.testing.assert_close(theirs(x), sae(x))
    assert theirs.cfg.metadata.hook_name == "model.layers.3"


def test_several_saes_share_a_repository_and_its_card(hub: hub_server.Hub) -> None:
    first, second = filled(), filled(lambda: FusedTopKSAE(8, 32, k=4))
    first.push_to_hub("me/saes", "a")
    hub.commits["me/saes"][-1]["README.md"] = b"written by its owner"
    second.push_to_hub("me/saes", "b", commit_message="the other one")
    assert hub.files("me/saes")["README.md"] == b"written by its owner"
    assert isinstance(SparseAutoencoder.load("me/saes", subfolder="a"), FusedJumpReLUSAE)
    assert isinstance(SparseAutoencoder.load("me/saes", subfolder="b"), FusedTopKSAE)
    with pytest.raises(
        FileNotFoundError, match=r"expected cfg\.json in this repository; subfolder: expected one of a, b$"
    ):
        SparseAutoencoder.load("me/saes")
    with pytest.raises(FileNotFoundError, match=r"expected c/cfg\.json in this repository"):
        SparseAutoencoder.load("me/saes", subfolder="c")
    with pytest.raises(ValueError, match="FusedTopKSAE runs, got architecture 'jumprelu'"):
        FusedTopKSAE.load("me/saes", subfolder="a")


def test_an_older_commit_is_loaded_by_its_name(hub: hub_server.Hub) -> None:
    sae = filled()
    sae.push_to_hub("me/sae")
    older = hub.sha("me/sae")
    with torch.no_grad():
        sae.b_dec.add_(1)
    sae.push_to_hub("me/sae")
    newest = SparseAutoencoder.load("me/sae")
    assert torch.equal(newest.b_dec, SparseAutoencoder.load("me/sae", revision=older).b_dec + 1)
    with pytest.raises(FileNotFoundError, match="no such revision"):
        SparseAutoencoder.load("me/sae", revision="v9")


def test_a_folder_comes_before_a_repository(hub: hub_server.Hub, tmp_path: Path) -> None:
    filled().save(tmp_path / "me" / "sae")
    filled().save(tmp_path / "me" / "sae" / "inner")
    SparseAutoencoder.load("me/sae")
    SparseAutoencoder.load("me/sae", subfolder="inner")
    for name in ("./me/other", "sae", "a/b/c", "../me/other", tmp_path / "me" / "other", Path("me/other")):
        with pytest.raises(FileNotFoundError, match=r"cfg\.json is missing"):
            SparseAutoencoder.load(name)
    assert hub.requests == []


def test_a_repository_that_is_not_there(hub: hub_server.Hub) -> None:
    with pytest.raises(FileNotFoundError, match="me/nothing: there is no such folder, and no such repository on the"):
        SparseAutoencoder.load("me/nothing")


def test_a_repository_of_something_else(hub: hub_server.Hub) -> None:
    hub.commits["me/model"] = [{"config.json": b"{}", "runner_cfg.json": b"{}"}]
    with pytest.raises(FileNotFoundError, match=r"none of its 2 files is a cfg\.json"):
        SparseAutoencoder.load("me/model")


def test_a_corrupt_upload_is_one_error(hub: hub_server.Hub) -> None:
    filled().push_to_hub("me/sae")
    hub.commits["me/sae"][-1]["sae_weights.safetensors"] = b"cut off"
    with pytest.raises(ValueError, match="expected safetensors, got a corrupt or truncated file"):
        SparseAutoencoder.load("me/sae")


def test_a_hub_that_fails_is_one_error(hub: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "none")
    with pytest.raises(FastsaeError, match="me/sae: the Hugging Face hub took no upload"):
        filled().push_to_hub("me/sae")
    assert hub.commits == {}


def test_what_cannot_be_saved_is_not_pushed(hub: hub_server.Hub) -> None:
    sae = filled()
    with torch.no_grad():
        sae.b_dec[0] = float("nan")
    with pytest.raises(ValueError, match="b_dec: expected finite numbers"):
        sae.push_to_hub("me/sae")
    for wrong in (
        torch.zeros(31),
        torch.full((32,), -torch.inf),
    ):  # a feature that never fires has a floor, as in SAELens
        with pytest.raises(ValueError, match="log_sparsity: expected 32 finite numbers"):
            filled().push_to_hub("me/sae", log_sparsity=wrong)
    assert hub.requests == []


def test_no_connection_is_one_error(hub: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        FastsaeError, match="me/sae: there is no such folder, and it could not be read from the Hugging"
    ):
        SparseAutoencoder.load("me/sae")


def test_without_huggingface_hub_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(FastsaeError, match="needs `huggingface_hub`, which is not installed"):
        SparseAutoencoder.load("me/sae")


def test_the_card_says_what_the_sae_is() -> None:
    sae = filled()
    sae.metadata |= {"dataset_path": "a | b\nc"}
    card = sae_hub.model_card(sae, "me/my-saes", "layer-3")
    for line in (
        'base_model: "owner/a-model"',
        "# my-saes",
        "| features (d_sae) | 32 |",
        "| active features per token (L0) | 31.75 |",
        "| dataset | a \\| b c |",
        "sae = SparseAutoencoder.load(\"me/my-saes\", subfolder='layer-3')",
        'sae = SAE.from_pretrained("me/my-saes", "layer-3")',
    ):
        assert f"\n{line}\n" in card
    sae.metadata["model_name"] = "/home/somebody/model"
    card = sae_hub.model_card(sae, "me/my-saes")
    assert "base_model" not in card
    assert "SAE.from_pretrained" not in card
