"""`fastsae convert`: what it prints, what it refuses, and a hub that a server on this machine stands for."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from peer_files import D_IN, circuit_tracer, dictionary_learning, gemma_scope, saelens, sparsify

from fastsae import FusedJumpReLUSAE, SparseAutoencoder, cli
from fastsae.commands.convert import FORMATS
from fastsae.errors import FastsaeError
from fastsae.peers import formats
from fastsae.summary import print_difference

ROOT = Path(__file__).parents[2]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        status = cli.main(["convert", *(str(argument) for argument in arguments)])
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_conversion_says_what_it_changed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    peer = dictionary_learning(tmp_path, "BatchTopKSAE")
    target = tmp_path / "out"
    status, out, err = run(capsys, peer.path, target, "--check")
    assert (status, err) == (0, "")
    assert out.splitlines()[:3] == [
        f"{target}: a jumprelu SAE, d_in 6, d_sae 20, read as dictionary-learning",
        "  transposed encoder.weight and decoder.weight",
        "  read BatchTopKSAE as the JumpReLU that it is at inference, with its threshold 0.4 for every feature",
    ]
    assert "  0  largest difference of a reconstruction" in out
    metadata = json.loads((target / "cfg.json").read_text())["metadata"]
    files = {file["file"]: file["sha256"] for file in metadata["provenance"]["files"]}
    assert files == {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("ae.pt", "config.json")
    }
    assert metadata["provenance"]["versions"]["torch"] == torch.__version__
    assert SparseAutoencoder.load(target)(torch.ones(2, D_IN)).shape == (2, D_IN)


def test_help_teaches_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    words = " ".join(out.split())
    assert all(name in words for name in FORMATS)
    assert [one.name for one in formats.FORMATS] == FORMATS
    assert "no pickle is read" in words


def test_mistakes_end_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "damaged").mkdir()
    source = gemma_scope(tmp_path).path
    (tmp_path / "damaged" / "params.npz").write_bytes(b"x" * 99)
    out = tmp_path / "out"
    mistakes: dict[str, tuple[list[object], int, str]] = {
        "no source": ([tmp_path / "nothing", out], 2, "there is no such path"),
        "no SAE": ([tmp_path / "full", out], 2, "expected the files of one SAE of a known format"),
        "full target": ([source, tmp_path / "full"], 2, "expected a new or an empty folder"),
        "target is a file": ([source, tmp_path / "full" / "file"], 2, "expected a new or an empty folder"),
        "no such format": ([source, out, "--to", "onnx"], 2, "--to: expected one of saelens"),
        "no such source format": ([source, out, "--from", "onnx"], 2, "--from: expected one of saelens"),
        "another format": ([source, out, "--from", "sparsify"], 2, "sae.safetensors, it is missing"),
        "cannot hold": ([source, out, "--to", "sparsify"], 1, "sparsify cannot hold a jumprelu SAE, only topk"),
        "damaged": ([tmp_path / "damaged", out], 1, "expected npz, got a corrupt or truncated file"),
        "k": ([source, out, "--k", "many"], 2, "expected a whole number"),
    }
    for name, (arguments, expected, text) in mistakes.items():
        status, printed, err = run(capsys, *arguments)
        assert (status, printed) == (expected, ""), name
        assert text in err, name
        assert "Traceback" not in err, name
        assert not out.exists(), name


def test_loader_names_of_saelens_are_taken(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(capsys, gemma_scope(tmp_path).path, tmp_path / "out", "--from", "gemma_2")[0] == 0
    assert isinstance(SparseAutoencoder.load(tmp_path / "out"), FusedJumpReLUSAE)


def test_a_check_that_fails_is_a_failure() -> None:
    with pytest.raises(FastsaeError, match="--check: the written SAE is not the one"):
        print_difference({"sae_out": 0.1, "size": 10.0, "tokens": 64, "other_features": 3})
    with pytest.raises(FastsaeError, match="--check"):
        print_difference({"sae_out": float("nan"), "size": 10.0, "tokens": 64, "other_features": 0})
    with pytest.raises(FastsaeError, match="--check"):
        print_difference({"sae_out": 0.0, "size": 10.0, "tokens": 64, "other_features": 40})
    print_difference({"sae_out": 1e-6, "size": 10.0, "tokens": 64, "other_features": 3})


def test_evaluate_takes_another_librarys_file(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    sae = FusedJumpReLUSAE(16, 32)
    sae.save(tmp_path / "own")
    targets = {"gs": "gemma-scope", "gs2": "gemma-scope-2", "dl": "dictionary-learning", "ls": "llamascopium"}
    for name, target in targets.items():
        formats.write(formats.read(tmp_path / "own"), tmp_path / name, target)
    arguments = ["--model", tiny_model, "--dataset", chats, "--layer", 1, "--eval-dialogues", 4, "--quiet"]
    results = []
    for path in (tmp_path / "own", tmp_path / "gs" / "params.npz", *(tmp_path / name for name in targets)):
        status = cli.main(["evaluate", str(path), "--json", str(tmp_path / "m.json"), *map(str, arguments)])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        results.append(json.loads((tmp_path / "m.json").read_text())["fvu"])
    assert results == pytest.approx([results[0]] * 6, rel=1e-4)  # thresholds go through logarithms in one of them
    circuit_tracer(tmp_path)
    assert cli.main(["evaluate", str(tmp_path / "layer_3.safetensors"), *map(str, arguments)]) == 1
    assert "architecture: expected" in capsys.readouterr().err


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that downloads use; repositories are folders of `root`."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        kind, _, rest = path.partition("/models/")
        repository = "/".join((rest if kind == "api" else path).split("/")[:2])
        folder = self.root / repository
        if not folder.is_dir():
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
        commit = hashlib.sha1(repository.encode()).hexdigest()
        names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
        if kind == "api" and "/tree/" in rest:
            tree = [
                {"type": "file", "path": name, "oid": commit, "size": (folder / name).stat().st_size} for name in names
            ]
            return self.send(200, json.dumps(tree).encode(), {}, with_body)
        if kind == "api":
            info = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
            return self.send(
                200, json.dumps({**info, "private": False, "tags": [], "downloads": 0}).encode(), {}, with_body
            )
        name = path.split("/", 4)[4]
        if with_body:
            self.asked.append(name)
        content = (folder / name).read_bytes()
        tag = hashlib.sha1(content).hexdigest()
        return self.send(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": commit}, with_body)

    def send(self, status: int, content: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """Address, folder and log of a hub on this machine."""
    root, asked = tmp_path / "hub", []
    handler = type("Handler", (Hub,), {"root": root, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", root, asked
    server.shutdown()
    server.server_close()


def run_with(endpoint: str, tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because huggingface_hub reads its environment when it is imported."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    environment = {**os.environ, **settings, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "fastsae", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def convert_from(endpoint: str, tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_with(endpoint, tmp_path, "convert", *arguments)


def test_evaluate_takes_a_hub_id(
    hub: tuple[str, Path, list[str]], tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    pytest.importorskip("huggingface_hub")
    endpoint, root, asked = hub
    FusedJumpReLUSAE(16, 32).save(root / "me" / "saes" / "layer-1")
    data = ["--model", tiny_model, "--dataset", chats, "--layer", 1, "--eval-dialogues", 4, "--quiet"]
    done = run_with(endpoint, tmp_path, "evaluate", "me/saes/layer-1", *data)
    assert done.returncode == 0, done.stderr
    assert "features fire on a token (L0)" in done.stdout
    assert sorted(asked) == ["layer-1/cfg.json", "layer-1/sae_weights.safetensors"]


def test_hub_ids_fetch_the_files_of_one_sae(hub: tuple[str, Path, list[str]], tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    endpoint, root, asked = hub
    for name in ("google", "me/single"):
        (root / name).mkdir(parents=True)
    gemma_scope(root / "google")
    sparsify(root / "me" / "many") if (root / "me" / "many").mkdir() is None else None
    saelens(root / "me" / "single")
    (root / "me" / "single" / "large.bin").write_bytes(b"x")
    within = "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    done = convert_from(endpoint, tmp_path, within, tmp_path / "a", "--check")
    assert done.returncode == 0, done.stderr
    assert "read as gemma-scope" in done.stdout
    assert asked == ["layer_20/width_16k/average_l0_71/params.npz"]
    done = convert_from(endpoint, tmp_path, f"{within}/params.npz@main", tmp_path / "b", "--to", "dictionary-learning")
    assert done.returncode == 0, done.stderr
    asked.clear()
    done = convert_from(endpoint, tmp_path, "me/single", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    assert sorted(asked) == ["cfg.json", "sae_weights.safetensors"]
    for name, status, text in (
        ("me/nothing", 2, "me/nothing: the hub has no such repository, or you may not read it"),
        ("me/many/layers.4", 2, "expected a folder or a file 'layers.4' in the repository me/many, it has none"),
    ):
        done = convert_from(endpoint, tmp_path, name, tmp_path / "d")
        assert done.returncode == status, done.stderr
        assert text in done.stderr
        assert "Traceback" not in done.stderr
    done = convert_from("http://127.0.0.1:9", tmp_path / "elsewhere", "me/single", tmp_path / "d")
    assert done.returncode == 1
    assert "me/single is no local path, and could not be fetched from the hub" in done.stderr.splitlines()[-1]
