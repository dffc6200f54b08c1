"""What a stranger's file may hold: one line that says what was expected, nothing run, and no memory taken for it."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peer_files import AUTOENCODERS, D_IN, D_SAE, OTHERS
from safetensors.torch import load_file, save_file

from fastsae import SparseAutoencoder, UsageError
from fastsae.peers import formats
from fastsae.peers.formats import stored

EVERY = {**AUTOENCODERS, **OTHERS}
WEIGHTS = (".safetensors", ".npz", ".pt", ".pth")


class Harm:
    """A pickle that writes a file where it is run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def weights_of(path: Path) -> Path:
    if path.is_file():
        return path
    return next(file for file in sorted(path.rglob("*")) if file.suffix in WEIGHTS)


def change(path: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrites a file of weights with other content."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            content = edit({name: torch.from_numpy(arrays[name]) for name in arrays})
        np.savez(path, **{name: tensor.numpy() for name, tensor in content.items()})
    elif path.suffix == ".safetensors":
        save_file(edit({name: tensor.clone() for name, tensor in load_file(path).items()}), path)
    else:
        torch.save(edit(torch.load(path, weights_only=True)), path)


def problem_of(path: Path, format_name: str) -> str:
    with pytest.raises((ValueError, UsageError, FileNotFoundError)) as caught:
        formats.read(path, format_name)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 700
    assert str(path.name) in text or str(weights_of(path).name) in text
    return text


def first_matrix(content: dict[str, Any]) -> str:
    """The name of one that is not square."""
    return next(
        n for n, value in content.items() if isinstance(value, torch.Tensor) and {*value.shape} == {D_IN, D_SAE}
    )


EDITS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "missing": (lambda c: {n: v for n, v in c.items() if n != first_matrix(c)}, "expected a tensor, but it is missing"),
    "unknown": (lambda c: {**c, "surprise": torch.ones(2)}, "'surprise': expected no such tensor"),
    "transposed": (lambda c: {**c, first_matrix(c): c[first_matrix(c)].t().contiguous()}, "expected shape"),
    "flat": (lambda c: {**c, first_matrix(c): c[first_matrix(c)].flatten()}, "expected shape"),
    "empty": (lambda c: {**c, first_matrix(c): torch.zeros(0, D_IN)}, "expected shape"),
    "integers": (lambda c: {**c, first_matrix(c): c[first_matrix(c)].int()}, "expected floating-point numbers"),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("case", EVERY)
def test_wrong_tensors_are_named_by_their_headers_alone(
    case: str, edit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = EVERY[case](tmp_path)
    found = formats.recognise(peer.path)
    assert found is not None
    change(weights_of(peer.path), EDITS[edit][0])
    monkeypatch.setattr(stored, "is_finite", lambda tensor: pytest.fail("numbers were read"))
    assert EDITS[edit][1] in problem_of(peer.path, found.name)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", EVERY)
def test_numbers_that_are_none_are_refused(case: str, number: float, tmp_path: Path) -> None:
    peer = EVERY[case](tmp_path)
    found = formats.recognise(peer.path)
    assert found is not None

    def edit(content: dict[str, Any]) -> dict[str, Any]:
        content[first_matrix(content)][1, 1] = number
        return content

    change(weights_of(peer.path), edit)
    assert "expected finite numbers, got NaN or infinity" in problem_of(peer.path, found.name)


@pytest.mark.parametrize("case", EVERY)
def test_damaged_files_are_refused(case: str, tmp_path: Path) -> None:
    peer = EVERY[case](tmp_path)
    found = formats.recognise(peer.path)
    assert found is not None
    path = weights_of(peer.path)
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\x00" * 64, b"\xff" * len(content)):
        path.write_bytes(damaged)
        problem_of(peer.path, found.name)


CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "saelens-architecture": ("saelens-jumprelu", {"architecture": "gated"}, "architecture: expected standard or"),
    "saelens-size": ("saelens-jumprelu", {"d_in": 5}, r"expected shape \[d_in = 5, d_sae = 20\], got \[6, 20\]"),
    "saelens-norm": (
        "saelens-jumprelu",
        {"normalize_activations": "expected_average_only_in"},
        "its factor is in no file",
    ),
    "saelens-k": ("saelens-topk", {"k": 21}, "k: expected an integer from 1 to 20, got 21"),
    "sparsify-activation": ("sparsify", {"activation": "groupmax"}, "activation: expected topk, got 'groupmax'"),
    "sparsify-signed": ("sparsify", {"signed": True}, "signed: expected false"),
    "sparsify-d_in": ("sparsify", {"d_in": 2**40}, "d_in: expected an integer from 1"),
    "gemma": ("gemma-scope-2", {"architecture": "topk"}, "architecture: expected jump_relu"),
    "dictionary": (
        "dictionary-learning-AutoEncoder",
        {"trainer": {"dict_class": "GatedAutoEncoder"}},
        "trainer.dict_class: exp",
    ),
    "scope-glu": ("llama-scope", {"use_glu_encoder": True}, "use_glu_encoder: expected false"),
    "scope-norm": (
        "llama-scope",
        {"dataset_average_activation_norm": {"in": 0}},
        "norm.in: expected a finite number > 0",
    ),
    "llamascopium-type": ("llamascopium", {"sae_type": "clt"}, "sae_type: expected 'sae', got 'clt'"),
    "llamascopium-act": ("llamascopium", {"act_fn": "batchtopk"}, "act_fn: expected relu or jumprelu or topk"),
    "llamascopium-hook": ("llamascopium", {"hook_point_out": "blocks.9.x"}, "blocks.9.x: expected the norm"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_say_something_else_are_refused_by_their_key(case: str, tmp_path: Path) -> None:
    name, changes, expected = CONFIGS[case]
    peer = EVERY[name](tmp_path)
    path = next(file for file in sorted(peer.path.glob("*.json")))
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=expected):
        formats.read(peer.path)


@pytest.mark.parametrize("case", ["saelens-jumprelu", "sparsify", "gemma-scope-2", "llama-scope", "llamascopium"])
@pytest.mark.parametrize(
    "content", ["", "[]", "{", "[" * 100_000, '{"d_in": NaN}', "\ud800".encode("utf-8", "surrogatepass")]
)
def test_configs_that_are_no_objects_are_refused(case: str, content: str | bytes, tmp_path: Path) -> None:
    peer = EVERY[case](tmp_path)
    path = next(file for file in sorted(peer.path.glob("*.json")))
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"\.json: ") as caught:
        formats.read(peer.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["goodfire", "openai", "deepseek-r1", "qwen-scope"])
def test_no_pickle_is_run(name: str, tmp_path: Path) -> None:
    path, harm = tmp_path / "model-L0_4.pt", tmp_path / "harm"
    torch.save({"encoder_linear.weight": Harm(harm)}, path)
    assert "torch.load(weights_only=True) refuses" in problem_of(path, name)
    path.write_bytes(pickle.dumps({"W_enc": Harm(harm)}))
    assert "bare pickles" in problem_of(path, name)
    torch.save({"W_enc": Harm(harm)}, path, _use_new_zipfile_serialization=False)
    assert "bare pickles" in problem_of(path, name)
    assert formats.recognise(path) is None
    assert not harm.exists()


def test_no_array_of_objects_is_read(tmp_path: Path) -> None:
    path, harm = tmp_path / "params.npz", tmp_path / "harm"
    np.savez(path, W_enc=np.array([Harm(harm)], dtype=object))
    assert "a pickle is never read" in problem_of(path, "gemma-scope")
    assert not harm.exists()


def npy(shape: str, dtype: str = "<f4") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
@pytest.mark.parametrize(
    "member",
    [
        npy("(1099511627776, 1048576)"),
        npy("(4, 4)"),
        npy("(-1, 4)"),
        npy("(4,)", "|O"),
        npy("(4,)", "<U9"),
        b"",
        b"\x93NUMPY",
        b"x" * 99,
    ],
    ids=["huge", "short", "negative", "objects", "texts", "empty", "magic", "noise"],
)
def test_arrays_that_lie_about_their_size_take_no_memory(member: bytes, compression: int, tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("W_enc.npy", member)
    problem_of(path, "gemma-scope")


def test_an_array_that_unpacks_to_more_than_zip_can_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    header = npy("(268435456,)")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", header + b"\x00" * 64)
    content = path.read_bytes()
    told = struct.pack("<I", len(header) + 64)
    path.write_bytes(content.replace(told, struct.pack("<I", len(header) + 2**30)))  # in both headers of the zip
    assert "the file holds other or fewer" in problem_of(path, "gemma-scope")


def test_tensors_repeated_by_strides_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sae.pt"
    huge = torch.zeros(1).expand(2**30, 2**10)
    torch.save({"encoder_linear.weight": huge}, path)
    assert "repeated by strides" in problem_of(path, "goodfire")


def test_other_kinds_of_content_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sae.pt"
    for content in ([torch.ones(2)], torch.ones(2), {1: torch.ones(2)}, {"encoder.weight": {"a": 1}}, "text"):
        torch.save(content, path)
        problem_of(path, "deepseek-r1")


def test_what_is_no_sae_is_told_with_the_known_formats(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such path"):
        formats.read(tmp_path / "nothing")
    with pytest.raises(UsageError, match="expected the files of one SAE of a known format") as caught:
        formats.read(tmp_path)
    assert all(one.title in str(caught.value) for one in formats.FORMATS)
    with pytest.raises(FileNotFoundError, match=r"cfg\.json is missing"):
        SparseAutoencoder.load(tmp_path)
    with pytest.raises(UsageError, match=r"--from: expected one of saelens, .*, got 'sae-lens'"):
        formats.read(tmp_path, "sae-lens")
    qwen = EVERY["qwen-scope"](tmp_path).path
    with pytest.raises(ValueError, match="expected one file of weights, got several or none; give the file itself"):
        formats.read(qwen.parent, "qwen-scope")


def test_k_is_given_where_no_file_says_it(tmp_path: Path) -> None:
    peer = EVERY["qwen-scope"](tmp_path)
    path = peer.path.rename(tmp_path / "layer9.sae.pt")
    with pytest.raises(ValueError, match=r"k: expected in the path, .* or given with --k"):
        formats.read(path)
    assert formats.read(path, k=3).k == 3
    with pytest.raises(ValueError, match=f"k: expected an integer from 1 to d_sae = {D_SAE}, got 99"):
        formats.read(path, k=99)
