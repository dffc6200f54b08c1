"""The libraries' own code reads what is written, and computes what is read, wherever the library is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peer_files import (
    AUTOENCODERS,
    D_IN,
    D_SAE,
    DICTIONARIES,
    IN_NORM,
    OTHERS,
    K,
    circuit_tracer,
    dictionary_learning,
    weights,
)
from safetensors import safe_open

from fastsae import FusedJumpReLUSAE, FusedReLUSAE, FusedTopKSAE, SparseAutoencoder
from fastsae.peers import formats

# SAELens' loader, the repository and the folder that it would ask for, and what it needs to be told of a small SAE
LOADERS = {
    "gemma-scope": ("gemma_2", "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"),
    "gemma-scope-embedding": ("gemma_2", "google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6"),
    "gemma-scope-2": ("gemma_3", "google/gemma-scope-2-270m-pt", "resid_post/layer_12_width_16k_l0_small"),
    "gemma-scope-2-affine": (
        "gemma_3",
        "google/gemma-scope-2-270m-pt",
        "transcoder/layer_12_width_16k_l0_small_affine",
    ),
    "goodfire": ("goodfire", "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth"),
    "deepseek-r1": ("deepseek_r1", "a/b", "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"),
    "qwen-scope": ("qwen_scope", f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}", "layer9.sae.pt"),
    **{
        f"dictionary-learning-{name}": ("dictionary_learning_1", "a/b", "x")
        for name in DICTIONARIES
        if name != "AutoEncoderNew"
    },
    "hook-z": ("connor_rob_hook_z", "a/b", "gpt2-small_L3_Hcat_z.pt"),
    "circuit-tracer-relu": ("mwhanna_transcoder", "a/b", "layer_3.safetensors"),
}


def x_like(seed: int = 3) -> torch.Tensor:
    return torch.randn(50, D_IN, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def in_heads(x: torch.Tensor, case: str) -> torch.Tensor:
    """As SAELens takes the activations of attention heads: `[..., heads, d_head]`."""
    return x.unflatten(-1, (2, -1)) if case == "hook-z" else x


def saelens_reads(case: str, root: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The SAE that SAELens makes of a published repository, which `path` stands for."""
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")
    from sae_lens import SAE

    def download(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        if filename.endswith(".yaml"):
            width = {"d_model": {"value": D_IN}, "d_feature": {"value": D_SAE}, "batch_size": {"value": 128}}
            (root / filename).write_text(str({"model_name": "Qwen/Qwen3-0.6B", **width}))
            return str(root / filename)
        name = Path(filename).name
        if name.endswith("_cfg.json"):
            return str(path.with_name(name))
        return str(path / name if path.is_dir() else path)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        with safe_open(path / "params.safetensors", framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    name, repository, folder = LOADERS[case]
    told = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32"}
    cfg, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[name](repository, folder, "cpu", False, told)
    sae = SAE.from_dict({**loaders.handle_config_defaulting(cfg), "device": "cpu"})
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()})
    return sae


@pytest.mark.parametrize("case", LOADERS)
def test_saelens_loaders_agree(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = {**AUTOENCODERS, **OTHERS}[case](tmp_path)
    theirs = saelens_reads(case, tmp_path, peer.path, monkeypatch)
    acts, sae_out = formats.read(peer.path, LOADERS[case][0]).forward(x_like())
    x = in_heads(x_like(), case)
    torch.testing.assert_close(acts, theirs.encode(x))
    torch.testing.assert_close(sae_out, theirs(x).reshape(sae_out.shape), rtol=1e-5, atol=1e-5)


def test_llama_scope_agrees_with_saelens_where_decoder_norms_are_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json
    import math

    from peer_files import linear, write_json
    from safetensors.torch import save_file

    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")
    from sae_lens import SAE

    norms = {"in": IN_NORM, "out": IN_NORM}
    config = {"d_model": D_IN, "d_sae": D_SAE, "hook_point_in": "blocks.3.hook_resid_post", "jump_relu_threshold": 0.5}
    config |= {"dataset_average_activation_norm": norms, "sparsity_include_decoder_norm": True, "act_fn": "jumprelu"}
    write_json(tmp_path / "hyperparams.json", config)
    (tmp_path / "checkpoints").mkdir()
    save_file(linear(weights(unit_norm=True)), tmp_path / "checkpoints" / "final.safetensors")
    names = {"hyperparams.json": "hyperparams.json", "final.safetensors": "checkpoints/final.safetensors"}
    monkeypatch.setattr(
        loaders,
        "hf_hub_download",
        lambda repo_id, filename, **_: str(tmp_path / names[Path(filename).name]),
    )
    cfg, state, _ = loaders.llama_scope_sae_huggingface_loader("a", "b", cfg_overrides={"dtype": "float32"})
    theirs = SAE.from_dict({**loaders.handle_config_defaulting(cfg), "normalize_activations": "none"})
    theirs.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()})
    c = math.sqrt(D_IN) / IN_NORM
    theirs.fold_activation_norm_scaling_factor(c)
    acts, sae_out = formats.read(tmp_path).forward(x_like())
    torch.testing.assert_close(acts * c, theirs.encode(x_like()))  # theirs are in units of the scaled activations
    torch.testing.assert_close(sae_out, theirs(x_like()))
    assert json.loads((tmp_path / "hyperparams.json").read_text()) == config


@pytest.mark.parametrize("case", {**AUTOENCODERS, **OTHERS})
def test_saelens_runs_what_is_written_for_it(case: str, tmp_path: Path) -> None:
    pytest.importorskip("sae_lens")
    from sae_lens import SAE

    peer = {**AUTOENCODERS, **OTHERS}[case](tmp_path)
    converted = formats.read(peer.path)
    if case == "sparsify-transcoder":
        with pytest.raises(ValueError, match="saelens cannot hold a top-k transcoder"):
            formats.write(converted, tmp_path / "out", "saelens")
        return
    formats.write(converted, tmp_path / "out", "saelens")
    theirs = SAE.load_from_disk(tmp_path / "out")
    x, expected = in_heads(x_like(), case), peer.forward(x_like().double())
    torch.testing.assert_close(theirs.encode(x).double(), peer.encode(x_like().double()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs(x).double().reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk", "topk", "jumprelu"])
def test_checkpoints_of_saelens_training_are_read(architecture: str, tmp_path: Path) -> None:
    pytest.importorskip("sae_lens")
    from sae_lens.registry import get_sae_training_class

    cls, config_cls = get_sae_training_class(architecture)
    options: dict[str, Any] = {"k": K} if "topk" in architecture else {}
    options |= {"matryoshka_widths": [8, D_SAE]} if architecture.startswith("matryoshka") else {}
    sae = cls(config_cls(d_in=D_IN, d_sae=D_SAE, **options))
    w = weights()
    state = {**sae.state_dict(), "W_enc": w.W_enc, "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
    if "topk_threshold" in state:
        state["topk_threshold"] = torch.tensor(0.5, dtype=torch.float64)
    sae.load_state_dict(state)
    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "inference")
    from sae_lens import SAE

    theirs = SAE.load_from_disk(tmp_path / "inference")
    acts, sae_out = formats.read(tmp_path / "training").forward(x_like())
    torch.testing.assert_close(acts, theirs.encode(x_like()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae_out, theirs(x_like()), rtol=1e-5, atol=1e-5)


def ours(kind: str) -> SparseAutoencoder:
    made = {
        "standard": lambda: FusedReLUSAE(D_IN, D_SAE, apply_b_dec_to_input=True),
        "new": lambda: FusedReLUSAE(D_IN, D_SAE),
        "topk": lambda: FusedTopKSAE(D_IN, D_SAE, K),
        "jumprelu": lambda: FusedJumpReLUSAE(D_IN, D_SAE, apply_b_dec_to_input=True),
    }
    sae: SparseAutoencoder = made[kind]()
    w = weights()
    state = {**sae.state_dict(), "W_enc": w.W_enc, "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
    sae.load_state_dict(state | ({"threshold": w.threshold} if kind == "jumprelu" else {}))
    return sae


@pytest.mark.parametrize("kind", ["standard", "new", "topk", "jumprelu"])
def test_dictionary_learning_runs_what_is_written_for_it(kind: str, tmp_path: Path) -> None:
    utils = pytest.importorskip("dictionary_learning.utils")
    ours(kind).save(tmp_path / "own")
    formats.write(formats.read(tmp_path / "own"), tmp_path / "theirs", "dictionary-learning")
    theirs, config = utils.load_dictionary(str(tmp_path / "theirs"), "cpu")
    assert config["provenance"]["format"] == "saelens"
    torch.testing.assert_close(theirs(x_like()), ours(kind)(x_like()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DICTIONARIES)
def test_dictionary_learning_computes_what_is_read(name: str, tmp_path: Path) -> None:
    utils = pytest.importorskip("dictionary_learning.utils")
    dictionary_learning(tmp_path, name)
    theirs, _ = utils.load_dictionary(str(tmp_path), "cpu")
    acts, sae_out = formats.read(tmp_path).forward(x_like())
    if name != "AutoEncoder":  # which rescales features to unit decoder norms as it loads
        torch.testing.assert_close(acts, theirs.encode(x_like()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae_out, theirs(x_like()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify_reads_and_writes_the_same_files(transcode: bool, tmp_path: Path) -> None:
    sparsify = pytest.importorskip("sparsify")
    config = sparsify.SparseCoderConfig(expansion_factor=3, k=K, transcode=transcode, skip_connection=transcode)
    theirs = sparsify.SparseCoder(D_IN, config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter.data)
    theirs.save_to_disk(tmp_path / "theirs")
    converted = formats.read(tmp_path / "theirs")
    formats.write(converted, tmp_path / "again", "sparsify")
    again = sparsify.SparseCoder.load_from_disk(tmp_path / "again")
    assert again.cfg == sparsify.SparseCoderConfig(**{**vars(config), "num_latents": 3 * D_IN})
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    torch.testing.assert_close(converted.forward(x_like())[1], theirs(x_like()).sae_out, rtol=1e-4, atol=1e-4)


def test_sparsify_runs_a_topk_sae_of_ours(tmp_path: Path) -> None:
    sparsify = pytest.importorskip("sparsify")
    ours("topk").save(tmp_path / "own")
    formats.write(formats.read(tmp_path / "own"), tmp_path / "theirs", "sparsify")
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "theirs")
    torch.testing.assert_close(theirs(x_like()).sae_out, ours("topk")(x_like()), rtol=1e-4, atol=1e-4)


def test_circuit_tracer_names_its_layer(tmp_path: Path) -> None:
    formats.write(formats.read(circuit_tracer(tmp_path).path), tmp_path / "again", "circuit-tracer")
    assert (tmp_path / "again" / "layer_3.safetensors").is_file()
