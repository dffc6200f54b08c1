"""What a stranger's folder may hold: loaded right, or one ValueError that names the key or the tensor, at no cost."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsae import FusedBatchTopKSAE, FusedJumpReLUSAE, FusedReLUSAE, FusedTopKSAE, SparseAutoencoder
from fastsae.sae import files
from fastsae.sae.config_file import SavedConfig

D_IN, D_SAE = 8, 16
CLASSES = {
    "jumprelu": lambda: FusedJumpReLUSAE(D_IN, D_SAE),
    "log": lambda: FusedJumpReLUSAE(D_IN, D_SAE, log_threshold=True),
    "standard": lambda: FusedReLUSAE(D_IN, D_SAE, k=5),
    "topk": lambda: FusedTopKSAE(D_IN, D_SAE, 4),
    "batchtopk": lambda: FusedBatchTopKSAE(D_IN, D_SAE, 4),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    FusedJumpReLUSAE(D_IN, D_SAE).save(tmp_path)
    return tmp_path


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, **changes: torch.Tensor) -> None:
    """Writes other tensors, and forgets the checksum."""
    path = folder / "sae_weights.safetensors"
    save_file({**load_file(path), **changes}, path)
    metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
    metadata.pop("weights_sha256", None)
    change_config(folder, metadata=metadata)


@pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
def test_loading_draws_no_random_numbers_and_keeps_the_layout(make: Any, tmp_path: Path) -> None:
    sae = make()
    sae.save(tmp_path)
    before = torch.get_rng_state()
    loaded = SparseAutoencoder.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(loaded) is type(sae)
    assert loaded.config() == sae.config()
    for (name, got), (_, expected) in zip(loaded.state_dict().items(), sae.state_dict().items(), strict=True):
        assert got.device.type == "cpu"
        assert got.stride() == expected.stride(), name
        assert got.dtype == expected.dtype, name
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    x = torch.randn(5, D_IN)
    torch.testing.assert_close(loaded(x), sae(x))
    loaded.training_forward(x).loss.backward()


@pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
def test_reading_a_state_leaves_the_tensors_of_the_file_alone(make: Any, tmp_path: Path) -> None:
    sae = make()
    sae.save(tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    config = SavedConfig.read(json.loads((tmp_path / "cfg.json").read_text()), sorted(sae.file_architectures))
    type(sae).state_from(config, tensors)
    assert tensors.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_a_subclass_of_the_user_loads_as_itself(folder: Path) -> None:
    class Mine(FusedJumpReLUSAE):
        pass

    assert type(Mine.load(folder)) is Mine
    assert type(SparseAutoencoder.load(folder)) is FusedJumpReLUSAE


@pytest.mark.parametrize("name", ["d_in", "d_sae"])
def test_giant_sizes_are_refused_before_they_are_allocated(folder: Path, name: str) -> None:
    change_config(folder, **{name: 10**9})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="expected the tensors"):
        SparseAutoencoder.load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


ODD: list[tuple[str, Any, str]] = [
    ("d_in", True, "d_in"),
    ("d_in", 8.0, "d_in"),
    ("d_in", -8, "d_in"),
    ("d_in", [8], "d_in"),
    ("d_in", None, "d_in"),
    ("d_sae", "16", "d_sae"),
    ("d_sae", 0, "d_sae"),
    ("d_sae", 10**4000, "d_sae"),
    ("dtype", 32, "dtype"),
    ("dtype", "int8", "dtype"),
    ("dtype", ["float32"], "dtype"),
    ("architecture", [], "architecture"),
    ("architecture", {}, "architecture"),
    ("architecture", True, "architecture"),
    ("apply_b_dec_to_input", 1, "apply_b_dec_to_input"),
    ("apply_b_dec_to_input", "false", "apply_b_dec_to_input"),
    ("normalize_activations", "layer_norm", "normalize_activations"),
    ("normalize_activations", True, "normalize_activations"),
    ("normalize_activations", {}, "normalize_activations"),
    ("reshape_activations", "hook_z", "reshape_activations"),
    ("metadata", 1, "metadata"),
    ("metadata", [], "metadata"),
    ("metadata", {"fastsae": [1]}, "metadata.fastsae"),
    ("metadata", {"fastsae": {"architecture": []}}, "metadata.fastsae.architecture"),
    *(
        ("metadata", {"fastsae": {"architecture": "jumprelu", name: value}}, f"metadata.fastsae.{name}")
        for name, value in (
            ("bandwidth", 0),
            ("bandwidth", "wide"),
            ("bandwidth", float("nan")),
            ("bandwidth", float("inf")),
            ("bandwidth", 10**400),
            ("bandwidth", True),
            ("init_threshold", -1),
            ("k", 17),
            ("k", 0),
            ("k", 2.5),
            ("ste_to_input", "no"),
            ("log_threshold", 1),
            ("momentum", 1),
        )
    ),
]


@pytest.mark.parametrize(("key", "value", "named"), ODD, ids=[f"{key}={str(value)[:40]}" for key, value, _ in ODD])
def test_a_wrong_value_is_one_error_that_names_its_key(folder: Path, key: str, value: Any, named: str) -> None:
    metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
    if key == "metadata" and isinstance(value, dict):
        value = {**metadata, **value}
    change_config(folder, **{key: value})
    with pytest.raises(ValueError, match=rf"{named}: expected .*, (got|only|but)") as caught:
        SparseAutoencoder.load(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"metadata": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "[]",
        "1",
        "",
        "{",
        "\x00",
        '{"d_in": 1' + "0" * 5000 + "}",
    ],
    ids=["open", "nested", "list", "number", "empty", "cut off", "zero", "digits"],
)
def test_a_file_that_is_no_object_is_one_error(folder: Path, text: str) -> None:
    (folder / "cfg.json").write_text(text)
    with pytest.raises(ValueError, match=r"cfg\.json"):
        SparseAutoencoder.load(folder)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("threshold", torch.zeros(D_SAE, dtype=torch.int64)),
        ("threshold", torch.ones(D_SAE, dtype=torch.bool)),
        ("b_dec", torch.full((D_IN,), 1 + 2j)),
        ("W_dec", torch.ones(D_SAE, D_IN, dtype=torch.int8)),
        ("W_dec", torch.ones(D_SAE, D_IN).to(torch.float8_e4m3fn)),
        ("W_enc", torch.full((D_IN, D_SAE), float("nan"))),
        ("b_enc", torch.full((D_SAE,), float("-inf"))),
        ("b_enc", torch.full((D_SAE,), 1e300, dtype=torch.float64)),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.dtype),
)
def test_tensors_of_other_kinds_are_refused_by_name(folder: Path, name: str, tensor: torch.Tensor) -> None:
    change_tensors(folder, **{name: tensor})
    with pytest.raises(ValueError, match=f"{name}: expected"):
        SparseAutoencoder.load(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_tensors_of_any_width_are_read(folder: Path, dtype: torch.dtype) -> None:
    weights = load_file(folder / "sae_weights.safetensors")
    change_tensors(folder, **{name: tensor.to(dtype) for name, tensor in weights.items()})
    loaded = SparseAutoencoder.load(folder)
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded.W_dec, weights["W_dec"].to(dtype).float(), rtol=0, atol=0, check_stride=False)


def test_another_weights_file_is_noticed(folder: Path) -> None:
    path = folder / "sae_weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="weights_sha256"):
        SparseAutoencoder.load(folder)
    change_tensors(folder)  # without a checksum, as SAELens writes a folder
    SparseAutoencoder.load(folder)


def test_metadata_survive_a_round_trip_without_an_old_checksum(folder: Path, tmp_path: Path) -> None:
    sae = FusedJumpReLUSAE(D_IN, D_SAE)
    sae.save(tmp_path / "a", model_name="m")
    loaded = SparseAutoencoder.load(tmp_path / "a")
    assert loaded.metadata["model_name"] == "m"
    assert not {"weights_sha256", "fastsae"} & loaded.metadata.keys()
    with torch.no_grad():
        loaded.b_dec += 1
    loaded.save(tmp_path / "b")
    torch.testing.assert_close(SparseAutoencoder.load(tmp_path / "b").b_dec, loaded.b_dec)


def test_weights_that_load_would_refuse_are_not_saved(folder: Path) -> None:
    sae = SparseAutoencoder.load(folder)
    with torch.no_grad():
        sae.b_enc[3] = float("nan")
    with pytest.raises(ValueError, match="b_enc: expected finite numbers"):
        sae.save(folder)
    assert SparseAutoencoder.load(folder).b_enc.isfinite().all()  # the good one is still there


OLD = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "torch.float32",
    "device": "cuda:0",
    "model_name": "gpt2-small",
    "hook_point": "blocks.8.hook_resid_pre",
    "hook_point_layer": 8,
    "activation_fn_str": "relu",
    "normalize_activations": False,
}


@pytest.mark.parametrize("normalize", [False, None, "none"])
def test_folders_of_older_saelens_are_read(tmp_path: Path, normalize: Any) -> None:
    sae = FusedReLUSAE(D_IN, D_SAE, apply_b_dec_to_input=True)
    sae.save(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps({**OLD, "normalize_activations": normalize}))
    loaded = SparseAutoencoder.load(tmp_path)
    assert type(loaded) is FusedReLUSAE
    assert loaded.apply_b_dec_to_input
    assert loaded.metadata == {"model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre"}
    assert torch.equal(loaded.W_enc, sae.W_enc)


def test_an_older_topk_is_read(tmp_path: Path) -> None:
    FusedTopKSAE(D_IN, D_SAE, 4, rescale_acts_by_decoder_norm=False).save(tmp_path)
    old = {**OLD, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    loaded = SparseAutoencoder.load(tmp_path)
    assert isinstance(loaded, FusedTopKSAE)
    assert (loaded.k, loaded.rescale_acts_by_decoder_norm) == (4, False)


@pytest.mark.parametrize(
    "change",
    [{"activation_fn_str": "tanh-relu"}, {"normalize_activations": True}, {"finetuning_scaling_factor": True}],
    ids=str,
)
def test_what_an_older_saelens_did_beyond_relu_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    FusedReLUSAE(D_IN, D_SAE).save(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps({**OLD, **change}))
    with pytest.raises(ValueError, match=next(iter(change)).removesuffix("_str")):
        SparseAutoencoder.load(tmp_path)


@pytest.mark.parametrize("old", [False, True])
def test_saelens_and_we_read_the_same_from_its_spellings(tmp_path: Path, old: bool) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    sae = FusedReLUSAE(D_IN, D_SAE)
    with torch.no_grad():
        sae.b_dec.normal_()
    sae.save(tmp_path)
    if old:
        (tmp_path / "cfg.json").write_text(json.dumps(OLD))
    else:
        change_config(tmp_path, dtype="torch.float32")
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    x = torch.randn(20, D_IN)
    torch.testing.assert_close(SparseAutoencoder.load(tmp_path)(x), theirs(x))


def test_a_folder_that_saelens_changed_and_saved_again_is_read(tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    FusedJumpReLUSAE(D_IN, D_SAE).save(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    with torch.no_grad():
        theirs.b_dec.fill_(2.0)
    theirs.save_model(str(tmp_path))
    assert files.CHECKSUM in json.loads((tmp_path / "cfg.json").read_text())["metadata"]  # it keeps what it knows not
    assert (SparseAutoencoder.load(tmp_path).b_dec == 2).all()


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    sae = FusedJumpReLUSAE(D_IN, D_SAE)
    sae.save("~/mine")
    assert (tmp_path / "home" / "mine" / "cfg.json").is_file()
    assert torch.equal(FusedJumpReLUSAE.load("~/mine").W_enc, sae.W_enc)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_full_disk_leaves_the_older_folder_whole(folder: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    script = (
        "import resource, signal, sys\n"
        "from fastsae import FusedJumpReLUSAE\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    FusedJumpReLUSAE(64, 256).save(sys.argv[1])\n"
        "except OSError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], check=True, capture_output=True, text=True, env={**os.environ}
    )
    assert "File too large" in done.stdout
    assert "sae_weights.safetensors'" in done.stdout  # the file, not the temporary one beside it
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
