"""Every format is read as its own library computes it, and written so that nothing is lost, or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peer_files import AUTOENCODERS, D_IN, D_SAE, OTHERS, PeerFile, dictionary_learning, gemma_scope, saelens, sparsify

from fastsae import FusedBatchTopKSAE, FusedJumpReLUSAE, FusedReLUSAE, FusedTopKSAE, SparseAutoencoder, UsageError
from fastsae.peers import formats
from fastsae.peers.formats.stored import Stored

EVERY = {**AUTOENCODERS, **OTHERS}
FORMAT_NAMES = [one.name for one in formats.FORMATS]


def inputs() -> torch.Tensor:
    x = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return x * torch.logspace(-1, 1, 40, dtype=torch.float64)[:, None] + 1


def check_same(peer: PeerFile, converted: formats.Converted) -> None:
    x = inputs()
    acts, sae_out = converted.forward(x)
    expected = peer.encode(x)
    assert torch.equal(acts != 0, expected != 0)
    torch.testing.assert_close(acts, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae_out, peer.forward(x), rtol=1e-5, atol=1e-4)


def format_of(case: str) -> str:
    return max((name for name in FORMAT_NAMES if case.startswith(name)), key=len)


@pytest.mark.parametrize("case", EVERY)
def test_a_format_is_recognised_and_read_as_its_library_computes_it(case: str, tmp_path: Path) -> None:
    peer = EVERY[case](tmp_path)
    found = formats.recognise(peer.path)
    assert found is not None
    assert found.name == format_of(case)
    converted = formats.read(peer.path)
    assert converted.history["format"] == found.name
    assert all(len(file["sha256"]) == 64 for file in converted.history["files"])
    check_same(peer, converted)


@pytest.mark.parametrize("case", AUTOENCODERS)
def test_load_runs_an_sae_of_any_library(case: str, tmp_path: Path) -> None:
    peer = AUTOENCODERS[case](tmp_path)
    sae = SparseAutoencoder.load(peer.path)
    x = inputs().float()
    torch.testing.assert_close(sae(x).double(), peer.forward(x.double()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.encode(x).double(), peer.encode(x.double()), rtol=1e-4, atol=1e-4)
    if format_of(case) != "saelens":
        assert sae.metadata["provenance"]["format"] == format_of(case)
    sae.save(tmp_path / "again")
    assert torch.equal(SparseAutoencoder.load(tmp_path / "again")(x), sae(x))


@pytest.mark.parametrize(
    "case", ["gemma-scope-2-affine", "sparsify-transcoder", "openai-topk", "circuit-tracer", "hook-z"]
)
def test_load_refuses_by_name_what_it_does_not_run(case: str, tmp_path: Path) -> None:
    peer = OTHERS[case](tmp_path)
    with pytest.raises(
        ValueError, match=r"architecture: .*transcoder|top-k transcoder|normalize_activations|reshape_activations"
    ):
        SparseAutoencoder.load(peer.path)


def test_load_gives_the_class_that_can_train_on(tmp_path: Path) -> None:
    for name in ("BatchTopKSAE", "AutoEncoderTopK", "JumpReluAutoEncoder", "AutoEncoder"):
        (tmp_path / name).mkdir()
        dictionary_learning(tmp_path / name, name)
    sae = SparseAutoencoder.load(tmp_path / "BatchTopKSAE")
    assert isinstance(sae, FusedBatchTopKSAE)
    assert (sae.k, float(sae.topk_threshold)) == (4, pytest.approx(0.4))
    sae.training_forward(torch.randn(8, D_IN)).loss.backward()
    assert isinstance(SparseAutoencoder.load(tmp_path / "AutoEncoderTopK"), FusedTopKSAE)
    assert isinstance(FusedJumpReLUSAE.load(tmp_path / "JumpReluAutoEncoder"), FusedJumpReLUSAE)
    with pytest.raises(ValueError, match="expected an SAE that FusedTopKSAE runs, got architecture 'standard'"):
        FusedTopKSAE.load(tmp_path / "AutoEncoder")


# decoder norms in the gate became a threshold for each feature, which these formats hold as one number or as logarithms;
# hook-z is only read
CANNOT_GO_BACK = (
    "llama-scope",
    "llama-scope-bf16",
    "llama-scope-transcoder",
    "llamascopium",
    "llamascopium-r1",
    "hook-z",
)


def try_to_write(converted: formats.Converted, folder: Path, target: str) -> tuple[formats.Converted | None, str]:
    try:
        return formats.write(converted, folder, target), ""
    except ValueError as error:
        return None, str(error)
    except UsageError as error:
        assert target == "hook-z"
        return None, str(error).removeprefix("--to: ").replace("is only read", "cannot hold it, it is only read")


@pytest.mark.parametrize("target", FORMAT_NAMES)
@pytest.mark.parametrize("case", EVERY)
def test_what_is_written_is_the_same_function_or_refused(case: str, target: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    peer = EVERY[case](source)
    converted = formats.read(peer.path)
    folder = tmp_path / f"target-L0_{converted.k}"
    written, problem = try_to_write(converted, folder, target)
    if written is None:
        assert problem.startswith(target)
        assert "cannot hold" in problem or "stores the logarithm" in problem
        assert "\n" not in problem
        assert not folder.exists()
        assert target != format_of(case) or case in CANNOT_GO_BACK
        return
    again = formats.read(folder, target)
    folded = any("folded" in note for note in written.notes[len(converted.notes) :])
    difference = formats.difference(converted, again)
    assert difference["other_features"] == 0
    assert difference["sae_out"] <= (1e-4 * difference["size"] if folded else 0)
    check_same(peer, again)
    assert again.history["history"]["format"] == format_of(case)
    assert again.history["history"]["changes"] == list(written.notes)
    found = formats.recognise(folder)
    assert found is not None
    assert found.name == target


@pytest.mark.parametrize("case", ["saelens-topk", "sparsify", "dictionary-learning-AutoEncoderTopK"])
def test_a_tour_through_three_libraries_changes_no_bit(case: str, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    start = now = formats.read(AUTOENCODERS[case](tmp_path / "0").path)
    for i, target in enumerate(("sparsify", "dictionary-learning", "saelens", "sparsify", "saelens")):
        formats.write(now, tmp_path / f"{i}-{target}", target)
        now = formats.read(tmp_path / f"{i}-{target}")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(now, name), getattr(start, name))


def test_jumprelu_goes_through_npz_and_dictionary_learning_without_a_change(tmp_path: Path) -> None:
    start = now = formats.read(gemma_scope(tmp_path).path)
    for i, target in enumerate(("dictionary-learning", "saelens", "gemma-scope", "gemma-scope-2", "saelens")):
        formats.write(now, tmp_path / str(i), target)
        now = formats.read(tmp_path / str(i))
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        assert torch.equal(getattr(now, name), getattr(start, name)), name
    assert now.metadata["hook_name"] == "blocks.20.hook_resid_post"


def test_a_config_comes_back_where_its_format_is_written_again(tmp_path: Path) -> None:
    peer = dictionary_learning(tmp_path, "AutoEncoderTopK", 0.7)
    config = json.loads((peer.path / "config.json").read_text())
    formats.write(formats.read(peer.path), tmp_path / "a", "saelens")
    formats.write(formats.read(tmp_path / "a"), tmp_path / "b", "dictionary-learning")
    again = json.loads((tmp_path / "b" / "config.json").read_text())
    assert again["trainer"] == config["trainer"]
    assert again["buffer"] == config["buffer"]
    assert torch.load(tmp_path / "b" / "ae.pt", weights_only=True)["threshold"] == torch.tensor(0.7)


def test_a_number_at_the_threshold_does_not_fire(tmp_path: Path) -> None:
    for case in ("gemma-scope", "gemma-scope-2", "dictionary-learning-JumpReluAutoEncoder"):
        (tmp_path / case).mkdir()
        converted = formats.read(AUTOENCODERS[case](tmp_path / case).path)
        at = replace(converted, b_enc=converted.threshold)
        sae = FusedJumpReLUSAE(D_IN, D_SAE)
        sae.load_state_dict({name: getattr(at, name) for name in sae.state_dict()})
        assert not at.forward(torch.zeros(2, D_IN))[0].any()
        assert not sae.encode(torch.zeros(2, D_IN)).any()


def test_sparsify_sizes_come_from_the_expansion_factor_where_num_latents_is_0(tmp_path: Path) -> None:
    peer = sparsify(tmp_path, num_latents=0)
    with pytest.raises(ValueError, match=r"encoder.weight: expected shape \[d_sae = 192, d_in = 6\], got \[20, 6\]"):
        formats.read(peer.path)
    config = json.loads((peer.path / "cfg.json").read_text())
    (peer.path / "cfg.json").write_text(json.dumps({**config, "expansion_factor": 3, "d_in": 6}))
    with pytest.raises(ValueError, match="d_sae = 18"):
        formats.read(peer.path)


def test_16_bits_are_kept_and_widened_only_to_fold(tmp_path: Path) -> None:
    sae = FusedReLUSAE(D_IN, D_SAE, dtype=torch.bfloat16)
    sae.save(tmp_path / "plain")
    converted = formats.read(tmp_path / "plain")
    assert formats.write(converted, tmp_path / "a", "goodfire").dtype == torch.bfloat16
    assert formats.read(tmp_path / "a").dtype == torch.bfloat16
    torch.nn.init.ones_(sae.b_dec)
    sae.save(tmp_path / "biased")
    written = formats.write(formats.read(tmp_path / "biased"), tmp_path / "b", "openai")
    assert written.dtype == torch.float32
    assert "widened bfloat16 to float32, because folding rounds" in written.notes
    assert formats.read(tmp_path / "b").dtype == torch.float32


def test_loader_names_of_saelens_are_formats() -> None:
    aliases = {alias for one in formats.FORMATS for alias in one.aliases} | set(FORMAT_NAMES)
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")
    refused = {"temporal", "mntss_clt_layer_transcoder"}
    assert set(loaders.NAMED_PRETRAINED_SAE_LOADERS) - refused <= aliases
    for name in refused:
        with pytest.raises(UsageError, match=f"--from: {name} is not converted: it "):
            formats.read(Path(__file__), name)


def test_shapes_of_inputs_are_kept(tmp_path: Path) -> None:
    sae = SparseAutoencoder.load(gemma_scope(tmp_path).path)
    for shape in ((D_IN,), (0, D_IN), (3, D_IN), (2, 3, D_IN)):
        assert sae(torch.ones(shape)).shape == shape


def test_headers_alone_tell_formats_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    paths = [
        make(tmp_path / "a" / str(i))
        for i, make in enumerate([saelens, gemma_scope])
        if not (tmp_path / "a" / str(i)).mkdir()
    ]
    monkeypatch.setattr(Stored, "load", property(lambda stored: pytest.fail("a tensor was read")))
    assert all(formats.recognise(peer.path) for peer in paths)


def test_only_published_layouts_are_read_by_their_names(tmp_path: Path) -> None:
    path = gemma_scope(tmp_path / "embedding" / "transcoders").path
    converted = formats.read(path)
    assert (converted.is_transcoder, converted.notes) == (False, ())
    assert formats.read(path, "gemma_2_transcoder").is_transcoder
    published = gemma_scope(tmp_path / "gemma-scope-2b-pt-transcoders").path
    assert formats.read(published).is_transcoder


def test_a_real_size_folds_without_rounding_the_weights(tmp_path: Path) -> None:
    sae = FusedTopKSAE(64, 9000, 32)
    torch.nn.init.normal_(sae.b_dec)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(9000, 1) + 0.5)
    sae.save(tmp_path / "own")
    start = formats.read(tmp_path / "own")
    formats.write(start, tmp_path / "SAE-L0_32", "qwen-scope")
    found = formats.difference(start, formats.read(tmp_path / "SAE-L0_32"))
    assert found["other_features"] <= 2
    assert found["sae_out"] < 1e-4 * found["size"]
